import inspect
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import one_hot

from rayltr.losses import CLASS_WEIGHTS, LOSSES, UNWEIGHTED, smoothing

COUNTS = [500, 120, 30, 7, 2, 0]
CIFAR10 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_weight = pytest.mark.parametrize("weight", CLASS_WEIGHTS.values(), ids=CLASS_WEIGHTS)


def batch(size=12, seed=0, dtype=torch.float64):
    """Logits, targets that never hit the empty last class, counts."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, len(COUNTS), generator=g, dtype=torch.float64).to(dtype)
    return logits, torch.randint(len(COUNTS) - 1, (size,), generator=g), torch.tensor(COUNTS)


def extras(loss, size=12):
    """What else a loss takes for each of the samples of `batch`: a fixed draw, features."""
    g = torch.Generator().manual_seed(1)
    known = {
        "mask": torch.rand(size, len(COUNTS), generator=g) < 0.7,
        "features": torch.randn(size, 4, generator=g, dtype=torch.float64),
    }
    return {name: known[name] for name in inspect.signature(loss).parameters if name in known}


def full(loss, size=12):
    return partial(loss, **extras(loss, size))


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


def slow_cdt(z, y, n, gamma=0.2):
    return slow_cross_entropy([v * (k / max(n)) ** gamma for v, k in zip(z, n, strict=True)], y)


def slow_seql(z, y, n, mask, gamma=0.9, threshold=0.005):
    total = 0.0
    for j, v in enumerate(z):
        tail = n[j] / sum(n) < threshold
        total += (1 - mask[j] * tail * (j != y)) * math.exp(v)
    return -math.log(math.exp(z[y]) / total)


def slow_smoothed(z, y, epsilon):
    soft = [(1 - epsilon) * (j == y) + epsilon / len(z) for j in range(len(z))]
    return sum(s * slow_cross_entropy(z, j) for j, s in enumerate(soft))


def slow_label_aware_smoothing(z, y, n, head=0.4, tail=0.1, shape="concave"):
    u = (n[y] - min(n)) / (max(n) - min(n))
    epsilon = {
        "concave": tail + (head - tail) * math.sin(math.pi * u / 2),
        "linear": tail + (head - tail) * u,
        "convex": head + (head - tail) * math.sin(3 * math.pi / 2 + math.pi * u / 2),
    }
    return slow_smoothed(z, y, epsilon[shape])


def slow_influence_balanced(z, y, n, features, alpha=1000.0):
    p = [math.exp(-slow_cross_entropy(z, j)) for j in range(len(z))]
    influence = sum(abs(h) for h in features) * sum(abs(q - (j == y)) for j, q in enumerate(p))
    weight = len(n) / n[y] / sum(1 / k for k in n)
    return weight * -math.log(p[y]) * alpha / (influence + 1e-3)


SLOW = {
    "cross_entropy": lambda z, y, n: slow_cross_entropy(z, y),
    "balanced_softmax": slow_balanced_softmax,
    "logit_adjusted": slow_logit_adjusted,
    "focal": slow_focal,
    "ldam": slow_ldam,
    "cdt": slow_cdt,
    "seql": slow_seql,
    "label_smoothing": lambda z, y, n, epsilon=0.1: slow_smoothed(z, y, epsilon),
    "label_aware_smoothing": slow_label_aware_smoothing,
    "influence_balanced": slow_influence_balanced,
}
HYPERS = [
    ("logit_adjusted", {"tau": 0.0}),
    ("logit_adjusted", {"tau": 1.7}),
    ("focal", {"gamma": 0.0}),
    ("focal", {"gamma": 0.5}),
    ("ldam", {"max_margin": 0.3, "scale": 10.0}),
    ("cdt", {"gamma": 0.0}),
    ("cdt", {"gamma": 0.5}),
    ("seql", {"threshold": 0.05}),
    ("seql", {"threshold": 0.5}),
    ("label_smoothing", {"epsilon": 0.0}),
    ("label_smoothing", {"epsilon": 0.6}),
    ("label_aware_smoothing", {"shape": "linear"}),
    ("label_aware_smoothing", {"shape": "convex"}),
    ("label_aware_smoothing", {"head": 0.2, "tail": 0.5}),
    ("influence_balanced", {"alpha": 20.0}),
    *((name, {}) for name in LOSSES),
]


@pytest.mark.parametrize("name, hyper", HYPERS, ids=str)
def test_value_and_gradient_against_a_slow_reference(name, hyper):
    logits, target, counts = batch()
    n = [max(k, 1) for k in COUNTS]
    more = extras(LOSSES[name])
    loss = partial(LOSSES[name], **hyper, **more)
    expected = [
        SLOW[name](z, y, n, **hyper, **{key: value[i].tolist() for key, value in more.items()})
        for i, (z, y) in enumerate(zip(logits.tolist(), target.tolist(), strict=True))
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(loss(logits, target, counts), expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda z: loss(z, target, counts), logits.requires_grad_(), atol=1e-6)


@every_loss
def test_one_value_per_sample_in_at_least_float32(loss):
    for dtype, wide in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]:
        logits, target, counts = batch(dtype=dtype)
        value = full(loss)(logits, target, counts)
        assert value.shape == (12,) and value.dtype == wide
        assert (value >= 0).all()


@every_loss
def test_half_precision_logits_are_computed_in_float32(loss):
    logits, target, counts = batch(dtype=torch.bfloat16)
    loss = full(loss)
    torch.testing.assert_close(loss(logits, target, counts), loss(logits.float(), target, counts), rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_logits_keep_value_and_gradient_finite(loss, dtype):
    logits, target, counts = batch(size=64, dtype=dtype)
    logits = (50 * logits).requires_grad_()
    value = full(loss, 64)(logits, target, counts)
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
    more = extras(loss)
    moved = {key: value[:, order] if key == "mask" else value for key, value in more.items()}
    renamed = loss(logits[:, order], order.argsort()[target], counts[order], **moved)
    torch.testing.assert_close(renamed, loss(logits, target, counts, **more))


@every_loss
def test_samples_do_not_see_each_other(loss):
    logits, target, counts = batch()
    more = extras(loss)
    alone = [
        loss(logits[[i]], target[[i]], counts, **{key: value[[i]] for key, value in more.items()}) for i in range(12)
    ]
    torch.testing.assert_close(loss(logits, target, counts, **more), torch.cat(alone))


@every_loss
def test_a_class_without_images_counts_as_one_image(loss):
    logits, _, counts = batch()
    target = torch.full((12,), len(COUNTS) - 1)  # even as the target
    loss = full(loss)
    value = loss(logits.requires_grad_(), target, counts)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()
    torch.testing.assert_close(value, loss(logits, target, counts.clamp(min=1)))


@every_loss
@pytest.mark.parametrize("classes", [1, 6])
def test_equal_classes_and_a_single_one_are_no_special_case(loss, classes):
    logits, _, _ = batch()
    logits = logits[:, :classes].requires_grad_()
    more = {key: value[:, :classes] if key == "mask" else value for key, value in extras(loss).items()}
    value = loss(logits, torch.zeros(12, dtype=torch.int64), torch.full((classes,), 40), **more)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()


@every_loss
def test_falls_as_the_true_logit_grows(loss):
    logits, target, counts = batch(size=1)
    steps = torch.linspace(-3, 3, 25, dtype=torch.float64)
    raised = logits.repeat(25, 1)
    raised[torch.arange(25), target] = steps
    more = {key: value[[0] * 25] for key, value in extras(loss).items()}
    assert (loss(raised, target.repeat(25), counts, **more).diff() < 0).all()


@every_loss
def test_dtype_of_the_counts_does_not_matter(loss):
    logits, target, counts = batch()
    loss = full(loss)
    torch.testing.assert_close(loss(logits, target, counts.float()), loss(logits, target, counts), rtol=0, atol=0)


@pytest.mark.parametrize("entry", [*LOSSES.values(), *CLASS_WEIGHTS.values()], ids=lambda f: f.__name__)
def test_every_hyper_parameter_has_a_literal_default(entry):
    hypers = [p for p in inspect.signature(entry).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert all(p.default is None or isinstance(p.default, (bool, int, float, str, tuple)) for p in hypers)


def test_losses_without_a_class_weight_are_losses_that_have_none_published():
    assert set(UNWEIGHTED) == set(LOSSES) - {"cross_entropy", "focal", "ldam"}


def soften(own, epsilon):
    return (1 - epsilon) * own + epsilon / own.shape[1]


def seql_gradient(z, own, n, more):
    kept = (1 - more["mask"] * (n / n.sum() < 0.005) * (1 - own)) * z.exp()
    return kept / kept.sum(1, keepdim=True) - own


GRADIENTS = {
    "cross_entropy": lambda z, own, n, more: z.softmax(1) - own,
    "balanced_softmax": lambda z, own, n, more: (z + n.log()).softmax(1) - own,
    "ldam": lambda z, own, n, more: 30 * ((30 * (z - 0.5 * (n.min() / n) ** 0.25 * own)).softmax(1) - own),
    "cdt": lambda z, own, n, more: ((z / (n.max() / n) ** 0.2).softmax(1) - own) / (n.max() / n) ** 0.2,
    "seql": seql_gradient,
    "label_smoothing": lambda z, own, n, more: z.softmax(1) - soften(own, 0.1),
    "label_aware_smoothing": lambda z, own, n, more: (
        z.softmax(1) - soften(own, (own @ (0.1 + 0.3 * torch.sin(math.pi / 2 * (n - 1) / 499)))[:, None])
    ),
}


@pytest.mark.parametrize("name, formula", GRADIENTS.items(), ids=GRADIENTS)
def test_gradients_are_those_of_the_formulas(name, formula):
    logits, target, counts = batch()
    more = extras(LOSSES[name])
    LOSSES[name](logits.requires_grad_(), target, counts, **more).sum().backward()
    expected = formula(logits.detach(), one_hot(target, 6).double(), counts.clamp(min=1).double(), more)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-9)


def test_losses_that_are_equal_in_theory_are_equal():
    logits, target, counts = batch()
    plain = LOSSES["cross_entropy"](logits, target, counts)
    for name, hyper in [("cdt", {"gamma": 0.0}), ("label_smoothing", {"epsilon": 0.0}), ("seql", {"threshold": 0.0}),
                        ("seql", {"gamma": 0.0, "threshold": 1.0})]:  # fmt: skip
        torch.testing.assert_close(LOSSES[name](logits, target, counts, **hyper), plain)
    equal = torch.full((6,), 9)
    torch.testing.assert_close(LOSSES["cdt"](logits, target, equal), plain)
    even = LOSSES["label_smoothing"](logits, target, counts, epsilon=0.3)
    torch.testing.assert_close(LOSSES["label_aware_smoothing"](logits, target, counts, head=0.3, tail=0.3), even)
    torch.testing.assert_close(LOSSES["label_aware_smoothing"](logits, target, equal, tail=0.3), even)
    scaled = 1000 * plain / (1 - (-plain).exp() + 1e-3)
    half = torch.full((12, 1), -0.5, dtype=torch.float64)
    torch.testing.assert_close(LOSSES["influence_balanced"](logits, target, equal, half), scaled)
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


def test_cdt_temperatures_of_cifar10_at_ratio_100():
    temperatures = [1, 1.108, 1.227, 1.359, 1.506, 1.668, 1.848, 2.047, 2.270, 2.512]
    logits, target = torch.eye(10), torch.arange(10)
    loss = LOSSES["cdt"](logits, target, torch.tensor(CIFAR10))
    divided = LOSSES["cross_entropy"](logits / torch.tensor(temperatures), target, target)
    torch.testing.assert_close(loss, divided, atol=2e-4, rtol=0)


def test_smoothing_of_cifar10_at_ratio_100():
    concave = [0.400, 0.341, 0.258, 0.196, 0.156, 0.132, 0.117, 0.108, 0.103, 0.100]
    counts = torch.tensor(CIFAR10)
    torch.testing.assert_close(smoothing(counts, 0.4, 0.1, "concave"), torch.tensor(concave), atol=5e-4, rtol=0)


@pytest.mark.parametrize("shape, middle", [("concave", 0.1 + 0.3 * 0.5**0.5), ("linear", 0.25), ("convex", 0.18787)])
def test_smoothing_runs_from_tail_to_head_in_every_shape(shape, middle):
    value = smoothing(torch.tensor([11, 0, 6, 1]), 0.4, 0.1, shape)
    torch.testing.assert_close(value, torch.tensor([0.4, 0.1, middle, 0.1]), atol=1e-5, rtol=0)
    for equal in ([7, 7], [7]):
        torch.testing.assert_close(smoothing(torch.tensor(equal), 0.4, 0.1, shape), torch.full((len(equal),), 0.1))


def test_smoothing_of_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="one of concave, linear, convex, not 'round'"):
        LOSSES["label_aware_smoothing"](*batch(), shape="round")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seql_spares_classes_strictly_below_the_threshold(dtype):
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=dtype)
    loss = LOSSES["seql"](logits, torch.tensor([0]), torch.tensor([91, 5, 4]), threshold=0.05, mask=torch.ones(1, 3))
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.e)], dtype=dtype))


def test_seql_is_exact_in_float32_for_large_logits():
    logits, target, counts = batch(size=64, dtype=torch.float32)
    loss = full(LOSSES["seql"], 64)
    exact = loss(50 * logits.double(), target, counts)
    torch.testing.assert_close(loss(50 * logits, target, counts).double(), exact, rtol=1e-6, atol=1e-5)


def test_seql_draws_every_sample_and_class_apart_from_the_default_generator():
    logits, target, counts = torch.zeros(20000, 3), torch.zeros(20000, dtype=torch.int64), torch.tensor([998, 1, 1])

    def spared(seed):
        """How many of the two rare classes are left out for each sample: the loss is log(3 - spared)."""
        torch.manual_seed(seed)
        return 3 - LOSSES["seql"](logits, target, counts, gamma=0.6).exp().round().long()

    with torch.random.fork_rng():
        drawn = spared(0)
        assert torch.equal(drawn, spared(0)) and not torch.equal(drawn, spared(1))
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(share, torch.tensor([0.16, 0.48, 0.36]), atol=0.015, rtol=0)


def test_influence_balanced_has_gradients_through_the_features():
    logits, target, counts = batch()
    features = extras(LOSSES["influence_balanced"])["features"].requires_grad_()
    loss = LOSSES["influence_balanced"]
    assert torch.autograd.gradcheck(lambda h: loss(logits, target, counts, h), features, atol=1e-6)
    loss(logits, target, counts, features).sum().backward()
    assert (features.grad * features < 0).all()


# zero features in float16 are left out: the gradient of the logits is then up to alpha / 0.001, beyond its range
@pytest.mark.parametrize(
    "dtype, scale", [(torch.float16, 50), *((d, s) for d in (torch.bfloat16, torch.float32) for s in (0, 50))], ids=str
)
def test_influence_balanced_is_finite_for_large_and_for_zero_features(dtype, scale):
    logits, target, counts = batch(size=64, dtype=dtype)
    logits = (50 * logits).requires_grad_()
    features = (scale * extras(LOSSES["influence_balanced"], 64)["features"]).to(dtype).requires_grad_()
    value = LOSSES["influence_balanced"](logits, target, counts, features)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all() and features.grad.isfinite().all()
    wide = LOSSES["influence_balanced"](logits.float(), target, counts, features.float())
    torch.testing.assert_close(value, wide, rtol=0, atol=0)


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
