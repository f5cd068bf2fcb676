import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rayltr import ahead, build, catalogue
from rayltr.ahead import Reader
from rayltr.data import Split, load
from rayltr.interface import Batch, Diverged, Facts, Resources, State
from rayltr.methods import supervised
from rayltr.spec import chain, fn, parents
from rayltr.train import assembled, batches, checked, generators, portion, predict, train
from tests.conftest import tiny

ONE = Resources(device="cpu", threads=1)
FACTS = Facts(("a", "b", "c", "d"), np.array([40, 25, 15, 10]), (0.5,) * 3, (0.25,) * 3, (8, 8))
OPTIMISERS = {
    "sgd": fn("sgd", lr=0.05, momentum=0.9, nesterov=True),
    "adamw": fn("adamw", lr=0.01),
    "sam": fn("sam", lr=0.05, rho=0.1, momentum=0.9),
}


def run(stage):
    """The final state of a chain, trained stage by stage."""
    states = {}
    for own in chain(stage):
        given = {role: states[parent] for role, parent in parents(own).items()}
        states[own], logits = train(own, given, resources=ONE)
    return states[stage], logits


TAUGHT = tiny(epochs=1, seed=1)
TRICKS = {
    "seql": {"loss": fn("seql", threshold=0.2), "optimiser": fn("sam", lr=0.05, base="sgd")},
    "pairs": {"sampler": fn("reverse"), "mixing": fn("bbn_mix")},
    "manifold": {"mixing": fn("manifold", layer="layer2")},
    "under-sampling": {"sampler": fn("undersample")},
    "cam": {"method": fn("cam"), "teacher": TAUGHT, "mixing": fn("mixup"), "sampler": fn("power", q=0.0)},
    "dive": {"method": fn("dive"), "teacher": TAUGHT},
    "tokens": {
        "method": fn("tokens"),
        "teacher": TAUGHT,
        "backbone": fn("deit", size=8, patch=4, width=8, depth=2, heads=2, drop_path=0.3),
        "views": (fn("randaugment", n=2, m=9.0, deviation=0.5, space="timm_increasing", erase=0.25),),
        "mixing": fn("mixup_or_cutmix"),
        "sampler": fn("repeated"),
        "optimiser": fn("adamw", spare=True),
        "schedule": fn("cosine", warmup=0.3, warmup_from=0.01, beneath=True),
        "precision": "bf16",
    },
    "rotation": {"method": fn("rotation")},
    "instance": {"method": fn("instance", rotation=0.5, groups=2), "views": (fn("flip_crop"),) * 2},
    "distil": {"method": fn("distil", teacher_bn="batch"), "teacher": TAUGHT},
    "classes in turn": {"sampler": fn("class_aware", walks=2)},
}
"""Everything that is random, or made before the first epoch."""


def same(one: State, other: State):
    for kind in ("model", "optimiser"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), kind


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cutting_a_stage_in_two_changes_no_weight(optimiser, precision):
    whole = tiny(
        epochs=4,
        horizon=4,
        optimiser=OPTIMISERS[optimiser],
        views=(fn("flip_crop"),),
        mixing=fn("mixup"),
        sampler=fn("progressive"),
        schedule=fn("cosine", warmup=0.3),
        precision=precision,
    )
    once, logits = run(whole)
    for cut in (1, 3):
        first = whole.but(epochs=cut)
        twice, again = run(whole.but(epochs=4 - cut, resume=first))
        same(once, twice)
        np.testing.assert_array_equal(logits["val"]["main"], again["val"]["main"])


@pytest.mark.parametrize("trick", TRICKS)
def test_cutting_changes_no_weight_whatever_the_trick(trick):
    whole = tiny(epochs=2, horizon=2, **TRICKS[trick])
    once, _ = run(whole)
    twice, _ = run(whole.but(epochs=1, resume=whole.but(epochs=1)))
    same(once, twice)
    plain, _ = run(tiny(epochs=2, horizon=2))
    both = once.model.keys() & plain.model.keys()
    assert not all(torch.equal(once.model[name], plain.model[name]) for name in both), "the trick does something"


