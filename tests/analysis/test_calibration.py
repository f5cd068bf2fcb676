import math

import numpy as np
import pytest

from analysis import calibration
from analysis.calibration import classwise, folds, measured, reliability, target_prior, temperature, weights, worthwhile
from rayltr import metrics
from tests.analysis.conftest import logits, long_tail


def case(classes: int = 7, each: int = 30, seed: int = 0):
    """Logits, target, training counts and groups, with as many images of each class or random numbers of them."""
    rng = np.random.default_rng(seed)
    counts = long_tail(classes)
    target = rng.integers(0, classes, classes * each)
    z = rng.normal(size=(len(target), classes)) * 1.5
    z[np.arange(len(target)), target] += 2 * counts[target] / counts.max() + 0.5
    return z, target, counts, metrics.groups(counts)[0]


def honest(n: int, classes: int, scale: float, seed: int = 0):
    """Logits whose softmax at temperature `scale` is the truth the targets are drawn from."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.normal(size=(n, classes))
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return scale * z, (p.cumsum(1) < rng.uniform(size=(n, 1))).sum(1).clip(max=classes - 1)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.array([[math.exp(v - max(row)) / sum(math.exp(u - max(row)) for u in row) for v in row] for row in z])


def slow_bins(by: list[float], bins: int) -> list[list[int]]:
    """Bins of equally many, the first ones one larger."""
    order, found = sorted(range(len(by)), key=lambda i: by[i]), []
    for b in range(bins):
        size = len(by) // bins + (b < len(by) % bins)
        found.append(order[:size])
        order = order[size:]
    return [part for part in found if part]


def slow_error(p: list[float], hit: list[bool], weight: list[float], bins: int) -> float:
    parts = slow_bins(p, bins)
    return sum(abs(sum(weight[i] * (p[i] - hit[i]) for i in part)) for part in parts) / sum(weight)


@pytest.mark.parametrize("prior", ["balanced", "train", np.arange(7.0)])
def test_everything_against_loops(prior):
    z, target, counts, groups = case()
    wanted = {"balanced": [1 / 7] * 7, "train": [n / sum(counts) for n in counts]}
    share = wanted[prior] if isinstance(prior, str) else [c / 21 for c in range(7)]
    images = [sum(target == c) for c in range(7)]
    kept = [i for i in range(len(target)) if share[target[i]]]
    w = [share[target[i]] / images[target[i]] for i in kept]
    p, own = softmax(z)[kept], [int(target[i]) for i in kept]
    said = [int(row.argmax()) for row in p]
    sure, hit = [max(row) for row in p], [one == other for one, other in zip(said, own, strict=True)]
    found = measured(z, target, counts, groups, prior)
    assert found.overall.ece == pytest.approx(slow_error(sure, hit, w, 15), abs=1e-12)
    assert found.nll == pytest.approx(-sum(v * math.log(row[c]) for v, row, c in zip(w, p, own, strict=True)), abs=1e-9)
    for name, members in groups.items():
        ours = [i for i in range(len(own)) if said[i] in members]
        error = slow_error(*([v[i] for i in ours] for v in (sure, hit, w)), 15)
        assert found.predicted[name].ece == pytest.approx(error, abs=1e-12)
        assert found.predicted[name].images.sum() == len(ours)
        true = [i for i in range(len(own)) if own[i] in members]
        gap = sum(w[i] * (sure[i] - hit[i]) for i in true) / sum(w[i] for i in true)
        assert found.gap[name] == pytest.approx(gap, abs=1e-12)
        classes = [c for c in members if share[c]]
        per_class = [slow_error([row[c] for row in p], [o == c for o in own], w, 15) for c in classes]
        assert found.classwise[classes] == pytest.approx(per_class, abs=1e-12)
        assert found.classwise_groups[name] == pytest.approx(np.mean(per_class), abs=1e-12)


def test_reliability_by_hand():
    found = reliability([0.9, 0.5, 0.6, 0.8], [True, False, True, False], [0.1, 0.2, 0.3, 0.4], bins=2)
    assert found.share == pytest.approx([0.5, 0.5]) and found.images.tolist() == [2, 2]
    assert found.confidence == pytest.approx([0.2 * 0.5 / 0.5 + 0.3 * 0.6 / 0.5, (0.1 * 0.9 + 0.4 * 0.8) / 0.5])
    assert found.accuracy == pytest.approx([0.6, 0.2])
    assert found.ece == pytest.approx(0.5 * abs(0.56 - 0.6) + 0.5 * abs(0.82 - 0.2))


def test_the_debiased_error_against_draws_of_the_noise():
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.3, 1, 300)
    found = reliability(sure, rng.uniform(size=300) < sure - 0.1, np.full(300, 1 / 300))
    noise = np.sqrt(found.accuracy * (1 - found.accuracy) / found.images)
    drawn = np.abs(rng.normal(found.accuracy, noise, (200_000, 15)) - found.confidence) @ found.share
    assert found.debiased == pytest.approx(2 * found.ece - drawn.mean(), abs=2e-4)
    unequal = reliability(sure, sure > 0.6, np.where(sure > 0.5, 2.0, 1.0), bins=1)
    assert unequal.accuracy[0] == pytest.approx(2 * (sure > 0.6).sum() / (300 + (sure > 0.5).sum()))


def test_debiasing_takes_off_what_noise_adds():
    plain, debiased = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sure = rng.uniform(0.3, 1, 400)
        found = reliability(sure, rng.uniform(size=400) < sure, np.full(400, 1 / 400))
        plain.append(found.ece)
        debiased.append(found.debiased)
    assert np.mean(debiased) < 0.7 * np.mean(plain)  # the truth is 0


def test_bins_that_are_surely_right_are_left_alone():
    sure = np.array([0.9, 0.8, 0.95, 0.7])
    found = reliability(sure, np.ones(4, bool), np.full(4, 0.25), bins=2)
    assert found.debiased == pytest.approx(found.ece) == pytest.approx(1 - sure.mean())


def test_on_balanced_images_the_error_is_the_one_of_the_records():
    z, target = logits(long_tail(10), 33, 2.7, 0.0, seed=3)
    found = measured(z, target, long_tail(10), metrics.groups(long_tail(10))[0])
    assert found.overall.ece == pytest.approx(metrics.ece(z, target), abs=1e-12)
    assert found.nll == pytest.approx(metrics.balanced_nll(z, target, 10), abs=1e-9)


def test_repeating_images_changes_nothing_but_the_noise():
    z, target, counts, groups = case(each=15)
    once, twice = measured(z, target, counts, groups), measured(z.repeat(2, 0), target.repeat(2), counts, groups)
    assert twice.gap == pytest.approx(once.gap) and twice.nll == pytest.approx(once.nll)
    assert twice.overall.images.sum() == 2 * once.overall.images.sum()


def test_the_signed_gap_tells_who_is_flattered():
    z = np.log([[0.9, 0.1], [0.9, 0.1], [0.7, 0.3], [0.2, 0.8]])
    found = measured(z, [0, 0, 1, 1], [200, 5], {"many": [0], "medium": [], "few": [1]})
    assert found.gap["many"] == pytest.approx(-0.1)
    assert found.gap["few"] == pytest.approx((0.7 + 0.8 - 1) / 2)
    assert math.isnan(found.gap["medium"]) and math.isnan(found.predicted["medium"].ece)
    assert found.predicted["few"].ece == pytest.approx(0.2)


def test_weights_by_hand():
    assert weights([0, 0, 2], [6, 3, 1]) == pytest.approx([0.25, 0.25, 0.5])
    assert weights([0, 0, 2], [6, 3, 1], "train") == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    assert weights([0, 0, 2], [6, 3, 1], [1, 5, 0]) == pytest.approx([0.5, 0.5, 0])
    assert np.isnan(weights([0, 0], [6, 3], [0, 1])).all()
    assert target_prior([3, 0], "train") == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("prior", ["uniform", [1, 2], [1, 2, -1], [0, 0, 0], [1, 2, np.nan]])
def test_priors_that_cannot_be(prior):
    with pytest.raises(ValueError, match="target prior"):
        target_prior([5, 3, 1], prior)


def test_the_temperature_against_a_fine_grid():
    z, target, counts, _ = case(seed=2)
    weight = weights(target, counts, "train")
    own = np.arange(len(z))

    def nll(t: float) -> float:
        return weight @ (np.log(np.exp(z / t).sum(1)) - z[own, target] / t)

    grid = np.exp(np.arange(-2, 2, 1e-3))
    assert temperature(z, target, weight) == pytest.approx(min(grid, key=nll), rel=3e-3)
    assert temperature(50 * z, target, weight) == pytest.approx(50 * min(grid, key=nll), rel=3e-3)


def test_a_temperature_is_recommended_to_the_over_confident_only():
    counts = long_tail(5)
    groups = metrics.groups(counts)[0]
    z, target = honest(6000, 5, 3.0)
    worth = worthwhile(z, target, counts, groups, np.bincount(target))  # weights of 1: the draw's own prior
    assert worth.choice != "none"
    assert worth.options["one"].temperatures["all"] == pytest.approx(3, rel=0.1)
    assert worth.options["one"].ece < 0.03 < 0.1 < worth.options["none"].ece
    already = worthwhile(z / worth.options["one"].temperatures["all"], target, counts, groups, np.bincount(target))
    assert already.options["one"].temperatures["all"] == pytest.approx(1, abs=0.01)


def test_nll_alone_does_not_recommend_a_temperature():
    """Two kinds of images with errors of opposite sign: the NLL asks for heat, which the calibrated majority pays."""
    z, target = honest(1500, 4, 1.0, seed=5)
    rng = np.random.default_rng(0)
    wrong = rng.choice(1500, 30, replace=False)
    z[wrong] = 0
    z[wrong, (target[wrong] + 1) % 4] = 15.0
    counts = np.array([400, 60, 50, 5])
    worth = worthwhile(z, target, counts, metrics.groups(counts)[0], np.bincount(target))
    none, one = worth.options["none"], worth.options["one"]
    assert one.nll < none.nll and one.ece > none.ece
    assert worth.choice == "none"


def test_groups_get_their_own_temperature_where_it_helps_and_there_are_enough_images():
    rng = np.random.default_rng(0)
    z, target = honest(3000, 6, 1.0, seed=1)
    counts = np.array([300, 200, 60, 50, 8, 5])
    groups = metrics.groups(counts)[0]
    heat = np.where(z.argmax(1) >= 4, 4.0, np.where(z.argmax(1) < 2, 0.5, 1.0))
    worth = worthwhile(z * heat[:, None], target, counts, groups)
    assert worth.choice == "groups" and worth.reason == ""
    assert worth.options["groups"].temperatures == pytest.approx({"many": 0.5, "medium": 1, "few": 4}, rel=0.15)
    less = rng.choice(3000, 400, replace=False)
    fewer = worthwhile(z[less], target[less], counts, groups)
    assert "groups" not in fewer.options and "200" in fewer.reason


def test_no_image_is_judged_by_a_fit_that_has_seen_it():
    z, target, counts, groups = case(each=40)
    fold = folds(target, calibration.FOLDS, seed=0)
    weight = weights(target, counts)
    one = worthwhile(z, target, counts, groups).options["one"]
    for k in range(calibration.FOLDS):
        seen = fold != k
        assert one.applied[~seen] == pytest.approx(temperature(z[seen], target[seen], weight[seen]))
    after = measured(z / one.applied[:, None], target, counts, groups)
    assert after.overall.ece == pytest.approx(one.ece) and after.nll == pytest.approx(one.nll)
    before = worthwhile(z, target, counts, groups).options["none"]
    assert before.nll == pytest.approx(measured(z, target, counts, groups).nll)


def test_folds_are_even_within_every_class_and_repeatable():
    target = np.random.default_rng(0).integers(0, 9, 203)
    fold = folds(target, 5, seed=4)
    assert np.ptp(np.bincount(fold, minlength=5)) <= 1
    assert all(np.ptp(np.bincount(fold[target == c], minlength=5)) <= 1 for c in range(9))
    assert (fold == folds(target, 5, seed=4)).all() and (fold != folds(target, 5, seed=5)).any()


@pytest.mark.parametrize("classes, each", [(2, 8), (1000, 1)])
def test_few_and_many_classes(classes: int, each: int):
    counts = long_tail(classes)
    z, target = logits(counts, each, 2.7, 0.5, seed=1)
    groups = metrics.groups(counts)[0]
    found = measured(z, target, counts, groups)
    assert found.unmeasured == 0 and 0 <= found.overall.ece <= 1
    assert len(found.classwise) == classes and np.isfinite(found.classwise).all()
    assert math.isnan(found.gap["medium"]) == (classes == 2)
    assert worthwhile(z, target, counts, groups).choice in ("none", "one", "groups")


def test_a_class_without_images_is_unmeasured_not_zero():
    z, target, counts, groups = case()
    seen = target != 2
    found = measured(z[seen], target[seen], counts, groups)
    assert found.unmeasured == 1
    assert np.isnan(found.classwise).nonzero()[0].tolist() == [2]
    rest = groups["many"] if 2 in groups["many"] else groups["medium"]
    name = next(name for name, members in groups.items() if members is rest)
    assert found.classwise_groups[name] == pytest.approx(np.nanmean(found.classwise[rest]))


@pytest.mark.filterwarnings("error")
def test_nothing_is_claimed_about_logits_that_are_not_finite_or_absent():
    z, target, counts, groups = case()
    z[3, 1] = np.nan
    for some, own, unmeasured in ((z, target, 0), (z[:0], target[:0], 7)):
        found = measured(some, own, counts, groups)
        assert math.isnan(found.overall.ece) and math.isnan(found.overall.debiased) and math.isnan(found.nll)
        assert np.isnan([*found.gap.values(), *found.classwise, *found.classwise_groups.values()]).all()
        assert all(math.isnan(part.ece) and not part.images.size for part in found.predicted.values())
        assert found.unmeasured == unmeasured
        worth = worthwhile(some, own, counts, groups)
        assert worth.choice == "none" and worth.reason and math.isnan(worth.options["none"].ece)


def test_fewer_images_than_bins():
    found = reliability([0.4, 0.8], [False, True], [0.5, 0.5])
    assert found.images.tolist() == [1, 1] and found.ece == pytest.approx(0.3)
    assert classwise([[0.4, 0.6], [0.2, 0.8]], [0, 1], [0.5, 0.5]) == pytest.approx([0.4, 0.4])
