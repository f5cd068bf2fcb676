import json

import pytest

from rayltr import finalists, records, sampling
from rayltr.choice import SEEDS
from rayltr.proposals import Proposals
from rayltr.spec import dump, fn
from rayltr.studies import CONTROL, STUDY, Plan, find, rungs

PLAN = Plan("bag_of_tricks", source=fn("synthetic", classes=4, per_class=40, size=8), epochs=20, seed=5)


def row_of(number, balanced, arm=STUDY, **more):
    params = {"arm": arm, **(find("bag_of_tricks").presets["ce"] if arm == STUDY else CONTROLLED)}
    scores = {f"m.val.fitted_{name}": balanced for name in ("balanced", "many", "few")} | {"m.val.fitted_nll": 1.0}
    stage = PLAN.stage(find("bag_of_tricks"), params)
    row = {"trial": f"{number:04d}", "number": number, "state": "complete", "share": 1.0, "objective": 1.0}
    recipe = {"recipe": json.dumps(dump(stage)), **{f"p.{name}": value for name, value in params.items()}}
    return {**row, **scores, **recipe, **more}


CONTROLLED = {"flip": 0.5, "lr": 0.1, "schedule": "multistep"}


@pytest.fixture
def proposals(tmp_path):
    records.write_run(tmp_path, {})
    records.write_trials(tmp_path, [row_of(0, 0.5, CONTROL), row_of(1, 0.7), row_of(2, 0.6)])
    return Proposals(str(tmp_path), rungs(PLAN, "none"), ("balanced_nll",), 3, sampling.sampler("quasi", 0, 3))


def test_finalists_differ_from_what_was_found_in_the_seed_alone(proposals):
    waiting = finalists.jobs(proposals, 1, 5)
    assert [job.trial for job in waiting] == ["0001+1", "0001+2", "0001+3", "0000+1", "0000+2", "0000+3"]
    before = PLAN.stage(find("bag_of_tricks"), waiting[0].params)
    assert [job.stage for job in waiting[:3]] == [before.but(seed=5 + shift) for shift in range(1, SEEDS + 1)]


def test_what_is_over_is_not_trained_again_and_chooses_nothing(proposals):
    run = proposals.run
    records.append_trial(run, row_of(1, 0.9, trial="0001+2"))
    records.append_trial(run, row_of(2, 0.99, trial="0002+1"))
    assert [job.trial for job in finalists.jobs(proposals, 1, 5)] == ["0001+1", "0001+3", "0000+1", "0000+2", "0000+3"]


def test_none_are_asked_for_by_default(proposals):
    assert finalists.jobs(proposals, 0, 5) == []
    assert finalists.agenda([]).next() is None


def test_the_winner_is_trained_again_with_each_of_its_choices_set_back(proposals):
    study = find("bag_of_tricks")
    mixed = {"arm": STUDY, **study.presets["input_mixup_bsce"]}
    better = {name: value for name, value in row_of(3, 0.8).items() if not name.startswith("p.")}
    records.append_trial(proposals.run, better | {f"p.{name}": value for name, value in mixed.items()})
    made = {job.trial: job for job in finalists.ablation(proposals, 5)}
    assert list(made) == ["0003+1-nothing", "0003+1-mixing", "0003+1-loss"]
    whole = PLAN.stage(study, mixed)
    assert made["0003+1-nothing"].stage == reseeded(whole)
    gone = ("finetune", "alpha", "mixing")
    without = {name: value for name, value in mixed.items() if name not in gone} | {"mixing": "none"}
    assert made["0003+1-mixing"].stage == reseeded(PLAN.stage(study, without))
    assert made["0003+1-loss"].params == {**mixed, "loss": "cross_entropy", "reweight": False}


def reseeded(stage):
    return finalists.reseeded(stage, 6)


def test_what_is_left_is_what_nobody_has_trained_and_the_run_knows_its_ablation(proposals):
    records.append_trial(proposals.run, row_of(1, 0.7, trial="0001+1"))
    records.append_trial(proposals.run, row_of(1, 0.7, trial="0001+1-nothing"))
    assert [job.trial for job in finalists.left(proposals, 5, 1, True)] == [
        "0001+2", "0001+3", "0000+1", "0000+2", "0000+3"]  # fmt: skip
    assert records.read_run(proposals.run)["ablation"] == ["0001+1-nothing"], (
        "plain cross-entropy has nothing to set back"
    )
    assert finalists.left(proposals, 5, 0, False) == []


def test_a_winner_of_the_control_arm_has_no_ablation(proposals):
    records.append_trial(proposals.run, row_of(0, 0.9, CONTROL))
    assert finalists.ablation(proposals, 5) == []


def test_an_agenda_of_finalists_ends(proposals):
    made = finalists.agenda(finalists.jobs(proposals, 2, 5))
    seen = []
    while (job := made.next()) is not None:
        seen.append(job.trial)
        made.ended(job, (1.0,))
    assert len(seen) == 9 and made.finished()
