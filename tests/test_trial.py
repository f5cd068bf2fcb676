import socket
from types import SimpleNamespace

import numpy as np
import pytest

from rayltr import trial as module
from rayltr.actor import verdict
from rayltr.data import load
from rayltr.interface import Resources
from rayltr.records import read_predictions
from rayltr.spec import digest, fn
from rayltr.store import Store
from rayltr.trial import Trial, run
from tests.conftest import tiny

ONE = Resources(device="cpu", threads=1)
FIRST = tiny(epochs=3, horizon=5)
CHAIN = FIRST.but(epochs=2, resume=FIRST, weight=fn("inverse_frequency"))


def measured(result):
    """The metrics that do not measure time."""
    return {name: value for name, value in result.metrics.items() if name != "cost_s"}


def test_a_chain_is_trained_once_and_then_taken_from_the_store(tmp_path):
    told = []
    once = run(CHAIN, Store(tmp_path), resources=ONE, report=told.append)
    assert (once.asked, once.trained) == (5, 5)
    assert [(record["stage"], record["epoch"]) for record in told] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]
    again = run(CHAIN, Store(tmp_path), resources=ONE, report=told.append)
    assert (again.asked, again.trained) == (5, 0) and len(told) == 5
    assert again.metrics == once.metrics and again.address == once.address
    assert [(row["stage"], row["epoch"]) for row in again.epochs] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]


def test_a_shared_stage_is_trained_once(tmp_path):
    run(CHAIN, Store(tmp_path), resources=ONE)
    other = run(CHAIN.but(weight=None, sampler=fn("power", q=0.0)), Store(tmp_path), resources=ONE)
    assert (other.asked, other.trained) == (5, 2)


def test_a_longer_stage_goes_on_from_the_stored_prefix(tmp_path):
    run(FIRST, Store(tmp_path), resources=ONE)
    longer = run(FIRST.but(epochs=5), Store(tmp_path), resources=ONE)
    fresh = run(FIRST.but(epochs=5), Store(tmp_path / "fresh"), resources=ONE)
    assert (longer.trained, fresh.trained) == (2, 5)
    assert measured(longer) == measured(fresh)


def test_a_crash_costs_at_most_a_snapshot_interval(tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash(record):
        if record["epoch"] == 4:
            raise Crash

    often = Resources(device="cpu", threads=1, snapshot_s=0)
    stage = FIRST.but(epochs=5)
    with pytest.raises(Crash):
        run(stage, Store(tmp_path), resources=often, report=crash)
    found = run(stage, Store(tmp_path), resources=often)
    assert found.trained == 1, "an epoch is told of after its snapshot is taken"
    assert measured(found) == measured(run(stage, Store(tmp_path / "fresh"), resources=ONE))
    assert found.resumed == 4
    assert len(found.epochs) == 5


def test_told_to_stop_a_trial_stores_the_epoch_it_is_in(tmp_path):
    """However rare its snapshots are; and an epoch is counted for the trial that trained it, once."""
    rare = Resources(device="cpu", threads=1, snapshot_s=900)
    told = []
    leave = lambda: len(told) >= 4  # noqa: E731 - in the epoch after the fourth, the second of the second stage
    shared = FIRST.but(horizon=7)
    stage = shared.but(epochs=4, resume=shared, weight=fn("inverse_frequency"))
    first = Trial(stage, Store(tmp_path), resources=rare, report=told.append, name="0001", leave=leave)
    with pytest.raises(InterruptedError, match="told to stop; stored after epoch 5"):
        first.run()
    assert [record["epoch"] for record in told] == [1, 2, 3, 4, 5]
    again = Trial(stage, Store(tmp_path), resources=rare, name="0001").run()
    assert (again.trained, again.resumed, again.asked) == (2, 5, 7)
    third = stage.but(weight=None)
    other = Trial(third, Store(tmp_path), resources=rare, name="0002").run()
    assert (other.trained, other.resumed, other.asked) == (4, 0, 7), "the first stage is shared, not resumed"
    assert measured(again) == measured(run(stage, Store(tmp_path / "fresh"), resources=ONE))


def test_told_to_stop_a_trial_begins_no_stage(tmp_path):
    with pytest.raises(InterruptedError):
        Trial(CHAIN, Store(tmp_path), resources=ONE, leave=lambda: True).run()
    assert not list(tmp_path.glob("*/*.json"))


def test_lost_predictions_are_made_from_the_stored_weights(tmp_path):
    once = run(FIRST, Store(tmp_path), resources=ONE)
    with open(once.predictions, "r+b") as file:
        file.truncate(100)
    again = run(FIRST, Store(tmp_path), resources=ONE)
    assert again.trained == 0 and again.metrics == once.metrics


def test_the_test_split_is_opened_only_when_asked(tmp_path, monkeypatch):
    opened = []
    data = load(FIRST.source)
    monkeypatch.setattr(module.Data, "unseal", lambda self: opened.append(1) or self._test)
    trial = Trial(FIRST, Store(tmp_path), resources=ONE)
    trial.run()
    assert not opened
    path, scores = trial.test()
    assert len(opened) == 1
    np.testing.assert_array_equal(read_predictions(path).target, data._test.target)
    assert 0 <= scores["fitted_balanced"] <= 1


def test_a_source_is_known_by_its_content(tmp_path):
    """The same images under another name give the same addresses."""
    one, other = (Trial(tiny(source=fn("synthetic", classes=4, per_class=40, size=8, **more)), Store(tmp_path))
                  for more in ({}, {"test_per_class": 20}))  # fmt: skip
    assert digest(one.names[one.stage]) == digest(other.names[other.stage])
    another = Trial(tiny(source=fn("synthetic", classes=4, per_class=40, size=8, seed=1)), Store(tmp_path))
    assert digest(one.names[one.stage]) != digest(another.names[another.stage])


def test_a_teacher_is_trained_first_and_stays_as_it_is(tmp_path):
    taught = tiny(method=fn("dive"), teacher=FIRST, seed=1)
    found = run(taught, Store(tmp_path), resources=ONE)
    assert (found.asked, found.trained) == (5, 5)


def test_a_machine_that_does_not_see_the_run_trains_nothing_into_a_folder_of_its_own(tmp_path, monkeypatch):
    """And it is the machine's fault, not the recipe's: `rayltr.actor.verdict` goes by the OSError."""
    monkeypatch.setattr(module, "end_with_parent", lambda: None)
    settings = SimpleNamespace(run=str(tmp_path / "runs" / "first"))
    for work, more in ((module.for_search, ("0000", {}, print)), (module.for_test, ("",))):
        with pytest.raises(OSError, match=f"--storage {tmp_path}/runs is not visible on {socket.gethostname()}: ") as e:
            work(settings, *more)
        assert verdict(e.value, settings.run) == "interrupted"
    assert not list(tmp_path.iterdir())
