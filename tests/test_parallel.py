import copy

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from rayltr.optim import OPTIMISERS
from rayltr.parallel import SynchronisedBatchNorm, all_sum, gather, rank, synchronised, together, world

SLICES = [slice(0, 5), slice(5, 8)]  # how eight images are shared by two workers, unequally
HALVES = [slice(0, 4), slice(4, 8)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class NormAct(nn.BatchNorm2d):
    """As in timm: what follows the normalisation belongs to the module."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


NORMS = {
    "vectors": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "sequences": (lambda: nn.BatchNorm1d(3), (8, 3, 4)),
    "images": (lambda: nn.BatchNorm2d(3), (8, 3, 4, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (8, 3, 4, 2)),
    "bare": (lambda: nn.BatchNorm2d(3, affine=False), (8, 3, 4, 2)),
    "forgetful": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (8, 3, 4, 2)),
    "followed": (lambda: NormAct(3), (8, 3, 4, 2)),
}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_case(name, part=slice(None), convert=lambda module: module):
    """Two training steps and an evaluation of a norm on a part of the batch: everything that can be seen of it."""
    make, shape = NORMS[name]
    module = convert(nn.Sequential(make()).double())
    if module[0].affine:
        with torch.no_grad():
            module[0].weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
    for seed in range(2):
        module.zero_grad()
        x = (3 + 2 * numbers(*shape, seed=seed))[part].requires_grad_()
        y = module(x)
        (y * numbers(*shape, seed=9)[part]).sum().backward()
    grads = {key: p.grad for key, p in module.named_parameters()}
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module.eval()
    return {"y": y.detach(), "x": x.grad, "grads": grads, "state": state, "eval": module(x.detach()).detach()}


def sam_case(model, batch, sync):
    """Three steps of SAM, the batch's loss a mean."""
    optimiser = OPTIMISERS["sam"](model.parameters(), rho=0.5, sync=sync)
    optimiser.guard(model)
    for step in range(3):
        x, y = numbers(8, 4, seed=step)[batch], torch.arange(8)[batch] % 3

        def closure(x=x, y=y):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimiser.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def linear():
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(numbers(3, 4, seed=1)), model.bias.zero_()
    return model


def sum_case(part):
    x = numbers(2, 3, seed=part).T.requires_grad_()  # not contiguous
    total = all_sum(x)
    (total**2 * (part + 1)).sum().backward()
    return total.detach(), x.grad


def gather_case(part):
    x = numbers(3, 2, seed=part).T.requires_grad_()
    rows = gather(x)
    (rows**2 * (part + 1) * torch.arange(4)[:, None]).sum().backward()
    return rows.detach(), x.grad


def bfloat16_case():
    module = synchronised(nn.BatchNorm2d(3))
    return module(numbers(8, 3, 4, 2).bfloat16()).dtype


def buffers_case(number):
    """Buffers that differ at the start, and after a change by each worker a step."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double().eval()
    module[1].running_mean.fill_(number + 1.0)
    model = together(module)
    first = module[1].running_mean.clone()
    module[1].running_mean.fill_(number + 5.0)
    for _ in range(2):
        model(numbers(4, 2)).sum().backward()
    return first, module[1].running_mean


def worker(number, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    result = {
        "place": (rank(), world()),
        "sum": sum_case(number),
        "gather": gather_case(number),
        "whole numbers": gather(torch.tensor([number, 7])),
        "norms": {name: norm_case(name, SLICES[number], synchronised) for name in NORMS},
        "bfloat16": bfloat16_case(),
        "buffers": buffers_case(number),
    }
    for sync in (False, True):
        result["sam", sync] = sam_case(DistributedDataParallel(linear()), HALVES[number], sync)
    torch.save(result, f"{folder}/{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


def test_alone_everything_is_the_identity():
    assert (rank(), world()) == (0, 1)
    x = torch.rand(3, requires_grad=True)
    assert all_sum(x) is x and gather(x) is x
    module = nn.Sequential(nn.BatchNorm1d(3))
    assert synchronised(module) is module and type(module[0]) is nn.BatchNorm1d and together(module) is module


def test_a_synchronised_norm_that_is_used_alone_is_an_ordinary_one():
    ours, theirs = SynchronisedBatchNorm(3).double(), nn.BatchNorm2d(3).double()
    x = 5 + numbers(8, 3, 4, 2)
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)


def test_buffers_are_sent_around_once(workers):
    """At the start the first worker's are everybody's; a large queue must not travel before every step."""
    for number, own in enumerate(workers):
        first, last = own["buffers"]
        assert first.tolist() == [1, 1] and last.tolist() == [number + 5] * 2


def test_workers_know_their_place(workers):
    assert [w["place"] for w in workers] == [(0, 2), (1, 2)]


def test_all_sum_value_and_gradient(workers):
    parts = [numbers(2, 3, seed=part).T.requires_grad_() for part in range(2)]
    total = sum(parts)
    (total**2 * (1 + 2)).sum().backward()
    for (value, gradient), x in zip([w["sum"] for w in workers], parts, strict=True):
        torch.testing.assert_close(value, total.detach(), **EXACT)
        torch.testing.assert_close(gradient, x.grad, **EXACT)


def test_gather_value_and_gradient(workers):
    parts = [numbers(3, 2, seed=part).T.requires_grad_() for part in range(2)]
    rows = torch.cat(parts)
    (rows**2 * (1 + 2) * torch.arange(4)[:, None]).sum().backward()
    for (value, gradient), x in zip([w["gather"] for w in workers], parts, strict=True):
        torch.testing.assert_close(value, rows.detach(), **EXACT)
        torch.testing.assert_close(gradient, x.grad, **EXACT)
    assert [w["whole numbers"].tolist() for w in workers] == [[0, 7, 1, 7]] * 2


@pytest.mark.parametrize("name", NORMS)
def test_synchronised_norms_equal_one_process(workers, name):
    whole = norm_case(name)
    parts = [w["norms"][name] for w in workers]
    for key in ("y", "x"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), whole[key], **EXACT)
    for key, gradient in whole["grads"].items():
        torch.testing.assert_close(parts[0]["grads"][key] + parts[1]["grads"][key], gradient, **EXACT)
    for part, rows in zip(parts, SLICES, strict=True):
        assert list(part["state"]) == list(whole["state"])
        torch.testing.assert_close(part["state"], whole["state"], **EXACT)
        if name != "forgetful":  # evaluates with the statistics of its own batch, as one process does
            torch.testing.assert_close(part["eval"], whole["eval"][rows], **EXACT)


def test_synchronised_norms_keep_half_precision(workers):
    assert [w["bfloat16"] for w in workers] == [torch.bfloat16] * 2


def test_sam_that_climbs_together_equals_one_process(workers):
    expected = sam_case(linear(), slice(None), sync=True)
    for w in workers:
        torch.testing.assert_close(w["sam", True], expected, **EXACT)


def test_sam_that_climbs_alone_averages_the_workers_gradients(workers):
    model = linear()
    inner = OPTIMISERS["sgd"](model.parameters())
    for step in range(3):
        there = []
        for half in HALVES:
            x, y = numbers(8, 4, seed=step)[half], torch.arange(8)[half] % 3
            above = copy.deepcopy(model)
            gradient = torch.autograd.grad(F.cross_entropy(above(x), y), list(above.parameters()))
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            for p, g in zip(above.parameters(), gradient, strict=True):
                p.data += 0.5 * g / norm
            there.append(torch.autograd.grad(F.cross_entropy(above(x), y), list(above.parameters())))
        for p, *grads in zip(model.parameters(), *there, strict=True):
            p.grad = sum(grads) / 2
        inner.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.allclose(expected, workers[0]["sam", True])
    for w in workers:
        torch.testing.assert_close(w["sam", False], expected, **EXACT)
