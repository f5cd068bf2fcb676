import math

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.metrics import balanced_accuracy_score

from rayltr import metrics

IF100 = [int(500 * 100 ** (-i / 99)) for i in range(100)]


def long_tailed(images: int = 600, classes: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [N, C] that lean towards frequent classes, target [N], counts [C]."""
    rng = np.random.default_rng(seed)
    counts = np.array([int(400 * 80 ** (-i / (classes - 1))) for i in range(classes)])
    target = rng.integers(0, classes, images)
    z = 2 * rng.normal(size=(images, classes)) + np.log(counts)
    z[np.arange(images), target] += 3
    return z.astype(np.float32), target, counts


def gaussian(tau: float, temperature: float, each: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of which softmax(z / temperature - tau log prior) is the true posterior of equally frequent classes."""
    rng = np.random.default_rng(1)
    counts = np.array([900, 500, 200, 80, 30, 10])
    centres, target = 1.5 * rng.normal(size=(6, 4)), np.repeat(np.arange(6), each)
    x = centres[target] + rng.normal(size=(6 * each, 4))
    posterior = x @ centres.T - (centres**2).sum(1) / 2
    return temperature * (posterior + tau * np.log(counts / counts.sum())), target, counts


def slow_nll(z: np.ndarray, target: np.ndarray, classes: int, temperature: float) -> float:
    per_class: dict[int, list[float]] = {}
    for row, y in zip(z.astype(np.float64) / temperature, target, strict=True):
        per_class.setdefault(int(y), []).append(math.log(math.fsum(math.exp(v) for v in row)) - row[y])
    assert max(per_class) < classes
    return sum(sum(values) / len(values) for values in per_class.values()) / len(per_class)


def test_groups_of_cifar100_at_ratio_100():
    found, rule = metrics.groups(IF100)
    assert rule == "shots"
    assert {name: len(members) for name, members in found.items()} == {"many": 35, "medium": 35, "few": 30}
    assert np.array_equal(np.concatenate(list(found.values())), np.arange(100))


def test_group_limits_are_strict():
    found, _ = metrics.groups([101, 100, 20, 19, 0])
    assert [list(members) for members in found.values()] == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize(("classes", "sizes"), [(10, [3, 4, 3]), (100, [36, 35, 29]), (1000, [390, 445, 165])])
def test_published_ranges_are_of_the_classes_by_frequency(classes, sizes):
    counts = np.random.default_rng(0).permutation(classes) + 5
    found, rule = metrics.groups(counts, "deit_lt")
    assert rule == "deit_lt" and [len(members) for members in found.values()] == sizes
    order = np.argsort(-counts)
    for members, own in zip(found.values(), np.split(order, np.cumsum(sizes)[:2]), strict=True):
        assert set(members) == set(own)


def test_published_ranges_are_for_the_published_numbers_of_classes():
    with pytest.raises(ValueError, match="the group rule deit_lt is for 10, 100, 1000, 8142 classes, not 12"):
        metrics.groups(np.arange(12), "deit_lt")


def test_groups_fall_back_to_thirds_by_frequency():
    found, rule = metrics.groups([60, 500, 50, 400, 300, 200])  # no class below 20
    assert rule == "quantile"
    assert [list(members) for members in found.values()] == [[1, 3], [4, 5], [0, 2]]
    assert [len(members) for members in metrics.groups(IF100, "quantile")[0].values()] == [33, 34, 33]
    assert len(metrics.groups([60, 500], "shots")[0]["few"]) == 0


def test_two_classes_are_one_many_and_one_few():
    found, _ = metrics.groups([5, 50])
    assert [list(members) for members in found.values()] == [[1], [], [0]]


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="unknown group rule 'terciles': known: auto, shots, quantile"):
        metrics.groups([1, 2, 3], "terciles")


def test_class_accuracy_against_a_loop():
    z, target, counts = long_tailed()
    pred = z.argmax(1)
    expected = [np.mean([p == y for p, y in zip(pred, target, strict=True) if y == c]) for c in range(12)]
    np.testing.assert_allclose(metrics.class_accuracy(pred, target, 12), expected)
    np.testing.assert_allclose(np.mean(expected), balanced_accuracy_score(target, pred))


