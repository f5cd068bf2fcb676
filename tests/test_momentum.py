"""How queue and follower move where a step passes its batches twice, and on several workers (SAM)."""

import pytest
import torch
from torch import distributed

from rayltr import build, catalogue
from rayltr.momentum import Followers, Queue
from rayltr.parallel import synchronised, together
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods.test_contrastive import CASES, EXACT, VIEWS, batch_of
from tests.methods.test_methods import FACTS

METHODS = {name: CASES[name] for name in ("paco", "gpaco", "instance")}
METHODS["ncl"] = {"views": VIEWS[:2], "method": fn("ncl", queue=10, out=6, contrast=1.0)}
SHARED = {"bcl": CASES["bcl"], "paco": CASES["paco"], "instance": CASES["instance"]}


def closure(model, optimiser, batches, seen):
    """Adds up the gradients of the batches, and notes the loss of each."""

    def evaluate():
        optimiser.zero_grad()
        losses = []
        seen.append([])
        for batch in batches:
            losses.append(torch.stack([*model(batch).values()]).sum())
            losses[-1].backward()
            seen[-1].append(losses[-1].item())
        return torch.stack(losses).sum()

    return evaluate


def built(choice, wrap=lambda module: module, **optimiser):
    stage = catalogue.complete(tiny(**choice, optimiser=fn(**optimiser)))
    module = build.method(stage, FACTS).double().train()
    model, steps = wrap(module), build.optimiser(stage, module)
    if hasattr(steps, "guard"):
        steps.guard(model)
    return stage, module, model, steps


def trained(case, **optimiser):
    """A module after two steps of three batches each, more than its queue holds, and the losses of every pass."""
    stage, module, model, optimiser = built(METHODS[case], **optimiser)
    passes = []
    for step in range(2):
        batches = [batch_of(stage, 4, seed=3 * step + i) for i in range(3)]
        optimiser.step(closure(model, optimiser, batches, passes))
    return module.state_dict(), passes


def moving(module):
    """What is not learnt: queues, followers and statistics."""
    learnt = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: value.clone() for name, value in module.state_dict().items() if name not in learnt}


@pytest.mark.parametrize("name", METHODS)
def test_every_batch_of_a_second_pass_meets_what_it_met_in_the_first(name):
    """Where SAM does not climb, each batch has the loss of the first pass to the bit."""
    state, passes = trained(name, name="sam", lr=0.1, rho=0.0)
    assert passes[0] == passes[1] and passes[2] == passes[3] and len({*passes[0], *passes[2]}) == 6
    _, climbing = trained(name, name="sam", lr=0.1, rho=0.5)
    assert climbing[0] == passes[0] and climbing[1] != passes[1]
    plain, once = trained(name, name="sgd", lr=0.1, momentum=0.9)
    assert len(once) == 2 and once[0] == pytest.approx(passes[0], rel=1e-2)
    queues = [key for key in state if key.startswith("queue")]
    assert queues and all(torch.equal(state[key], plain[key]) for key in queues if not key.endswith("rows"))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_several_batches_moves_the_queue_with_each_and_the_follower_once(name):
    """What is left of a step, weights aside, is what one pass leaves if the follower moves with its first batch."""
    (stage, module, model, optimiser), (_, other, *_) = (built(METHODS[name], name="sam", rho=0.5) for _ in range(2))
    for one in (module, other):
        one(batch_of(stage, 4, seed=9))  # the first to follow becomes a copy
        with torch.no_grad():
            for p in one.backbone.parameters():
                p.add_(0.1)
    batches, passes = [batch_of(stage, 4, seed=seed) for seed in range(3)], []
    optimiser.step(closure(model, optimiser, batches, passes))
    assert passes[0] != passes[1]
    for batch in batches:
        other(batch)
        if hasattr(other, "slow"):
            other.slow.due = False
    torch.testing.assert_close(moving(module), moving(other), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_pass_that_fails_leaves_what_the_first_moved(name):
    (stage, module, _, optimiser), (_, other, *_) = (built(METHODS[name], name="sam", rho=0.5) for _ in range(2))
    batches, calls = [batch_of(stage, 4, seed=seed) for seed in range(3)], []

    def model(batch):
        calls.append(batch)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return module(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        optimiser.step(closure(model, optimiser, batches, []))
    for batch in batches:
        other(batch)
    torch.testing.assert_close(moving(module), moving(other), rtol=0, atol=0)
    assert len(calls) == 5
    module(batches[0])  # and it goes on as if that pass had not been
    other(batches[0])
    torch.testing.assert_close(moving(module), moving(other), rtol=0, atol=0)


def test_a_queue_is_put_back_and_taken_again():
    queue, plain = Queue(4, 2), Queue(4, 2)
    plain.load_state_dict(queue.state_dict())
    given = [(torch.full((n, 2), float(n)), torch.full((n,), n)) for n in (3, 2, 6)]  # around the end, and too many
    found = []
    for number in (1, 2):
        queue.passing(number)
        for rows, labels in given:
            found.append([part.tolist() for part in queue.content()])
            queue.push(rows if number == 1 else -rows, labels)
    queue.passing(0)
    for rows, labels in given:
        plain.push(rows, labels)
    assert found[:3] == found[3:] and found[0] != found[1]
    assert all(torch.equal(value, queue.state_dict()[name]) for name, value in plain.state_dict().items())
    queue.push(*given[0])
    plain.push(*given[0])
    assert torch.equal(queue.rows, plain.rows) and queue.replaced is None, "nothing is remembered outside of a step"


def test_a_follower_moves_once_where_a_step_is_told_and_else_with_every_batch():
    leader, follower = torch.nn.Linear(1, 1, bias=False), Followers(torch.nn.Linear(1, 1, bias=False))
    weight = follower.copies[0].weight
    follower.follow(leader, momentum=0.5)
    with torch.no_grad():
        weight.fill_(0.0)
        leader.weight.fill_(1.0)
    found = []
    for number in (1, 2, 0):
        follower.passing(number)
        for _ in range(2):
            follower.follow(leader, momentum=0.5)
            found.append(weight.item())
    assert found == [0.5, 0.5, 0.5, 0.5, 0.75, 0.875]


def climbed(name, sync, size, part=slice(None), wrap=lambda module: module):
    """The state after three steps of SAM."""
    stage, module, model, optimiser = built(SHARED[name], wrap, name="sam", lr=0.1, rho=0.5, sync=sync)
    for seed in range(3):
        optimiser.step(closure(model, optimiser, [batch_of(stage, size, part, seed)], []))
    return {key: value.clone() for key, value in module.state_dict().items()}


def worker(number, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    part = slice(4 * number, 4 * number + 4)
    wrap = lambda module: together(synchronised(module))  # noqa: E731
    found = {(name, sync): climbed(name, sync, 8, part, wrap) for name in SHARED for sync in (False, True)}
    torch.save(found, f"{folder}/{number}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sam_on_two_workers_trains_as_on_one(tmp_path):
    """With gathered features, normalisation over both and a queue.  Where each climbs alone, both stay the same."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    for name in SHARED:
        expected = climbed(name, True, 8)
        torch.testing.assert_close(first[name, True], expected, **EXACT)
        torch.testing.assert_close(second[name, True], expected, **EXACT)
        torch.testing.assert_close(first[name, False], second[name, False], rtol=0, atol=0)
        assert not torch.allclose(first[name, False]["head.weight"], expected["head.weight"]), "another climb"
