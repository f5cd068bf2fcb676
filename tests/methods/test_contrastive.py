"""What the contrastive methods have in common: several workers, SAM, cutting, what they keep and refuse."""

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.contrast import balanced, parametric, supervised
from rayltr.interface import Batch, Resources
from rayltr.momentum import Followers, Queue
from rayltr.parallel import synchronised, together
from rayltr.spec import fn
from rayltr.train import train
from tests.conftest import tiny
from tests.methods.test_methods import FACTS

VIEWS = (fn("flip_crop"), fn("flip_crop"), fn("flip_crop"))
CASES = {
    "bcl": {"views": VIEWS, "method": fn("bcl", hidden=8, out=6), "loss": fn("logit_adjusted")},
    "bcl, cosine": {"views": VIEWS, "method": fn("bcl", hidden=8, out=6), "head": fn("cosine", scale=30.0)},
    "bcl, no complement": {"views": VIEWS, "method": fn("bcl", hidden=8, out=6, complement=False)},
    "bcl, L2": {"views": VIEWS, "method": fn("bcl", hidden=8, out=6, variant="L2")},
    "bcl, L3": {"views": VIEWS, "method": fn("bcl", hidden=8, out=6, variant="L3")},
    "bcl, mixed": {"views": VIEWS, "method": fn("bcl", hidden=8, out=6), "mixing": fn("mixup")},
    "supcon": {"views": VIEWS[:2], "method": fn("supcon", ce=0.5, hidden=8, out=6)},
    "paco": {"views": VIEWS[:2], "method": fn("paco", queue=10, out=6)},
    "gpaco": {"views": VIEWS[:2], "method": fn("gpaco", queue=10, out=6, smoothing=0.1)},
    "instance": {"views": VIEWS[:2], "method": fn("instance", queue=10, out=6)},
    "instance, both tasks": {"views": VIEWS[:2], "method": fn("instance", queue=10, out=6, rotation=0.5, groups=2)},
}

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def batch_of(stage, size, part=slice(None), seed=0):
    g = torch.Generator().manual_seed(seed)
    views = [torch.rand(size, 3, 8, 8, generator=g, dtype=torch.float64) for _ in stage.views]
    target, share = torch.randint(0, 3, (size,), generator=g), torch.rand(size, generator=g, dtype=torch.float64)
    mixed = (target.flip(0)[part], share[part]) if stage.mixing else ()
    return Batch([view[part] for view in views], target[part], torch.arange(size)[part], *mixed)


def steps(case, size, part=slice(None), wrap=lambda module: module):
    """Two steps: the terms of both, the gradients of the second, the state afterwards."""
    stage = catalogue.complete(tiny(**CASES[case]))
    module = build.method(stage, FACTS).double().train()
    model, terms = wrap(module), []
    for seed in range(2):
        module.zero_grad()
        found = model(batch_of(stage, size, part, seed))
        torch.stack([*found.values()]).sum().backward()
        terms.append({name: value.detach() for name, value in found.items()})
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return terms, grads, {name: value.clone() for name, value in module.state_dict().items()}


