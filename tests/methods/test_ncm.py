import pytest
import torch
from torch import distributed

from rayltr import build, catalogue
from rayltr.data import load
from rayltr.interface import Resources
from rayltr.spec import fn
from rayltr.train import facts, pixels, train
from tests.conftest import tiny
from tests.methods.test_methods import FACTS

ONE = Resources(device="cpu", threads=1)
JOINT = tiny(epochs=1)


def slow_logits(features, target, x, kind):
    """Minus the squared distances from the class means, image by image."""
    centre = sum(features) / len(features)

    def placed(f):
        f = f - centre if kind == "cl2n" else f
        return f if kind == "un" else f / f.square().sum().sqrt()

    means = []
    for c in range(3):
        own = [placed(f) for f, y in zip(features, target.tolist(), strict=True) if y == c]
        means.append(sum(own) / len(own))
    return torch.stack([torch.stack([-(placed(f) - mean).square().sum() for mean in means]) for f in x])


@pytest.mark.parametrize("kind", ["cl2n", "l2n", "un"])
def test_the_nearest_mean(kind):
    g = torch.Generator().manual_seed(0)
    features, target = torch.randn(20, 16, generator=g, dtype=torch.float64), torch.arange(20) % 3
    head = build.method(catalogue.complete(tiny(method=fn("ncm", features=kind))), FACTS).double().head
    halves = zip(features.split(13), target.split(13), strict=True)
    head.learn(list(halves), 20)
    x = torch.randn(5, 16, generator=g, dtype=torch.float64)
    torch.testing.assert_close(head(x), slow_logits(features, target, x, kind), rtol=1e-9, atol=1e-9)


def test_a_class_without_images_is_never_the_nearest():
    head = build.method(catalogue.complete(tiny(method=fn("ncm"))), FACTS).head
    head.learn([(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2)], 9)
    logits = head(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)))
    assert logits.isfinite().all() and (logits.argmax(1) < 2).all()


def test_a_stage_of_no_epochs_takes_the_means_of_the_stage_before():
    parent, _ = train(JOINT, resources=ONE)
    stage = JOINT.but(epochs=0, init=JOINT, method=fn("ncm", features="un"))
    state, logits = train(stage, {"init": parent}, resources=ONE)
    data = load(JOINT.source)
    plain = build.method(catalogue.complete(JOINT), facts(data))
    plain.load_state_dict(parent.model)
    with torch.no_grad():
        features = plain.eval().backbone(pixels(data.train.take(range(len(data.train))), torch.device("cpu")))
    target = torch.as_tensor(data.train.target)
    means = torch.stack([features[target == c].mean(0) for c in range(4)])
    torch.testing.assert_close(state.model["head.weight"], means, rtol=1e-4, atol=1e-5)
    assert logits["val"]["main"].shape == (len(data.val), 4)
    for name, value in parent.model.items():
        assert name.startswith("head.") or torch.equal(value, state.model[name]), name


def test_means_that_go_on_learning_can_be_cut():
    parent, _ = train(JOINT, resources=ONE)
    whole = JOINT.but(epochs=2, horizon=2, init=JOINT, method=fn("ncm"))
    once, _ = train(whole, {"init": parent}, resources=ONE)
    first = whole.but(epochs=1)
    begun, _ = train(first, {"init": parent}, resources=ONE)
    last = whole.but(epochs=1, init=None, resume=first)
    twice, _ = train(last, {"resume": begun}, resources=ONE)
    assert all(torch.equal(once.model[name], twice.model[name]) for name in once.model)
    assert not torch.equal(begun.model["head.weight"], once.model["head.weight"])


def test_other_features_are_refused():
    with pytest.raises(ValueError, match="features is one of cl2n, l2n, un, not 'l2'"):
        build.method(catalogue.complete(tiny(method=fn("ncm", features="l2"))), FACTS)


def shares():
    g = torch.Generator().manual_seed(0)
    return torch.rand(21, 3, 8, 8, generator=g, dtype=torch.float64), torch.arange(21) % 3


def prepared(rows):
    """What is learnt from these images, two batches of them."""
    module, (images, target) = build.method(catalogue.complete(tiny(method=fn("ncm"))), FACTS).double(), shares()
    module.prepare(((part, images[part], target[part]) for part in rows.split(5)), 21)
    return module.state_dict()


def worker(number, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    torch.save(prepared(torch.arange(number, 21, 2)), f"{folder}/{number}.pt")
    distributed.destroy_process_group()


def test_two_workers_take_the_means_of_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for number in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), prepared(torch.arange(21)))
