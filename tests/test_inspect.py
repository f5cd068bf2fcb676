"""`rayltr.inspect`: what it says of a trained student is what the measures say."""

import json
import math
import re

import numpy as np
import pytest
import torch

from rayltr import inspect, recipe, records
from rayltr.command import USAGE
from rayltr.data import load
from rayltr.metrics import groups
from rayltr.spec import dump, fn
from tests.conftest import tiny
from tests.export.helpers import did

STUDENT = fn("deit", size=8, patch=2, width=8, depth=3, heads=2)
LDAM = {"loss": fn("ldam"), "head": fn("cosine")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs: a student that was mixed before its last stage, and a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = tiny(epochs=2, optimiser=fn("sgd", lr=0.02), **LDAM)
    first = tiny(method=fn("tokens"), backbone=STUDENT, teacher=teacher, mixing=fn("mixup"), epochs=1, horizon=2)
    for name, stage in {"student": first.but(resume=first, mixing=None), "teacher": teacher}.items():
        (folder / f"{name}.json").write_text(json.dumps({"recipe": dump(stage)}))
        assert did(recipe, folder / f"{name}.json", "--storage", folder, "--name", name) == 0
    return folder


def test_the_measures_of_a_student(runs, capsys):
    assert did(inspect, runs / "student", "--images", "60") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines[1:4]]
    assert [row[0] for row in rows] == ["as they are", "augmented", "augmented and mixed"]
    entropies = [float(row[2]) for row in rows]
    assert all(0 <= float(row[1]) <= 100 for row in rows) and all(0 < value < 1.3 for value in entropies), (
        "log 4 = 1.39 is that of cosines, which say nothing unless they are multiplied"
    )
    assert all(0 <= float(row[3]) <= 2 for row in rows)
    for number, line in enumerate(lines[4:6], 1):
        assert line.startswith(f"attention distance of the heads of block {number} (pixels): ")
        heads = [float(value) for value in line.rsplit(": ", 1)[1].split()]
        assert len(heads) == 2 and heads == sorted(heads) and 0 < heads[0] < 2 * 4 * 2**0.5
    ranks = [int(value) for value in lines[6].rsplit(": ", 1)[1].split()]
    assert len(ranks) == 3 and all(1 <= rank <= 8 for rank in ranks)


def test_the_measures_are_kept_in_the_run(runs, capsys):
    assert did(inspect, runs / "student", "--images", "60") == 0
    lines = capsys.readouterr().out.splitlines()
    found = records.read_note(runs / "student", "inspected", "0000")
    (row,) = records.read_trials(runs / "student").to_pylist()
    assert found["address"] == row["address"] and found["images"] == 60
    assert inspect.told(found) == lines[:-1]
    assert lines[-1].endswith(f"python -m analysis {runs / 'student'}")
    uniform = found["attention"]["uniform"]  # of 4 x 4 patches of two pixels
    pairs = [(a, b) for a in range(16) for b in range(16)]
    assert uniform == pytest.approx(sum(2 * math.dist(divmod(a, 4), divmod(b, 4)) for a, b in pairs) / 256, rel=1e-5)


def test_a_rank_needs_images_of_few_classes_and_says_what_bounds_it():
    data = load(tiny().source)
    few = groups(data.counts)[0]["few"]
    training = np.flatnonzero(np.isin(data.train.target, few))
    for images in (3, len(training) + 2):
        seen, unseen = inspect.rare(data, images)
        assert len(seen) + len(unseen) == images and set(seen) <= set(training)
        assert np.isin(data.val.target[unseen], few).all() and len(unseen) == max(0, images - len(training))
    found = {"views": {}, "attention": {"blocks": []}}
    rank = {"blocks": [4, 5], "images": 8, "unseen": 2, "width": 8}
    assert "8 images of few classes (2 of validation), so at most 7: 4 5" in inspect.told({**found, "rank": rank})[-1]
    rank = {"blocks": [4, 5], "images": 9, "unseen": 0, "width": 8}
    assert "9 images of few classes: 4 5" in inspect.told({**found, "rank": rank})[-1]


def test_it_says_the_same_again(runs, capsys):
    said = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert did(inspect, runs / "student", "--images", "30") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_what_cannot_be_inspected_is_said_in_one_line(runs, capsys):
    assert did(inspect, runs / "teacher") == USAGE
    error = capsys.readouterr().err
    assert "trial 0000 is of the method supervised; only students with two tokens" in error and error.count("\n") == 1
    for path in (runs / "student" / "store").rglob("*.safetensors"):
        path.unlink()
    assert did(inspect, runs / "student") == USAGE
    assert "does not hold the weights of the trial and of its teacher any more" in capsys.readouterr().err