def test_a_class_without_images_and_an_empty_group_are_nan():
    per_class = metrics.class_accuracy([0, 2, 2], [0, 0, 2], 4)
    np.testing.assert_array_equal(per_class, [0.5, np.nan, 1.0, np.nan])
    found = metrics.group_means(per_class, {"many": [0, 1], "medium": [1, 3], "few": []})
    assert found["many"] == 0.5 and math.isnan(found["medium"]) and math.isnan(found["few"])


def test_worst_decile():
    assert metrics.worst_decile(np.arange(20) / 20) == pytest.approx(0.025)
    assert metrics.worst_decile(np.arange(19) / 20) == 0
    assert metrics.worst_decile([0.9, np.nan, 0.3]) == 0.3
    assert math.isnan(metrics.worst_decile([np.nan]))


def test_adjust_counts_an_empty_class_as_one_image():
    z = np.zeros((2, 3))
    np.testing.assert_allclose(metrics.adjust(z, [8, 1, 0], 1.5)[0], -1.5 * np.log([0.8, 0.1, 0.1]))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_balanced_nll_against_a_loop(temperature: float):
    z, target, _ = long_tailed()
    target[target == 3] = 4  # an absent class
    assert metrics.balanced_nll(z, target, 12, temperature) == pytest.approx(slow_nll(z, target, 12, temperature))


def test_nll_survives_large_logits():
    z, target, counts = long_tailed()
    assert np.isfinite(metrics.balanced_nll(1e4 * z, target, 12))
    assert metrics.balanced_nll(z + 1e6, target, 12) == pytest.approx(metrics.balanced_nll(z, target, 12), rel=0.01)


@pytest.mark.parametrize(("tau", "temperature"), [(1.0, 1.0), (0.0, 3.0), (1.7, 0.2), (-0.3, 0.02)])
def test_fit_recovers_tau_and_temperature(tau: float, temperature: float):
    z, target, counts = gaussian(tau, temperature)
    found = metrics.fit(z, target, counts)
    assert found[0] == pytest.approx(tau, abs=0.101)
    assert found[1] == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_fit_is_the_minimum_of_the_whole_grid(scale: float):
    z, target, counts = long_tailed(images=200)
    tau, temperature, nll = metrics.fit(scale * z, target, counts)
    prior = np.log(counts / counts.sum())
    grid = [
        (slow_nll(scale * z / t - each * prior, target, 12, 1.0), each)
        for each in metrics.TAUS[::2]
        for t in scale * np.geomspace(0.3, 3.0, 25)
    ]
    assert nll <= min(grid)[0] + 1e-6
    assert nll == pytest.approx(slow_nll(scale * z / temperature - tau * prior, target, 12, 1.0))
    assert abs(tau - min(grid)[1]) < 0.25


def test_fit_leaves_tau_alone_where_it_does_not_matter():
    z, target, _ = long_tailed()
    assert metrics.fit(z, target, [7] * 12)[0] == 0.0


def test_ece_against_a_loop():
    z, target, _ = long_tailed(images=305)
    p = np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum(1, keepdims=True)
    order = sorted(range(305), key=lambda i: p[i].max())
    expected, start = 0.0, 0
    for b in range(15):
        size = 305 // 15 + (b < 305 % 15)
        part = order[start : start + size]
        start += size
        gap = np.mean([p[i].max() for i in part]) - np.mean([p[i].argmax() == target[i] for i in part])
        expected += abs(gap) * size / 305
    assert metrics.ece(z, target) == pytest.approx(expected)


def test_a_perfectly_calibrated_classifier_has_little_ece():
    z, target, _ = gaussian(0.0, 1.0)
    assert metrics.ece(z, target) < 0.015 < metrics.ece(3 * z, target)


