"""What the documentation shows works."""

import re
from pathlib import Path

import pytest

from rayltr import catalogue, studies
from rayltr.search import checked
from rayltr.studies import Plan

ROOT = Path(__file__).parents[1]


def test_the_study_in_the_readme_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})
    (block,) = re.findall(r"```python\n(# my_space.py\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    path = tmp_path / "my_space.py"
    path.write_text(block)
    checked(studies.find(str(path)), Plan(str(path), epochs=20))


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/data.md",
        "docs/runs.md",
        "docs/bag_of_tricks.md",
        "docs/contrastive.md",
        "docs/deit_lt.md",
        "docs/decoupled.md",
        "docs/experts.md",
        "docs/cluster.md",
        "docs/million_way.md",
        "docs/results.md",
        "docs/performance.md",
    ],
)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / name).parent.joinpath(target).exists(), target
