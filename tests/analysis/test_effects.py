import numpy as np
import pytest

from analysis.effects import Effects, effects
from tests.analysis import synthetic
from tests.analysis.synthetic import LEVELS, PAIR, SHARES

GRID = synthetic.scores_on_grid()
TRUE = {
    name: dict(zip(levels, GRID.mean(tuple({0, 1, 2} - {axis})) - GRID.mean(), strict=True))
    for axis, (name, levels) in enumerate(LEVELS.items())
}
"""What each level of a factor adds to the score, on average over the others."""


def of(made: synthetic.Factors, **how) -> Effects:
    return effects(made.params, made.values, made.designed, **how)


def shares(found: Effects) -> np.ndarray:
    return np.array([*(found.shares[name] for name in SHARES), found.pairs[PAIR[0]]])


def test_the_grid_has_the_shares_it_is_said_to_have():
    whole, found = GRID.var(), {}
    for axis, name in enumerate(LEVELS):
        found[name] = GRID.mean(tuple({0, 1, 2} - {axis})).var() / whole
    assert found == pytest.approx(SHARES)
    assert GRID.mean(2).var() / whole == pytest.approx(SHARES["loss"] + SHARES["drw"] + PAIR[1])


@pytest.mark.parametrize("designed", [1.0, 0.3], ids=["at random", "seeking good trials"])
def test_shares_are_true_and_conditional_parameters_never_take_them(designed: float):
    found = [of(synthetic.factors(seed, designed=designed), times=1, seed=seed) for seed in range(6)]
    error = np.array([shares(one) for one in found]) - [*SHARES.values(), PAIR[1]]
    assert np.abs(error.mean(0)).max() < 0.03
    assert np.abs(error).max() < 0.05
    for one in found:
        assert one.shares.keys() == SHARES.keys() and one.conditional.keys() == {"mixup.alpha", "drw.switch"}
        assert max(share for pair, share in one.pairs.items() if pair != PAIR[0]) < 0.05
        assert sum(one.shares.values()) + sum(one.pairs.values()) == pytest.approx(1, abs=0.02)


def test_factors_that_do_nothing_get_nothing():
    made, random = synthetic.factors(0), np.random.default_rng(0)
    for row in made.params:
        row |= {"flip": bool(random.integers(2)), "decay": float(random.choice([2e-4, 5e-4])), "lr": random.random()}
    found = of(made, times=1)
    assert list(found.shares)[0] == "loss" and max(found.shares[name] for name in ("flip", "decay", "lr")) < 0.03
    assert abs(found.shares["loss"] - SHARES["loss"]) < 0.1


@pytest.mark.parametrize("trials, designed", [(150, 1.0), (150, 0.3), (40, 1.0)])
def test_intervals_of_levels_cover_the_truth(trials: int, designed: float, monkeypatch):
    monkeypatch.setattr("analysis.effects._shares", lambda factors, *_: (dict.fromkeys(factors, 0.0), {}, 0.0))
    factors, inside = [], []
    for seed in range(60):
        found = of(synthetic.factors(seed, trials=trials, designed=designed, noise=0.01), times=200, seed=seed)
        for name, levels in found.levels.items():
            factors += [level.difference.low <= TRUE[name][level.value] <= level.difference.high for level in levels]
        for name, slope in (("mixup.alpha", 0.01), ("drw.switch", 0.04)):
            middle = np.mean([level.value for level in found.conditional[name]])
            for level in found.conditional[name]:
                truth = slope * (level.value - middle)
                inside.append(level.difference.low <= truth <= level.difference.high)
    assert 0.9 <= np.mean(factors) <= 0.98
    assert 0.9 <= np.mean(inside) <= 0.98


def test_levels_and_their_trials():
    made = synthetic.factors(1)
    found = of(made, times=50)
    assert (found.trials, found.designed, found.reason) == (150, 150, "")
    assert 0.8 < found.explained <= 1
    for name, levels in found.levels.items():
        assert [level.value for level in levels] == sorted(LEVELS[name])
        assert [level.trials for level in levels] == [
            sum(row[name] == level.value for row in made.params) for level in levels
        ]
        assert sum(level.difference.value for level in levels) == pytest.approx(0, abs=1e-12)
        assert all(level.difference.low <= level.difference.value <= level.difference.high for level in levels)


