"""What becomes of a trial that begins, reports, ends or dies, without Ray."""

from types import SimpleNamespace

import pytest

from rayltr import catalogue, records, sampling
from rayltr.claims import go_on, told_to_stop
from rayltr.ledger import LOSSES, Ledger, Settings, death
from rayltr.proposals import Proposals
from rayltr.studies import Plan, rungs

SPACE = """
from rayltr.spec import Stage, fn

def space(trial):
    return Stage(source=fn("synthetic", classes=4), epochs=27, loss=fn("focal", gamma=trial.suggest_float("g", 1, 2)))

def control(trial):
    return Stage(source=fn("synthetic", classes=4), epochs=27)
"""
GOOD = {"final": 1, "state": "complete", "metrics": {"fitted_nll": 0.5}, "trained": 27, "resumed": 0, "started": 0.0,
        "epochs": [], "node": "n"}  # fmt: skip
FULL_DISK = {"final": 1, "state": "interrupted", "error": "OSError: no space", "started": 0.0, "node": "n"}
DEAD = death("The actor died unexpectedly before finishing this task.\n\tpid: 1\nWorker exit type: SYSTEM_ERROR")
FAILED = {**FULL_DISK, "state": "failed", "error": "ValueError: no", "traceback": "Traceback ..."}


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})
    (tmp_path / "my_space.py").write_text(SPACE)
    plan = Plan(str(tmp_path / "my_space.py"), epochs=27, seed=0)
    settings = Settings(str(tmp_path), plan, 3, ("balanced_nll",), "quasi")
    proposals = Proposals(str(tmp_path), rungs(plan, "none"), ("balanced_nll",), 3, sampling.sampler("quasi", 0, 3))
    said = []
    quiet = SimpleNamespace(say=said.append, moved=said.append, ended=said.append, epoch=said.append)
    made = Ledger(settings, proposals, proposals.agenda("none", 0), quiet, quiet)  # type: ignore[arg-type]
    made.said = said  # type: ignore[attr-defined]
    return made


def rows(ledger):
    return {row["trial"]: row for row in records.read_trials(ledger.settings.run).to_pylist()}


def over(ledger, trial_id, result):
    ledger.heard(trial_id, result)
    ledger.end(trial_id)


def test_a_trial_that_ends_is_recorded_and_told(ledger):
    job = ledger.begin("a")
    over(ledger, "a", {**GOOD, "trial": job.trial})
    row = rows(ledger)["0000"]
    assert (row["state"], row["objective"], row["share"], row["again"]) == ("complete", 0.5, 1.0, False)
    assert ledger.proposals.study.trials[0].value == 0.5


def test_an_error_in_a_trial_is_its_result(ledger):
    ledger.begin("a")
    over(ledger, "a", FAILED)
    assert rows(ledger)["0000"]["error"] == "Traceback ..." and ledger.begin("b").number == 1


def test_a_process_that_dies_is_given_a_second_chance_alone_and_no_third(ledger):
    ledger.begin("a")
    ledger.end("a", DEAD)
    assert not rows(ledger)
    again = ledger.begin("b")
    assert (again.number, again.again) == (0, True) and ledger.begin("c") is None
    ledger.end("b", DEAD)
    row = rows(ledger)["0000"]
    assert (row["state"], row["again"]) == ("failed", True)
    assert "Worker exit type: SYSTEM_ERROR\nthe process of the trial died" in row["error"]


IMPORT = """Failure # 1
The actor died unexpectedly before finishing this task.
Worker exit detail: Worker exits unexpectedly. Traceback (most recent call last):
  File "function_manager.py", line 657, in temporary_actor_method
RuntimeError: The actor with name ImplicitFunc failed to import on the worker.

  File "proposals.py", line 10, in <module>
ModuleNotFoundError: No module named 'optuna'

An unexpected internal error occurred while the worker was executing a task.
"""


def test_what_a_process_cannot_even_begin_with_is_recorded_as_it_is(ledger):
    ledger.begin("a")
    ledger.end("a", death(IMPORT))
    assert ledger.said[-1] == "  0000 is run again, alone: ModuleNotFoundError: No module named 'optuna'"
    ledger.begin("b")
    ledger.end("b", death(IMPORT))
    error = rows(ledger)["0000"]["error"]
    assert "killed" not in error and 'File "proposals.py", line 10' in error
    assert error.splitlines()[-1] == "ModuleNotFoundError: No module named 'optuna'", "what is said of it"


def test_an_error_that_says_nothing_is_told_from_a_death():
    assert death("Traceback\n  assert ready\nAssertionError\n")["error"] == "AssertionError"
    assert death("Worker exit type: SYSTEM_ERROR")["error"].startswith("the process of the trial died")


