"""The search played on a table: the table is whole, epochs are counted right, nothing is reached too early."""

import json
import random

import numpy as np
import pytest

from benchmarks import recorded_space, search
from rayltr import catalogue, studies
from rayltr.agenda import Agenda, Job
from rayltr.metrics import TAUS
from rayltr.spec import Stage, fn
from rayltr.store import Store
from rayltr.studies import CONTROL, STUDY, Plan

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
    whole = search.everything(studies.find(plan.study))
    return {(search.key(point), epochs): search.Found(value(point, epochs), 0.5, CURVE)
            for point in whole for epochs in (3, 9, 27)}  # fmt: skip


def found(objective, *curve):
    return search.Found(objective, 0.5, np.array(curve or CURVE))


def test_the_recorded_table_is_complete():
    table = search.read()
    points = search.everything(studies.find(search.PLAN.study))
    assert len(points) == 160
    assert set(table) == {(search.key(point), epochs) for point in points for epochs in (6, 18, 54)}
    for one in table.values():
        assert one.objective > 0 and 0 <= one.error <= 1
        assert one.curve.shape == (len(TAUS), 2) and ((one.curve >= 0) & (one.curve <= 1)).all()
    assert search.TABLE.stat().st_size < 300_000


def test_points_are_all_paths_through_a_conditional_space():
    def space(trial):
        if trial.suggest_categorical("a", [1, 2]) == 2:
            trial.suggest_categorical("b", ["x", "y"])
        return Stage(source=fn("digits"), epochs=1)

    points = recorded_space.points(space, {"arm": "study"})
    assert [tuple(point.values()) for point in points] == [("study", 1), ("study", 2, "x"), ("study", 2, "y")]


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


def test_a_goal_is_reached_when_the_whole_trainings_so_far_reach_it_and_not_before():
    draw = random.Random(0)
    for _ in range(50):
        log = [search.Step(10 * n, 5 * n, draw.random() < 0.4, found(draw.random(), (draw.random(), draw.random())))
               for n in range(1, 20)]  # fmt: skip
        goals = {"objective": -draw.random() / 3, "area": draw.random()}
        met, last = search.reach(iter(log), goals)
        for name, goal in goals.items():
            true = [step for n, step in enumerate(log) if (so_far := [s.found for s in log[: n + 1] if s.whole])
                    and search.MEASURES[name](so_far) >= goal]  # fmt: skip
            assert met.get(name) is (true[0] if true else None)
            assert true or last is log[-1], "what is never reached costs the whole search"


def test_what_is_never_reached_counts_as_the_whole_search(plan, table, monkeypatch):
    monkeypatch.setattr(search, "play", lambda *given: [search.Step(200, 100, True, found(99.0))])
    baseline = [search.Step(150, 50, True, found(1.0, (0.5, 0.5)))]
    rows = search.shares(table, plan, ("tpe", "none"), [baseline], 1)
    assert rows == {name: [(200 / 150, 2.0, False)] for name in search.MEASURES}


def test_recording_goes_on_where_it_was_and_the_table_can_be_played(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "PLAN", Plan(plan.study, epochs=27, seed=0))
    monkeypatch.setattr(search, "RECORDED", "schedules")
    monkeypatch.setattr(search, "everything", lambda study: [
        {"arm": STUDY, "lr": 0.1, "gamma": 1.0}, {"arm": CONTROL, "lr": 0.1}])  # fmt: skip
    path = tmp_path / "table.parquet"
    search.record(path, Store(tmp_path / "store"))
    first = search.read(path)
    assert {epochs for _, epochs in first} == {3, 27} and len(first) == 4
    capsys.readouterr()
    search.record(path, Store(tmp_path / "store"))
    assert "2 of 2 points, 0 epochs trained" in capsys.readouterr().out
    again = search.read(path)
    assert all(np.array_equal(one.curve, again[name].curve) for name, one in first.items())


@pytest.mark.parametrize(("limit", "code"), [(10.0, 0), (1e-6, 1)])
def test_the_exit_code_says_whether_the_default_is_within_the_limit(monkeypatch, capsys, limit, code):
    monkeypatch.setattr(search, "SEARCHES", {"random, none": ("random", "none")})
    monkeypatch.setattr(search, "LIMIT", limit)
    assert search.main(["--seeds", "2", "--trials", "12"]) == code
    assert "12 trials of 54 epochs = 648 epochs asked" in capsys.readouterr().out
