import numpy as np
import pytest

from analysis.greedy import TINY, Path, condensed, greedy, half, select, weighted
from analysis.routing import plain
from rayltr import metrics
from tests.analysis.panels import logs

IMAGES = (5, 1, 3, 0, 4)
GROUPS = [np.array([0, 1]), np.array([2]), np.array([3, 4]), np.array([], np.int64)]


def nll(z, target):
    """Class-balanced, by loops."""
    classes = sorted(set(target.tolist()))
    return np.mean([np.mean([-z[i, c] for i in np.flatnonzero(target == c)]) for c in classes])


def averaged(parts, mode):
    if mode == "prob":
        return np.log(np.mean([np.exp(z) for z in parts], 0))
    z = np.mean(parts, 0)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def slow(experts, target, mode, rounds, limit, penalty):
    """Greedy selection as Caruana et al. write it down."""
    picks, losses = [], []
    for _ in range(rounds):
        allowed = range(len(experts)) if len(set(picks)) < limit else sorted(set(picks))
        tried = [
            nll(averaged([experts[p] for p in (*picks, m)], mode), target) + penalty * len({*picks, m}) for m in allowed
        ]
        picks.append(allowed[int(np.argmin(tried))])
        losses.append(min(tried))
    return picks, losses


@pytest.mark.parametrize("mode", ["logit", "prob"])
@pytest.mark.parametrize(("limit", "penalty"), [(2, 0.0), (5, 0.0), (5, 0.02)])
def test_selection_is_that_of_a_slow_reference(mode, limit, penalty):
    experts, target = logs(7, 5, IMAGES, seed=1)
    found = greedy(condensed(experts, target, GROUPS), mode=mode, rounds=12, limit=limit, penalty=penalty)
    picks, losses = slow(experts, target, mode, 12, limit, penalty)
    assert found.picks == picks
    np.testing.assert_allclose(found.losses, losses, atol=1e-9)


def test_equal_losses_are_decided_by_accuracy_and_then_by_order():
    right, wrong = np.log([[0.4, 0.3, 0.3]]), np.log([[0.4, 0.5, 0.1]])
    for experts, pick in (([wrong, right], 1), ([right, wrong], 0), ([wrong, wrong, right, right], 2)):
        for mode in ("logit", "prob"):
            view = condensed(experts, np.array([0]), [np.arange(3)])
            assert greedy(view, rounds=1, mode=mode).picks == [pick]


def test_the_best_prefix_within_a_number_of_members():
    path = Path([3, 3, 1, 3, 2], [0.9, 0.9, 0.5, 0.6, 0.4])
    assert path.best(1) == {3: 1.0}
    assert path.best(2) == pytest.approx({3: 2 / 3, 1: 1 / 3})
    assert path.best(3) == pytest.approx({3: 3 / 5, 1: 1 / 5, 2: 1 / 5}) == path.best(9)


@pytest.mark.parametrize("mode", ["logit", "prob"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kept", [2, 5, 40])
def test_an_ensemble_is_never_below_the_best_single_expert(mode, seed, kept):
    """On the exact objective, however few classes the choice has looked at, and with the default search."""
    experts, target = logs(40, 30, [1, 2, 6] * 10, seed=seed, skill=3.0)
    groups = [np.arange(10), np.arange(10, 30)]
    best = min(metrics.balanced_nll(z, target, 30) for z in experts)
    for limit, penalty in ((5, 0.0), (2, 0.0), (5, 0.1)):
        path = select(condensed(experts, target, groups, kept), mode=mode, limit=limit, penalty=penalty, bags=4)
        weights = path.best(limit)
        mixture = plain(weights, 30, mode)
        found = metrics.balanced_nll(mixture.of([experts[m] for m in mixture.members]), target, 30)
        assert len(weights) <= limit and sum(weights.values()) == pytest.approx(1)
        assert found + penalty * (len(weights) - 1) <= best + 1e-9


def test_condensed_single_experts_are_exact_and_ensembles_no_better_than_they_are():
    experts, target = logs(6, 30, [2] * 30, seed=3, skill=4.0)
    view = condensed(experts, target, [np.arange(12), np.arange(12, 30)], kept=4)
    assert view.logs.shape == (6, 4 + 2, 60) and view.kept == 4
    np.testing.assert_allclose(np.exp(view.logs).sum(1), 1, atol=1e-9)
    np.testing.assert_array_equal(view.column[0], target)
    assert set(view.column[4]) == {30} and set(view.column[5]) == {31}
    for rounds in (1, 3, 8):
        path = greedy(view, rounds=rounds)
        exact = nll(averaged([experts[p] for p in path.picks], "logit"), target)
        assert path.losses[-1] == pytest.approx(exact, abs=1e-9) if rounds == 1 else path.losses[-1] >= exact - 1e-9


def test_the_likeliest_classes_are_kept():
    experts, target = logs(3, 9, [2] * 9, seed=4)
    view = condensed(experts, target, [np.arange(9)], kept=3)
    for n, own in enumerate(target):
        mean = np.mean([np.exp(z[n]) for z in experts], 0)
        others = [c for c in np.argsort(-mean) if c != own][:2]
        assert view.column[:3, n].tolist() == [own, *others]


def test_impossible_targets_cost_a_finite_loss():
    with np.errstate(divide="ignore"):
        certain = np.log(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    view = condensed([certain] * 2, np.array([0, 1]), [np.arange(3)])
    assert greedy(view).losses[-1] == pytest.approx(-np.log(TINY) / 2)


def test_every_class_counts_the_same():
    experts, target = logs(5, 5, (3, 3, 3, 3, 3), seed=5)
    rows = np.concatenate([np.arange(len(target)), np.flatnonzero(target == 2), np.flatnonzero(target == 2)])
    more = [z[rows] for z in experts], target[rows]
    one, other = (greedy(condensed(*given, GROUPS), rounds=10) for given in ((experts, target), more))
    assert one.picks == other.picks
    np.testing.assert_allclose(one.losses, other.losses, atol=1e-9)
    np.testing.assert_allclose([weighted(more[1])[more[1] == c].sum() for c in range(5)], 0.2)


def test_a_high_price_leaves_one_member():
    experts, target = logs(12, 5, (9,) * 5, seed=6, skill=2.0)
    view = condensed(experts, target, GROUPS)
    assert len(select(view).best(5)) > 1 and len(select(view, penalty=1.0).best(5)) == 1


def test_bags_are_drawn_from_the_seed():
    experts, target = logs(40, 5, (6,) * 5, seed=7, skill=2.0)
    view = condensed(experts, target, GROUPS)
    assert select(view, seed=1).picks == select(view, seed=1).picks


def test_half_of_every_class():
    target = np.array([2, 0, 0, 1, 2, 0, 0, 2, 4, 0])
    sizes = set()
    for seed in range(40):
        items = half(target, np.random.default_rng(seed))
        assert items.tolist() == sorted(set(items.tolist()))
        taken = np.bincount(target[items], minlength=5)
        assert taken[0] in (2, 3) and taken[2] in (1, 2) and taken[3] == 0 and {taken[1], taken[4]} <= {0, 1}
        sizes.add(tuple(taken))
    assert len(sizes) > 4