def test_a_snapshot_goes_on_where_it_was_taken():
    stage, taken = tiny(epochs=4, optimiser=OPTIMISERS["sam"]), []
    one = Resources(device="cpu", threads=1)
    once, _ = train(stage, resources=one, on_snapshot=lambda make: taken.append(make()))
    assert [state.epoch for state in taken] == [1, 2, 3]
    again, _ = train(stage, begun=taken[1], resources=ONE)
    same(once, again)
    assert [record["epoch"] for record in again.history] == [1, 2, 3, 4]


def test_training_learns_and_prediction_has_every_image():
    stage = tiny(epochs=12, source=fn("synthetic", classes=4, per_class=60, size=8, ratio=4.0))
    state, logits = train(stage, resources=ONE)
    losses = [record["terms"]["loss"] for record in state.history]
    assert losses[-1] < 0.5 * losses[0]
    assert logits["val"]["main"].shape[1] == 4 and logits["val"]["main"].dtype == np.float32


def test_what_a_method_measures_is_recorded_beside_its_loss(monkeypatch):
    """The mean over the steps of an epoch, of SAM's two passes the first; no weight knows of it."""
    stage = tiny(epochs=2, optimiser=OPTIMISERS["sam"])
    plain, _ = train(stage, resources=ONE)
    assert all("measured" not in record for record in plain.history)
    passes = []

    def measuring(self, batch):
        passes.append(len(passes))
        self.measured = {"passes": torch.tensor(float(passes[-1]))}
        return forward(self, batch)

    forward = supervised.Method.forward
    monkeypatch.setattr(supervised.Method, "forward", measuring)
    state, _ = train(stage, resources=ONE)
    same(state, plain)
    steps = len(passes) // 4
    means = [sum(range(2 * steps * epoch, 2 * steps * (epoch + 1), 2)) / steps for epoch in range(2)]
    assert [record["measured"] for record in state.history] == [{"passes": mean} for mean in means]
    assert [record["terms"] for record in state.history] == [record["terms"] for record in plain.history]


def test_the_second_pass_of_sam_in_bf16_sees_the_climbed_weights(monkeypatch):
    """Every pass casts the weights anew, whatever autocast remembers of the first."""
    found = []

    def noting(self, batch):
        if self.training:
            head, features = self.head, self.backbone(batch.views[0]).detach()
            with torch.autocast("cpu", enabled=False):
                cast = [x.detach().bfloat16() for x in (features, head.weight, head.bias)]
                expected = nn.functional.linear(*cast)
            found.append((head(features).detach(), expected, cast[1]))
        return forward(self, batch)

    forward = supervised.Method.forward
    monkeypatch.setattr(supervised.Method, "forward", noting)
    train(tiny(epochs=1, precision="bf16", optimiser=fn("sam", lr=0.05, rho=0.5)), resources=ONE)
    assert len(found) >= 4 and all(logits.dtype is torch.bfloat16 for logits, *_ in found)
    assert all(torch.equal(logits, expected) for logits, expected, _ in found)
    passes = zip(found[::2], found[1::2], strict=True)
    assert not any(torch.equal(first[2], second[2]) for first, second in passes), "SAM climbed"


@pytest.mark.parametrize(("images", "workers"), [(256, 3), (128, 2), (7, 3), (16, 1)])
def test_workers_share_a_batch_and_part_no_pair(monkeypatch, images, workers):
    rows, parts = torch.arange(images), []
    for number in range(workers):
        monkeypatch.setattr("rayltr.train.rank", lambda number=number: number)
        monkeypatch.setattr("rayltr.train.world", lambda: workers)
        parts.append(portion(rows))
    assert torch.equal(torch.cat(parts), rows) and all(len(part) for part in parts)
    assert all(part[0] % 2 == 0 for part in parts)


def test_a_golden_run():
    """Bit-identical numerics on one kind of machine; loose enough to hold on others."""
    state, _ = train(tiny(epochs=2), resources=ONE)
    assert [record["terms"]["loss"] for record in state.history] == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = [1.5295551300048829, 1.4198280334472657]


def test_a_seed_changes_everything_and_nothing_else_does():
    once, again, other = (train(tiny(seed=seed), resources=ONE)[0] for seed in (0, 0, 1))
    same(once, again)
    assert not torch.equal(once.model["head.weight"], other.model["head.weight"])


def test_lws_trains_its_scales_only():
    first = tiny()
    stage = first.but(init=first, head=fn("lws"), method=fn("supervised", frozen=True))
    before, _ = run(first)
    after, _ = run(stage)
    assert not torch.equal(after.model["head.scale"], torch.ones(4))
    for name, value in before.model.items():
        assert torch.equal(after.model[name], value), name


