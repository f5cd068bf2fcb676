"""The search played on a table: epochs are counted right, nothing is reached too early."""

import json
import random

import numpy as np
import pytest

from benchmarks import recording, search
from rayltr import catalogue, studies
from rayltr.agenda import Agenda, Job
from rayltr.spec import Stage, fn
from rayltr.studies import Plan

SPACE = """
from rayltr.spec import Stage, fn

def control(trial):
    lr = trial.suggest_categorical("lr", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    source = fn("synthetic", classes=3, per_class=16, size=8, ratio=2.0)
    return Stage(source=source, epochs=27, batch=16, backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=lr))

def space(trial):
    first = control(trial).but(epochs=18, horizon=27)
    gamma = trial.suggest_categorical("gamma", [float(g) for g in range(1, 13)])
    return first.but(epochs=9, resume=first, loss=fn("focal", gamma=gamma))
"""
CURVE = np.zeros((2, 2))


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})
    path = tmp_path / "tiny_space.py"
    path.write_text(SPACE)
    return Plan(str(path), epochs=27, seed=0)


def value(params, epochs):
    """Short trainings rank the recipes of the space the other way round."""
    return (-1 if epochs < 27 else 1) * params.get("gamma", 0.0) + params["lr"] + (100 if epochs < 27 else 10)


@pytest.fixture
def table(plan):
    whole = recording.everything(studies.find(plan.study))
    return {(recording.key(point), epochs): recording.Found(value(point, epochs), 0.5, CURVE)
            for point in whole for epochs in (3, 9, 27)}  # fmt: skip


def found(objective, *curve):
    return recording.Found(objective, 0.5, np.array(curve or CURVE))


def test_stages_that_jobs_share_are_asked_twice_and_trained_once():
    first = Stage(source=fn("digits"), epochs=6, horizon=9)
    stages = [first.but(epochs=3, resume=first, seed=seed) for seed in (0, 1, 1)] + [first.but(epochs=9)]
    for concurrent, asked in ((1, [9, 18, 27, 36]), (2, [18, 27, 36, 36])):
        jobs = iter([Job(number, 0, {}, number, stage) for number, stage in enumerate(stages)])
        agenda = Agenda(lambda jobs=jobs: next(jobs, None))
        steps = [*search.steps(agenda, lambda job: found(1.0), 1, concurrent)]
        assert [step.asked for step in steps] == asked
        assert steps[-1].trained == 9 + 3 + 0 + 3, "the last one goes on from the shared epoch 6"


def test_running_jobs_count_when_another_ends():
    jobs = iter([Job(number, 0, {}, number, Stage(source=fn("digits"), epochs=4, seed=number)) for number in range(3)])
    steps = [*search.steps(Agenda(lambda: next(jobs, None)), lambda job: found(1.0), 1, 2)]
    assert [step.asked for step in steps] == [8, 12, 12]


@pytest.mark.parametrize("fidelity", ["none", "schedules", "halving"])
def test_a_search_costs_what_its_jobs_cost(plan, table, fidelity):
    steps = [*search.play(table, plan, "quasi", fidelity, 23, 0)]
    assert steps[-1].asked == search.cost(plan, 23, fidelity)
    assert len(steps) == studies.jobs(23, fidelity)
    trials = search.filling(plan, fidelity, 500)
    assert search.cost(plan, trials, fidelity) >= 500 > search.cost(plan, trials - 1, fidelity)


def test_short_trainings_decide_and_only_whole_ones_count(plan, table):
    steps = [*search.play(table, plan, "quasi", "schedules", 45, 0)]
    whole = [step.found.objective for step in steps if step.whole]
    assert len(whole) == 4 + 1, "36 proposals of the study and 9 of the control, one of each nine in full"
    shorts = {value(json.loads(point), 3) for point, epochs in table if epochs == 3}
    assert not shorts & set(whole), "what was found at full length is reported, not what was promoted on"
    assert sorted(whole)[0] < 11 and sorted(whole)[1] >= 10 + 9, "the shortest schedules prefer the largest gamma"


