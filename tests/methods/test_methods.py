"""What every method keeps: a method is tested by being there."""

import numpy as np
import pytest
import torch
from torch import distributed

from rayltr import build, catalogue
from rayltr.interface import Batch, Facts, Resources
from rayltr.parallel import everyones, sizes_of, synchronised, together
from rayltr.spec import fn
from rayltr.train import train
from tests.conftest import tiny

FACTS = Facts(("a", "b", "c"), np.array([30, 12, 5]), (0.5,) * 3, (0.25,) * 3, (8, 8))
METHODS = sorted(catalogue.names("method"))
TAUGHT = {name for name in METHODS if catalogue.names("method")[name].taught}


NEEDED = {"tokens": {"backbone": fn("deit", size=8, patch=4, width=8, depth=2, heads=2, drop_path=0.0)}}
"""Other backbones than a convolutional one, without layers dropped at random, which workers do differently."""


def asked(name):
    """The method, with a teacher and a backbone where it needs one."""
    views = (fn("flip_crop"),) * catalogue.names("method")[name].views
    taught = {"teacher": tiny(seed=1, epochs=1)} if name in TAUGHT else {}
    return {"method": fn(name), "views": views, **taught, **NEEDED.get(name, {})}


OWN = {name for name in METHODS if catalogue.names("method")[name].own_loss}
CASES = {name: {**asked(name), **({} if name in OWN else {"weight": fn("inverse_frequency")})} for name in METHODS} | {
    "supervised, mean of images": {"method": fn("supervised", reduction="mean"), "loss": fn("focal")},
    "supervised, mixed": {"method": fn("supervised"), "mixing": fn("mixup"), "weight": fn("effective_number")},
    "supervised, ldam": {"method": fn("supervised"), "loss": fn("ldam"), "head": fn("cosine")},
    "supervised, influence": {"method": fn("supervised"), "loss": fn("influence_balanced")},
    "dive, mixed": {**asked("dive"), "mixing": fn("mixup")},
    "tokens, mixed": {**asked("tokens"), "mixing": fn("mixup_or_cutmix"), "loss": fn("label_smoothing")},
    "tokens, soft": {
        **asked("tokens"),
        "method": fn("tokens", distil="soft", temperature=2.0),
        "weight": fn("effective_number", beta=0.9),
    },
    "distil, statistics of the batch": {**asked("distil"), "method": fn("distil", teacher_bn="batch")},
    "student, lws": {"method": fn("student"), "head": fn("lws")},
    **{
        f"supervised, mixed at {layer}": {"mixing": fn("manifold", layer=layer), "loss": fn("balanced_softmax")}
        for layer in ("layer1", "layer3", "pool", "fc")
    },
}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def batch_of(stage, part=slice(None)):
    """A fixed global batch of 8 images with as many views as the stage has, or a part of it."""
    g = torch.Generator().manual_seed(0)
    views = [torch.rand(8, 3, 8, 8, generator=g, dtype=torch.float64) for _ in stage.views]
    target, share = torch.tensor([0, 0, 1, 0, 1, 2, 0, 1]), torch.rand(8, generator=g, dtype=torch.float64)
    partner = torch.tensor([2, 4, 0, 1, 3, 7, 5, 6])  # everyone's partner is on the same worker
    mixed = (target[partner][part], share[part], partner[part] - (part.start or 0)) if stage.mixing else ()
    return Batch([view[part] for view in views], target[part], torch.arange(8)[part], *mixed)


def built(stage):
    """The method in float64, with its teacher."""
    teacher = build.method(stage.teacher, FACTS).double().eval().requires_grad_(False) if stage.teacher else None
    return build.method(stage, FACTS, teacher).double()


def step(case, wrap, part=slice(None)):
    """Terms, gradients and statistics after one training pass."""
    stage = catalogue.complete(tiny(**CASES[case]))
    module = built(stage).train()
    model = wrap(module)
    build.optimiser(stage, module)  # what moves by itself learns how fast
    if hasattr(module, "between"):
        module.between(0)
    terms = model(batch_of(stage, part))
    torch.stack([*terms.values()]).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    shared = getattr(module, "sharded", ())
    state = {
        name: everyones(value, sizes_of(value)) if name in shared else value
        for name, value in module.state_dict().items()
    }
    return {name: value.detach() for name, value in terms.items()}, grads, state


def worker(number, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    part = slice(0, 5) if number == 0 else slice(5, 8)
    found = {case: step(case, lambda m: together(synchronised(m)), part) for case in CASES}
    torch.save(found, f"{folder}/{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_workers_give_the_loss_and_gradients_of_one(case, workers):
    """At equal global batch, unequally shared: DDP averages over workers, so the mean of their terms is the term."""
    terms, grads, state = step(case, lambda module: module)
    for name, value in terms.items():
        torch.testing.assert_close((workers[0][case][0][name] + workers[1][case][0][name]) / 2, value, **EXACT)
    for found in workers:
        assert found[case][1].keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[case][1][name], grad, **EXACT)
        for name, value in state.items():
            torch.testing.assert_close(found[case][2][name], value, **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_terms_are_finite_scalars_with_gradients(method):
    terms, grads, _ = step(method, lambda module: module)
    assert terms and all(value.ndim == 0 and value.isfinite() for value in terms.values())
    assert grads and all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("method", METHODS)
def test_prediction_gives_logits_for_every_head(method):
    module = build.method(catalogue.complete(tiny(**asked(method))), FACTS).eval()  # no teacher is needed for this
    heads = module.predict(torch.rand(5, 3, 8, 8))
    assert heads and all(z.shape == (5, 3) for z in heads.values())


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_what_it_keeps_can_be_handed_over(method):
    stage = tiny(**asked(method), epochs=1)
    one = Resources(device="cpu", threads=1)
    given = {"teacher": train(stage.teacher, resources=one)[0]} if stage.teacher else {}
    state, _ = train(stage, given, resources=one)
    assert set(state.kept) <= set(state.model)
    train(stage.but(init=stage), {**given, "init": state}, resources=one)