def test_a_lost_machine_is_no_fault_of_its_trial_until_it_is_one_too_many(ledger):
    """It is run again beside the others; a trial that takes machine after machine down is run alone in the end."""
    for time in range(LOSSES):
        job = ledger.begin(f"a{time}")
        assert (job.number, job.again) == (0, False)
        ledger.end(f"a{time}", DEAD, lost=True)
        assert f"  {job.trial} is run again: its machine was lost" in ledger.said
    ledger.begin("b")
    assert ledger.begin("c").number == 1, "others run beside it"
    over(ledger, "c", GOOD)
    ledger.end("b", DEAD, lost=True)
    again = ledger.begin("d")
    assert (again.number, again.again) == (0, True)
    ledger.end("d", DEAD, lost=True)
    assert rows(ledger)["0000"]["state"] == "failed"


def test_workers_that_are_lost_with_their_machine_are_no_fault_of_the_trial_either(ledger):
    """Its own process lives, and tells."""
    lost = {**FULL_DISK, "state": "lost", "error": "Lost: a machine of the workers was lost"}
    for time in range(LOSSES):
        assert not ledger.begin(f"a{time}").again
        over(ledger, f"a{time}", lost)
        assert ledger.said[-1] == "  0000 is run again: its machine was lost"
    ledger.begin("b")
    over(ledger, "b", lost)
    assert ledger.begin("c").again
    over(ledger, "c", lost)
    assert rows(ledger)["0000"]["state"] == "failed"


def begun(ledger, trial_id):
    job = ledger.begin(trial_id)
    ledger.heard(trial_id, {"final": 0, "trial": job.trial, "node": "n"})
    return job


def test_a_search_that_is_told_to_stop_waits_for_what_has_begun_and_records_nothing_of_it(ledger):
    run = ledger.settings.run
    begun(ledger, "a")
    ledger.begin("b")
    assert not (ledger.left() or ledger.over() or told_to_stop(run))
    ledger.leave()
    assert told_to_stop(run) and ledger.begin("c") is None
    assert not ledger.left(), "the first trial has begun, and has something to store"
    over(ledger, "a", {**FULL_DISK, "error": "InterruptedError: told to stop"})
    assert ledger.left() and not ledger.over(), "the second only waits for a machine"
    ledger.end("b", DEAD)
    assert ledger.over() and ledger.open and not rows(ledger)
    go_on(run)
    assert not told_to_stop(run)


def test_what_ends_while_the_search_is_left_counts(ledger):
    job = begun(ledger, "a")
    ledger.leave()
    over(ledger, "a", {**GOOD, "trial": job.trial})
    assert ledger.over() and set(rows(ledger)) == {"0000"} and not ledger.agenda.finished()


def full(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["append_epochs", "append_trial", "tell", "propose"])
def test_a_disk_that_takes_no_record_ends_the_search_and_not_a_trial(ledger, monkeypatch, where):
    """Whatever cannot be written; nothing waits for ever, and nothing is lost that was."""
    interrupted = []
    monkeypatch.setattr("os.kill", lambda *arguments: interrupted.append(arguments) or ledger.leave())
    job = begun(ledger, "a")
    owner = {"tell": ledger.proposals, "propose": ledger.agenda}.get(where, records)
    monkeypatch.setattr(owner, where, full)
    if where == "propose":
        assert ledger.begin("b") is None
    over(ledger, "a", {**GOOD, "trial": job.trial})
    assert len(interrupted) == 1 and ledger.error.errno == 28 and ledger.over() and ledger.begin("c") is None
    assert set(rows(ledger)) == ({"0000"} if where in ("tell", "propose") else set())


def test_a_full_disk_leaves_the_trial_open_and_ends_the_search(ledger):
    jobs = [ledger.begin("a")]
    over(ledger, "a", FULL_DISK)
    assert ledger.begin("b") == jobs[0].__class__(**{**vars_of(jobs[0]), "again": True})
    over(ledger, "b", FULL_DISK)
    for name in ("c", "d"):
        ledger.begin(name)
        over(ledger, name, GOOD)
    assert ledger.begin("e") is None and ledger.agenda.finished() and ledger.open
    assert rows(ledger)["0000"]["state"] == "interrupted"
    settings = ledger.settings
    later = Proposals(settings.run, rungs(settings.plan, "none"), ("balanced_nll",), 3, sampling.sampler("quasi", 0, 3))
    assert later.agenda("none", 0).next().number == 0, "a resumed search proposes it again"


def vars_of(job):
    return {name: getattr(job, name) for name in ("number", "rung", "params", "asked", "stage", "broken")}
