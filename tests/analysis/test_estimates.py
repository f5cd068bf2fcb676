import numpy as np
import pytest

from analysis import estimates, resample
from analysis.estimates import Estimate
from tests.analysis import synthetic


def best(scores) -> int:
    return int(np.nanargmax(scores["balanced"]))


def covered(found: Estimate, truth: float) -> bool:
    return found.low <= truth <= found.high


def test_an_interval_lies_between_the_quantiles_of_the_draws():
    found = estimates.estimate(0.3, np.arange(41))
    assert (found.value, found.low, found.high) == (0.3, pytest.approx(1), pytest.approx(39))
    assert estimates.estimate(0.3, [0, 1, np.nan], level=0.5) == Estimate(0.3, 0.25, 0.75)
    found = estimates.estimate(0.3, [np.nan])
    assert found.value == 0.3 and np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("each, classes", [(20, 10), (5, 30), (3, 60)])
def test_intervals_cover_the_truth(each: int, classes: int):
    scores, pairs = [], []
    for seed in range(120):
        made = synthetic.sample(seed, trials=6, classes=classes, each=each)
        samples = resample.grouped(made.hits, made.target, made.groups, resample.draws(made.target, 300, seed))
        for name in ("balanced", "few"):
            truth, drawn = made.true(name), samples[name]
            scores += [covered(estimates.estimate(0.0, drawn[:, i]), truth[i]) for i in range(6)]
            found = [estimates.difference(drawn, i, i + 1) for i in (0, 2, 4)]
            pairs += [covered(one, truth[i] - truth[i + 1]) for one, i in zip(found, (0, 2, 4), strict=True)]
    assert 0.9 <= np.mean(scores) <= 0.98
    assert 0.9 <= np.mean(pairs) <= 0.98


def test_pairs_are_told_apart_where_the_same_images_say_so():
    made = synthetic.sample(0, trials=2, shared=0.95)
    drawn = resample.grouped(made.hits, made.target, made.groups, resample.draws(made.target, 200))["balanced"]
    pair = estimates.difference(drawn, 0, 1)
    single = [estimates.estimate(0.0, drawn[:, i]) for i in (0, 1)]
    assert pair.high - pair.low < 0.8 * min(one.high - one.low for one in single)


def test_the_value_of_a_difference_is_the_measured_one_where_given():
    drawn = np.array([[0.5, 0.4], [0.7, 0.5]])
    assert estimates.difference(drawn, 0, 1).value == pytest.approx(0.15)
    assert estimates.difference(drawn, 0, 1, values=[0.6, 0.5]).value == pytest.approx(0.1)
    assert estimates.difference(drawn, 1, 1) == Estimate(0, 0, 0)


def test_equivalents_are_those_whose_difference_may_be_nothing():
    noise = np.random.default_rng(0).normal(0, 0.01, (500, 1))
    own = np.random.default_rng(1).normal(0, 0.01, (500, 4))
    drawn = 0.5 + noise + own - [0, 0.01, 0.2, np.nan]
    assert estimates.equivalents(drawn, 0).tolist() == [True, True, False, False]
    assert estimates.equivalents(drawn[:, :1], 0).tolist() == [True]


