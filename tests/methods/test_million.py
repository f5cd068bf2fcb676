"""One class per image: the prior, the hardest classes, cutting, and workers that die and change in number."""

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from rayltr import build, catalogue, command, recipe, records
from rayltr.ahead import Reader
from rayltr.backbones import Pooled
from rayltr.data import load
from rayltr.interface import Batch, Facts, Resources
from rayltr.parallel import rank, share, synchronised, world
from rayltr.rehearsal import spread
from rayltr.spec import fn, line
from rayltr.store import Store
from rayltr.train import prepared, train
from rayltr.trial import Trial
from tests.conftest import CIFAR100, tiny
from tests.methods.test_methods import FACTS

ONE = Resources(device="cpu", threads=1)
SMALL = {"method": fn("million", out=6, hardest=5, block=16)}
SAMPLED = {"method": fn("million", out=6, hardest=5, block=16, sampled=0.6)}
CASES = {
    "smoothed": SMALL,
    "sampled": SAMPLED,
    "seen": {"method": fn("million", out=6, hardest=5, augmented=True)},
    "plain": {"method": fn("million", out=6, smoothing=0.0, prior=False)},
    "dot": {"method": fn("million", out=6, cosine=False, temperature=1.0, kept=True)},
}
IMAGES = 47
"""Of the `FACTS` of the contract tests."""


def built(**changes):
    return build.method(catalogue.complete(tiny(**changes)), FACTS)


def batch_of(rows):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, 8, 8, generator=g)
    return Batch([images[rows]], torch.zeros(len(rows), dtype=torch.int64), rows)