def test_random_search_draws_whole_trainings_of_the_study_alone(plan, table):
    steps = search.random_search(table, plan, 6, 0)
    assert [step.asked for step in steps] == [27, 54, 81, 108, 135, 162]
    assert all(step.whole and step.found.objective > 11 for step in steps), "no control: gamma is at least 1"
    assert 9 < steps[-1].trained < 162, "first stages are shared"


def test_the_area_is_what_all_curves_cover_together():
    assert search.area([found(1, (1.0, 0.25), (0.5, 0.75))]) == pytest.approx(0.25 + 0.5 * 0.5)
    assert search.area([found(1, (1.0, 0.25)), found(1, (0.5, 0.75), (0.4, 0.7))]) == pytest.approx(0.5)
    assert search.area([found(1, (0.8, 0.5)), found(1, (0.4, 1.0))]) == pytest.approx(0.8 * 0.5 + 0.4 * 0.5)


def random_courses(draw, size):
    logs = [[search.Step(10 * n, 5 * n, draw.random() < 0.4 or n == 1, found(draw.random(), (draw.random(), 0.5)))
             for n in range(1, 20)] for _ in range(size)]  # fmt: skip
    return logs, [search.course(log) for log in logs]


def test_a_goal_is_reached_when_the_mean_of_the_whole_trainings_so_far_is_as_good_and_not_before():
    draw = random.Random(0)
    for _ in range(30):
        logs, courses = random_courses(draw, 3)
        _, baselines = random_courses(draw, 3)
        for name, measure in search.MEASURES.items():
            goal = np.mean([own.reached[name][-1] for own in baselines])
            true = [10 * n for n in range(1, 20) if np.mean(
                [measure([step.found for step in log[:n] if step.whole]) for log in logs]) >= goal]  # fmt: skip
            last = baselines[0].asked[-1]
            expected = true[0] / last if true else np.inf
            assert search.shares(courses, baselines, "asked", name)[0] == pytest.approx(expected)
            assert search.shares(courses, baselines, "trained", name)[0] == pytest.approx(expected / 2)


def test_before_every_search_has_a_whole_training_their_mean_is_no_good():
    late = search.course([search.Step(5, 5, False, found(0.0)), search.Step(9, 9, True, found(1.0))])
    early = search.course([search.Step(1, 1, True, found(0.0))])
    grid, reached = search.levels([early, late], "asked", "objective")
    assert grid.tolist() == [1, 9] and reached.tolist() == [[0, 0], [-np.inf, -1]]


def test_seeds_that_differ_widen_the_interval():
    base = [search.course([search.Step(100, 100, True, found(1.0))]) for _ in range(4)]
    quick, slow = (
        [search.Step(n, n, True, found(2.0)), search.Step(m, m, True, found(1.0))] for n, m in ((1, 20), (1, 60))
    )
    assert search.shares([search.course(quick)] * 4, base, "asked", "objective") == [0.2, 0.2, 0.2]
    share, low, high = search.shares(
        [search.course(log) for log in (quick, quick, slow, slow)], base, "asked", "objective"
    )
    assert share == 0.6 and low == 0.2 or (low, high) == (0.6, 0.6)


@pytest.mark.parametrize(("limit", "code"), [(10.0, 0), (1e-6, 1)])
def test_the_exit_code_says_whether_the_default_is_within_the_limit(monkeypatch, capsys, limit, code):
    same = lambda table, plan, *given: search.random_search(table, plan, 12, given[3])  # noqa: E731
    monkeypatch.setattr(search, "play", same)
    monkeypatch.setattr(search, "SEARCHES", {"random, none": ("random", "none")})
    monkeypatch.setattr(search, "LIMIT", limit)
    assert search.main(["--seeds", "2", "--trials", "12"]) == code
    assert "12 trials of 54 epochs = 648 epochs; 2 seeds" in capsys.readouterr().out