@pytest.mark.parametrize("drift", [False, True])
def test_statistics_of_a_frozen_backbone_move_only_if_asked(drift):
    first = tiny()
    stage = first.but(init=first, method=fn("supervised", frozen=True, drift=drift, fresh_head=True))
    before, _ = run(first)
    after, _ = run(stage)
    statistics = [name for name in before.model if "running" in name]
    assert all(torch.equal(before.model[name], after.model[name]) != drift for name in statistics)
    weights = [name for name in before.model if name.startswith("backbone") and "running" not in name]
    assert all(torch.equal(before.model[name], after.model[name]) for name in weights if "tracked" not in name)
    assert not torch.equal(before.model["head.weight"], after.model["head.weight"])


def test_a_stage_of_no_epochs_only_hands_weights_over():
    first = tiny()
    state, logits = run(first)
    after, normalised = run(first.but(epochs=0, init=first, head=fn("tau_normalised", tau=0.0)))
    np.testing.assert_allclose(logits["val"]["main"], normalised["val"]["main"], atol=1e-6)
    assert after.model.keys() == state.model.keys()


def test_a_trained_scale_is_taken_over_unless_the_head_is_to_be_new():
    parent = build.method(catalogue.complete(tiny(head=fn("lws"))), FACTS)
    parent.head.scale.data.fill_(3.0)
    state = State(dict(parent.state_dict()), {}, 2, tuple(parent.state_dict()))
    for fresh_head, expected in ((False, 3.0), (True, 1.0)):
        method = fn("supervised", frozen=True, fresh_head=fresh_head)
        module = build.method(catalogue.complete(tiny(head=fn("lws"), method=method, seed=7)), FACTS)
        build.adopt(module, state)
        assert module.head.scale.unique().item() == expected
        assert torch.equal(module.head.weight, parent.head.weight) is not fresh_head


def hand_over(change, **stage):
    module = build.method(catalogue.complete(tiny(**stage)), FACTS)
    model = build.method(catalogue.complete(tiny()), FACTS).state_dict()
    change(model)
    build.adopt(module, State(model, {}, 2, tuple(model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("head.bias"), "head.bias of this stage is missing"),
        (lambda m: m.update({"queue": torch.zeros(1)}), "queue of the parent stage has no place"),
        (lambda m: m.update({"head.weight": torch.zeros(5, 64)}), r"head.weight is \[5, 64\] in the parent"),
    ],
)
def test_a_hand_over_is_strict(change, message):
    with pytest.raises(ValueError, match=message):
        hand_over(change)


def test_a_fresh_head_may_follow_any_other():
    hand_over(lambda model: model.pop("head.bias"), method=fn("supervised", fresh_head=True))


def test_a_loss_that_is_no_number_is_named():
    with pytest.raises(Diverged, match="'loss' became nan in epoch 3"):
        checked(3, {"loss": float("nan")}, 1, 0.0)
    with pytest.raises(Diverged, match="lower learning rate"):
        train(tiny(optimiser=fn("sgd", lr=1e9)), resources=ONE)


def noisy(images):
    """A split of random images."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), np.uint8)
    return Split(pixels, np.arange(images), np.zeros(images, np.int64))


@pytest.mark.parametrize(("images", "sizes"), [(50, [16, 16, 16]), (10, [10]), (16, [16])])
def test_an_incomplete_last_batch_is_left_out_unless_it_is_the_only_one(images, sizes):
    read = Reader(noisy(images), torch.device("cpu"))
    found = list(batches(read, torch.arange(images), 16, max(1, images // 16)))
    assert [len(rows) for _, rows, _ in found] == sizes
    for _, rows, shown in found:
        expected = read.split.images[rows].transpose(0, 3, 1, 2) / 255
        np.testing.assert_allclose(shown, expected, rtol=1e-6)
        assert shown.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_draws_from_its_seed_and_number_alone():
    one, other = generators(3, 5, torch.device("cpu")), generators(3, 5, torch.device("cpu"))
    assert torch.equal(torch.rand(4, generator=one[1]), torch.rand(4, generator=other[1]))
    draws = {tuple(torch.rand(2, generator=generators(s, e, torch.device("cpu"))[0]).tolist())
             for s in range(3) for e in range(3)}  # fmt: skip
    assert len(draws) == 9


def test_weights_depend_on_the_stage_and_not_on_the_data_order_of_parts():
    module, _ = assembled(catalogue.complete(tiny()), FACTS, {}, None, torch.device("cpu"))
    again, _ = assembled(catalogue.complete(tiny()), FACTS, {}, None, torch.device("cpu"))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_predict_does_not_depend_on_the_batch_size():
    module = build.method(catalogue.complete(tiny()), FACTS)
    split = noisy(20)
    whole = predict(module, split, torch.device("cpu"), size=20)["main"]
    np.testing.assert_allclose(predict(module, split, torch.device("cpu"), size=7)["main"], whole, atol=1e-5)


def test_a_prediction_computes_no_loss(monkeypatch):
    """Not even while the network is traced: the loss may be the user's, and write files."""
    calls = []
    monkeypatch.setattr(supervised.Method, "forward", lambda self, batch: calls.append(batch))
    module = build.method(catalogue.complete(tiny()), FACTS)
    predict(module, load(tiny().source).val, torch.device("cpu"), "bf16")
    assert not calls