def worker(number, workers, sizes, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", workers)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=workers)
    wrap = lambda module: together(synchronised(module))  # noqa: E731
    found = {}
    for size, cases in sizes.items():
        part = slice(number * size // workers, (number + 1) * size // workers)
        found[size] = {case: steps(case, size, part, wrap) for case in cases}
    torch.save(found, f"{folder}/{number}.pt")
    distributed.destroy_process_group()


SHARES = [(2, {8: [*CASES], 12: ["bcl"], 24: ["bcl"]}), pytest.param((2, {24: [*CASES]}), marks=pytest.mark.slow),
          pytest.param((4, {12: [*CASES]}), marks=pytest.mark.slow)]  # fmt: skip
"""Workers, and which cases with how many images."""


@pytest.fixture(scope="module", params=SHARES, ids=lambda share: f"{share[0]} workers, {[*share[1]]} images")
def shared(request, tmp_path_factory):
    workers, sizes = request.param
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, (workers, sizes, str(folder)), nprocs=workers)
    return sizes, [torch.load(folder / f"{number}.pt") for number in range(workers)]


def test_workers_give_the_loss_gradients_and_queue_of_one(shared):
    """Over two steps, so that the queue is met; in double precision, where a wrong share cannot hide in rounding."""
    sizes, found = shared
    for size, case in [(size, case) for size, cases in sizes.items() for case in cases]:
        several = [one[size][case] for one in found]
        terms, grads, state = steps(case, size)
        for step, wanted in enumerate(terms):
            mean = {name: sum(one[0][step][name] for one in several) / len(several) for name in wanted}
            torch.testing.assert_close(mean, wanted, **EXACT)
        for one in several:
            torch.testing.assert_close(one[1], grads, **EXACT)
            torch.testing.assert_close(one[2], state, **EXACT)


def test_the_terms_of_bcl_are_the_weighted_losses_of_its_views():
    stage = catalogue.complete(tiny(**{**CASES["bcl"], "method": fn("bcl", hidden=8, out=6, ce=3.0, contrast=0.7)}))
    module, batch = build.method(stage, FACTS).double().train(), batch_of(stage, 8)
    terms = module(batch)
    features = module.backbone(torch.cat(batch.views))
    z, prototypes = module.project(features[8:]), module.project_class(module.head.weight)
    twice, place = batch.target.repeat(2), torch.arange(16)
    torch.testing.assert_close(terms["contrast"], 0.7 * balanced(z, z, twice, twice, place, prototypes).mean())
    prior = (module.counts / module.counts.sum()).log()
    logits = module.head(features[:8]) + prior
    torch.testing.assert_close(terms["loss"], 3 * F.cross_entropy(logits, batch.target))


def test_the_term_of_supcon_is_the_loss_of_both_views():
    stage = catalogue.complete(tiny(**CASES["supcon"]))
    module, batch = build.method(stage, FACTS).double().train(), batch_of(stage, 8)
    terms = module(batch)
    features = module.backbone(torch.cat(batch.views))
    z, twice = module.project(features), batch.target.repeat(2)
    expected = supervised(z, z, twice, twice, torch.arange(16), temperature=0.1).mean()
    torch.testing.assert_close(terms["contrast"], expected)
    torch.testing.assert_close(terms["loss"], 0.5 * F.cross_entropy(module.head(features[:8]), batch.target))


def test_paco_compares_queries_with_keys_and_the_queue_and_follows_slowly():
    stage = catalogue.complete(tiny(**CASES["paco"]))
    module = build.method(stage, FACTS).double().train()
    first, second = batch_of(stage, 4, seed=0), batch_of(stage, 4, seed=1)
    module(first)
    for name, value in module.slow.copies[0].named_parameters():  # after the first step it is still the network
        torch.testing.assert_close(value, dict(module.backbone.named_parameters())[name])
    assert module.queue.labels.tolist() == [*first.target.tolist(), *[-1] * 6]
    with torch.no_grad():
        for p in module.backbone.parameters():
            p.add_(0.5)
    slow = {name: p.clone() for name, p in module.slow.copies[0].named_parameters()}
    rows, labels = module.queue.content()
    found = module(second)["contrast"]
    for name, value in module.slow.copies[0].named_parameters():
        expected = 0.999 * slow[name] + 0.001 * dict(module.backbone.named_parameters())[name]
        torch.testing.assert_close(value, expected)
    features = module.backbone(second.views[0])
    q, k = module.project(features), module.slow(second.views[1])
    logits = module.head(features) + (module.counts / module.counts.sum()).log()
    known = torch.cat([second.target, second.target, labels])
    bank = torch.cat([q, k, rows])
    expected = parametric(q, bank, second.target, known, torch.arange(4), logits, **module.weights).mean()
    torch.testing.assert_close(found, expected)
    assert not k.requires_grad and module.queue.oldest == 8


def test_a_queue_replaces_the_oldest_rows_first():
    queue = Queue(4, 2)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(4))
    for start in (0, 3, 6):
        queue.push(torch.arange(start, start + 3.0)[:, None].expand(3, 2), torch.arange(start, start + 3))
    assert queue.labels.tolist() == [8, 5, 6, 7] and queue.rows[:, 0].tolist() == [8, 5, 6, 7]
    queue.push(torch.arange(10.0)[:, None].expand(10, 2), torch.arange(10))  # more than it holds: the last ones
    assert sorted(queue.labels.tolist()) == [6, 7, 8, 9]


