import numpy as np
import pytest
from scipy.stats import beta

from analysis import perclass

COUNTS = np.array([500, 300, 200, 90, 60, 40, 12, 9, 6, 5, 5, 4])


def test_bins_hold_every_class_once_from_rare_to_frequent():
    parts = perclass.bins(COUNTS)
    assert sorted(np.concatenate(parts)) == list(range(12)) and len(parts) == 4
    assert [COUNTS[part].max() for part in parts] == sorted(COUNTS[part].max() for part in parts)
    assert len(perclass.bins(np.arange(1, 1001))) == perclass.BINS


def test_a_pooled_mean_has_the_interval_of_all_its_images():
    hits, images = np.array([8.0, 4.0, 0.0]), np.array([10, 10, 0])
    found = perclass.pooled(hits, images, np.arange(3))
    assert found.value == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx(tuple(beta.ppf([0.025, 0.975], 12.5, 8.5)))
    assert np.isnan(perclass.pooled(hits, images, np.array([2])).value)


def test_intervals_of_single_classes_cover_the_truth_and_lean_on_the_trend():
    rng = np.random.default_rng(0)
    counts = np.sort(rng.integers(5, 500, 60))[::-1]
    centre = 0.3 + 0.1 * np.log(counts / 5) / np.log(100)
    inside, narrower = [], []
    for _ in range(60):
        truth = rng.beta(20 * centre, 20 * (1 - centre))
        images = np.full(60, 10)
        found = perclass.single(rng.binomial(10, truth) / 10, images, counts)
        inside += [one.low <= t <= one.high for one, t in zip(found, truth, strict=True)]
        plain = [np.diff(beta.ppf([0.025, 0.975], 10 * e.value + 0.5, 10 * (1 - e.value) + 0.5))[0] for e in found]
        narrower.append(np.mean([e.high - e.low for e in found]) / np.mean(plain))
    assert 0.9 <= np.mean(inside) <= 0.98 and np.mean(narrower) < 0.85


def test_a_class_without_images_has_no_interval():
    per_class, images = np.full(12, 0.5), np.full(12, 20)
    per_class[3], images[3] = np.nan, 0
    found = perclass.single(per_class, images, COUNTS)
    assert np.isnan([found[3].value, found[3].low, found[3].high]).all()
    assert all(one.low < 0.5 < one.high for i, one in enumerate(found) if i != 3)


def test_confusions_go_from_rarer_to_more_frequent_groups():
    groups = {"many": np.array([0, 1]), "medium": np.array([2]), "few": np.array([3])}
    target = np.array([3, 3, 3, 3, 2, 2, 0, 0])
    pred = np.array([0, 0, 2, 3, 1, 2, 3, 1])
    found = perclass.confusions(pred, target, groups, 4)
    assert [(one.true, one.said, one.share, one.images) for one in found] == [
        (3, 0, 0.5, 2),
        (2, 1, 0.5, 1),
        (3, 2, 0.25, 1),
    ]
