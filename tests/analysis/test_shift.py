import math

import numpy as np
import pytest

from analysis.shift import RATIOS, priors, under_priors
from rayltr import metrics
from tests.analysis.conftest import logits, long_tail


def test_priors_by_hand():
    found = priors([30, 500, 90], ratios=(4,))  # ranks 2, 0, 1
    assert [(direction, ratio) for direction, ratio, _ in found] == [("forward", 4), ("uniform", 1), ("backward", 4)]
    forward, uniform, backward = (prior for *_, prior in found)
    assert forward == pytest.approx(np.array([0.25, 1, 0.5]) / 1.75)
    assert uniform == pytest.approx([1 / 3] * 3)
    assert backward == pytest.approx(np.array([1, 0.25, 0.5]) / 1.75)


def test_priors_are_the_profiles_of_the_published_protocol():
    """There the classes are in the order of their frequency: the share of class c is (1 / ratio) ^ (c / (C - 1))."""
    rows = priors(long_tail(100))
    assert [row[:2] for row in rows] == [
        *(("forward", r) for r in (50, 25, 10, 5, 2)),
        ("uniform", 1),
        *(("backward", r) for r in (2, 5, 10, 25, 50)),
    ]
    for direction, ratio, prior in rows:
        size = [(1 / ratio) ** ((c if direction == "forward" else 99 - c) / 99) for c in range(100)]
        assert prior == pytest.approx(np.array(size) / sum(size), abs=1e-12)
        assert prior.max() / prior.min() == pytest.approx(ratio)


def test_a_ratio_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, not 0.5"):
        priors([5, 3], (2, 0.5))


def test_accuracy_against_loops():
    counts = long_tail(8)
    rng = np.random.default_rng(0)
    target = rng.integers(0, 8, 150)
    z = rng.normal(size=(150, 8))
    z[np.arange(150), target] += 1
    groups = metrics.groups(counts)[0]
    for (direction, ratio, prior), row in zip(priors(counts), under_priors(z, target, counts, groups), strict=True):
        assert (row.direction, row.ratio, row.covered) == (direction, ratio, pytest.approx(1))
        plain = adjusted = variance = 0.0
        right = {}
        for c in range(8):
            own = [i for i in range(150) if target[i] == c]
            before = [float(max(range(8), key=lambda k, i=i: z[i, k]) == c) for i in own]
            after = [float(max(range(8), key=lambda k, i=i: z[i, k] + math.log(prior[k])) == c) for i in own]
            right[c] = (np.mean(before), np.mean(after))
            plain, adjusted = plain + prior[c] * right[c][0], adjusted + prior[c] * right[c][1]
            variance += prior[c] ** 2 * np.var(np.subtract(after, before)) / len(own)
        assert row.plain == pytest.approx(plain, abs=1e-9)
        assert row.adjusted == pytest.approx(adjusted, abs=1e-9)
        assert row.error == pytest.approx(math.sqrt(variance), abs=1e-9)
        for name, members in groups.items():
            assert row.groups[name] == pytest.approx(np.mean([right[c] for c in members], axis=0), abs=1e-9)


def test_weighting_is_the_mean_over_drawn_test_sets():
    counts, groups = [300, 50, 8], {"many": [0], "medium": [1], "few": [2]}
    z, target = logits(np.array(counts), 40, 1.5, 1.0, seed=4)
    row = next(r for r in under_priors(z, target, counts, groups, (4,)) if r.direction == "backward")
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2000):  # 10, 20 and 40 images: a ratio of 4, backward
        chosen = [rng.choice(np.flatnonzero(target == c), size, False) for c, size in enumerate((10, 20, 40))]
        kept = np.concatenate(chosen)
        drawn.append((z[kept].argmax(1) == target[kept]).mean())
    assert row.plain == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) / math.sqrt(2000))


def test_the_uniform_prior_adjusts_nothing_and_balanced_accuracy_comes_out():
    counts = long_tail(20)
    z, target = logits(counts, 15, 2.0, 0.5, seed=2)
    groups = metrics.groups(counts)[0]
    row = next(r for r in under_priors(z, target, counts, groups) if r.direction == "uniform")
    scores = metrics.scores(z, target, counts, groups)
    assert row.plain == row.adjusted == pytest.approx(scores["balanced"]) and row.error == 0
    assert {name: pair[0] for name, pair in row.groups.items()} == pytest.approx(
        {name: scores[name] for name in groups}
    )


def test_knowing_the_prior_helps_the_more_the_steeper_it_is():
    counts = long_tail(50)
    z, target = logits(counts, 40, 2.7, 1.0, seed=0)
    rows = {(r.direction, r.ratio): r for r in under_priors(z, target, counts, metrics.groups(counts)[0])}
    for direction in ("forward", "backward"):
        gains = [rows[direction, ratio].adjusted - rows[direction, ratio].plain for ratio in RATIOS]
        assert gains[-1] > gains[2] > gains[0] and gains[-1] > 2 * rows[direction, RATIOS[-1]].error


def test_a_class_without_images_is_not_covered():
    counts, groups = [300, 50, 8], {"many": [0], "medium": [1], "few": [2]}
    z = np.array([[2.0, 1, 0], [2, 3, 0], [0, 1, 0]])
    forward = under_priors(z, [0, 1, 1], counts, groups, (4,))[0]
    assert forward.covered == pytest.approx(1.5 / 1.75)
    assert forward.plain == pytest.approx(1) and np.isnan(forward.groups["few"]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 1000])
def test_nothing_is_claimed_about_logits_that_are_not_finite_or_absent(classes: int):
    counts = long_tail(classes)
    groups = metrics.groups(counts)[0]
    z, target = logits(counts, 1, 2.0, 0.0, seed=0)
    assert all(0 <= row.plain <= 1 and 0 <= row.adjusted <= 1 for row in under_priors(z, target, counts, groups, (50,)))
    z[0, 0] = np.nan
    for some, own in ((z, target), (z[:0], target[:0])):
        for row in under_priors(some, own, counts, groups, (50,)):
            assert np.isnan([row.plain, row.adjusted, row.error, *row.groups["many"]]).all()
