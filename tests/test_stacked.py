"""What trials train as one, they train as each of them alone: in float64, where sums in another order show least."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from rayltr import stacked
from rayltr import train as loop
from rayltr.interface import Diverged, Resources, State
from rayltr.joint import Network, Stack
from rayltr.spec import fn
from rayltr.train import train
from tests.conftest import tiny
from tests.methods.test_methods import METHODS, TAUGHT, asked

ONE = Resources(device="cpu", threads=1)
NARROW = loop.pixels
NEAR = {"rtol": 1e-7, "atol": 1e-9}
"""A few steps of float64, in which BatchNorms of few images make the last bits larger."""
THREE = (
    tiny(epochs=2, mixing=fn("mixup"), optimiser=fn("sgd", lr=0.1), seed=1),
    tiny(epochs=3, loss=fn("focal"), sampler=fn("progressive"), schedule=fn("cosine", warmup=0.3), seed=2),
    tiny(epochs=2, loss=fn("balanced_softmax"), optimiser=fn("sam", lr=0.05, rho=0.1), head=fn("cosine"), seed=3),
)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Trains in float64."""
    monkeypatch.setattr(loop, "pixels", lambda images, device: NARROW(images, device).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def sizes(monkeypatch):
    """How many backbones were computed at once, time after time."""
    found, real = [], stacked.Pass

    def counted(stack, images, precision):
        found.append(len(images))
        return real(stack, images, precision)

    monkeypatch.setattr(stacked, "Pass", counted)
    return found


def job(stage, given=None, **more):
    """Trains, and reports the state and logits, or the error, with the number of the lane."""

    def run(lane, report):
        number = lane.shared.lanes.index(lane)
        try:
            report((number, train(stage, given, resources=Resources("cpu", 1, lane=lane), **more)))
        except Exception as error:
            report((number, error))

    return run


def beside(*jobs):
    """What each job reported."""
    found = dict(stacked.bundle(jobs))
    return [found[number] for number in range(len(jobs))]


def same(one, other, exact=False):
    (state, logits), (its, theirs) = one, other
    assert isinstance(state, State) and state.model.keys() == its.model.keys() and state.epoch == its.epoch
    near = {"rtol": 0, "atol": 0} if exact else NEAR
    for kind in ("model", "optimiser"):
        for name, value in getattr(state, kind).items():
            torch.testing.assert_close(value, getattr(its, kind)[name], **near, msg=lambda text, n=name: f"{n}: {text}")
    for mine, record in zip(state.history, its.history, strict=True):
        assert mine["epoch"] == record["epoch"] and mine["terms"].keys() == record["terms"].keys()
        assert mine["terms"] == pytest.approx(record["terms"], rel=0 if exact else 1e-7)
    for head, values in logits["val"].items():
        np.testing.assert_allclose(values, theirs["val"][head], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


def test_three_trials_of_their_own_are_what_they_are_alone(sizes):
    """Other rates, losses, mixing, samplers, lengths and seeds, and SAM, which computes twice in a step."""
    alone = [train(stage, resources=ONE) for stage in THREE]
    for mine, its in zip(beside(*map(job, THREE)), alone, strict=True):
        same(mine, its)
    assert {2, 3} == set(sizes), "first three at once, then, as one of them has more steps, two"
    assert not torch.equal(alone[0][0].model["head.weight"], alone[1][0].model["head.weight"])


def test_a_trial_without_company_is_itself_to_the_last_bit(sizes):
    """Beside others of another size, batch or precision, too; and nothing of it depends on when others run."""
    others = tiny(batch=8), tiny(source=fn("synthetic", classes=4, per_class=40, size=12)), tiny(precision="bf16")
    found = beside(job(THREE[2]), *map(job, others))
    for mine, stage in zip(found, (THREE[2], *others), strict=True):
        same(mine, train(stage, resources=ONE), exact=True)
    assert not sizes
    same(beside(job(THREE[0]))[0], train(THREE[0], resources=ONE), exact=True)


def test_the_same_bundle_gives_the_same_bits():
    once, twice = beside(*map(job, THREE)), beside(*map(job, THREE))
    for mine, its in zip(once, twice, strict=True):
        same(mine, its, exact=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_beside_another_trial_of_its_kind_as_alone(method, sizes):
    stages = [tiny(**asked(method), epochs=1, seed=seed, optimiser=fn("sgd", lr=0.02)) for seed in (1, 2)]
    given = {"teacher": train(tiny(seed=1, epochs=1), resources=ONE)[0]} if method in TAUGHT else {}
    alone = [train(stage, given, resources=ONE) for stage in stages]
    for mine, its in zip(beside(*(job(stage, given) for stage in stages)), alone, strict=True):
        same(mine, its)
    assert bool(sizes) == (method not in APART), "it says whether it stacks"


APART = {"ncm", "neighbours", "route", "student", "tokens"}
"""Methods that train no backbone, as they are asked here, or not by one call of it."""


def test_arithmetic_in_bf16_is_that_of_each_alone(monkeypatch, sizes):
    monkeypatch.setattr(loop, "pixels", NARROW)
    torch.set_default_dtype(torch.float32)
    nets = [network(seed) for seed in (1, 2, 3)]
    images = [torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        alone = [net(each) for net, each in zip(nets, images, strict=True)]
    made = stacked.Pass(Stack(Network(nets[0]), nets), images, (True, torch.bfloat16))
    for leaf, features in zip(made.leaves, alone, strict=True):
        assert leaf.dtype == features.dtype == torch.bfloat16
        torch.testing.assert_close(leaf, features, rtol=0.02, atol=0.02)
    stages = [tiny(precision="bf16", seed=seed) for seed in (1, 2)]
    for (state, _), stage in zip(beside(*map(job, stages)), stages, strict=True):
        mine, its = (made.history[-1]["terms"]["loss"] for made in (state, train(stage, resources=ONE)[0]))
        assert mine == pytest.approx(its, rel=0.03)
    assert set(sizes[1:]) == {2}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))


def test_weights_and_gradients_are_views_of_what_is_computed():
    nets = [network(seed).to(memory_format=torch.channels_last) for seed in (1, 2)]
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    stack = Stack(Network(nets[0]), nets)
    made = stacked.Pass(stack, [torch.rand(2, 3, 16, 16)] * 2, (False, torch.bfloat16))
    made.leaves[1].sum().backward()
    made.backward()
    for net, old in zip(nets, before, strict=True):
        for (name, p), value in zip(net.named_parameters(), old, strict=True):
            assert torch.equal(p, value) and p.stride() == value.stride() == p.grad.stride()
            assert p.untyped_storage().data_ptr() == stack.weights[name].untyped_storage().data_ptr()
    assert all(not p.grad.any() for p in nets[0].parameters()), "no gradient came back for it"
    assert all(p.grad.any() for name, p in nets[1].named_parameters() if name != "0.bias")
    assert [int(net[1].num_batches_tracked) for net in nets] == [1, 1]


def test_what_draws_at_random_or_mixes_inside_is_not_computed_at_once(sizes):
    """Dropout in the network, stochastic depth, and what is hooked into it; each draws what it draws alone."""
    random = {"backbone": fn("deit", size=8, patch=4, width=8, depth=2, heads=2, drop_path=0.5)}
    inside = {"mixing": fn("manifold", layer="layer2")}
    for more in (random, inside):
        stages = [tiny(**more, seed=seed) for seed in (1, 2)]
        for mine, stage in zip(beside(*map(job, stages)), stages, strict=True):
            same(mine, train(stage, resources=ONE), exact=True)
    assert not sizes


def test_transformers_without_chance_and_networks_of_timm_are(sizes):
    for backbone in (
        fn("deit", size=8, patch=4, width=8, depth=2, heads=2, drop_path=0.0),
        fn("timm", model="test_resnet"),
        fn("timm", model="test_efficientnet"),
    ):
        stages = [tiny(backbone=backbone, epochs=1, seed=seed) for seed in (1, 2)]
        for mine, stage in zip(beside(*(job(stage, most=1) for stage in stages)), stages, strict=True):
            same(mine, train(stage, resources=ONE, most=1))
        assert sizes.pop() == 2


def test_chance_in_a_head_is_each_trials_own(monkeypatch, sizes):
    made = loop.build.method

    def dropping(stage, *rest):
        module = made(stage, *rest)
        module.head = nn.Sequential(nn.Dropout(0.5), module.head)
        return module

    monkeypatch.setattr(loop.build, "method", dropping)
    for mine, stage in zip(beside(*map(job, THREE)), THREE, strict=True):
        same(mine, train(stage, resources=ONE))
    assert sizes


def test_a_frozen_backbone_is_left_alone_while_others_train(sizes):
    frozen = tiny(method=fn("supervised", frozen=True, drift=True), init=tiny(), epochs=2)
    given = {"init": train(tiny(), resources=ONE)[0]}
    found = beside(job(frozen, given), job(THREE[0]), job(THREE[1]))
    same(found[0], train(frozen, given, resources=ONE), exact=True)
    same(found[1], train(THREE[0], resources=ONE))
    assert set(sizes) == {2}


def test_one_that_diverges_or_is_told_to_stop_leaves_the_others_as_they_are(sizes):
    def stop(record):
        raise InterruptedError("told to stop")

    wild = THREE[0].but(optimiser=fn("sgd", lr=1e150))
    found = beside(job(wild), job(THREE[0], on_epoch=stop), job(THREE[1]), job(THREE[2]))
    assert isinstance(found[0], Diverged) and isinstance(found[1], InterruptedError)
    for mine, stage in zip(found[2:], THREE[1:], strict=True):
        same(mine, train(stage, resources=ONE))
    assert set(sizes) == {4, 2}


def test_one_that_fails_between_its_features_and_their_gradient_counts_as_zero(monkeypatch, sizes):
    made = loop.build.method

    def failing(stage, *rest):
        module = made(stage, *rest)
        if stage.seed == 3:
            module.head.register_forward_hook(lambda *_: 1 / 0)
        return module

    monkeypatch.setattr(loop.build, "method", failing)
    found = beside(*map(job, THREE))
    assert isinstance(found[2], ZeroDivisionError) and sizes[0] == 3
    for mine, stage in zip(found[:2], THREE[:2], strict=True):
        same(mine, train(stage, resources=ONE))


@pytest.mark.parametrize("where", ["features", "gradients"])
def test_an_error_in_what_is_computed_at_once_is_everyones(monkeypatch, where):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "features":
        monkeypatch.setattr(stacked, "Pass", full)
    else:
        monkeypatch.setattr(stacked.Pass, "backward", full)
    other = tiny(batch=8)
    *found, apart = beside(*map(job, THREE), job(other))
    assert all(isinstance(error, torch.OutOfMemoryError) for error in found)
    same(apart, train(other, resources=ONE), exact=True)


def test_who_rests_keeps_nobody_waiting():
    """Someone waits for what another trial of the bundle makes; the wait is as long as the making."""
    ready, waited = threading.Event(), []

    def maker(lane, report):
        job(THREE[0])(lane, report)
        ready.set()

    def waiter(lane, report):
        while not ready.is_set():
            waited.append(torch.initial_seed())
            lane.rest(0.01)
        job(THREE[1])(lane, report)

    def resting_to_the_end(lane, report):
        lane.rest(0.01)
        report((2, torch.rand(1)))

    found = beside(waiter, maker, resting_to_the_end)
    same(found[1] if isinstance(found[1], tuple) else found[0], train(THREE[0], resources=ONE), exact=True)
    assert waited


def test_what_a_job_raises_is_raised_when_all_have_ended():
    def failing(lane, report):
        raise ValueError("no")

    said = []
    with pytest.raises(ValueError, match="no"):
        for record in stacked.bundle([failing, job(THREE[0])]):
            said.append(record)
    assert len(said) == 1


def test_nobody_trains_for_those_who_have_left():
    over = threading.Event()

    def endless(lane, report):
        try:
            while True:
                report(0)
                lane.rest(0.001)
        except InterruptedError:
            over.set()

    for _ in stacked.bundle([endless]):
        break
    assert over.wait(30)


def test_the_seconds_of_all_are_no_more_than_have_passed():
    began, records = stacked.time.monotonic(), []
    jobs = [job(stage, on_epoch=records.append) for stage in THREE]
    beside(*jobs)
    spent = sum(record["wall_s"] for record in records)
    assert 0 < spent < stacked.time.monotonic() - began