@pytest.mark.parametrize(("precision", "inside"), [("fp32", False), ("bf16", True)])
def test_only_rounded_predictions_have_their_norms_inside_the_convolutions(precision, inside):
    module, seen = build.method(catalogue.complete(tiny()), FACTS), []

    def spied(images):
        seen.append(not any(isinstance(part, nn.BatchNorm2d) for part in module.modules()))
        return {"main": images.mean((2, 3))}

    module.predict = spied
    split = load(tiny().source).val
    found = predict(module, split, torch.device("cpu"), precision)["main"]
    assert seen == [inside] and found.dtype == np.float32
    assert any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def test_the_bare_loop_needs_no_ray_no_optuna_and_no_plotly(tmp_path):
    """What a machine without them sees: their import fails."""
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "optuna", "plotly"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from rayltr import command, recipe
sys.exit(command.run(recipe.main, sys.argv[1:]))
"""
    words = ["bag_of_tricks", "--preset", "ldam_drw", "--data", "synthetic", "--ratio", "4", "--epochs", "2"]
    words += ["--batch", "32", "--storage", str(tmp_path), "--name", "bare"]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "no report: plotly is not installed" in found.stdout
    assert "stage 2, epoch 2/2" in found.stdout


def test_a_batch_reaches_the_method_with_its_mixing():
    """The loss of a mixed batch is the share-weighted sum of both targets' losses."""
    stage = catalogue.complete(tiny(weight=fn("inverse_frequency")))
    method: nn.Module = build.method(stage, FACTS).eval()
    g = torch.Generator().manual_seed(0)
    images, target = torch.rand(6, 3, 8, 8, generator=g), torch.tensor([0, 1, 2, 3, 0, 1])
    other, share = target.flip(0), torch.rand(6, generator=g)
    found = method(Batch([images], target, torch.arange(6), other, share))["loss"]
    logits, w = method.predict(images)["main"], method.class_weight
    loss = nn.CrossEntropyLoss(reduction="none")
    expected = (share * w[target] * loss(logits, target)).sum() / w[target].sum()
    expected += ((1 - share) * w[other] * loss(logits, other)).sum() / w[other].sum()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("several", [False, True])
def test_images_that_are_decoded_on_the_way_train_the_same_weights(tmp_path, monkeypatch, several):
    """A set that does not fit in memory gives the same numbers, whether processes decode or a thread, and if cut."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    for number, image in enumerate(images):
        place = tmp_path / f"class{number % 2}" / f"{number:02d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(place)
    asked = []
    monkeypatch.setattr(ahead, "processes", lambda *images: asked.append(images) or 2 * several)
    kept, lazy = (tiny(source=fn("folder", root=str(tmp_path), in_memory_gb=gb), epochs=2, horizon=2) for gb in (8, 0))
    expected, logits = train(kept, resources=ONE)
    assert not asked
    found, others = train(lazy, resources=ONE)
    first, _ = train(lazy.but(epochs=1), resources=ONE)
    cut, _ = train(lazy.but(epochs=1, resume=lazy.but(epochs=1)), {"resume": first}, resources=ONE)
    same(expected, found)
    same(expected, cut)
    np.testing.assert_array_equal(logits["val"]["main"], others["val"]["main"])
    assert asked and not multiprocessing.active_children()
