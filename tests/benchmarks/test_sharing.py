"""What sharing saves: the same recipes alone, compared bit for bit, and the table of both."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sharing
from rayltr import records, trial
from rayltr.interface import Resources
from rayltr.spec import Stage, dump, fn
from rayltr.store import Store

ONE = Resources(device="cpu", threads=1)
FIRST = Stage(
    source=fn("synthetic", classes=3, per_class=8, size=8, ratio=4.0),
    epochs=2,
    horizon=3,
    backbone=fn("resnet20"),
    batch=8,
)
LATE = FIRST.but(epochs=1, resume=FIRST)
RECIPES = {
    "whole": FIRST.but(epochs=3),
    "late weight": LATE.but(weight=fn("inverse_frequency")),
    "late loss": LATE.but(loss=fn("balanced_softmax")),
    "again": LATE.but(loss=fn("balanced_softmax")),
}


def searched(folder: Path) -> list[dict]:
    """The rows of a search over the recipes, the shortest prefix first, as records hold them."""
    for name in ("late weight", "late loss", "again", "whole"):
        found = trial.run(RECIPES[name], Store(folder / "store"), resources=ONE)
        row = {
            "trial": name,
            "state": "complete",
            "address": found.address,
            "epochs_trained": found.trained,
            "recipe": json.dumps(dump(RECIPES[name])),
            "predictions_val": trial.inside(found.predictions),
            "p.arm": "control" if name == "whole" else "study",
            "p.when": None if name == "whole" else "reweighted",
            **{f"m.val.{metric}": value for metric, value in found.metrics.items()},
        }
        records.append_trial(folder, row)
    return records.read_trials(folder).to_pylist()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = searched(folder)
    return folder, rows, [sharing.alone(row, folder / "alone" / row["trial"]) for row in rows]


def test_what_is_shared_is_found_alone_too(both, capsys):
    folder, rows, found = both
    assert [row["epochs_trained"] for row in rows] == [3, 1, 0, 1] and [own.epochs for own in found] == [3, 3, 3, 3]
    assert sharing.judged(rows, folder, found) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[1:4]] == [
        ["control", "1", "3", "1", "0.33"], ["reweighted", "3", "9", "4", "0.44"], ["all", "4", "12", "5", "0.42"]
    ]  # fmt: skip
    assert said[4] == "1 of 4 trials repeat another one; without them the ratio is 0.56"
    assert said[5] == "0 of 4 records differ; 0.42 of all epochs are trained, 0.60 are allowed"


def test_a_record_that_differs_is_named(both, capsys):
    folder, rows, found = both
    other = {**rows[0], "m.val.balanced_nll": rows[0]["m.val.balanced_nll"] * (1 + 1e-15)}
    assert sharing.judged([other, *rows[1:]], folder, found) == 1
    said = capsys.readouterr().out
    assert "trial late weight found otherwise with sharing: balanced_nll\n" in said
    assert "1 of 4 records differ" in said
    elsewhere = {**rows[0], "predictions_val": rows[1]["predictions_val"]}
    assert sharing.differences(elsewhere, folder, found[0]) == ["logits"]
    assert sharing.differences(rows[0], folder, replace(found[0], address="x")) == ["address"]
    assert sharing.differences({**rows[0], "m.val.cost_s": 1e9}, folder, found[0]) == [], "seconds never agree"


def test_a_metric_that_only_one_of_them_has_differs(both):
    folder, rows, found = both
    more = replace(found[0], metrics={**found[0].metrics, "new": 0.5})
    assert sharing.differences(rows[0], folder, more) == ["new"]
    unmeasured = replace(found[0], metrics={**found[0].metrics, "new": float("nan")})
    assert sharing.differences(rows[0], folder, unmeasured) == []


def test_too_little_sharing_is_a_failure(both, capsys):
    folder, rows, found = both
    much = [{**row, "epochs_trained": 2} for row in rows]
    assert sharing.judged(much, folder, found) == 1
    assert "0.67 of all epochs" in capsys.readouterr().out
    assert sharing.judged([], folder, []) == 1, "nothing was compared"


def test_the_search_is_asked_for_what_the_options_say(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        sharing.subprocess, "run", lambda words: asked.extend(words) or argparse.Namespace(returncode=0)
    )
    options = sharing.parser().parse_args(["--trials", "60", "--epochs", "20"])
    assert sharing.searched(options, tmp_path) == tmp_path / "run"
    assert asked[1:4] == ["-m", "rayltr.search", "bag_of_tricks"]
    assert {"--trials=60", "--epochs=20", "--data=digits", "--ratio=20.0", f"--storage={tmp_path}"} <= {*asked}


@pytest.mark.slow
def test_a_search_and_its_recipes_alone(capfd):
    words = ["--data=synthetic", "--ratio=4", "--trials=4", "--epochs=3"]
    sharing.main(words)
    assert "0 of 4 records differ" in capfd.readouterr().out
