import json
from datetime import UTC, datetime

import pytest
from optuna.trial import TrialState

from rayltr import catalogue, records, sampling
from rayltr.proposals import Proposals, journal, laid_out, mend
from rayltr.spec import dump
from rayltr.studies import CONTROL, FIDELITIES, STUDY, Plan, rungs

SPACE = """
from rayltr.spec import Stage, fn

def space(trial):
    gamma = trial.suggest_float("gamma", 0.5, 2.0)
    epochs = 27 if trial.suggest_categorical("good", [True, True, False]) else -1
    return Stage(source=fn("synthetic", classes=4), epochs=epochs, loss=fn("focal", gamma=gamma))

def control(trial):
    return Stage(source=fn("synthetic", classes=4), epochs=27)
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})
    path = tmp_path / "my_space.py"
    path.write_text(SPACE.replace("[True, True, False]", "[True, False]"))
    return Plan(str(path), epochs=27, seed=0)


def opened(tmp_path, plan, trials=10, fidelity="none", objectives=("balanced_nll",), starts=()):
    sampler = sampling.sampler("quasi", 0, trials)
    return Proposals(str(tmp_path), rungs(plan, fidelity), objectives, trials, sampler, starts)


def recorded(tmp_path, job, nll, state="complete"):
    now = datetime.now(UTC)
    row = {"trial": job.trial, "number": job.number, "state": state, "started": now, "ended": now, "epochs_asked": 27,
           "recipe": json.dumps(dump(job.stage)) if job.stage else None, "m.val.fitted_nll": nll,
           **{f"p.{name}": value for name, value in job.params.items()}}  # fmt: skip
    records.append_trial(tmp_path, row)


def test_arms_are_laid_down_and_starts_come_first():
    points = laid_out(7, [{"loss": "a"}, {"arm": STUDY, "loss": "b"}])
    assert [point["arm"] for point in points] == [CONTROL, STUDY, STUDY, STUDY, STUDY, CONTROL, STUDY]
    assert [point.get("loss") for point in points] == [None, "a", "b", None, None, None, None]


def test_proposals_are_numbered_from_zero_and_end(tmp_path, plan):
    made = opened(tmp_path, plan, 6, starts=[{"good": True, "gamma": 1.25}])
    jobs = [made.propose() for _ in range(6)]
    assert [job.number for job in jobs] == list(range(6)) and made.propose() is None
    assert jobs[1].params == {"arm": STUDY, "good": True, "gamma": 1.25}
    assert jobs[0].stage.loss.name == "cross_entropy"


def test_a_point_that_is_no_chain_is_broken_and_only_that(tmp_path, plan):
    jobs = [opened(tmp_path, plan, 10).propose()]
    made = opened(tmp_path, plan, 10)
    jobs = [job for job in iter(made.propose, None) if job.arm == STUDY]
    for job in jobs:
        assert (job.stage is None) == (not job.params["good"]) == bool(job.broken)
    assert any("-1" in job.broken for job in jobs if job.broken)


def test_what_a_crash_left_open_is_proposed_again_under_its_number(tmp_path, plan):
    made = opened(tmp_path, plan, 8)
    before = [made.propose() for _ in range(4)]
    recorded(tmp_path, before[1], 0.5)
    recorded(tmp_path, before[2], float("nan"))
    again = opened(tmp_path, plan, 8)
    states = [trial.state for trial in again.study.get_trials()[:4]]
    assert states == [TrialState.WAITING, TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    jobs = [*iter(again.propose, None)]
    assert [job.number for job in jobs] == [0, 3, 4, 5, 6, 7]
    assert (jobs[0].params, jobs[1].params) == (before[0].params, before[3].params)


def test_more_trials_can_be_added(tmp_path, plan):
    first = opened(tmp_path, plan, 3)
    jobs = [*iter(first.propose, None)]
    assert len(jobs) == 3
    for job in jobs:
        recorded(tmp_path, job, 0.1)
        first.tell(job.asked, [0.1])
    assert [job.number for job in iter(opened(tmp_path, plan, 5).propose, None)] == [3, 4]


def test_fewer_trials_can_be_asked_for_and_the_others_later(tmp_path, plan):
    begun = opened(tmp_path, plan, 6)
    open_again = [begun.propose() for _ in range(2)]
    fewer = opened(tmp_path, plan, 4)
    jobs = [*iter(fewer.propose, None)]
    assert [job.number for job in jobs] == [0, 1, 2, 3] and jobs[:2] == open_again
    for job in jobs:
        recorded(tmp_path, job, 0.1)
        fewer.tell(job.asked, [0.1])
    assert opened(tmp_path, plan, 3).agenda("none", 0).finished()
    assert [job.number for job in iter(opened(tmp_path, plan, 6).propose, None)] == [4, 5]


def test_the_agenda_knows_the_past(tmp_path, plan):
    made = opened(tmp_path, plan, 10, "schedules")
    agenda = made.agenda("schedules", 0)
    while not (job := agenda.next()).rung:
        recorded(tmp_path, job, 1.0 + job.number)
        made.tell(job.asked, [1.0 + job.number])
        agenda.ended(job, (1.0 + job.number,))
    resumed = opened(tmp_path, plan, 10, "schedules").agenda("schedules", 0)
    again = resumed.next()
    assert again.trial == job.trial and again.rung == 1
    assert sum(own.epochs for own in [again.stage]) == 27
    assert FIDELITIES["schedules"] == (9,)


def test_objectives_are_told_as_they_are_and_judged_so_that_less_is_better(tmp_path, plan):
    made = opened(tmp_path, plan, 2, objectives=("many", "balanced_nll"))
    assert made.judged([0.8, 0.3]) == (-0.8, 0.3) and made.judged(None) is None
    job = made.propose()
    made.tell(job.asked, [0.8, 0.3])
    assert made.study.get_trials()[job.asked].values == [0.8, 0.3]
    assert [direction.name for direction in made.study.directions] == ["MAXIMIZE", "MINIMIZE"]


@pytest.mark.parametrize("fidelity", ["none", "schedules"])
def test_what_was_told_but_is_not_in_the_records_is_proposed_again(tmp_path, plan, fidelity):
    """A power cut, or a damaged table, took the rows; the stages are in the store."""
    made = opened(tmp_path, plan, 8, fidelity)
    before = [made.propose() for _ in range(5)]
    recorded(tmp_path, before[1], 0.5)
    for job in before[:4]:
        made.tell(job.asked, [0.5] if job.stage else None)
    again = opened(tmp_path, plan, 8, fidelity)
    agenda = again.agenda(fidelity, 0)
    jobs = [*iter(again.propose, None)]
    assert not agenda.asked_all and [job.number for job in jobs] == [0, 2, 3, 4, 5, 6, 7]
    for job, first in zip(jobs, [before[0], *before[2:]], strict=False):
        assert (job.params, job.asked, bool(job.broken)) == (first.params, first.asked, bool(first.broken))
        assert job.stage == first.stage
    for job in jobs:
        recorded(tmp_path, job, 0.25)
        again.tell(job.asked, [0.25])  # what it was told before holds
    assert again.study.trials[0].value == 0.5
    last = opened(tmp_path, plan, 8, fidelity)
    assert last.agenda(fidelity, 0).asked_all and last.propose() is None


def test_what_was_lost_is_the_last_thing_left_to_do(tmp_path, plan):
    made = opened(tmp_path, plan, 2)
    for job in iter(made.propose, None):
        made.tell(job.asked, [0.5])
    agenda = opened(tmp_path, plan, 2).agenda("none", 0)
    assert not agenda.asked_all and [agenda.next().number, agenda.next().number] == [0, 1]


def test_a_disk_that_is_full_while_a_point_is_drawn_is_no_verdict_on_it(tmp_path, plan, monkeypatch):
    made = opened(tmp_path, plan, 3)

    write = made.study._storage.set_trial_param

    def full(trial_id, name, *more):
        if name == "gamma":  # the space asks for it
            raise OSError(28, "No space left on device")
        write(trial_id, name, *more)

    made.propose()  # a control, which draws nothing
    with monkeypatch.context() as patch:
        patch.setattr(made.study._storage, "set_trial_param", full)
        with pytest.raises(OSError, match="No space left"):
            made.propose()
    again = [job.number for job in iter(opened(tmp_path, plan, 3).propose, None)]
    assert again == [0, 1, 2], "all are still open"


def test_what_a_study_does_wrong_is_its_own_verdict(tmp_path, plan):
    path = tmp_path / "my_space.py"
    path.write_text(path.read_text().replace("def space(trial):", "def space(trial):\n    raise KeyError('mine')"))
    jobs = [*iter(opened(tmp_path, plan, 2).propose, None)]
    assert "KeyError: 'mine'" in jobs[1].broken and jobs[1].stage is None


TORN = {
    "whole": "",
    "half a line": '{"op_code":6,"tri',
    "no end": '{"op_code":6}',
    "zeros": "\0" * 4096,
}


@pytest.mark.parametrize("torn", TORN)
def test_a_journal_that_a_crash_has_torn_can_be_read_and_written(tmp_path, torn):
    path = tmp_path / "optuna.journal"
    trial = journal(str(tmp_path), ["balanced_nll"]).ask()
    with path.open("a") as file:
        file.write(TORN[torn])
    (tmp_path / "optuna.journal.lock").symlink_to(path)  # what Optuna holds while it writes
    mend(path)
    study = journal(str(tmp_path), ["balanced_nll"])
    study.tell(trial.number, 0.5)
    assert [one.value for one in journal(str(tmp_path), ["balanced_nll"]).trials] == [0.5]


@pytest.mark.parametrize("torn", ['{"op_code":6,"tri', '{"op_code":6,"tri\n', '{"op_code":6}', "6\n", "\n"])
def test_what_was_written_behind_a_torn_line_is_kept(tmp_path, torn):
    """A disk was full in the middle of a line, and then it was not any more."""
    path = tmp_path / "optuna.journal"
    study = journal(str(tmp_path), ["balanced_nll"])
    study.enqueue_trial({"x": 0.25})
    study.ask().suggest_float("x", 0, 1)
    before = path.read_bytes()
    study.enqueue_trial({"x": 0.75})
    behind = path.read_bytes()[len(before) :]
    path.write_bytes(before + torn.encode() + behind)
    mend(path)
    assert path.read_bytes() == before + behind
    again = journal(str(tmp_path), ["balanced_nll"])
    assert again.ask().suggest_float("x", 0, 1) == 0.75 and again.trials[0].params == {"x": 0.25}


def test_a_whole_journal_is_not_written_again(tmp_path):
    path = tmp_path / "optuna.journal"
    journal(str(tmp_path), ["balanced_nll"]).ask()
    before = path.stat()
    mend(path)
    assert path.stat() == before


def test_a_run_without_a_journal_needs_no_mending(tmp_path):
    mend(tmp_path / "optuna.journal")
    assert not list(tmp_path.iterdir())
