import inspect
import math

import pytest
import torch

from rayltr.losses import CLASS_WEIGHTS, LOSSES

COUNTS = [500, 120, 30, 7, 2, 0]
CIFAR10 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_weight = pytest.mark.parametrize("weight", CLASS_WEIGHTS.values(), ids=CLASS_WEIGHTS)


def batch(size=12, seed=0, dtype=torch.float64):
    """Logits, targets that never hit the empty last class, counts."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, len(COUNTS), generator=g, dtype=torch.float64).to(dtype)
    return logits, torch.randint(len(COUNTS) - 1, (size,), generator=g), torch.tensor(COUNTS)


def slow_cross_entropy(z, y):
    top = max(z)
    return top + math.log(sum(math.exp(v - top) for v in z)) - z[y]


def slow_balanced_softmax(z, y, n):
    return slow_cross_entropy([v + math.log(k) for v, k in zip(z, n, strict=True)], y)


def slow_logit_adjusted(z, y, n, tau=1.0):
    return slow_cross_entropy([v + tau * math.log(k / sum(n)) for v, k in zip(z, n, strict=True)], y)


def slow_focal(z, y, n, gamma=2.0):
    total = 0.0
    for j, v in enumerate(z):
        p = 1 / (1 + math.exp(-v))
        own = p if j == y else 1 - p
        total -= (1 - own) ** gamma * math.log(own)
    return total


def slow_ldam(z, y, n, max_margin=0.5, scale=30.0):
    margin = [max_margin * k**-0.25 / max(m**-0.25 for m in n) for k in n]
    return slow_cross_entropy([scale * (v - margin[y] * (j == y)) for j, v in enumerate(z)], y)


SLOW = {
    "cross_entropy": lambda z, y, n: slow_cross_entropy(z, y),
    "balanced_softmax": slow_balanced_softmax,
    "logit_adjusted": slow_logit_adjusted,
    "focal": slow_focal,
    "ldam": slow_ldam,
}
HYPERS = [
    ("logit_adjusted", {"tau": 0.0}),
    ("logit_adjusted", {"tau": 1.7}),
    ("focal", {"gamma": 0.0}),
    ("focal", {"gamma": 0.5}),
    ("ldam", {"max_margin": 0.3, "scale": 10.0}),
    *((name, {}) for name in LOSSES),
]


@pytest.mark.parametrize("name, hyper", HYPERS, ids=str)
def test_value_and_gradient_against_a_slow_reference(name, hyper):
    logits, target, counts = batch()
    n = [max(k, 1) for k in COUNTS]
    expected = [SLOW[name](z, y, n, **hyper) for z, y in zip(logits.tolist(), target.tolist(), strict=True)]
    torch.testing.assert_close(
        LOSSES[name](logits, target, counts, **hyper), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    assert torch.autograd.gradcheck(
        lambda z: LOSSES[name](z, target, counts, **hyper), logits.requires_grad_(), atol=1e-6
    )


@every_loss
def test_one_value_per_sample_in_at_least_float32(loss):
    for dtype, wide in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]:
        logits, target, counts = batch(dtype=dtype)
        value = loss(logits, target, counts)
        assert value.shape == (12,) and value.dtype == wide
        assert (value >= 0).all()


@every_loss
def test_half_precision_logits_are_computed_in_float32(loss):
    logits, target, counts = batch(dtype=torch.bfloat16)
    torch.testing.assert_close(loss(logits, target, counts), loss(logits.float(), target, counts), rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_logits_keep_value_and_gradient_finite(loss, dtype):
    logits, target, counts = batch(size=64, dtype=dtype)
    logits = (50 * logits).requires_grad_()
    value = loss(logits, target, counts)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()


def test_focal_with_a_small_gamma_has_a_gradient_where_the_probability_is_one():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    LOSSES["focal"](logits, torch.tensor([0]), torch.tensor([1, 1]), gamma=0.5).sum().backward()
    assert logits.grad.isfinite().all()


@every_loss
def test_names_of_classes_do_not_matter(loss):
    logits, target, counts = batch()
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(3))
    renamed = loss(logits[:, order], order.argsort()[target], counts[order])
    torch.testing.assert_close(renamed, loss(logits, target, counts))


@every_loss
def test_samples_do_not_see_each_other(loss):
    logits, target, counts = batch()
    alone = torch.cat([loss(logits[i : i + 1], target[i : i + 1], counts) for i in range(len(target))])
    torch.testing.assert_close(loss(logits, target, counts), alone)


@every_loss
def test_a_class_without_images_counts_as_one_image(loss):
    logits, _, counts = batch()
    target = torch.full((12,), len(COUNTS) - 1)  # even as the target
    value = loss(logits.requires_grad_(), target, counts)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()
    torch.testing.assert_close(value, loss(logits, target, counts.clamp(min=1)))


@every_loss
def test_falls_as_the_true_logit_grows(loss):
    logits, target, counts = batch(size=1)
    steps = torch.linspace(-3, 3, 25, dtype=torch.float64)
    raised = logits.repeat(25, 1)
    raised[torch.arange(25), target] = steps
    assert (loss(raised, target.repeat(25), counts).diff() < 0).all()


@every_loss
def test_dtype_of_the_counts_does_not_matter(loss):
    logits, target, counts = batch()
    torch.testing.assert_close(loss(logits, target, counts.float()), loss(logits, target, counts), rtol=0, atol=0)


@pytest.mark.parametrize("entry", [*LOSSES.values(), *CLASS_WEIGHTS.values()], ids=lambda f: f.__name__)
def test_every_hyper_parameter_has_a_literal_default(entry):
    hypers = [p for p in inspect.signature(entry).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert all(isinstance(p.default, (bool, int, float, str, tuple)) for p in hypers)


def test_losses_that_are_equal_in_theory_are_equal():
    logits, target, counts = batch()
    plain = LOSSES["cross_entropy"](logits, target, counts)
    torch.testing.assert_close(LOSSES["logit_adjusted"](logits, target, counts, tau=0.0), plain)
    torch.testing.assert_close(LOSSES["ldam"](logits, target, counts, max_margin=0.0, scale=1.0), plain)
    balanced = LOSSES["balanced_softmax"](logits, target, counts)
    torch.testing.assert_close(LOSSES["logit_adjusted"](logits, target, counts), balanced)
    torch.testing.assert_close(LOSSES["balanced_softmax"](logits, target, torch.full((6,), 9)), plain)


def test_ldam_margins_of_cifar10_at_ratio_100():
    margins = [0.158, 0.180, 0.204, 0.232, 0.264, 0.300, 0.341, 0.387, 0.441, 0.500]
    target = torch.arange(10)
    shifted = torch.zeros(10, 10).scatter(1, target[:, None], -torch.tensor(margins)[:, None])
    loss = LOSSES["ldam"](torch.zeros(10, 10), target, torch.tensor(CIFAR10), scale=1.0)
    torch.testing.assert_close(loss, LOSSES["cross_entropy"](shifted, target, target), atol=5e-4, rtol=0)


@every_weight
def test_weights_are_finite_and_prefer_rare_classes(weight):
    value = weight(torch.tensor(COUNTS))
    assert value.shape == (6,) and value.dtype == torch.float32
    assert value.isfinite().all() and (value.diff() >= 0).all() and (value > 0).all()
    torch.testing.assert_close(value, weight(torch.tensor(COUNTS).clamp(min=1)))


@every_weight
def test_weights_of_equal_classes_are_equal(weight):
    torch.testing.assert_close(weight(torch.full((4,), 37)), torch.ones(4))


def test_inverse_frequency_of_cifar10_at_ratio_100():
    expected = [0.0100, 0.0167, 0.0278, 0.0464, 0.0775, 0.1292, 0.2155, 0.3597, 0.6024, 1]
    torch.testing.assert_close(
        CLASS_WEIGHTS["inverse_frequency"](torch.tensor(CIFAR10)), torch.tensor(expected), atol=5e-5, rtol=0
    )
    root = CLASS_WEIGHTS["inverse_frequency"](torch.tensor([16, 4]), gamma=0.5)
    assert root.tolist() == [0.5, 1.0]


def test_effective_number_of_cifar10_at_ratio_100():
    expected = [0.051, 0.077, 0.121, 0.195, 0.319, 0.525, 0.868, 1.443, 2.409, 3.993]
    value = CLASS_WEIGHTS["effective_number"](torch.tensor(CIFAR10), beta=0.9999)
    torch.testing.assert_close(value, torch.tensor(expected), atol=5e-4, rtol=0)


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999])
def test_effective_number_against_the_formula(beta):
    raw = [(1 - beta) / (1 - beta**n) for n in CIFAR10]
    expected = torch.tensor([10 * w / sum(raw) for w in raw], dtype=torch.float64)
    counts = torch.tensor(CIFAR10, dtype=torch.float64)
    torch.testing.assert_close(CLASS_WEIGHTS["effective_number"](counts, beta=beta), expected, rtol=1e-9, atol=0)


def test_effective_number_close_to_one_is_one_over_n_even_in_float32():
    counts = torch.tensor(CIFAR10)
    inverse = 1 / counts.double()
    value = CLASS_WEIGHTS["effective_number"](counts, beta=1 - 1e-12)
    torch.testing.assert_close(value.double(), 10 * inverse / inverse.sum(), rtol=1e-5, atol=0)


def test_effective_number_with_beta_zero_is_one_and_beta_one_is_refused():
    assert CLASS_WEIGHTS["effective_number"](torch.tensor(COUNTS), beta=0.0).tolist() == [1.0] * 6
    with pytest.raises(ValueError, match="below 1, not 1.0"):
        CLASS_WEIGHTS["effective_number"](torch.tensor(COUNTS), beta=1.0)