def test_summary_agrees_with_its_parts():
    z, target, counts = long_tailed()
    found, groups = metrics.groups(counts)[0], metrics.groups(counts)[0]
    summary = metrics.summary(z, target, counts, found)
    assert tuple(sorted(summary)) == tuple(sorted(metrics.SUMMARY))
    assert summary["accuracy"] == pytest.approx(np.mean(z.argmax(1) == target))
    assert summary["balanced"] == pytest.approx(balanced_accuracy_score(target, z.argmax(1)))
    tau, temperature, nll = metrics.fit(z, target, counts)
    assert (summary["tau"], summary["temperature"], summary["fitted_nll"]) == (tau, temperature, nll)
    pred = (z / temperature - tau * np.log(counts / counts.sum())).argmax(1)
    assert summary["fitted_balanced"] == pytest.approx(balanced_accuracy_score(target, pred))
    assert summary["fitted_few"] == pytest.approx(np.mean([np.mean(pred[target == c] == c) for c in groups["few"]]))
    assert summary["fitted_few"] > summary["few"] and summary["fitted_nll"] < summary["balanced_nll"]
    corrected = z / temperature - tau * np.log(counts / counts.sum())
    assert summary["ece"] == metrics.ece(z, target)
    assert summary["fitted_ece"] == pytest.approx(metrics.ece(corrected, target), abs=1e-6)
    loss = logsumexp(corrected, axis=1) - corrected[np.arange(len(z)), target]
    by_class = [loss[target == c].mean() for c in range(12)]
    assert summary["fitted_nll"] == pytest.approx(np.mean(by_class), abs=1e-5)
    for name, members in groups.items():
        assert summary[f"fitted_{name}_nll"] == pytest.approx(np.mean([by_class[c] for c in members]), abs=1e-5)
    assert summary["fewest_images"] == np.bincount(target).min()
    per_class = metrics.class_accuracy(pred, target, 12)
    assert summary["fitted_worst_decile"] == per_class.min() > summary["worst_decile"]


def test_a_class_without_images_is_no_part_of_the_nll_of_its_group():
    z, target, counts = long_tailed()
    groups, kept = metrics.groups(counts)[0], target != 11
    assert 11 in groups["few"]
    rest = {**groups, "few": np.setdiff1d(groups["few"], [11]), "gone": np.array([11])}
    found, expected = (metrics.group_nll(z[kept], target[kept], own) for own in (groups, rest))
    assert {name: expected[name] for name in groups} == found and np.isnan(expected["gone"])
    summary = metrics.summary(z[kept], target[kept], counts, groups)
    assert summary["fewest_images"] == np.bincount(target[kept])[:11].min() > 0


def test_sweep_passes_through_the_raw_and_the_fitted_scores():
    z, target, counts = long_tailed()
    groups = metrics.groups(counts)[0]
    summary = metrics.summary(z, target, counts, groups)
    curve = metrics.sweep(z, target, counts, groups, summary["temperature"])
    raw, fitted = (int(np.flatnonzero(curve["tau"] == tau)[0]) for tau in (0.0, summary["tau"]))
    for name in ("accuracy", "balanced", "many", "medium", "few"):
        assert curve[name][raw] == summary[name] and curve[name][fitted] == summary[f"fitted_{name}"]
    assert curve["nll"][fitted] == pytest.approx(summary["fitted_nll"]) and curve["nll"].argmin() == fitted
    assert (np.diff(curve["few"]) >= -0.02).all() and (np.diff(curve["many"]) <= 0.02).all()


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_nan_everywhere(spoilt: float):
    z, target, counts = long_tailed()
    z[5, 2] = spoilt
    groups = metrics.groups(counts)[0]
    assert np.isnan(list(metrics.summary(z, target, counts, groups).values())).all()
    assert np.isnan(metrics.fit(z, target, counts)).all()
    assert np.isnan(metrics.sweep(z, target, counts, groups)["balanced"]).all()


def test_no_images_give_nan():
    z, target, counts = long_tailed()
    groups = metrics.groups(counts)[0]
    assert np.isnan(list(metrics.summary(z[:0], target[:0], counts, groups).values())).all()
    assert np.isnan(metrics.balanced_nll(z[:0], target[:0], 12))
    assert np.isnan(metrics.sweep(z[:0], target[:0], counts, groups)["nll"]).all()


def test_the_area_is_what_a_curve_covers():
    assert metrics.area([1.0, 0.5], [0.25, 0.75]) == pytest.approx(0.5 * 0.75 + 0.5 * 0.25)
    assert metrics.area([0.5, 0.4, 1.0], [0.75, 0.7, 0.25]) == pytest.approx(0.5)
    assert metrics.area([0.8], [0.5]) == pytest.approx(0.4) and np.isnan(metrics.area([0.8, 0.9], [np.nan, np.nan]))
    rng = np.random.default_rng(0)
    grid = (np.arange(400) + 0.5) / 400
    for _ in range(5):
        many, few = rng.random((2, 7))
        below = (grid[:, None, None] <= many) & (grid[None, :, None] <= few)
        assert metrics.area(many, few) == pytest.approx(below.any(-1).mean(), abs=0.01)