def test_a_conditional_parameter_is_judged_by_the_trials_that_have_it():
    made = synthetic.factors(2)
    found = of(made, times=50)
    alphas = [row["mixup.alpha"] for row in made.params if "mixup.alpha" in row]
    parts = found.conditional["mixup.alpha"]
    assert sum(level.trials for level in parts) == len(alphas) and len(parts) == 5
    assert min(alphas) < parts[0].value < parts[4].value < max(alphas)
    assert [level.value for level in found.conditional["drw.switch"]] == [0.6, 0.7, 0.8]
    slope = [level.difference.value for level in found.conditional["drw.switch"]]
    assert slope == pytest.approx([-0.004, 0, 0.004], abs=0.0015)


def test_differences_are_exact_where_nothing_is_left_to_chance():
    rows = [{"a": a, "b": b} for a in "xyz" for b in (False, True) for _ in range(3)]
    add = {"x": -0.1, "y": 0.02, "z": 0.08, False: -0.01, True: 0.01}
    found = effects(rows[1:], [0.5 + add[row["a"]] + add[row["b"]] for row in rows[1:]], times=20)
    for levels in found.levels.values():
        for level in levels:
            expected = pytest.approx(add[level.value], abs=1e-5)
            assert (level.difference.value, level.difference.low, level.difference.high) == (expected,) * 3
    assert sum(found.shares.values()) > 0.97


def test_the_same_seed_says_the_same():
    made = synthetic.factors(0, trials=30)
    assert of(made, times=20, seed=4) == of(made, times=20, seed=4)


def test_a_large_grid_is_sampled():
    random = np.random.default_rng(0)
    rows = [{f"f{k}": int(random.integers(5)) for k in range(8)} for _ in range(200)]
    values = [row["f3"] + random.normal(0, 0.1) for row in rows]
    found = effects(rows, values, times=10)
    assert found.shares["f3"] > 0.95 and len(found.pairs) == 28


def test_a_level_of_a_single_trial_has_no_interval():
    made = synthetic.factors(0, trials=40)
    made.params[7]["loss"] = "dive"
    level = next(level for level in of(made, times=30).levels["loss"] if level.value == "dive")
    assert level.trials == 1 and np.isfinite(level.difference.value) and np.isnan(level.difference.low)


def test_trials_of_nan_are_left_out():
    made = synthetic.factors(0, trials=40)
    values, designed = made.values.copy(), made.designed.copy()
    values[[3, 5]], designed[20:] = np.nan, False
    kept = np.isfinite(values)
    found = effects(made.params, values, designed, times=10)
    again = effects([row for row, use in zip(made.params, kept, strict=True) if use], values[kept], designed[kept], 10)
    assert found == again and (found.trials, found.designed) == (38, 18)


def test_few_trials_of_many_factors_are_not_overfitted():
    random = np.random.default_rng(0)
    rows = [{f"f{k}": int(random.integers(3)) for k in range(6)} for _ in range(10)]
    values = random.normal(0, 0.01, 10)
    found = effects(rows, values, times=100)
    for name, levels in found.levels.items():
        for level in levels:
            own = np.mean([v for row, v in zip(rows, values, strict=True) if row[name] == level.value])
            others = [np.mean([v for row, v in zip(rows, values, strict=True) if row[name] == o.value]) for o in levels]
            assert level.difference.value == pytest.approx(own - np.mean(others), abs=1e-6)


def test_one_factor_and_conditional_parameters_alone():
    random = np.random.default_rng(0)
    only = effects([{"a": i % 2, "same": 1} for i in range(20)], random.random(20), times=10)
    assert only.shares == {"a": pytest.approx(1)} and only.pairs == {}
    rows = [{"alpha": i % 3} if i % 2 else {} for i in range(30)]
    branch = effects(rows, random.random(30), times=10)
    assert branch.shares == branch.levels == {} and branch.reason == ""
    assert [level.trials for level in branch.conditional["alpha"]] == [5, 5, 5]


@pytest.mark.parametrize(
    "params, values, reason",
    [
        ([{"a": i % 2} for i in range(7)], range(7), "it takes 8 scored trials, there are 7"),
        ([{"a": i % 2} for i in range(9)], [np.nan] * 9, "it takes 8 scored trials, there are 0"),
        ([], [], "it takes 8 scored trials, there are 0"),
        ([{"a": i % 2} for i in range(9)], [0.5] * 9, "all trials have the same score"),
        ([{"a": 1, "b": None}] * 9, range(9), "no parameter takes more than one value"),
        ([{}] * 9, range(9), "no parameter takes more than one value"),
    ],
)
def test_where_there_is_nothing_to_say_the_reason_is_said(params, values, reason: str):
    found = effects(params, values)
    assert found.reason == reason
    assert found.shares == found.pairs == found.levels == found.conditional == {}
