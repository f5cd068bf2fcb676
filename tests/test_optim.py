import copy
import inspect
import math
from contextlib import contextmanager

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F

from rayltr.optim import OPTIMISERS, SCHEDULES

SAMS = [{}, {"adaptive": True, "rho": 1.0}, {"base": "adamw", "lr": 0.01}, {"momentum": 0.5, "nesterov": True}]
every_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
every_sam = pytest.mark.parametrize("keywords", SAMS, ids=str)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def network(*extra):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=g, dtype=torch.float64), torch.randint(3, (16,), generator=g)


def train(model, optimiser, steps):
    """The losses that the optimiser returned at these steps."""

    def closure(x, y):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return [optimiser.step(lambda s=s: closure(*batch(s))).item() for s in steps]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@every_optimiser
def test_an_optimiser_lowers_the_loss_it_returns(optimiser):
    model = network()
    steps = optimiser(model.parameters(), lr=0.05)
    assert isinstance(steps, torch.optim.Optimizer)
    losses = train(model, steps, [0] * 30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("entry", [*OPTIMISERS.values(), *SCHEDULES.values()], ids=lambda f: f.__name__)
def test_every_keyword_has_a_literal_default(entry):
    hypers = [p for p in inspect.signature(entry).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert all(p.default is None or isinstance(p.default, (bool, float, str, tuple)) for p in hypers)


@pytest.mark.parametrize("name, keywords", [("sgd", {}), ("adamw", {}), *(("sam", k) for k in SAMS)], ids=str)
def test_an_optimiser_goes_on_from_its_state_bit_for_bit(name, keywords):
    model = network()
    whole = OPTIMISERS[name](model.parameters(), **keywords)
    train(model, whole, range(4))
    resumed, state = copy.deepcopy(model), copy.deepcopy(whole.state_dict())
    train(model, whole, range(4, 8))
    other = OPTIMISERS[name](resumed.parameters(), **keywords)
    other.load_state_dict(state)
    train(resumed, other, range(4, 8))
    assert torch.equal(weights(model), weights(resumed))
    forgetful = copy.deepcopy(model)
    train(forgetful, OPTIMISERS[name](forgetful.parameters(), **keywords), range(4, 8))
    assert not torch.equal(weights(model), weights(forgetful))  # there was something to remember


def test_hyper_parameters_reach_the_optimiser():
    keywords = {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}
    (group,) = OPTIMISERS["sgd"](network().parameters(), **keywords).param_groups
    assert keywords.items() <= group.items()
    (group,) = OPTIMISERS["adamw"](network().parameters(), lr=0.3, weight_decay=0.1, beta1=0.5, beta2=0.6).param_groups
    assert [group[k] for k in ("lr", "weight_decay", "betas")] == [0.3, 0.1, (0.5, 0.6)]
    (group,) = OPTIMISERS["sam"](network().parameters(), momentum=0.5).param_groups
    assert [group[k] for k in ("lr", "momentum", "nesterov", "weight_decay")] == [0.1, 0.5, False, 2e-4]
    (group,) = OPTIMISERS["sam"](network().parameters(), base="adamw").param_groups
    assert group["weight_decay"] == 0.05


def test_adamw_spares_what_timm_spares():
    model = VisionTransformerDistilled(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    ours = OPTIMISERS["adamw"](model.parameters(), weight_decay=0.05, spare=True).param_groups
    for decay in (0.0, 0.05):
        sets = [
            {id(p) for group in groups if group["weight_decay"] == decay for p in group["params"]}
            for groups in (ours, theirs)
        ]
        assert sets[0] == sets[1] and sets[0]
    assert len(OPTIMISERS["adamw"](model.parameters()).param_groups) == 1


@every_sam
def test_sam_against_a_slow_reference(keywords):
    model = network()
    slow = copy.deepcopy(model)
    train(model, OPTIMISERS["sam"](model.parameters(), **keywords), range(5))

    rho, adaptive = keywords.get("rho", 0.05), keywords.get("adaptive", False)
    base = {k: v for k, v in keywords.items() if k in ("momentum", "nesterov")}
    inner = OPTIMISERS[keywords.get("base", "sgd")](slow.parameters(), lr=keywords.get("lr", 0.1), **base)
    parameters = list(slow.parameters())
    for step in range(5):
        x, y = batch(step)
        gradient = torch.autograd.grad(F.cross_entropy(slow(x), y), parameters)
        reach = [p.detach().abs() if adaptive else torch.ones_like(p) for p in parameters]
        norm = math.sqrt(sum((t * g).square().sum().item() for t, g in zip(reach, gradient, strict=True)))
        above = copy.deepcopy(slow)
        for p, t, g in zip(above.parameters(), reach, gradient, strict=True):
            p.data += rho * t**2 * g / (norm + 1e-12)
        there = torch.autograd.grad(F.cross_entropy(above(x), y), list(above.parameters()))
        for p, g in zip(parameters, there, strict=True):
            p.grad = g
        inner.step()
    torch.testing.assert_close(weights(model), weights(slow), rtol=1e-11, atol=1e-11)


def passes(*losses):
    """A closure that takes the gradient of another loss at every call."""
    rest = iter(losses)

    def closure():
        loss = next(rest)()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_restores_what_had_a_gradient_in_the_first_pass_only(adaptive):
    a, b = (nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    before = a.detach().clone(), b.detach().clone()
    optimiser = OPTIMISERS["sam"]([a, b], rho=0.7, adaptive=adaptive, weight_decay=0.0, lr=0.5)
    seen = []

    def second():
        seen.append((a.detach().clone(), b.detach().clone()))
        return (3 * b).sum()

    first_loss = optimiser.step(passes(lambda: (a * b).sum(), second))
    assert first_loss == (before[0] * before[1]).sum()
    assert not torch.equal(seen[0][0], before[0]) and not torch.equal(seen[0][1], before[1])
    assert torch.equal(a, before[0])
    torch.testing.assert_close(b.detach(), before[1] - 0.5 * 3)


def test_sam_restores_when_the_second_pass_fails():
    model = network(nn.BatchNorm1d(6))
    optimiser = OPTIMISERS["sam"](model.parameters())
    optimiser.guard(model)
    before = weights(model)
    x, _ = batch(0)

    def fail():
        model(x)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimiser.step(passes(lambda: model(x).square().sum(), fail))
    assert torch.equal(weights(model), before)
    assert model[1].num_batches_tracked == 1


def test_sam_does_not_climb_a_gradient_that_is_not_finite():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimiser = OPTIMISERS["sam"]([w], weight_decay=0.0, momentum=0.0, lr=1.0)
    seen = []

    def second():
        seen.append(w.detach().clone())
        return w.sum()

    loss = optimiser.step(passes(lambda: (w * torch.tensor([1.0, math.nan])).sum(), second))
    assert loss.isnan() and seen[0].tolist() == [1.0, 2.0] and w.tolist() == [0.0, 1.0]


def test_sam_shows_a_gradient_that_is_not_finite_as_its_base_does():
    """To leave the step out would hide it: the loss here is finite at first, and the weights would stay for ever."""
    ends = []
    for name in ("sam", "sgd"):
        w = nn.Parameter(torch.tensor([0.0, 4.0]))
        optimiser, losses = OPTIMISERS[name]([w], lr=0.1), []
        for _ in range(2):
            optimiser.zero_grad()
            losses.append(optimiser.step(passes(*[lambda w=w: (2 * w).sqrt().sum()] * 2)).isfinite().item())
        ends.append((losses, w.isfinite().tolist()))
    assert ends[0] == ends[1] == ([True, False], [False, True])


def test_sam_without_any_gradient_does_nothing():
    model, idle = network(), nn.Parameter(torch.ones(2))
    optimiser = OPTIMISERS["sam"]([idle])
    optimiser.step(lambda: model(batch(0)[0]).sum())
    assert idle.tolist() == [1.0, 1.0]


def test_sam_shares_its_groups_with_the_base_before_and_after_loading():
    model = network()
    optimiser = OPTIMISERS["sam"](model.parameters(), lr=0.1)
    train(model, optimiser, range(2))
    optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    assert optimiser.param_groups is optimiser.inner.param_groups and optimiser.state is optimiser.inner.state
    before = weights(model)
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    train(model, optimiser, range(2, 4))
    assert torch.equal(weights(model), before)
    optimiser.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})
    assert [group["lr"] for group in optimiser.inner.param_groups] == [0.0, 0.7]
    torch.optim.lr_scheduler.StepLR(optimiser, 1)  # accepts it as an optimiser


def test_sam_takes_over_from_its_base():
    model = network()
    plain = OPTIMISERS["sgd"](model.parameters())
    train(model, plain, range(3))
    other, state = copy.deepcopy(model), copy.deepcopy(plain.state_dict())
    optimiser = OPTIMISERS["sam"](other.parameters(), rho=0.0)
    optimiser.load_state_dict(state)
    train(model, plain, range(3, 5))
    train(other, optimiser, range(3, 5))
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_sam_moves_batch_norm_statistics_once(momentum):
    model = network(nn.BatchNorm1d(6, momentum=momentum))
    once = copy.deepcopy(model)
    optimiser = OPTIMISERS["sam"](model.parameters(), lr=0.0, rho=1.0)
    optimiser.guard(model)
    train(model, optimiser, range(3))
    for step in range(3):
        once(batch(step)[0])
    assert model[1].num_batches_tracked == 3
    torch.testing.assert_close(model[1].state_dict(), once[1].state_dict(), rtol=0, atol=0)


def test_sam_draws_the_same_random_numbers_in_both_passes():
    drawn = []
    model = network(nn.Dropout(0.5))
    model[1].register_forward_hook(lambda module, args, out: drawn.append(out == 0))
    optimiser = OPTIMISERS["sam"](model.parameters())
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        train(model, optimiser, range(2))
        after = torch.get_rng_state()
        torch.manual_seed(3)
        for step in range(2):
            model(batch(step)[0])
        assert torch.equal(after, torch.get_rng_state())  # a step uses up what one pass draws
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("sync, expected", [(False, [True, False]), (True, [False, False])])
def test_sam_climbs_each_worker_s_own_gradient_unless_told(sync, expected):
    model, alone, passes = network(), [False], []

    @contextmanager
    def no_sync():
        alone[0] = True
        yield
        alone[0] = False

    model.no_sync = no_sync
    model.register_forward_hook(lambda *_: passes.append(alone[0]))
    optimiser = OPTIMISERS["sam"](model.parameters(), sync=sync)
    optimiser.guard(model)
    train(model, optimiser, [0])
    assert passes == expected


def test_sam_refuses_what_its_base_does_not_have():
    with pytest.raises(ValueError, match="one of sgd, adamw, not 'sam'"):
        OPTIMISERS["sam"](network().parameters(), base="sam")
    with pytest.raises(ValueError, match="adamw, the base of sam, has no keyword 'momentum'"):
        OPTIMISERS["sam"](network().parameters(), base="adamw", momentum=0.9)


@every_schedule
def test_a_schedule_is_a_factor_between_zero_and_one_that_warms_up_linearly(schedule):
    for warmup in (0.0, 0.2):
        factors = [schedule((step + 1) / 200, warmup=warmup) for step in range(200)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert max(factors) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(factors[:40], [(step + 1) / 40 for step in range(40)])
    assert all(a >= b for a, b in zip(factors[39:], factors[40:], strict=False))


def test_constant_and_cosine():
    assert [SCHEDULES["constant"](t) for t in (1e-9, 0.5, 1.0)] == [1.0] * 3
    values = [SCHEDULES["cosine"](t, warmup=0.2, final=0.1) for t in (0.1, 0.2, 0.4, 0.6, 1.0)]
    assert values == pytest.approx([0.5, 1.0, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1])
    assert SCHEDULES["cosine"](1.0) == pytest.approx(0, abs=1e-12)
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)


def test_the_cosine_of_timm_with_its_warm_up_and_floor():
    group = [{"params": [nn.Parameter(torch.ones(1))], "lr": 2.5e-4}]
    theirs = CosineLRScheduler(torch.optim.SGD(group), t_initial=1200, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    keywords = {"warmup": 5 / 1200, "warmup_from": 1e-6 / 2.5e-4, "final": 1e-5 / 2.5e-4, "beneath": True}
    for epoch in (0.0, 0.5, 4.0, 5.0, 5.5, 50.0, 600.0, 1100.25, 1199.0):
        ours = 2.5e-4 * SCHEDULES["cosine"](epoch / 1200, **keywords)
        expected = theirs._get_lr(epoch)[0]
        # at 5 itself the warm-up is complete here, and over there
        assert ours == pytest.approx(expected, rel=1e-4), epoch


def test_multistep_of_the_bag_of_tricks_over_200_epochs():
    """Learning rates by epoch, counted from 1: warm-up from a third over 5 epochs, a hundredth at 160 and at 180."""

    def rate(epoch):
        keywords = {"warmup": 5 / 200, "warmup_from": 1 / 3, "milestones": (159 / 200, 179 / 200)}
        return 0.1 * SCHEDULES["multistep"](epoch / 200, **keywords)

    assert [rate(e) for e in range(1, 7)] == pytest.approx([0.14 / 3, 0.06, 0.22 / 3, 0.26 / 3, 0.1, 0.1])
    table = {159: 0.1, 160: 1e-3, 179: 1e-3, 180: 1e-5, 200: 1e-5}
    assert {e: rate(e) for e in table} == pytest.approx(table)


def test_a_milestone_acts_on_the_steps_after_it():
    factors = [SCHEDULES["multistep"](epoch / 10) for epoch in range(1, 11)]
    assert factors == pytest.approx([1] * 8 + [0.01, 1e-4])
    assert SCHEDULES["multistep"](0.8 + 1e-6) == 0.01
    assert SCHEDULES["multistep"](0.9, milestones=(0.5,), gamma=0.1) == 0.1
    assert SCHEDULES["multistep"](1.0, milestones=()) == 1