def same(one, other, **close):
    assert one.model.keys() == other.model.keys() and one.rows.keys() == other.rows.keys()
    for name, value in {**one.model, **one.rows}.items():
        torch.testing.assert_close({**other.model, **other.rows}[name], value, **(close or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("case", CASES)
def test_cutting_a_stage_changes_no_weight_and_no_row(case):
    whole = tiny(epochs=4, horizon=4, **CASES[case])
    expected, _ = train(whole, resources=ONE)
    for cut in (1, 2):
        first = whole.but(epochs=cut)
        begun, _ = train(first, resources=ONE)
        found, _ = train(whole.but(epochs=4 - cut, resume=first), {"resume": begun}, resources=ONE)
        same(expected, found)
    assert set(expected.rows) == {"classes.weight", "classes.velocity"}
    assert not any(name.startswith("classes.") for name in expected.model)


def test_snapshots_on_the_way_change_no_row():
    stage, states = tiny(epochs=3, **SAMPLED), []
    once, _ = train(stage, resources=ONE)
    looked, _ = train(stage, resources=ONE, on_snapshot=lambda make: states.append(make()))
    same(once, looked)
    again, _ = train(stage, begun=states[0], resources=ONE)
    same(once, again)


@pytest.mark.parametrize("case", ["smoothed", "plain"])
def test_the_loss_is_a_cross_entropy_over_all_images_and_the_projector_is_trained_by_it(case):
    module = built(**CASES[case]).double().train()
    module.between(0)
    rows = torch.arange(0, IMAGES, 4)
    batch = batch_of(rows)
    batch = Batch([batch.views[0].double()], batch.target, rows)
    x = module.project(module.backbone(batch.views[0]))
    weight, labels = F.normalize(module.classes.weight), module.ids[rows]
    logits = F.normalize(x) @ weight.T / 0.15
    target = torch.zeros_like(logits)
    if case == "smoothed":
        near = (weight @ weight.T).fill_diagonal_(-torch.inf)[labels].topk(5).indices
        target.scatter_(1, near, 0.2 / 5)
    target[torch.arange(len(rows)), labels] = 1 - target.sum(1)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    gradient = torch.autograd.grad(expected, module.project[0].weight)[0]
    found = module(batch)["instance"]
    torch.testing.assert_close(found, expected.detach())
    module.zero_grad()
    found.backward()
    torch.testing.assert_close(module.project[0].weight.grad, gradient)


def shown(module, data, batch):
    """The rows that the loop shows to `prepare`, batch by batch."""
    seen, fill = [], module.classes.fill
    module.classes.fill = lambda classes, features: seen.append(classes) or fill(classes, features)
    prepared(module, tiny(batch=batch, **SMALL), Reader(data.train, torch.device("cpu")))
    return seen


def test_the_prior_is_the_feature_of_each_image_by_the_statistics_of_its_batch():
    """And it is taken once: a network that has begun keeps its rows."""
    data = load(tiny().source)
    facts = Facts(data.classes, data.counts, data.mean, data.std, data.size)
    module = build.method(catalogue.complete(tiny(**SMALL)), facts)
    moving = [buffer.clone() for name, buffer in module.named_buffers() if "running" in name]
    weights = [p.clone() for p in module.parameters()]
    seen = shown(module, data, batch=16)
    assert sorted(torch.cat(seen).tolist()) == list(range(len(data.train)))
    assert {len(part) for part in seen} <= {len(data.train) // len(seen), len(data.train) // len(seen) + 1}
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    moved = [buffer for name, buffer in module.named_buffers() if "running" in name]
    assert not any(torch.equal(a, b) for a, b in zip(moving, moved, strict=True))
    image = module.ids.argsort()[seen[-1]]
    images = torch.from_numpy(data.train.take(image.numpy())).permute(0, 3, 1, 2) / 255
    expected = F.normalize(module.project(module.backbone(images)))
    torch.testing.assert_close(module.classes.weight[seen[-1]], expected, rtol=1e-4, atol=1e-5)
    classes = [len(set(data.train.target[module.ids.argsort()[part]])) for part in seen]
    assert min(classes) > 1, "batches are mixed, although the images are sorted by class"
    before = module.classes.weight.clone()
    assert shown(module, data, batch=16) == [] and torch.equal(module.classes.weight, before)


def priors(view, **keywords):
    """The rows after the prior of a stage with that view, which always shows the same images."""
    data, stage = load(tiny().source), tiny(views=(view,), method=fn("million", out=6, **keywords))
    facts = Facts(data.classes, data.counts, data.mean, data.std, data.size)
    module = build.method(catalogue.complete(stage), facts)
    prepared(module, stage, Reader(data.train, torch.device("cpu")))
    return module.classes.weight


def test_the_prior_may_be_taken_from_the_view():
    """A crop looks different whenever it is drawn, but the draws come from the stage's seed."""
    crop, identity = fn("flip_crop"), fn("identity")
    plain = priors(identity)
    assert torch.equal(priors(crop), plain) and torch.equal(priors(identity, augmented=True), plain)
    seen = priors(crop, augmented=True)
    assert torch.equal(priors(crop, augmented=True), seen)
    assert (F.cosine_similarity(seen, plain) < 0.99).any() and (F.cosine_similarity(seen, plain) > 0).all()


def test_without_the_prior_rows_start_at_random_with_the_length_asked_for():
    module = built(method=fn("million", out=6, prior=False, norm=0.3))
    torch.testing.assert_close(module.classes.weight.norm(dim=1), torch.full((IMAGES,), 0.3))
    assert module.wanted(IMAGES, 8) == []


def test_other_images_than_the_method_was_made_for_are_refused():
    with pytest.raises(ValueError, match="a class for each of 47 training images, not for 48"):
        built(**SMALL).wanted(48, 8)


@pytest.mark.parametrize("rate", [1.0, 16.0])
def test_rows_follow_the_schedule_momentum_and_decay_of_the_stage(rate):
    module = built(method=fn("million", out=6, smoothing=0.0, rate=rate)).train()
    optimiser = build.optimiser(tiny(optimiser=fn("sgd", lr=0.05, momentum=0.8, weight_decay=0.1)), module)
    weight = module.classes.weight.clone().requires_grad_()
    other = torch.optim.SGD([weight], lr=1.0, momentum=0.8, weight_decay=0.1)
    for step, lr in enumerate((0.05, 0.02)):
        batch = batch_of(torch.arange(step, 40, 5))
        x = F.normalize(module.project(module.backbone(batch.views[0])))
        loss = F.cross_entropy(x.detach() @ F.normalize(weight).T / 0.15, module.ids[batch.rows])
        other.zero_grad()
        loss.backward()
        other.param_groups[0]["lr"] = rate * lr
        other.step()
        optimiser.param_groups[0]["lr"] = lr
        module(batch)["instance"].backward()
    torch.testing.assert_close(module.classes.weight, weight.detach(), rtol=1e-4, atol=1e-6)


def test_what_a_later_stage_gets_is_the_network_alone():
    first = tiny(epochs=1, **SMALL)
    state, _ = train(first, resources=ONE)
    assert {name.split(".")[0] for name in state.kept} == {"backbone", "head"}
    for stage in (
        tiny(epochs=1, method=fn("supervised", frozen=True, fresh_head=True), init=first),
        tiny(epochs=1, init=first),
        first.but(init=first),
    ):
        after, _ = train(stage, {"init": state}, resources=ONE)
        assert after.epoch == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": fn("million", smoothing=1.0)}, "million needs 0 <= smoothing < 1"),
        ({"method": fn("million", rate=0.0)}, "rate > 0, not 0.2, 100, 0.0"),
        ({"method": fn("million", temperature=0.0)}, "needs temperature, norm and block > 0"),
        ({"method": fn("million"), "optimiser": fn("adamw")}, "moves by the optimiser sgd without nesterov"),
        ({"method": fn("million"), "optimiser": fn("sam")}, "moves by the optimiser sgd without nesterov"),
        ({"method": fn("million"), "mixing": fn("mixup")}, "million has a loss of its own; leave mixing= out"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    stage = tiny(**changes)
    with pytest.raises(ValueError, match=message):
        build.optimiser(stage, build.method(catalogue.complete(stage), FACTS))


STAGE = tiny(
    epochs=4, source=fn("synthetic", classes=4, per_class=44, size=8, ratio=4.0), views=(fn("identity"),), **SMALL
)
"""Of 91 images, which 2 and 3 workers share unevenly; a view would draw other numbers on other workers."""
NEAR = {"rtol": 0, "atol": 1e-9}


def trial(folder, report=lambda record: None, stage=STAGE):
    often = Resources(device="cpu", threads=1, snapshot_s=0.0)
    return Trial(stage, Store(folder), resources=often, report=report)


def worker(number, workers, folder, killed, stage):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # sums in another order differ, and float32 would let that grow
    if workers > 1:
        store = distributed.FileStore(f"{folder}/meeting-{killed}-{workers}", workers)
        distributed.init_process_group("gloo", store=store, rank=number, world_size=workers)

    def report(record):
        if killed == "last" and record["epoch"] == 3 and number == workers - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    own = trial(f"{folder}/store", report=report, stage=stage)
    state = own.obtain(own.stage)
    torch.save((state.model, state.rows, own.trained), f"{folder}/found-{workers}-{number}.pt")
    if workers > 1:
        distributed.destroy_process_group()


def run(folder, workers, killed="", stage=STAGE):
    """What the workers have at the end, with all rows, and how many epochs they trained; None if one was killed."""
    folder.mkdir(exist_ok=True)
    context = torch.multiprocessing.spawn(worker, (workers, str(folder), killed, stage), workers, join=False)
    if killed:
        while all(process.is_alive() for process in context.processes):
            time.sleep(0.05)
        for process in context.processes:  # as whoever started them would end the others, who wait for it
            process.kill()
            process.join()
        return None
    context.join()
    found = [torch.load(folder / f"found-{workers}-{number}.pt") for number in range(workers)]
    model, rows, trained = found[0][0], {}, found[0][2]
    for name in found[0][1]:
        rows[name] = torch.cat([one[1][name] for one in found])
    for one in found[1:]:
        torch.testing.assert_close(one[0], model, rtol=0, atol=0)
    return SimpleNamespace(model=model, rows=rows, trained=trained)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two workers without an interruption."""
    return run(tmp_path_factory.mktemp("whole"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 1])
def test_a_killed_worker_costs_no_bit_and_any_number_of_workers_goes_on(tmp_path, whole, workers):
    """Two workers are killed after three epochs; as many go on bit for bit, others as far as sums in another order."""
    run(tmp_path, 2, killed="last")
    folder = tmp_path / "store"
    kept = {path.name for path in folder.glob("*/000003.*")}
    files = ("json", "safetensors", "rows0.safetensors", "rows1.safetensors")
    assert kept == {f"000003.snapshot.{end}" for end in files}
    found = run(tmp_path, workers)
    assert found.trained == 1, "three epochs were stored"
    same(whole, found, **({} if workers == 2 else NEAR))
    names = sorted(path.name for path in folder.glob("*/*") if not path.name.endswith("claim"))
    rows = [f"000004.rows{number}.safetensors" for number in range(workers)]
    assert names == sorted(["000004.json", "000004.safetensors", *rows]), "nothing of the snapshot is left"


@pytest.mark.slow
def test_one_and_two_workers_train_the_same_from_the_start(tmp_path, whole):
    """The prior, too: batches are those of one process, wherever the rows lie."""
    same(whole, run(tmp_path, 1), **NEAR)


def prior_of(number, workers, folder):
    """The rows after the prior, in double precision."""
    if workers > 1:
        store = distributed.FileStore(f"{folder}/store", workers)
        distributed.init_process_group("gloo", store=store, rank=number, world_size=workers)
    torch.set_num_threads(1)
    data = load(STAGE.source)
    facts = Facts(data.classes, data.counts, data.mean, data.std, data.size)
    module = synchronised(build.method(catalogue.complete(STAGE), facts).double())
    rows = module.wanted(len(data.train), 16)
    assert {*torch.cat(rows).tolist()} == {*module.ids.argsort()[slice(*_own(len(data.train)))].tolist()}
    images = [torch.from_numpy(data.train.take(part.numpy())).permute(0, 3, 1, 2).double() / 255 for part in rows]
    with torch.no_grad():
        module.prepare(((part, seen, part) for part, seen in zip(rows, images, strict=True)), len(data.train))
    torch.save(module.classes.weight, f"{folder}/{workers}-{number}.pt")
    if workers > 1:
        distributed.destroy_process_group()


def _own(size):
    first, many = share(size, rank(), world())
    return first, first + many


@pytest.mark.slow
def test_the_prior_of_two_workers_is_that_of_one_to_the_last_digits(tmp_path):
    torch.multiprocessing.spawn(prior_of, (2, str(tmp_path)), nprocs=2)
    prior_of(0, 1, str(tmp_path))
    rows = torch.cat([torch.load(tmp_path / f"2-{number}.pt") for number in range(2)])
    torch.testing.assert_close(rows, torch.load(tmp_path / "1-0.pt"), rtol=0, atol=1e-10)


WORDS = ["--data", "digits", "--epochs", "3", "--batch", "128", "--backbone", "resnet20"]


@pytest.mark.parametrize("preset", ["small", "small_linear", "small_neighbours"])
def test_one_command_trains_a_preset_and_records_each_group(preset, tmp_path, capsys):
    words = ["million_way", "--preset", preset, *WORDS, "--storage", str(tmp_path)]
    assert command.run(recipe.main, words) == 0
    said = capsys.readouterr().out
    assert "stage 1, epoch 1/" in said and "instance " in said and "few " in said
    (run,) = tmp_path.iterdir()
    (row,) = records.read_trials(run).to_pylist()
    for split in ("val", "test"):
        groups = [row[f"m.{split}.{group}"] for group in ("many", "medium", "few")]
        assert 0 <= min(groups) <= row[f"m.{split}.balanced"] <= max(groups) <= 1 and max(groups) > 0
    terms = {(epoch["stage"], epoch["metric"]) for epoch in records.read_epochs(run).to_pylist()}
    assert {metric for stage, metric in terms if stage == 0} == {"instance"}
    assert {metric for stage, metric in terms if stage == 1} == ({"loss"} if preset != "small_neighbours" else set())


@pytest.mark.slow
def test_two_workers_train_the_first_stage_of_the_preset_on_digits(tmp_path):
    words = recipe.parser().parse_args(["million_way", "--preset", "small", *WORDS])
    _, stage, _ = recipe.asked(words)
    found = run(tmp_path / "two", 2, stage=stage.init)
    assert found.trained == stage.init.epochs and len(found.rows["classes.weight"]) == 1238
    note = next((tmp_path / "two/store").glob(f"*/{stage.init.epochs:06d}.json"))
    assert note.with_name(note.name.replace("json", "rows1.safetensors")).exists()
    assert note.parent.name == line(trial(tmp_path, stage=stage).names[stage.init])


def four_layers(**keywords):
    layers, inside = [], 3
    for out, stride in ((32, 1), (64, 2), (64, 2), (96, 2)):
        layers += [nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        inside = out
    return Pooled(nn.Sequential(*layers), 96)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not CIFAR100.exists(), reason="no CIFAR-100 here")
def test_the_prior_pays_at_equal_length_of_rows(monkeypatch):
    """4096 real images; random rows are where they began, at ln 4096 = 8.3 nats, when the prior is far below."""
    monkeypatch.setitem(build.TABLES["backbone"], "resnet20", four_layers)
    data = load(fn("parquet", root=str(CIFAR100)))
    part = spread(data.train, 4096)
    data = replace(data, train=part, counts=np.bincount(part.target, minlength=100))
    stage = tiny(
        epochs=8,
        horizon=16,
        views=(fn("simaugment", scale=(0.2, 1.0)),),
        backbone=fn("resnet20"),
        optimiser=fn("sgd", lr=0.12, momentum=0.9, weight_decay=1e-4),
        schedule=fn("cosine"),
        batch=256,
    )
    last = {}
    for prior in (True, False):
        method = fn("million", out=64, smoothing=0.0, prior=prior)
        state, _ = train(stage.but(method=method), data=data, resources=ONE, splits=())
        last[prior] = state.history[-1]["terms"]["instance"]
    assert last[True] < last[False] - 0.5
