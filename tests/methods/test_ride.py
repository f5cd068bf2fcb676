import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.interface import Facts, Resources
from rayltr.methods.ride import divergence, temperatures
from rayltr.spec import fn
from rayltr.train import train
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, batch_of, built

CIFAR = Facts(
    tuple(map(str, range(100))),
    np.array([int(500 * 0.01 ** (c / 99)) for c in range(100)]),
    (0.5,) * 3,
    (0.25,) * 3,
    (32, 32),
)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def stage_of(method="ride", **changes):
    keywords = changes.pop("keywords", {})
    return catalogue.complete(tiny(method=fn(method, **keywords), **changes))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_published_sizes():
    """Three reduced experts of ResNet-32 for 100 classes, and the single network with the same classifier."""
    stage = stage_of(backbone=fn("resnet32", reduced=True), head=fn("cosine", scale=30.0))
    assert parameters(build.method(stage, CIFAR)) == 783_856
    single = catalogue.complete(tiny(backbone=fn("resnet32"), head=fn("cosine", scale=30.0)))
    assert parameters(build.method(single, CIFAR)) == 469_904


def slow_divergence(logits, t):
    """The definition, image by image and expert by expert; the mean is a constant."""
    found = []
    for experts in logits:
        mean = sum(experts) / len(experts)
        total = 0
        for own in experts:
            p = torch.softmax((mean / t).detach(), 0)
            q = torch.softmax(own / t, 0)
            total = total + sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))
        found.append(t.mean() ** 2 * total)
    return torch.stack(found)


@pytest.mark.parametrize("tempered", [0.0, 0.05, 0.8])
def test_the_divergence_in_value_and_gradient(tempered):
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(4, 3, 5, generator=g, dtype=torch.float64)
    t = temperatures(torch.tensor([100, 40, 20, 7, 3]), tempered)
    one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    found, expected = divergence(one, t), slow_divergence(other, t)
    torch.testing.assert_close(found, expected, **EXACT)
    weights = torch.rand(4, generator=g, dtype=torch.float64)
    (weights * found).sum().backward()
    (weights * expected).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, **EXACT)


