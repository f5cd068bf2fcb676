import numpy as np
import pytest

from analysis.crossfit import Bench, crossfitted, folds
from analysis.routing import equal
from rayltr import metrics
from tests.analysis.panels import logs, noisy

TARGET = np.repeat(np.arange(4), [6, 5, 2, 1])


def test_every_item_is_judged_once_in_each_repeat_by_what_did_not_see_it():
    parts = folds(TARGET, seed=3)
    assert len(parts) == 4
    for one, other in (parts[:2], parts[2:]):
        np.testing.assert_array_equal(one[0], other[1])
        np.testing.assert_array_equal(one[1], other[0])
        assert sorted([*one[0], *one[1]]) == list(range(len(TARGET)))
        assert (np.abs(np.bincount(TARGET[one[0]], minlength=4) - np.array([3, 2.5, 1, 0.5])) <= 0.5).all()
    assert not np.array_equal(parts[0][0], parts[2][0]) and not np.array_equal(parts[0][0], parts[2][1])


def test_out_of_fold_scores_are_those_of_a_loop():
    experts, _ = logs(3, 4, (6, 5, 2, 1), seed=1)
    parts = folds(TARGET)
    mixtures = [equal(members, 4) for members in ([0], [1], [0, 2], [2])]
    nll, hits = crossfitted(experts, TARGET, parts, mixtures)
    for n, own in enumerate(TARGET):
        mine = [m for (_, judged), m in zip(parts, mixtures, strict=True) if n in judged]
        rows = [m.of([experts[e] for e in m.members])[n] for m in mine]
        assert len(rows) == 2
        assert nll[n] == pytest.approx(np.mean([-row[own] for row in rows]), abs=1e-12)
        assert hits[n] == np.mean([row.argmax() == own for row in rows])


def test_groups_are_scored_by_what_did_not_see_them():
    panel = noisy(3, 0, seed=2)
    bench = Bench(panel, times=200)
    judged = bench.judged(lambda _, fold: equal([fold % 3], 10))
    found = bench.score("another in every fold", judged, judged)
    hits = crossfitted(panel.logits, panel.target, bench.parts, judged.mixtures[:-1])[1]
    by_class = np.array([hits[panel.target == c].mean() for c in range(10)])
    for group, classes in panel.groups.items():
        assert found.groups[group].value == pytest.approx(by_class[classes].mean())
    right = [np.mean(panel.logits[1][panel.target == c].argmax(1) == c) for c in range(10)]
    assert {name: found.whole[name] for name in panel.groups} == metrics.group_means(np.array(right), panel.groups)


def test_estimates_are_means_over_classes():
    panel = noisy(1, 1, seed=0, classes=4, each=6)
    bench = Bench(panel, times=300)
    values = np.random.default_rng(0).normal(size=24)
    by_class = [values[panel.target == c].mean() for c in range(4)]
    found = bench.estimate(values)
    assert found.value == pytest.approx(np.mean(by_class)) and found.low < found.value < found.high
    assert bench.estimate(values, np.array([1, 2])).value == pytest.approx(np.mean(by_class[1:3]))
    assert np.isnan(bench.estimate(values, np.array([], np.int64)).value)
    error = np.sqrt(sum(values[panel.target == c].var(ddof=1) / 6 for c in range(4))) / 4
    assert (found.high - found.low) / 3.92 == pytest.approx(error, rel=0.2)


def test_a_score_beside_the_single_expert():
    panel = noisy(2, 0, seed=1)
    bench = Bench(panel, times=200)
    single, both = (bench.judged(lambda *_, members=members: equal(members, 10)) for members in ([0], [0, 1]))
    found, z = bench.score("both", both, single), equal([0, 1], 10).of(panel.logits)
    assert found.members == ("0000", "0001") and found.passes == 2 and found.cost == 20
    assert found.whole["nll"] == metrics.balanced_nll(z, panel.target, 10)
    assert found.whole["balanced"] == pytest.approx(np.mean(z.argmax(1) == panel.target))
    cross_fitted = {"nll": found.nll, "balanced": found.balanced, **found.groups}
    for name, own in cross_fitted.items():
        assert own.value == pytest.approx(found.whole[name], abs=1e-5), "nothing was chosen"
        assert own.low < own.value < own.high
    alone = bench.score("one", single, single)
    assert alone.gain_nll.value == alone.gain_nll.low == alone.gain_nll.high == 0
    assert found.gain_nll.value == pytest.approx(alone.nll.value - found.nll.value, abs=1e-5)
    assert found.gain_groups["few"].value == pytest.approx(
        found.groups["few"].value - alone.groups["few"].value, abs=1e-6
    )