def corrections(repetitions: int, times: int, **shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error of the raw and of the corrected score of the winner, and whether its interval holds the truth."""
    rows = []
    for seed in range(repetitions):
        made = synthetic.sample(seed, **shape)
        found = estimates.corrected(made.hits, made.target, made.groups, best, times=times, seed=seed)
        winner = best({"balanced": resample.grouped(made.hits, made.target, made.groups)["balanced"][0]})
        truth = made.true("balanced")[winner]
        assert found.optimism == pytest.approx(found.raw - found.corrected.value)
        rows.append((found.raw - truth, found.corrected.value - truth, covered(found.corrected, truth)))
    return tuple(np.array(rows).T)


def test_the_correction_leaves_little_bias():
    raw, bbc, _ = corrections(60, 60)
    assert raw.mean() > 0.005
    assert abs(bbc.mean()) < 0.005


@pytest.mark.parametrize("shape", [{"classes": 10, "each": 20}, {"classes": 30, "each": 5}])
def test_corrected_intervals_cover_the_truth(shape: dict[str, int]):
    raw, bbc, held = corrections(200, 100, trials=30, **shape)
    assert abs(bbc.mean()) < 0.3 * raw.mean()
    assert 0.9 <= held.mean() <= 0.985


@pytest.mark.slow
def test_the_correction_over_many_studies():
    raw, bbc, held = corrections(400, 200)
    assert raw.mean() > 0.005
    assert abs(bbc.mean()) < 0.005
    assert 0.9 <= held.mean() <= 0.98


def test_one_trial_needs_no_correction():
    made = synthetic.sample(0, trials=1)
    found = estimates.corrected(made.hits, made.target, made.groups, best)
    assert found.reliable and abs(found.optimism) < 0.002


def test_the_named_score_of_another_choice():
    made = synthetic.sample(0, trials=20)
    few = estimates.corrected(
        made.hits, made.target, made.groups, lambda scores: int(scores["few"].argmax()), "few", 100
    )
    assert few.raw == pytest.approx(resample.grouped(made.hits, made.target, made.groups)["few"].max())
    assert few.corrected.value < few.raw


def test_a_trial_of_nan_is_not_chosen():
    made = synthetic.sample(0, trials=6)
    hits = np.vstack([np.full(len(made.target), np.nan), made.hits])
    found = estimates.corrected(hits, made.target, made.groups, best, times=50)
    assert found == estimates.corrected(made.hits, made.target, made.groups, best, times=50)


def test_no_choice_is_no_number():
    made = synthetic.sample(0, trials=3, classes=4)
    found = estimates.corrected(made.hits, made.target, made.groups, lambda scores: None, times=10)
    assert np.isnan([found.raw, found.optimism, found.corrected.value, found.corrected.low]).all()


def test_draws_without_a_choice_are_left_out():
    made = synthetic.sample(0, trials=3, classes=30)
    floor = np.median(resample.grouped(made.hits, made.target, made.groups)["balanced"])
    found = estimates.corrected(
        made.hits,
        made.target,
        made.groups,
        lambda scores: best(scores) if scores["balanced"].max() > floor else None,
        times=60,
    )
    assert np.isfinite([found.raw, found.corrected.value, found.corrected.low, found.corrected.high]).all()


def test_an_empty_group_has_no_corrected_score():
    made = synthetic.sample(0, trials=3, classes=6)
    groups = {"many": np.arange(6), "few": np.array([], int)}
    found = estimates.corrected(made.hits, made.target, groups, best, "few", times=10)
    assert np.isnan([found.raw, found.corrected.value, found.optimism]).all()


@pytest.mark.parametrize("classes, each", [(2, 50), (1000, 5)])
def test_two_classes_and_a_thousand(classes: int, each: int):
    made = synthetic.sample(1, trials=4, classes=classes, each=each)
    found = estimates.corrected(made.hits, made.target, made.groups, best, times=30)
    assert found.reliable and 0 <= found.corrected.low <= found.corrected.value <= found.corrected.high <= 1


def test_a_correction_is_trusted_where_classes_have_images():
    groups = {"many": np.arange(10), "few": np.arange(10, 20)}
    images = np.full(20, 5)
    assert estimates.reliable(np.repeat(np.arange(20), images), groups)
    images[[3, 19]] = 4
    assert estimates.reliable(np.repeat(np.arange(20), images), groups)
    images[11] = 0
    assert not estimates.reliable(np.repeat(np.arange(20), images), groups)
    assert not estimates.reliable([], groups)
    images[:] = 20
    images[0] = 1
    assert not estimates.reliable(np.repeat(np.arange(20), images), groups), "it is in every draw"


@pytest.mark.parametrize("runs", [3, 5])
def test_intervals_over_seeds_and_images_cover_the_recipe(runs: int):
    held = []
    for seed in range(150):
        made = synthetic.sample(seed, trials=1, classes=30, each=10)
        recipe, random = made.true("balanced")[0], np.random.default_rng(seed)
        drawn = resample.grouped(made.hits, made.target, made.groups, resample.draws(made.target, 300, seed))
        samples = [drawn["balanced"][:, 0] + random.normal(0, 0.015) for _ in range(runs)]
        held.append(covered(estimates.seeds(samples, seed), recipe))
    assert 0.9 <= np.mean(held) <= 0.98


def test_fresh_seeds_of_a_chosen_recipe_cover_it_and_the_seed_that_chose_it_does_not():
    errors, held, naive, gains = [], [], [], []
    for seed in range(80):
        made = synthetic.sample(seed, trials=20, classes=20, each=10, seeds=4, wobble=0.05)
        first = resample.grouped(made.hits[::4], made.target, made.groups)["balanced"][0]
        chosen, truth = int(first.argmax()), made.true("balanced")[::4]
        rows = [4 * i + k for i in (chosen, 0) for k in range(4)]
        draws = resample.draws(made.target, 200, seed)
        own, *fresh = resample.grouped(made.hits[rows], made.target, made.groups, draws)["balanced"].T
        found, other = estimates.seeds(fresh[:3], seed), fresh[4:]
        errors.append((first[chosen] - truth[chosen], found.value - truth[chosen]))
        held.append(covered(found, truth[chosen]))
        naive.append(covered(estimates.estimate(first[chosen], own), truth[chosen]))
        gains.append(covered(estimates.apart(fresh[:3], other, seed), truth[chosen] - truth[0]))
    flattered, fair = np.mean(errors, 0)
    assert flattered > 0.03 and abs(fair) < 0.25 * flattered
    assert np.mean(naive) < 0.85 and 0.9 <= np.mean(held) <= 0.99 and np.mean(gains) >= 0.9


def test_seeds_that_differ_widen_the_interval_and_one_seed_cannot():
    drawn = np.random.default_rng(0).normal(0.5, 0.01, 2000)
    alone = estimates.seeds([drawn])
    assert alone == estimates.estimate(drawn.mean(), drawn)
    apart = estimates.seeds([drawn - 0.05, drawn, drawn + 0.05])
    assert apart.value == pytest.approx(drawn.mean())
    assert apart.high - apart.low > 2 * (alone.high - alone.low)


def test_the_interval_of_two_recipes_with_several_seeds_covers_their_difference():
    held = []
    for seed in range(150):
        made = synthetic.sample(seed, trials=2, classes=30, each=10)
        recipes, random = made.true("balanced"), np.random.default_rng(seed)
        drawn = resample.grouped(made.hits, made.target, made.groups, resample.draws(made.target, 300, seed))
        one, other = ([drawn["balanced"][:, i] + random.normal(0, 0.015) for _ in range(3)] for i in (0, 1))
        held.append(covered(estimates.apart(one, other, seed), recipes[0] - recipes[1]))
    assert 0.9 <= np.mean(held) <= 0.99
