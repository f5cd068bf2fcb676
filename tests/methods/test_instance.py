"""Several workers, cutting and SAM are tested for all contrastive methods in tests/methods/test_contrastive.py."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.interface import Batch, Facts
from rayltr.methods.instance import instance_contrast
from rayltr.methods.rotation import turned
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods.test_contrastive import batch_of
from tests.methods.test_methods import FACTS
from tests.methods.test_million import NEAR, STAGE, run, same

VIEWS = (fn("flip_crop"),) * 2


def built(**keywords):
    stage = catalogue.complete(tiny(views=VIEWS, method=fn("instance", **keywords)))
    return stage, build.method(stage, FACTS).double().train()


def slow_contrast(queries, keys, rows, target, labels, temperature):
    """The definition, with exponentials as they stand."""
    found = []
    for i, y in enumerate(target.tolist()):
        own = math.exp(float(queries[i] @ keys[i]) / temperature)
        pairs = zip(rows, labels.tolist(), strict=True)
        others = sum(math.exp(float(queries[i] @ row) / temperature) for row, label in pairs if label != y)
        found.append(-math.log(own / (own + others)))
    return torch.tensor(found, dtype=torch.float64)


def units(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_the_contrast_equals_its_definition(temperature):
    q, k, rows = units(5, 0).requires_grad_(), units(5, 1), units(9, 2)
    target, labels = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([-1, 0, 0, 1, 2, 2, -1, 1, 1])
    found = instance_contrast(q, k, rows, target, labels, temperature)
    torch.testing.assert_close(
        found, slow_contrast(q.detach(), k, rows, target, labels, temperature), rtol=1e-9, atol=1e-12
    )
    (gradient,) = torch.autograd.grad(found.sum(), q)
    for i, y in enumerate(target.tolist()):  # sum_j p_j r_j - (1 - p) k over the others, divided by T
        others = rows[labels != y]
        p = torch.cat([k[i : i + 1], others]).matmul(q[i] / temperature).softmax(0)
        torch.testing.assert_close(gradient[i], (p[1:] @ others - (1 - p[0]) * k[i]) / temperature)


def test_without_images_of_other_classes_there_is_nothing_to_tell_apart():
    q, k, rows = units(2, 0).requires_grad_(), units(2, 1), units(4, 2)
    found = instance_contrast(q, k, rows, torch.tensor([0, 1]), torch.zeros(4, dtype=torch.long), 0.2)
    assert found[0] == 0 and found[1] > 0
    (gradient,) = torch.autograd.grad(found.sum(), q)
    assert gradient.isfinite().all() and not gradient[0].any()


def test_small_temperatures_and_half_precision_stay_finite():
    q = units(4, 0).float().requires_grad_()
    found = instance_contrast(q, -q.detach(), units(9, 2).float(), torch.arange(4), torch.full((9,), -1), 1e-3)
    (gradient,) = torch.autograd.grad(found.sum(), q)
    assert found.isfinite().all() and gradient.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stage, module = built(queue=10, out=6)
        terms = module.float()(Batch([v.float() for v in batch_of(stage, 4).views], *_rest(batch_of(stage, 4))))
    assert terms["contrast"].dtype == torch.float32 and terms["contrast"].isfinite()


def _rest(batch):
    return batch.target, batch.rows


def test_four_steps_equal_the_method_written_out():
    """Query first, then the followers move, then the keys; the queue of before; then the batch joins it."""
    stage, module = built(queue=10, out=6, temperature=0.3, momentum=0.9, contrast=0.7)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    follower = [copy.deepcopy(module.backbone), copy.deepcopy(module.project)]
    rows, labels, place = module.queue.rows.clone(), [-1] * 10, 0
    for seed in range(4):
        batch = batch_of(stage, 4, seed=seed)
        network = copy.deepcopy([module.backbone, module.project])
        features = network[0](batch.views[0])
        for leader, own in zip(network, follower, strict=True):
            for theirs, mine in zip(leader.parameters(), own.parameters(), strict=True):
                mine.data = 0.9 * mine.data + 0.1 * theirs.data
        q, k = F.normalize(network[1](features)), F.normalize(follower[1](follower[0](batch.views[1]))).detach()
        expected = slow_contrast(q.detach(), k, rows, batch.target, torch.tensor(labels), 0.3).mean()
        terms = module(batch)
        torch.testing.assert_close(terms["contrast"], 0.7 * expected)
        torch.testing.assert_close(terms["loss"], F.cross_entropy(module.head(features), batch.target))
        for row, label in zip(k, batch.target.tolist(), strict=True):
            rows[place], labels[place], place = row, label, (place + 1) % 10
        torch.testing.assert_close(module.queue.rows, rows)
        assert module.queue.labels.tolist() == labels and module.queue.oldest == place
        mine = [p for part in follower for p in part.parameters()]
        torch.testing.assert_close([*module.slow.copies.parameters()], mine)
        optimiser.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        optimiser.step()
    assert not torch.allclose(mine[0], next(module.backbone.parameters())), "the network has moved on"


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_keys_of_neighbours_are_normalised_apart(groups):
    stage, module = built(queue=10, out=6, groups=groups)
    images = batch_of(stage, 7).views[1]
    slow = copy.deepcopy(module.slow)
    expected = torch.empty(7, 6, dtype=torch.float64)
    for group in range(groups):
        part = [i for i in range(7) if i % groups == group]
        expected[part] = F.normalize(slow(images[part]))
    torch.testing.assert_close(module._keys(images, 0), expected)
    if groups > 1:
        assert not torch.allclose(slow(images), module.slow(images[:4])[[0, 1, 2, 3, 0, 0, 0]])
    slow.eval()
    module.eval()
    module.slow.load_state_dict(slow.state_dict())
    torch.testing.assert_close(module._keys(images, 0), F.normalize(slow(images)))  # every key in its place
    torch.testing.assert_close(module._keys(images, 5), F.normalize(slow(images)))


def test_too_many_groups_are_refused():
    stage, module = built(queue=10, groups=5)
    with pytest.raises(ValueError, match="4 images per worker cannot be cut into 5 groups"):
        module(batch_of(stage, 4))


def test_both_tasks_share_one_pass():
    stage, module = built(queue=10, out=6, rotation=0.5, contrast=2.0)
    other = copy.deepcopy(module)
    batch = batch_of(stage, 8)
    terms = module(batch)
    copies, turns = turned(batch.views[0], batch.rows)
    features = other.backbone(torch.cat([batch.views[0], copies]))
    torch.testing.assert_close(terms["loss"], F.cross_entropy(other.head(features[:8]), batch.target))
    torch.testing.assert_close(terms["rotation"], 0.5 * F.cross_entropy(other.angle(features[8:]), turns))
    other.slow.follow(other.backbone, other.project, momentum=0.999)
    q, k = F.normalize(other.project(features[:8])), F.normalize(other.slow(batch.views[1]))
    losses = instance_contrast(q, k, other.queue.rows, batch.target, other.queue.labels, 0.2)
    torch.testing.assert_close(terms["contrast"], 2 * losses.mean())


def test_random_rows_belong_to_no_class_or_as_published_to_the_first():
    for label in (-1, 0):
        _, module = built(queue=6, queue_label_init=label)
        assert module.queue.labels.tolist() == [label] * 6
        torch.testing.assert_close(module.queue.rows.norm(dim=1), torch.ones(6).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("images", "batch", "rows"),
    [(115846, 256, 115712), (10847, 128, 10752), (437513, 512, 437248), (445, 128, 384), (40, 64, 64)],
)
def test_the_queue_holds_an_epoch_of_whole_batches(images, batch, rows):
    known = Facts(("a", "b"), np.array([images - 1, 1]), (0.5,) * 3, (0.25,) * 3, (8, 8))
    stage = catalogue.complete(tiny(views=VIEWS, method=fn("instance", out=2), batch=batch))
    assert len(build.method(stage, known).queue.rows) == rows


def test_the_second_pass_of_sam_moves_neither_queue_nor_follower():
    keywords = {"queue": 10, "out": 6, "rotation": 1.0}
    stage, module = built(**keywords)
    stage = stage.but(optimiser=fn("sam", lr=0.0, rho=0.5))
    other, batch = built(**keywords)[1], batch_of(stage, 8)
    optimiser = build.optimiser(stage, module)
    optimiser.guard(module)
    other(batch)
    passes = []

    def closure():
        optimiser.zero_grad()
        loss = torch.stack([*module(batch).values()]).sum()
        loss.backward()
        passes.append(loss.item())
        return loss

    optimiser.step(closure)
    assert len(passes) == 2 and passes[0] != passes[1]
    torch.testing.assert_close(module.state_dict(), other.state_dict())


@pytest.mark.slow
def test_two_workers_train_as_one_does_queue_and_statistics_included(tmp_path):
    """Over epochs in which the queue is overwritten; `run` compares the workers with each other, bit for bit."""
    stage = STAGE.but(views=(fn("identity"),) * 2, method=fn("instance", queue=24, out=6, rotation=0.5, groups=2))
    two, one = (run(tmp_path / str(workers), workers, stage=stage) for workers in (2, 1))
    assert {"queue.rows", "queue.labels", "queue.oldest", "slow.copies.0.body.trunk.1.running_var"} <= two.model.keys()
    assert (two.model["queue.labels"] >= 0).all() and two.trained == one.trained == 4
    same(two, one, **NEAR)


def test_it_keeps_what_predicts():
    _, module = built(queue=10, rotation=1.0)
    assert module.keep() == list(build.method(catalogue.complete(tiny()), FACTS).state_dict())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"contrast": 0.0}, "instance needs contrast > 0"),
        ({"momentum": 1.0}, "0 <= momentum < 1"),
        ({"queue": 0}, "queue of at least 1"),
        ({"groups": 0}, "groups, out and queue of at least 1"),
        ({"queue_label_init": 1}, "-1 or 0 as queue_label_init"),
    ],
)
def test_values_that_cannot_be_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        built(**keywords)


def test_mixing_is_refused():
    stage = catalogue.complete(tiny(views=VIEWS, method=fn("instance", queue=10), mixing=fn("mixup")))
    with pytest.raises(ValueError, match="leave the mixing out"):
        build.method(stage, FACTS).double()(batch_of(stage, 4))
