import json
from datetime import UTC, datetime

import pytest
from optuna.trial import TrialState

from rayltr import catalogue, records, sampling
from rayltr.proposals import Proposals, laid_out
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
    assert len([*iter(first.propose, None)]) == 3
    for job in (0, 1, 2):
        first.tell(job, [0.1])
    assert [job.number for job in iter(opened(tmp_path, plan, 5).propose, None)] == [3, 4]


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