def test_followers_start_as_copies_of_what_the_leaders_have_become():
    leader, follower = torch.nn.BatchNorm1d(3), Followers(torch.nn.BatchNorm1d(3))
    leader(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    follower.follow(leader, momentum=0.9)
    assert torch.equal(follower.copies[0].running_mean, leader.running_mean)
    assert not any(p.requires_grad for p in follower.parameters())


@pytest.mark.parametrize("case", ["bcl", "paco", "gpaco"])
def test_the_second_pass_of_sam_moves_neither_queue_nor_follower_nor_statistics(case):
    stage = catalogue.complete(tiny(**CASES[case], optimiser=fn("sam", lr=0.0, rho=0.5)))
    module = build.method(stage, FACTS).double().train()
    optimiser, batch = build.optimiser(stage, module), batch_of(stage, 8)
    optimiser.guard(module)
    other = build.method(stage, FACTS).double().train()
    other(batch)  # one pass
    passes = []

    def closure():
        optimiser.zero_grad()
        loss = torch.stack([*module(batch).values()]).sum()
        loss.backward()
        passes.append(loss.item())
        return loss

    optimiser.step(closure)
    assert len(passes) == 2 and passes[0] != passes[1]
    for name, value in other.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("case", ["bcl", "supcon", "paco", "gpaco"])
@pytest.mark.parametrize("optimiser", ["sgd", "sam"])
def test_cutting_a_stage_changes_no_weight(case, optimiser):
    one, choice = Resources(device="cpu", threads=1), {"optimiser": fn(optimiser, lr=0.05)}
    whole = tiny(epochs=4, horizon=4, **CASES[case], **choice)
    first = tiny(epochs=2, horizon=4, **CASES[case], **choice)
    expected, _ = train(whole, resources=one)
    half, _ = train(first, resources=one)
    found, _ = train(first.but(resume=first), {"resume": half}, resources=one)
    assert all(torch.equal(found.model[name], value) for name, value in expected.model.items())


@pytest.mark.parametrize("case", ["bcl", "supcon", "paco", "gpaco"])
def test_a_classifier_can_be_trained_on_what_it_keeps(case):
    one = Resources(device="cpu", threads=1)
    first = tiny(epochs=1, **CASES[case])
    state, _ = train(first, resources=one)
    assert {name.split(".")[0] for name in state.kept} == {"backbone", "head"}
    train(tiny(epochs=1, method=fn("supervised", frozen=True, fresh_head=True), init=first), {"init": state},
          resources=one)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": fn("bcl")}, "the method bcl needs 3 views, the stage has 1"),
        ({"method": fn("paco"), "views": VIEWS[:2], "weight": fn("inverse_frequency")}, "paco has a loss of its own; "
         "leave weight= out"),
        ({"method": fn("paco"), "views": VIEWS[:2], "mixing": fn("mixup")}, "leave mixing= out"),
        ({"method": fn("gpaco"), "views": VIEWS[:2], "loss": fn("balanced_softmax")}, "leave loss= out"),
        ({"method": fn("bcl", temperature=0.0), "views": VIEWS}, "bcl needs ce >= 0, contrast >= 0 and temp"),
        ({"method": fn("bcl", variant="L3", complement=False), "views": VIEWS}, "variant is one of L1, L2, L3"),
        ({"method": fn("bcl"), "views": VIEWS, "mixing": fn("manifold")}, "bcl cannot mix inside the network"),
        ({"method": fn("supcon", temperature=-1.0), "views": VIEWS}, "supcon needs ce >= 0"),
        ({"method": fn("paco", momentum=1.0), "views": VIEWS}, "0 <= momentum < 1"),
        ({"method": fn("gpaco", smoothing=1.0), "views": VIEWS}, "0 <= smoothing < 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build.method(catalogue.complete(tiny(**changes)), FACTS)
