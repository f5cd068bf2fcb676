"""Contrastive losses against loops over the definitions, closed forms, invariances and extreme numbers."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from rayltr.contrast import Projector, balanced, parametric, similarities, supervised

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
TARGETS = {
    "long tail": [0, 0, 0, 1, 0, 2],
    "one class": [1, 1, 1],
    "one image": [2],
    "all different": [0, 1, 2, 3],
    "no head": [2, 3, 3],
}
CLASSES = 4


def units(rows, dim=5, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def two_views(target, seed=0, views=2):
    """(anchors that want gradients, target, place): two views of every image, one view above the other."""
    twice = torch.tensor(target * views)
    return units(len(twice), seed=seed).requires_grad_(), twice, torch.arange(len(twice))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_supervised(bank, labels, i, t):
    positives = [k for k in range(len(bank)) if k != i and labels[k] == labels[i]]
    if not positives:
        return 0 * bank[i].sum()
    total = sum((dot(bank[i], bank[a]) / t).exp() for a in range(len(bank)) if a != i)
    return -sum(dot(bank[i], bank[k]) / t - total.log() for k in positives) / len(positives)


def slow_balanced(bank, labels, i, t, variant="L1"):
    """Bank and labels with the prototypes, where there are any."""
    positives = [k for k in range(len(bank)) if k != i and labels[k] == labels[i]]
    if not positives:
        return 0 * bank[i].sum()
    z = 0
    for j in set(labels):
        rows = [k for k in range(len(bank)) if labels[k] == j and k != i]
        s = [dot(bank[i], bank[k]) / t for k in rows]
        if s:
            z = z + (sum(v.exp() for v in s) / len(s) if variant == "L1" else (sum(s) / len(s)).exp())
    return -sum(dot(bank[i], bank[k]) / t - z.log() for k in positives) / len(positives)


def slow_third(z, prototypes, target, t):
    """Variant L3 for one anchor."""
    s = torch.stack([dot(z, c) / t for c in prototypes])
    return s.exp().sum().log() - s[target]


def slow_parametric(bank, labels, i, t, logits, alpha, beta, gamma, smoothing):
    positives = [k for k in range(len(bank)) if k != i and labels[k] == labels[i]]
    total = logits[i].exp().sum() + gamma * sum((dot(bank[i], bank[a]) / t).exp() for a in range(len(bank)) if a != i)
    terms = [alpha * (dot(bank[i], bank[k]) / t - total.log()) for k in positives]
    for j, u in enumerate(logits[i]):
        share = 1 - smoothing if j == labels[i] else smoothing / (len(logits[i]) - 1)
        terms.append(beta * share * (u - total.log()))
    return -sum(terms) / (beta + alpha * len(positives))


def equal_with_gradients(found, expected, *inputs):
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.arange(1.0, len(found) + 1, dtype=torch.float64)
    both = [torch.autograd.grad((weight * v).sum(), inputs, retain_graph=True, allow_unused=True)
            for v in (found, expected)]  # fmt: skip
    for one, other in zip(*both, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if one is None else one, zero if other is None else other, check_dtype=False,
                                   **CLOSE)  # fmt: skip


def has_positives(target, views):
    return [views * target.count(one) > 1 for one in target] * views


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_supervised_equals_its_definition(target, views):
    """With one view an anchor may be alone in its class."""
    z, twice, place = two_views(target, views=views)
    expected = torch.stack([slow_supervised(z, twice.tolist(), i, 0.2) for i in range(len(z))])
    found = supervised(z, z, twice, twice, place, temperature=0.2)
    equal_with_gradients(found, expected, z)
    if len(z) > 2:  # of two, the one is all that the other is compared with: 0 as well
        assert [bool(loss) for loss in found] == has_positives(target, views)


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("variant", ["L1", "L2"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_balanced_equals_its_definition(target, views, variant, complement):
    z, twice, place = two_views(target, views=views)
    prototypes = units(CLASSES, seed=1).requires_grad_()
    bank = torch.cat([z, prototypes]) if complement else z
    labels = twice.tolist() + (list(range(CLASSES)) if complement else [])
    expected = torch.stack([slow_balanced(bank, labels, i, 0.3, variant) for i in range(len(z))])
    found = balanced(z, z, twice, twice, place, prototypes if complement else None, temperature=0.3, variant=variant)
    equal_with_gradients(found, expected, z, prototypes)


def test_the_third_variant_compares_with_prototypes_only():
    z, twice, place = two_views(TARGETS["long tail"])
    prototypes = units(CLASSES, seed=1).requires_grad_()
    found = balanced(z, z, twice, twice, place, prototypes, temperature=0.3, variant="L3")
    expected = torch.stack([slow_third(own, prototypes, y, 0.3) for own, y in zip(z, twice, strict=True)])
    equal_with_gradients(found, expected, z, prototypes)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("gamma", "smoothing"), [(1.0, 0.0), (0.5, 0.2)])
def test_parametric_equals_its_definition(target, gamma, smoothing):
    """Anchors are the first view; the bank is both views and a queue."""
    z, twice, _ = two_views(target)
    bank = torch.cat([z, units(3, seed=2)])
    labels, n = torch.cat([twice, torch.tensor([0, 1, 0])]), len(target)
    logits = torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    weights = {"alpha": 0.1, "beta": 0.7, "gamma": gamma, "smoothing": smoothing}
    found = parametric(bank[:n], bank, labels[:n], labels, torch.arange(n), logits, temperature=0.3, **weights)
    asked = [slow_parametric(bank, labels.tolist(), i, 0.3, logits, 0.1, 0.7, gamma, smoothing) for i in range(n)]
    equal_with_gradients(found, torch.stack(asked), z, logits)


def simplex(classes):
    """The vertices of the regular simplex around 0, of unit length."""
    return F.normalize(torch.eye(classes, dtype=torch.float64) - 1 / classes)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("t", [0.05, 0.5])
def test_closed_forms(target, t):
    twice, place = torch.tensor(target * 2), torch.arange(2 * len(target))
    same = F.normalize(torch.ones(len(twice), 3, dtype=torch.float64))
    found = balanced(same, same, twice, twice, place, same[:1].expand(CLASSES, -1), temperature=t)
    torch.testing.assert_close(found, torch.full_like(found, math.log(CLASSES)), **CLOSE)
    found = supervised(same, same, twice, twice, place, temperature=t)
    torch.testing.assert_close(found, torch.full_like(found, math.log(len(twice) - 1)), **CLOSE)
    best = simplex(CLASSES)
    ideal = math.log(1 + (CLASSES - 1) * math.exp(-CLASSES / ((CLASSES - 1) * t)))
    found = balanced(best[twice], best[twice], twice, twice, place, best, temperature=t)
    torch.testing.assert_close(found, torch.full_like(found, ideal), **CLOSE)


@pytest.mark.parametrize(("variant", "complement"), [("L1", True), ("L1", False), ("L2", True), ("L3", True)])
def test_balanced_knows_neither_the_names_of_classes_nor_the_order_of_images_nor_which_view_is_which(
    variant, complement
):
    z, twice, place = two_views(TARGETS["long tail"])
    prototypes, n = units(CLASSES, seed=1), len(z) // 2

    def mean(z, twice, prototypes):
        return balanced(z, z, twice, twice, place, prototypes if complement else None, variant=variant).mean()

    plain = mean(z, twice, prototypes)
    torch.testing.assert_close(mean(torch.cat([z[n:], z[:n]]), twice, prototypes), plain, **CLOSE)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    order = torch.cat([order, order + n])
    torch.testing.assert_close(mean(z[order], twice[order], prototypes), plain, **CLOSE)
    for names in itertools.permutations(range(CLASSES)):
        renamed, moved = torch.tensor(names)[twice], torch.empty_like(prototypes)
        moved[torch.tensor(names)] = prototypes
        torch.testing.assert_close(mean(z, renamed, moved), plain, **CLOSE)


OPPOSITE = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
"""Where a sum of exponentials below the largest, the anchor itself, would vanish: two views that are opposite."""


def as_defined(name, z, prototypes, logits, labels, t):
    """The slow loss of every anchor, in double precision."""
    if name == "parametric":
        return [slow_parametric(z, labels, i, t, logits, 0.01, 1.0, 1.0, 0.0) for i in range(len(z))]
    if name == "L3":
        return [slow_third(one, prototypes, y, t) for one, y in zip(z, labels, strict=True)]
    if name == "supervised":
        return [slow_supervised(z, labels, i, t) for i in range(len(z))]
    bank, known = torch.cat([z, prototypes]), labels + list(range(len(prototypes)))
    return [slow_balanced(bank, known, i, t, name) for i in range(len(z))]


def as_computed(name, z, prototypes, logits, target, t):
    about = (z, z, target, target, torch.arange(len(z)))
    if name == "parametric":
        return parametric(*about, logits, temperature=t)
    if name == "supervised":
        return supervised(*about, temperature=t)
    return balanced(*about, prototypes, temperature=t, variant=name)


LOGITS = torch.tensor([[1.0, -1.0], [50.0, -50.0], [300.0, -300.0], [-300.0, 300.0]])


@pytest.mark.parametrize("z", [OPPOSITE, units(4, dtype=torch.float32)], ids=["opposite", "random"])
@pytest.mark.parametrize("t", [0.1, 0.01, 0.005])
@pytest.mark.parametrize("name", ["supervised", "L1", "L2", "L3", "parametric"])
def test_single_precision_is_enough_for_small_temperatures_and_large_logits(name, t, z):
    """Value and gradient, against the definition in double precision, which bears exponentials of 300."""
    labels, given = [0, 1, 0, 1], (z, units(2, z.shape[1], seed=1, dtype=torch.float32), LOGITS)
    single = [value.clone().requires_grad_() for value in given]
    double = [value.double().requires_grad_() for value in given]
    found = as_computed(name, *single, torch.tensor(labels), t)
    expected = torch.stack(as_defined(name, *double, labels, t))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    weight = torch.arange(1.0, 5.0)
    both = [torch.autograd.grad((weight * loss).sum(), kind, allow_unused=True)
            for loss, kind in ((found, single), (expected, double))]  # fmt: skip
    one, other = (torch.cat([own.flatten() for own in grads if own is not None]) for grads in both)
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_similarities_are_not_computed_in_half_precision():
    a, b = units(4, seed=1, dtype=torch.float32), units(6, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarities(a, b, 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, a @ b.T / 0.1)


def test_many_classes_need_no_table_of_classes_by_classes():
    """With 30 000 classes a square table would take 3.6 GB."""
    classes = 30_000
    z, prototypes = units(8, dtype=torch.float32), units(classes, seed=1, dtype=torch.float32)
    twice = torch.tensor([0, 5, 5, classes - 1] * 2)
    for variant in ("L1", "L2", "L3"):
        assert balanced(z, z, twice, twice, torch.arange(8), prototypes, variant=variant).isfinite().all()


@pytest.mark.parametrize(("variant", "complement"), [("L4", True), ("L3", False)])
def test_other_variants_are_refused(variant, complement):
    z, twice, place = two_views([0, 1])
    with pytest.raises(ValueError, match="variant is one of L1, L2, L3"):
        balanced(z, z, twice, twice, place, units(2) if complement else None, variant=variant)


def test_a_projector_gives_unit_vectors_and_tracks_a_batch_only():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    plain, fixed = Projector(3, 8, 4), Projector(3, 8, 4, fixed=True)
    for made in (plain, fixed):
        torch.testing.assert_close(made(x).norm(dim=1), torch.ones(6))
    assert [name for name in plain.state_dict() if "running" in name] == ["1.running_mean", "1.running_var"]
    assert not [name for name in fixed.state_dict() if "running" in name]
    fixed.eval()
    torch.testing.assert_close(fixed(x), fixed.train()(x))
