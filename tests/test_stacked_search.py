"""Trials of a search that are trained as one: what the ledger makes of them, and the search as a user runs it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from rayltr import records
from rayltr.agenda import Agenda, Job
from rayltr.interface import Resources
from rayltr.ledger import death
from rayltr.spec import Stage, fn, parse
from rayltr.store import Store
from rayltr.trial import run
from tests.test_agenda import agenda, recipe, single
from tests.test_ledger import FULL_DISK, GOOD, ledger, rows  # noqa: F401

ONE = Resources(device="cpu", threads=1)
SPACE = """
from rayltr.spec import Stage, fn

def space(trial):
    lr, loss = trial.suggest_float("lr", 0.02, 0.1), trial.suggest_categorical("loss", ["focal", "balanced_softmax"])
    mixing = fn("mixup") if trial.suggest_categorical("mixed", [False, True]) else None
    return stage(lr).but(loss=fn(loss), mixing=mixing)

def control(trial):
    return stage(trial.suggest_float("lr", 0.02, 0.1))

def stage(lr):
    return Stage(source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0), epochs=4, batch=16,
                 backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=lr))
"""


@pytest.fixture
def wide(ledger):  # noqa: F811
    """A ledger whose processes run up to two trials; there are three of one shape."""
    ledger.settings = replace(ledger.settings, stack=2)
    return ledger


def bundled(ledger, trial_id):  # noqa: F811
    jobs = [ledger.begin(trial_id), *ledger.beside(trial_id)]
    for job in jobs:
        ledger.heard(trial_id, {"final": 0, "trial": job.trial, "node": "n"})
    return jobs


def test_a_trial_of_a_bundle_is_recorded_when_it_ends_and_its_process_goes_on(wide):
    one, two = bundled(wide, "a")
    wide.heard("a", {**GOOD, "trial": two.trial})
    assert set(rows(wide)) == {two.trial} and not wide.left()
    assert bundled(wide, "b")[0].number == 2 and wide.begin("c") is None
    wide.heard("a", {**GOOD, "trial": one.trial})
    assert set(rows(wide)) == {two.trial}, "the process has one trial, and that ends with it"
    wide.end("a")
    wide.end("b", death(""))
    assert set(rows(wide)) == {one.trial, two.trial} and not wide.jobs


def test_what_is_left_of_a_bundle_that_dies_is_repeated_each_alone(wide):
    bundled(wide, "a")
    wide.end("a", death(""))
    for name in ("b", "c"):
        (job,) = bundled(wide, name)
        assert job.again and wide.begin("other") is None
        wide.heard(name, {**GOOD, "trial": job.trial})
        wide.end(name)
    assert set(rows(wide)) == {"0000", "0001"} and all(row["again"] for row in rows(wide).values())


def test_memory_that_was_too_small_for_a_bundle_may_do_for_each(wide):
    one, two = bundled(wide, "a")
    for job in (one, two):
        wide.heard("a", {**FULL_DISK, "state": "memory", "error": "out of memory", "trial": job.trial})
    wide.end("a")
    assert not rows(wide)
    again = bundled(wide, "b")
    assert len(again) == 1 and again[0].again


def test_a_bundle_that_is_told_to_stop_leaves_all_its_trials_open(wide):
    jobs = bundled(wide, "a")
    wide.leave()
    assert not wide.left() and not wide.beside("a")[2:]
    for job in jobs:
        wide.heard("a", {**FULL_DISK, "error": "InterruptedError: told to stop", "trial": job.trial})
    wide.end("a")
    assert wide.open and wide.over() and not rows(wide)


def test_a_disk_that_takes_no_record_of_a_bundled_trial_ends_the_search(wide, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.kill", lambda *given: wide.leave())
    monkeypatch.setattr(records, "append_trial", full)
    one, two = bundled(wide, "a")
    wide.heard("a", {**GOOD, "trial": one.trial})
    assert wide.error.errno == 28
    wide.heard("a", {**GOOD, "trial": two.trial})
    wide.end("a")
    assert wide.over()


def test_beside_a_job_run_those_of_its_shape_which_want_no_stage_of_it():
    long, narrow = single(3, epochs=9), single(4).but(backbone=fn("resnet20"))
    made = agenda([single(0), long, narrow, single(5), recipe(6), recipe(7)])
    first = made.next()
    assert made.next(first).number == 3, "neither the longer one nor the other network"
    assert made.next(first) is None
    assert [made.next().number for _ in range(3)] == [1, 2, 4]
    assert made.next() is None, "the last wants the first stage of the one before"


def test_a_point_that_is_no_chain_has_no_company():
    left = [Job(number, 0, {}, broken="no") for number in range(2)]
    made = Agenda(lambda: left.pop(0) if left else None)
    first = made.next()
    assert made.next(first) is None and made.next().number == 1


def test_shapes_look_at_what_is_trained():
    plain = Job(0, 0, {}, stage=Stage(source=fn("digits"), epochs=10))
    first = Stage(source=fn("digits"), epochs=6, mixing=fn("mixup"))
    deferred = Job(1, 0, {}, stage=Stage(source=fn("digits"), epochs=4, resume=first, loss=fn("ldam")))
    assert plain.shape == deferred.shape
    for change in ({"batch": 64}, {"precision": "bf16"}, {"epochs": 11}, {"method": fn("bcl")}):
        assert Job(2, 0, {}, stage=plain.stage.but(**change)).shape != plain.shape


def search(*words):
    command = [sys.executable, "-m", "rayltr.search", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "my_space.py"
    path.write_text(SPACE)
    return path


@pytest.mark.slow
def test_a_search_of_trials_as_one_finds_what_each_finds_alone(study, tmp_path):
    """And goes on, with another number of trials as one."""
    words = [study, "--epochs", 4, "--sampler", "random", "--precision", "fp32", "--storage", tmp_path, "--name", "run"]
    words += ["--no-dashboard", "--concurrent", 1]
    found = search(*words, "--trials", 2, "--stack", 2)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 trials to run, 2 at once" in found.stdout
    assert found.stdout.index("0001 begins") < found.stdout.index("0000 stage 1, epoch 1/4"), "at the same time"
    more = search(*words, "--trials", 4, "--stack", 3, "--resume")
    assert more.returncode == 0, more.stdout + more.stderr
    trials = records.read_trials(tmp_path / "run").to_pylist()
    assert sorted(row["trial"] for row in trials) == ["0000", "0001", "0002", "0003"]
    for row in trials:
        alone = run(parse(json.loads(row["recipe"])), Store(f"{tmp_path}/{row['trial']}"), resources=ONE)
        assert (row["state"], row["address"], row["epochs_trained"]) == ("complete", alone.address, 4)
        for name in ("nll", "fitted_nll", "balanced_nll"):
            assert row[f"m.val.{name}"] == pytest.approx(alone.metrics[name], rel=0.02), (row["trial"], name)
    found = records.read_epochs(tmp_path / "run").to_pylist()
    assert sorted({(row["trial"], row["epoch"]) for row in found}) == [
        (f"{n:04d}", e) for n in range(4) for e in (1, 2, 3, 4)
    ]


def test_trials_as_one_have_no_workers(study, tmp_path):
    found = search(study, "--stack", 2, "--workers", 2, "--storage", tmp_path)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert "--stack trains several trials in one process, --workers one trial in several; choose one" in found.stderr
    assert not list(tmp_path.iterdir())
