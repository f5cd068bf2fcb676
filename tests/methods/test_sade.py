import math
from functools import partial

import pytest
import torch
from torch import nn

from rayltr import build, catalogue
from rayltr.methods.sade import aggregated, combined, expertise, reversed_prior, shifts, stability
from rayltr.spec import fn
from rayltr.views import VIEWS
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, batch_of, built

EXACT = {"rtol": 1e-9, "atol": 1e-12}
COUNTS = torch.tensor([20, 100, 5, 40])


def stage_of(**keywords):
    return catalogue.complete(tiny(method=fn("sade", **keywords), head=fn("cosine", scale=30.0)))


def test_the_reversed_prior_swaps_ranks():
    prior = torch.tensor([0.2, 0.5, 0.05, 0.25])
    assert reversed_prior(prior).tolist() == prior[[3, 2, 1, 0]].tolist()
    falling = torch.tensor([0.6, 0.3, 0.1])
    assert reversed_prior(falling).tolist() == falling.flip(0).tolist()
    tied = torch.tensor([0.1, 0.4, 0.1, 0.4])
    assert reversed_prior(tied).tolist() == tied[[3, 2, 1, 0]].tolist(), "the first of two equal ones ranks lower"


def slow_losses(logits, target, counts, tau):
    """One image after the other, in the words of the paper."""
    total, order = sum(counts), sorted(range(len(counts)), key=lambda c: counts[c])
    p = [n / total for n in counts]
    inverse = dict(zip(order, [p[c] for c in reversed(order)], strict=True))
    shift = [
        [0.0 for _ in p],
        [math.log(v + 1e-9) for v in p],
        [math.log(v + 1e-9) - tau * math.log(inverse[c] + 1e-9) for c, v in enumerate(p)],
    ]
    rows = []
    for z, t in zip(logits, target.tolist(), strict=True):
        moved = [own + torch.tensor(s, dtype=own.dtype) for own, s in zip(z, shift, strict=True)]
        rows.append(torch.stack([-(own.exp() / own.exp().sum()).log()[t] for own in moved]))
    return torch.stack(rows)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_the_losses_in_value_and_gradient(tau):
    g = torch.Generator().manual_seed(0)
    z, target = torch.randn(6, 3, 4, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 1])
    one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    found, expected = expertise(one, target, shifts(COUNTS, tau)), slow_losses(other, target, COUNTS.tolist(), tau)
    torch.testing.assert_close(found, expected, **EXACT)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, **EXACT)


def test_half_precision_large_logits_and_empty_classes_stay_finite():
    z = (1e4 * torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    found = expertise(z, torch.tensor([0, 1, 2, 3, 0]), shifts(torch.tensor([9, 0, 3, 0]), 2.0))
    found.sum().backward()
    assert found.dtype == torch.float32 and found.isfinite().all() and z.grad.isfinite().all()


def test_each_expert_has_a_term_of_its_own():
    stage = stage_of(tau=1.5)
    module, batch = built(stage).train(), batch_of(stage)
    logits = module.head(module.backbone(batch.views[0]))
    expected = expertise(logits, batch.target, shifts(torch.as_tensor(FACTS.counts), 1.5)).mean(0)
    terms = module(batch)
    assert list(terms) == ["frequent", "uniform", "rare"]
    torch.testing.assert_close(torch.stack([*terms.values()]), expected, rtol=1e-6, atol=1e-6)


def test_values_outside_are_refused():
    with pytest.raises(ValueError, match="sade needs tau >= 0, not -1.0"):
        built(stage_of(tau=-1.0))


def test_stability_is_the_cosine_between_two_predictions():
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64)
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for row, found in enumerate(stability(one, other, w)):
        p, q = (torch.softmax(sum(w[e] * z[row, e] for e in range(3)), 0) for z in (one, other))
        torch.testing.assert_close(found, (p * q).sum() / (p.norm() * q.norm()), **EXACT)


class Told(nn.Module):
    """A method whose first expert says at random what it saw, and whose third always says the same of an image."""

    def predict(self, images):
        noise, brightness = images[:, 0, 0, :4], images[:, 1].mean((1, 2))
        steady = 6 * nn.functional.one_hot((8 * brightness).long() % 4, 4).float()
        experts = {"expert1": 8 * noise, "expert2": 3 * noise + steady / 4, "expert3": steady}
        return {"main": sum(experts.values()) / 3, **experts}


def noisy(images, generator):
    return torch.cat([torch.rand(images[:, :1].shape, generator=generator), images[:, 1:]], 1)


def batches(number=3):
    return [*torch.rand(number, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).unbind()]


def learnt(**keywords):
    return aggregated(Told(), batches(), noisy, torch.Generator().manual_seed(2), **keywords)


def test_the_expert_whose_predictions_are_stable_gains_weight():
    weights = learnt(epochs=20, least=0.0)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[2] > weights[1] > weights[0] and weights[2] > 0.5


def test_it_ends_when_a_weight_is_small():
    assert torch.equal(learnt(epochs=1, least=1.0), learnt(epochs=20, least=1.0))
    assert not torch.equal(learnt(epochs=1, least=0.0), learnt(epochs=2, least=0.0))
    assert learnt(epochs=200, least=0.2).min() > 0.1, "it does not go on for long after that"


def test_the_weights_learn_by_nesterov_momentum_with_weight_decay():
    found = learnt(lr=0.5, momentum=0.9, weight_decay=0.1, epochs=2, least=0.0)
    g, free, speed = torch.Generator().manual_seed(2), torch.full((3,), 1 / 3), torch.zeros(3)
    for _ in range(2):
        for images in batches():
            one, other = (torch.stack([*Told().predict(noisy(images, g)).values()][1:], 1) for _ in range(2))
            free.requires_grad_()
            (gradient,) = torch.autograd.grad(-stability(one, other, free.softmax(0)).mean(), free)
            free = free.detach()
            gradient = gradient + 0.1 * free
            speed = 0.9 * speed + gradient
            free = free - 0.5 * (gradient + 0.9 * speed)
    torch.testing.assert_close(found, free.softmax(0))


@pytest.mark.parametrize("method", ["sade", "ride", "ncl"])
def test_any_method_with_experts_can_be_aggregated_and_learns_nothing(method):
    module = build.method(catalogue.complete(tiny(method=fn(method))), FACTS).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    view = partial(VIEWS["flip_crop"], padding=1)
    weights = aggregated(module, batches(1), view, torch.Generator().manual_seed(0), epochs=1)
    assert weights.shape == (3,) and weights.isfinite().all() and not weights.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    images = batches(1)[0]
    heads = module.predict(images)
    experts = torch.stack([heads[f"expert{number}"] for number in (1, 2, 3)], 1)
    torch.testing.assert_close(combined(experts, torch.full((3,), 1 / 3)), heads["main"])


def test_a_method_without_experts_is_refused():
    module = build.method(catalogue.complete(tiny()), FACTS)
    with pytest.raises(ValueError, match="aggregated needs a method with experts, such as sade, ride or ncl"):
        aggregated(module, batches(1), noisy, torch.Generator())