def test_temperatures_follow_the_class_frequencies():
    counts = torch.tensor([60, 30, 10])
    # C p r + 1 - r with r = 0.5 is (1.4, 0.95, 0.65)
    expected = torch.tensor([1.0, 0.95 / 1.4, 0.65 / 1.4], dtype=torch.float64)
    torch.testing.assert_close(temperatures(counts, 0.5), expected)
    assert temperatures(counts, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert (temperatures(torch.tensor([5, 0]), 1.0) > 0).all(), "a class without images"


def test_half_precision_and_large_logits_stay_finite():
    g = torch.Generator().manual_seed(0)
    z = (1e4 * torch.randn(4, 3, 6, generator=g)).bfloat16().requires_grad_()
    found = divergence(z, torch.ones(6))
    found.sum().backward()
    assert found.dtype == torch.float32 and found.isfinite().all() and z.grad.isfinite().all()
    same = z.detach()[:, :1].expand(-1, 3, -1)
    torch.testing.assert_close(divergence(same, torch.ones(6)), torch.zeros(4))


def published(logits, target, counts, margin, scale, weight):
    """CE of x - scale * margin * one-hot with class weights, summed over the experts."""
    m = counts.double() ** -0.25
    m = margin * m / m.max()
    total = 0.0
    for own in logits.unbind(1):
        total = total + F.cross_entropy(own - scale * m[target][:, None] * F.one_hot(target, 3), target, weight=weight)
    return total


@pytest.mark.parametrize("late", [False, True])
def test_the_terms_are_the_published_ones(late):
    keywords = {"diversity": -0.45, "tempered": 0.05 if late else 0.0}
    weight = {"weight": fn("effective_number", beta=0.9999)} if late else {}
    ldam = fn("ldam", max_margin=15.0, scale=1.0)
    stage = stage_of(keywords=keywords, loss=ldam, head=fn("cosine", scale=30.0), **weight)
    module, batch = built(stage).train(), batch_of(stage)
    logits = module.head(module.backbone(batch.views[0]))
    terms, counts = module(batch), torch.as_tensor(FACTS.counts)
    expected = published(logits, batch.target, counts, 0.5, 30.0, module.class_weight.double() if late else None)
    torch.testing.assert_close(terms["loss"], expected, **EXACT)
    far = slow_divergence(logits, module.temperature).mean()
    torch.testing.assert_close(terms["diversity"], -0.45 * far, **EXACT)
    assert (module.temperature.unique().numel() == 3) == late


def test_no_diversity_is_no_term_and_changes_no_other():
    batch = batch_of(stage_of())
    terms = {f: built(stage_of(keywords={"diversity": f})).train()(batch) for f in (0.0, -0.45)}
    assert terms[0.0].keys() == {"loss"} and terms[-0.45].keys() == {"loss", "diversity"}
    assert torch.equal(terms[0.0]["loss"], terms[-0.45]["loss"])


def test_together_the_experts_are_judged_by_their_mean():
    stage = stage_of(keywords={"together": True, "diversity": 0.0})
    module, batch = built(stage).train(), batch_of(stage)
    mean = module.head(module.backbone(batch.views[0])).mean(1)
    torch.testing.assert_close(module(batch)["loss"], 3 * F.cross_entropy(mean, batch.target))


@pytest.mark.parametrize(("method", "experts"), [("ride", 4), ("sade", 3), ("ncl", 2)])
def test_every_expert_is_a_head_beside_their_mean(method, experts):
    keywords = {} if method == "sade" else {"experts": experts}
    module = built(stage_of(method, keywords=keywords)).eval()
    images = batch_of(stage_of()).views[0]
    heads = module.predict(images)
    assert list(heads) == ["main", *(f"expert{number}" for number in range(1, experts + 1))]
    logits = module.head(module.backbone(images))
    torch.testing.assert_close(torch.stack([heads[name] for name in list(heads)[1:]], 1), logits)
    torch.testing.assert_close(heads["main"], logits.mean(1))
    assert not torch.allclose(heads["expert1"], heads["expert2"])


@pytest.mark.parametrize("layer", ["layer1", "pool", "fc"])
def test_what_the_experts_share_can_be_mixed(layer):
    """Each pair of images that is mixed half and half predicts the same at the last layer, and not without mixing."""
    stage = stage_of(mixing=fn("manifold", layer=layer))
    module, batch = built(stage).eval(), batch_of(stage)
    partner = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    batch = type(batch)(batch.views, batch.target, batch.rows, batch.target[partner], torch.full((8,), 0.5), partner)
    mixed, _ = module.classified(batch)
    torch.testing.assert_close(mixed[0], mixed[1])
    assert not torch.allclose(module.head(module.backbone(batch.views[0]))[0], mixed[0])


def test_what_an_expert_owns_cannot_be_mixed():
    with pytest.raises(ValueError, match="no layer 'layer3' to mix at; it has pool, fc, layer1$"):
        built(stage_of(mixing=fn("manifold", layer="layer3")))


def test_heads_that_learn_a_scale_take_over_from_linear_ones():
    one = Resources(device="cpu", threads=1)
    first = stage_of(epochs=1)
    state, _ = train(first, resources=one)
    again, _ = train(first.but(epochs=0, head=fn("lws"), init=first), {"init": state}, resources=one)
    assert torch.equal(again.model["head.2.scale"], torch.ones(4))
    assert torch.equal(again.model["head.2.weight"], state.model["head.2.weight"])


def test_class_weights_and_temperatures_come_with_a_stage_that_resumes():
    one = Resources(device="cpu", threads=1)
    first = stage_of(epochs=1, horizon=2)
    state, _ = train(first, resources=one)
    last = first.but(resume=first, weight=fn("effective_number", beta=0.9999), method=first.method.but(tempered=0.05))
    final, logits = train(last, {"resume": state}, resources=one)
    assert final.epoch == 2 and final.history[0]["terms"].keys() == {"loss", "diversity"}
    assert logits["val"].keys() == {"main", "expert1", "expert2", "expert3"}
    assert all(math.isfinite(value) for value in final.history[0]["terms"].values())


@pytest.mark.parametrize("wrong", [{"experts": 1}, {"tempered": -0.1}, {"tempered": 1.5}])
def test_values_outside_are_refused(wrong):
    with pytest.raises(ValueError, match="ride needs experts >= 2 and 0 <= tempered <= 1"):
        built(stage_of(keywords=wrong))


def test_more_stages_than_there_are_cannot_be_owned():
    with pytest.raises(ValueError, match="an expert can own 1 to 3 residual stages, not 4"):
        built(stage_of(keywords={"own": 4}))
