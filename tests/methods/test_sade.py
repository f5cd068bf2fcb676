import math

import pytest
import torch
from torch import nn

from rayltr import build, catalogue
from rayltr.methods.sade import (
    aggregated,
    combined,
    expertise,
    published_view,
    reversed_prior,
    shifts,
    shuffled,
    stability,
)
from rayltr.spec import fn
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


def images(number=48):
    return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def seeded():
    return torch.Generator().manual_seed(2)


def learnt(**keywords):
    seen = images()
    return aggregated(Told(), len(seen), seen.__getitem__, noisy, seeded(), **{"batch": 16, **keywords})


def test_the_expert_whose_predictions_are_stable_gains_weight():
    weights = learnt(epochs=20, least=0.0)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[2] > weights[1] > weights[0] and weights[2] > 0.5


def test_no_weight_falls_below_the_floor_and_steps_are_limited():
    free, floored = learnt(epochs=200, least=0.0), learnt(epochs=200, least=0.2)
    assert free.min() < 0.1 and 0.2 <= floored.min() < 0.22, "it stops right before"
    assert torch.equal(learnt(epochs=200, steps=6, least=0.0), learnt(epochs=2, least=0.0))
    assert not torch.equal(learnt(epochs=1, least=0.0), learnt(epochs=2, least=0.0))
    torch.testing.assert_close(learnt(least=0.4), torch.full((3,), 1 / 3), msg="nothing satisfies such a floor")


def test_each_epoch_has_all_rows_in_an_order_of_its_own():
    parts = [*shuffled(10, 4, 3, seeded())]
    assert [len(part) for part in parts] == 3 * [4, 4, 2]
    epochs = [torch.cat(parts[first : first + 3]).tolist() for first in (0, 3, 6)]
    assert all(sorted(own) == list(range(10)) for own in epochs)
    assert len({tuple(own) for own in [*epochs, range(10)]}) == 4


def test_the_weights_learn_by_nesterov_momentum_with_weight_decay():
    found = learnt(lr=0.5, momentum=0.9, weight_decay=0.1, epochs=2, least=0.0)
    g, free, speed = seeded(), torch.full((3,), 1 / 3), torch.zeros(3)
    for _ in range(2):
        order = torch.randperm(48, generator=g)
        for first in (0, 16, 32):
            seen = images()[order[first : first + 16]]
            one, other = (torch.stack([*Told().predict(noisy(seen, g)).values()][1:], 1) for _ in range(2))
            free.requires_grad_()
            w, cosines = free.softmax(0), []
            for a, b in zip(one, other, strict=True):
                p, q = (torch.softmax(w[0] * z[0] + w[1] * z[1] + w[2] * z[2], 0) for z in (a, b))
                cosines.append((p * q).sum() / (p.norm() * q.norm()))
            (gradient,) = torch.autograd.grad(-sum(cosines) / 16, free)
            free = free.detach()
            gradient = gradient + 0.1 * free
            speed = 0.9 * speed + gradient
            free = free - 0.5 * (gradient + 0.9 * speed)
    torch.testing.assert_close(found, free.softmax(0))


@pytest.mark.parametrize("method", ["sade", "ride", "ncl"])
def test_any_method_with_experts_can_be_aggregated_and_learns_nothing(method):
    module, seen = build.method(catalogue.complete(tiny(method=fn(method))), FACTS).train(), images(16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weights = aggregated(module, 16, seen.__getitem__, published_view, seeded(), epochs=1)
    assert weights.shape == (3,) and weights.isfinite().all() and not weights.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    heads = module.predict(seen)
    experts = torch.stack([heads[f"expert{number}"] for number in (1, 2, 3)], 1)
    torch.testing.assert_close(combined(experts, torch.full((3,), 1 / 3)), heads["main"])


def test_the_published_view_crops_mirrors_jitters_greys_and_blurs():
    grey = torch.linspace(0, 1, 32).expand(2000, 3, 32, 32)  # darker to the left, no colours
    colourful = grey * torch.tensor([1.0, 0.5, 0.2])[:, None, None]
    seen = published_view(colourful, seeded(), flip=0.5)
    grey_share = (seen.amax(1) - seen.amin(1)).amax((1, 2)).lt(1e-6).float().mean()
    assert grey_share == pytest.approx(0.2, abs=0.03)
    mirrored = (seen[..., 10].mean((1, 2)) > seen[..., 22].mean((1, 2))).float().mean()
    assert mirrored == pytest.approx(0.5, abs=0.04)
    assert not (published_view(colourful, seeded(), flip=0.0)[..., 4:28].mean((1, 2)).diff().mean(1) < 0).any()
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float().expand(2000, 3, 32, 32)
    smooth = published_view(board, seeded())[..., 5:27, 5:27].diff(dim=-1).abs().amax((1, 2, 3)) < 0.05
    # a Gaussian of s pixels leaves exp(-(pi s)^2) of it: a twentieth at 0.55, and s is uniform from 0.1 to 2
    assert smooth.float().mean() == pytest.approx(0.2 * 1.45 / 1.9, abs=0.03)


def test_a_method_without_experts_is_refused():
    module = build.method(catalogue.complete(tiny()), FACTS)
    with pytest.raises(ValueError, match="aggregated needs a method with experts, such as sade, ride or ncl"):
        aggregated(module, 16, images(16).__getitem__, noisy, seeded())
