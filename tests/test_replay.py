"""A trial trained again from its record says how the two compare."""

import contextlib
import io

import pytest

from rayltr import catalogue, command, recipe, records
from rayltr.recipe import differences

SPACE = """
from rayltr.spec import Stage, fn

PAPER = {"lr": 0.05}

def space(trial):
    return Stage(source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0), epochs=2, batch=16,
                 backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=trial.suggest_float("lr", 0.01, 0.1)))
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs `rayltr train WORDS` in this process; the text it printed."""
    monkeypatch.setattr(catalogue, "USER", {})
    (tmp_path / "my_space.py").write_text(SPACE)

    def run(*words, code=0):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert command.run(recipe.main, [*map(str, words), "--storage", str(tmp_path), "--threads", "1"]) == code
        return out.getvalue()

    return run


def test_a_replay_trains_anew_and_finds_the_same_numbers(train, tmp_path):
    train(tmp_path / "my_space.py", "--name", "run")
    said = train(tmp_path / "run", "--trial", "0", "--name", "again")
    count = sum(name.startswith("m.val.") for name in records.read_trials(tmp_path / "run").column_names) - 1
    assert f"replayed: all {count} validation metrics are identical to the record of trial 0000" in said
    row = records.read_trials(tmp_path / "again").to_pylist()[0]
    assert row["epochs_trained"] == 2, "it trained, and did not read what the run has stored"
    assert "nothing to train" in train(tmp_path / "run", "--trial", "0000", "--name", "again")


def test_what_differs_is_named(train, tmp_path):
    train(tmp_path / "my_space.py", "--name", "run")
    row = records.read_trials(tmp_path / "run").to_pylist()[0]
    records.append_trial(tmp_path / "run", {**row, "m.val.nll": row["m.val.nll"] + 0.25})
    info = records.read_run(tmp_path / "run")
    records.write_run(tmp_path / "run", {**info, "versions": {**info["versions"], "torch": "1.0"}})
    said = train(tmp_path / "run", "--trial", "0", "--name", "again")
    assert "1 validation metrics differ" in said and "nll by 0.25" in said and "(there 1.0)" in said


def test_a_run_is_not_replayed_into_itself(train, tmp_path, capsys):
    train(tmp_path / "my_space.py", "--name", "run")
    train(tmp_path / "run", "--trial", "0", "--name", "run", code=2)
    assert "holds the trial already; --name or --storage" in capsys.readouterr().err


def test_differences_are_of_bits():
    assert differences({"a": 1.0, "b": float("nan"), "c": 2.0}, {"a": 1.0, "b": float("nan"), "c": 2.5}) == {"c": 0.5}
    assert differences({"a": 1.0}, {}) == {"a": float("inf")}
