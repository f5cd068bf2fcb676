"""A vote of the nearest training images."""

import math

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.interface import Batch, Facts, Resources
from rayltr.methods.neighbours import NOBODY, Vote
from rayltr.spec import fn
from rayltr.train import train
from tests.conftest import tiny
from tests.methods.test_methods import FACTS

ONE = Resources(device="cpu", threads=1)


def built(facts=FACTS, **keywords):
    return build.method(catalogue.complete(tiny(method=fn("neighbours", **keywords))), facts).double().eval()


def slow_vote(cosines, target, classes, k, temperature):
    """Log shares of the votes of one image, on plain floats."""
    near = sorted(range(len(cosines)), key=lambda place: -cosines[place])[:k]
    votes = [0.0] * classes
    for place in near:
        votes[target[place]] += math.exp(cosines[place] / temperature)
    return [math.log((1 - NOBODY) * vote / sum(votes) + NOBODY / classes) for vote in votes]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (4, 0.07), (4, 1.0), (40, 0.5)])
def test_the_nearest_vote_by_their_cosine(k, temperature):
    g = torch.Generator().manual_seed(0)
    vote = Vote(5, torch.tensor([6, 3, 2]), k, temperature).double()
    assert vote.sharpness.exp().item() == pytest.approx(1 / temperature)
    vote.sharpness.data.fill_(-math.log(temperature))  # it was a float32
    x = torch.randn(7, 5, generator=g, dtype=torch.float64)
    cosines = (F.normalize(x) @ vote.bank.T).tolist()
    target = [0] * 6 + [1] * 3 + [2] * 2
    expected = [slow_vote(row, target, 3, min(k, 10), temperature) for row in cosines]
    torch.testing.assert_close(vote(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    own = [[-2.0 if place == 4 else cosine for place, cosine in enumerate(row)] for row in cosines]
    expected = [slow_vote(row, target, 3, min(k, 10), temperature) for row in own]
    found = vote(x, torch.full((7,), 4))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def images(size):
    return torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prepared(rows, facts=FACTS):
    module, x, target = built(facts, k=5), images(47), torch.arange(47) % 3
    module.train()
    with torch.no_grad():
        module.prepare([(part, x[part], target[part]) for part in rows.split(10)], 47)
    return module


def worker(number, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    torch.save(prepared(torch.arange(number, 47, 2)).state_dict(), f"{folder}/{number}.pt")
    distributed.destroy_process_group()


def test_workers_collect_the_features_of_all_images(tmp_path):
    whole = prepared(torch.arange(47))
    expected = F.normalize(whole.eval().backbone(images(47))).detach()
    torch.testing.assert_close(whole.head.bank, expected, rtol=0, atol=1e-12)
    assert whole.head.target.tolist() == [row % 3 for row in range(47)] and whole.head.known
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(found, dict(whole.state_dict()), rtol=0, atol=1e-12)


def test_a_method_that_has_its_neighbours_looks_at_no_image_again():
    module = prepared(torch.arange(47))
    before = module.head.bank.clone()
    module.prepare(iter([(torch.arange(2), None, None)]), 47)
    assert torch.equal(module.head.bank, before)


def test_in_training_an_image_is_not_its_own_neighbour():
    module = prepared(torch.arange(47)).train()
    rows = torch.arange(6)
    batch = Batch([images(47)[rows]], rows % 3, rows)
    features = module.backbone(batch.views[0])
    expected = F.cross_entropy(module.head(features, rows), rows % 3)
    torch.testing.assert_close(module(batch)["loss"], expected)
    assert not torch.allclose(expected, F.cross_entropy(module.head(features), rows % 3))


def test_a_stage_without_epochs_votes_by_the_images_of_its_parent():
    source = fn("synthetic", classes=4, per_class=60, size=8, ratio=4.0)
    first = tiny(epochs=6, source=source)
    before, linear = train(first, resources=ONE)
    stage = first.but(epochs=0, init=first, method=fn("neighbours", k=5))
    state, logits = train(stage, {"init": before}, resources=ONE)
    assert logits["val"]["main"].shape == linear["val"]["main"].shape
    assert np.mean(logits["val"]["main"].argmax(1) == linear["val"]["main"].argmax(1)) > 0.5
    again, same = train(stage, {"init": before}, begun=state, resources=ONE)
    np.testing.assert_array_equal(same["val"]["main"], logits["val"]["main"])
    assert all(torch.equal(again.model[name], value) for name, value in state.model.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": fn("neighbours", k=0)}, "neighbours needs k >= 1 and temperature > 0, not 0 and 0.07"),
        ({"method": fn("neighbours", temperature=0.0)}, "not 20 and 0.0"),
        ({"method": fn("neighbours"), "mixing": fn("manifold")}, "neighbours cannot mix inside the network"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    facts = Facts(("a", "b"), np.array([3, 2]), (0.5,) * 3, (0.25,) * 3, (8, 8))
    with pytest.raises(ValueError, match=message):
        build.method(catalogue.complete(tiny(**changes)), facts)
