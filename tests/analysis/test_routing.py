import numpy as np
import pytest

from analysis.greedy import condensed, weighted
from analysis.routing import PULL, Mixture, equal, plain, routed
from rayltr import metrics
from tests.analysis.panels import logs

GROUPS = {"many": np.array([0, 1]), "medium": np.array([2, 3]), "few": np.array([4, 5]), "none": np.array([], np.int64)}
IMAGES = (30,) * 6


def specialists(seed=0):
    """Two experts, the first good at the classes 0, 1, the second at 4, 5; at 2, 3 they are equals."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(6), IMAGES)
    found = []
    for skill in ((3.0, 3.0, 1.5, 1.5, 0.0, 0.0), (0.0, 0.0, 1.5, 1.5, 3.0, 3.0)):
        z = rng.normal(size=(len(target), 6))
        own = np.array(skill) + np.zeros_like(z)
        hit = rng.random(len(target)) < 0.8
        z[hit, target[hit]] += own[hit, target[hit]]
        z[:, np.array(skill) == 0] *= 0.1
        found.append(z - np.log(np.exp(z).sum(1, keepdims=True)))
    return found, target


def objective(mixture, experts, target, slots):
    """The penalised class-balanced NLL, by its definition."""
    z = mixture.of(experts)
    first = [np.flatnonzero(slots == s)[0] for s in np.unique(slots)]
    weights, bias = mixture.weights[:, first], mixture.bias[first]
    pull = PULL * (((weights - 1 / len(weights)) ** 2).sum() + (bias**2).sum()) / len(first)
    return metrics.balanced_nll(z, target, z.shape[1]) + pull


@pytest.mark.parametrize(
    ("rung", "slots"), [("groups", np.array([0, 0, 1, 1, 2, 2])), ("classes", np.arange(6))], ids=["groups", "classes"]
)
def test_fitted_weights_are_a_minimum(rung, slots):
    experts, target = specialists()
    view = condensed(experts, target, [members for name, members in GROUPS.items() if name != "none"])
    groups = {name: members for name, members in GROUPS.items() if name != "none"}
    found = routed(view, [0, 1], 6, groups, rung)
    np.testing.assert_allclose(found.weights.sum(0), 1, atol=1e-9)
    rng, least = np.random.default_rng(0), objective(found, experts, target, slots)
    for _ in range(30):
        share = np.clip(found.weights[0] + rng.normal(0, 0.02, slots.max() + 1)[slots], 0, 1)
        moved = Mixture((0, 1), np.stack([share, 1 - share]), found.bias + rng.normal(0, 0.02, slots.max() + 1)[slots])
        assert objective(moved, experts, target, slots) > least - 2e-4 * (rung == "classes")


def test_specialists_get_their_groups():
    experts, target = specialists()
    groups = {name: members for name, members in GROUPS.items() if name != "none"}
    found = routed(condensed(experts, target, list(groups.values())), [0, 1], 6, groups, "groups")
    assert found.weights[0, 0] > 0.6 and found.weights[1, 4] > 0.6
    before = metrics.balanced_nll(equal([0, 1], 6).of(experts), target, 6)
    assert metrics.balanced_nll(found.of(experts), target, 6) < before - 0.05


def test_a_known_bias_is_found_again():
    experts, target = logs(1, 6, (300,) * 6, seed=2, skill=0.0)
    rng = np.random.default_rng(3)
    z = 2 * rng.normal(size=experts[0].shape)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    target = np.array([rng.choice(6, p=row) for row in p])
    shift = np.array([0.6, 0.6, 0.0, 0.0, -0.6, -0.6])
    shifted = z - shift
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    found = routed(condensed([shifted], target, [*GROUPS.values()]), [0], 6, GROUPS, "groups")
    np.testing.assert_allclose(found.bias - found.bias[2], shift, atol=0.2)
    np.testing.assert_array_equal(found.weights, 1)


def test_condensed_classes_take_part_by_their_group():
    experts, target = logs(2, 40, (3,) * 40, seed=4, skill=3.0)
    groups = {"many": np.arange(10), "few": np.arange(10, 40)}
    whole, short = (condensed(experts, target, [*groups.values()], kept) for kept in (40, 8))
    one, other = (routed(view, [0, 1], 40, groups, "groups") for view in (whole, short))
    np.testing.assert_allclose(one.weights, other.weights, atol=0.1)
    np.testing.assert_allclose(one.bias, other.bias, atol=0.1)


def test_mixtures_give_log_probabilities():
    experts, target = logs(3, 6, IMAGES, seed=5)
    rng = np.random.default_rng(0)
    weights, bias = rng.dirichlet(np.ones(3), 6).T, rng.normal(size=6)
    found = Mixture((0, 1, 2), weights, bias, "logit", "classes").of(experts)
    z = np.stack([sum(weights[m, c] * experts[m][:, c] for m in range(3)) + bias[c] for c in range(6)], 1)
    np.testing.assert_allclose(found, z - np.log(np.exp(z).sum(1, keepdims=True)), atol=1e-12)
    mean = plain({0: 0.5, 2: 0.5}, 6, "prob").of([experts[0], experts[2]])
    np.testing.assert_allclose(np.exp(mean), (np.exp(experts[0]) + np.exp(experts[2])) / 2, atol=1e-12)
    assert equal([4, 7], 6).members == (4, 7) and (equal([4, 7], 6).weights == 0.5).all()


def test_weights_are_told_as_briefly_as_the_rung_allows():
    experts, target = specialists()
    found = routed(condensed(experts, target, [*GROUPS.values()]), [0, 1], 6, GROUPS, "groups")
    told = found.told(found.weights[0], GROUPS)
    assert list(told) == ["many", "medium", "few"] and told["few"] == found.weights[0, 4]
    assert plain({0: 0.25, 1: 0.75}, 6).told(np.full(6, 0.25), GROUPS) == 0.25
    assert len(Mixture((0,), np.ones((1, 6)), np.zeros(6), "logit", "classes").told(np.ones(6), GROUPS)) == 6


def test_items_count_by_their_class():
    experts, target = specialists()
    rows = np.concatenate([np.arange(len(target)), np.flatnonzero(target == 3)])
    assert weighted(target[rows])[target[rows] == 3].sum() == pytest.approx(1 / 6)
    one = routed(condensed(experts, target, [*GROUPS.values()]), [0, 1], 6, GROUPS, "groups")
    again = [z[rows] for z in experts], target[rows]
    other = routed(condensed(*again, [*GROUPS.values()]), [0, 1], 6, GROUPS, "groups")
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-3)
