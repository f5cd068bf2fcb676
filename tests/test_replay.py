"""A trial trained again from its record: that it is really trained, and how it compares."""

import json
import math
import shutil

import pytest

from rayltr import catalogue, command, recipe, records
from rayltr.command import FAILED, USAGE
from rayltr.spec import dump
from tests.conftest import tiny

FIRST = tiny(epochs=1, horizon=2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})


def did(*words):
    return command.run(recipe.main, [*map(str, words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one thread, of a chain of two stages."""
    place = tmp_path_factory.mktemp("trained")
    (place / "config.json").write_text(json.dumps(dump(FIRST.but(epochs=1, resume=FIRST))))
    assert did(place / "config.json", "--storage", place, "--name", "run", "--threads", 1) == 0
    return place / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A search with this trial under number 7."""
    run = shutil.copytree(trained, tmp_path / "run")
    info = records.read_run(run)
    arguments = {"trials": 8, "cpus_per_trial": 1, "workers": 1}
    records.write_run(run, {**info, "arguments": arguments, "settled": {"objectives": ["balanced_nll"]}})
    (row,) = records.read_trials(run).to_pylist()
    records.write_trials(run, [{**row, "trial": "0007", "number": 7, "m.val.cost_s": 123.0}])
    return run


@pytest.fixture
def replay(run, tmp_path, capsys):
    """Trains the trial again; returns the last line that is printed."""

    def check(*words, trial="0007", name="again"):
        capsys.readouterr()
        assert did(run, "--trial", trial, "--storage", tmp_path, "--name", name, *words) == 0
        return capsys.readouterr().out.splitlines()[-1]

    return check


def row_of(run):
    return records.read_trials(run).to_pylist()[0]


def changed(run, **changes):
    """Another record of the trial."""
    records.append_trial(run, {**row_of(run), **changes})


def test_a_replay_trains_in_a_run_of_its_own_and_is_the_same(run, tmp_path, replay):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = replay()
    names = [name for name in row_of(run) if name.startswith("m.val.") and name != "m.val.cost_s"]
    assert said == (f"replayed: all {len(names)} validation metrics are identical to the record of trial 0007 in {run}")
    again = row_of(tmp_path / "again")
    assert again["epochs_trained"] == again["epochs_asked"] == 2
    assert again["address"] == row_of(run)["address"] and again["m.val.nll"] == row_of(run)["m.val.nll"]
    assert records.read_run(tmp_path / "again")["arguments"]["threads"] == 1, "as many as the search gave its trials"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_same_replay_again_trains_nothing_and_says_so(run, tmp_path, replay):
    replay()
    said = replay(trial="7")
    assert said.startswith(f"nothing to train, {tmp_path / 'again'} holds the replay: all ")
    assert said.endswith(f"identical to the record of trial 0007 in {run}")


def test_differences_are_named_with_what_may_explain_them(run, replay):
    row = row_of(run)
    changed(run, **{"m.val.nll": row["m.val.nll"] + 0.25, "m.val.balanced": row["m.val.balanced"] - 0.5,
                    "m.val.ece": math.nextafter(row["m.val.ece"], 1), "m.val.tau": row["m.val.tau"] + 1})  # fmt: skip
    info = records.read_run(run)
    versions = {**info["versions"], "torch": "1.0", "optuna": "0.1"}
    arguments = {"cpus_per_trial": 16, "workers": 4}
    records.write_run(run, {**info, "versions": versions, "arguments": arguments})
    said = replay("--threads", 1)
    assert said.startswith("replayed: 4 of ")
    assert f" validation metrics differ from the record of trial 0007 in {run} " in said
    assert "(tau by 1, balanced by 0.5, nll by 0.25)" in said
    torch = info["versions"]["torch"]
    cause = f"torch {torch} (there 1.0), threads 1 (there 16), workers 1 (there 4), another processor or GPU"
    assert said.endswith(f"what may explain it: {cause}")


def test_without_another_cause_it_is_the_machine(run, replay):
    changed(run, **{"m.val.nll": 0.0})
    assert replay().endswith("; what may explain it: another processor or GPU")


@pytest.mark.parametrize("words", [("--seed", 1), ("--epochs", 4)])
def test_another_recipe_is_not_compared(run, replay, words):
    assert "not compared with the record of trial 0007" in replay(*words)


def test_a_trial_that_did_not_complete_has_nothing_to_compare_with(run, replay):
    changed(run, state="failed", address=None, error="the process died")
    assert replay() == f"replayed: nothing to compare with, because trial 0007 of {run} is failed"


def test_a_trial_of_a_higher_rung_has_a_record_of_its_own(run, replay):
    records.append_trial(run, {**row_of(run), "trial": "0007.1", "m.val.nll": 0.0})
    assert "identical to the record of trial 0007 " in replay(trial="7")
    assert "validation metrics differ from the record of trial 0007.1 " in replay(trial="7.1")


def test_a_replay_that_diverges_says_so(run, tmp_path, capsys):
    stage = FIRST.but(optimiser=FIRST.optimiser.but(lr=1e30))
    changed(run, recipe=json.dumps(dump(stage)))
    assert did(run, "--trial", 7, "--storage", tmp_path, "--name", "again") == FAILED
    assert "the recipe cannot be trained" in capsys.readouterr().err


def test_a_run_is_not_replayed_into_itself(trained, tmp_path, capsys):
    """There the weights would be found, and nothing would be trained."""
    copy = shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path)
    for storage in (tmp_path, tmp_path / "link"):
        assert did(copy, "--trial", "0000", "--storage", storage, "--name", "run") == USAGE
        assert "holds the trial already; --name or --storage gives" in capsys.readouterr().err


def test_a_run_that_is_named_by_a_dot_gives_its_name(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run)
    assert did(".", "--trial", 7, "--storage", tmp_path / "other") == 0
    (made,) = (tmp_path / "other").iterdir()
    assert made.name.startswith("run-0007-")


def test_metrics_are_compared_to_the_last_bit(run, replay):
    changed(run, **{"m.val.nll": math.nextafter(row_of(run)["m.val.nll"], 9)})
    assert "replayed: 1 of " in replay()


def test_only_what_both_have_measured_is_compared(run, replay):
    """Another version may know other metrics."""
    count = int(replay().split("all ")[1].split()[0])
    (row,) = records.read_trials(run).to_pylist()
    del row["m.val.ece"]
    records.write_trials(run, [{**row, "m.val.older": 0.5}])
    assert f"all {count - 1} validation metrics are identical" in replay()


def test_what_is_no_number_differs_from_one(run, replay):
    changed(run, **{"m.val.few": math.nan})
    assert "(few by nan)" in replay()
