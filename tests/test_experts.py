"""The study of several experts in one network: its presets are the published recipes, its points can be trained."""

import pytest

from rayltr import studies
from rayltr.catalogue import complete
from rayltr.spec import FixedTrial, RandomTrial, Stage, chain, end, fn, line
from rayltr.store import Store
from rayltr.studies import STUDY as ARM
from rayltr.studies import Plan
from rayltr.trial import run

STUDY = studies.find("experts")


def preset(name):
    return complete(STUDY.chains[name] if name in STUDY.chains else STUDY.space(FixedTrial(STUDY.presets[name])))


def test_every_published_error_belongs_to_a_preset_and_is_a_number():
    assert set(STUDY.published) <= set(STUDY.named)
    for row in STUDY.published.values():
        for data, error in row.items():
            assert data == "note" or 5 < float(error) < 60
    assert STUDY.published["ride_6"]["cifar100_100"] == "49.8"
    assert STUDY.published["sade_imagenet_lt"]["imagenet_lt"] == "41.2"


def test_ride_on_cifar():
    first, last = chain(preset("ride_3"))
    assert (first.epochs, last.epochs, last.horizon, last.resume) == (160, 40, 200, first)
    assert first.optimiser == fn("sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = dict(first.schedule.keywords)
    assert (schedule["warmup"], schedule["milestones"], schedule["gamma"]) == (5 / 200, (0.8, 0.9), 0.01)
    assert first.views == (fn("flip_crop", flip=0.5, rotation=15.0),) and first.batch == 128
    assert (first.head, first.loss) == (fn("cosine", scale=30.0), fn("ldam", max_margin=15.0, scale=1.0))
    assert (first.weight, last.weight) == (None, fn("effective_number", beta=0.9999))
    early, late = dict(first.method.keywords), dict(last.method.keywords)
    assert (early["experts"], early["own"], early["diversity"], early["tempered"]) == (3, 2, -0.45, 0.0)
    assert late == {**early, "tempered": 0.05}
    assert first.backbone == fn("resnet32", width=16, reduced=True)
    assert [preset(name).method.get("experts") for name in ("ride_4", "ride_6")] == [4, 6]


@pytest.mark.parametrize(
    ("name", "top"), [("ride_3_routed", 30), ("ride_3_routed_imagenet_lt", 50), ("ride_3_routed_inaturalist", 50)]
)
def test_routers_are_trained_last(name, top):
    before, routers = preset(name.replace("_routed", "")), preset(name)
    assert routers.init == before and (routers.epochs, routers.batch) == (5, 512)
    asked = {"experts": 3, "own": 2, "top": top, "positive": 100.0}
    assert {key: routers.method.get(key) for key in asked} == asked
    assert routers.sampler == fn("power", q=0.0) and routers.weight is None
    assert routers.optimiser.get("lr") == 0.01 and routers.schedule.name == "cosine"


@pytest.mark.parametrize(
    ("name", "root", "model", "batch", "lr", "tempered"),
    [
        ("ride_3_imagenet_lt", "imagenet_lt", "resnext50_32x4d", 256, 0.1, 0.02),
        ("ride_3_inaturalist", "inaturalist", "resnet50", 512, 0.2, 0.015),
    ],
)
def test_ride_on_photographs(name, root, model, batch, lr, tempered):
    first, last = chain(preset(name))
    assert (first.epochs, end(last), last.batch) == (80, 100, batch)
    assert last.source.get("root") == root
    assert last.backbone == fn("torchvision", model=model, pretrained=False, reduced=True)
    assert last.optimiser == fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=2e-4)
    assert (last.schedule.get("milestones"), last.schedule.get("gamma")) == ((0.6, 0.8), 0.1)
    assert (last.method.get("diversity"), last.method.get("tempered")) == (-0.2, tempered)


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "decay", "schedule", "tau"),
    [
        ("sade", 200, 128, 0.1, 5e-4, "multistep", 2.0),
        ("sade_cifar10", 200, 128, 0.05, 5e-4, "multistep", 2.0),
        ("sade_imagenet_lt", 180, 64, 0.025, 5e-4, "cosine", 2.0),
        ("sade_inaturalist", 100, 512, 0.2, 2e-4, "multistep", 1.0),
    ],
)
def test_sade(name, epochs, batch, lr, decay, schedule, tau):
    (stage,) = chain(preset(name))
    assert (stage.epochs, stage.batch, stage.schedule.name) == (epochs, batch, schedule)
    assert stage.optimiser == fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)
    assert stage.method == fn("sade", own=2, tau=tau) and stage.head == fn("cosine", scale=30.0)
    assert stage.backbone.get("reduced") == (None if name == "sade_cifar10" else True)
    assert schedule == "cosine" or stage.schedule.get("gamma") == 0.1


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "head"),
    [
        ("ncl", 400, 64, 0.1, fn("linear")),
        ("ncl_contrast", 400, 64, 0.1, fn("linear")),
        ("ncl_imagenet_lt", 200, 256, 0.2, fn("cosine", scale=16.0)),
        ("ncl_inaturalist", 400, 256, 0.2, fn("cosine", scale=32.0)),
    ],
)
def test_ncl(name, epochs, batch, lr, head):
    (stage,) = chain(preset(name))
    assert (stage.epochs, stage.batch, stage.head) == (epochs, batch, head)
    assert stage.optimiser == fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=2e-4)
    asked = {"experts": 3, "hard": 0.3, "distil": 0.6, "contrast": 1.0 if name == "ncl_contrast" else 0.0}
    assert {key: stage.method.get(key) for key in asked} == asked
    assert len(stage.views) == (2 if name == "ncl_contrast" else 1)
    assert stage.backbone.get("reduced") is None
    if epochs == 400 and head.name == "linear":
        assert stage.schedule.get("milestones") == (319 / 400, 359 / 400) and stage.schedule.get("gamma") == 0.1
        assert stage.views[0].name == "autoaugment" and stage.views[0].get("cutout") == 0.5


def test_every_point_can_be_trained():
    found = [complete(STUDY.space(RandomTrial(seed))) for seed in range(300)]
    assert {stage.method.name for stage in found} == {"ride", "route", "sade", "ncl"}
    assert {len(chain(stage)) for stage in found} == {1, 2, 3}
    assert {len(stage.views) for stage in found if stage.method.name == "ncl"} == {1, 2}


def test_what_comes_late_shares_the_first_stage():
    points = [{**STUDY.presets["ride_3"], "switch": s, "one_minus_beta": b} for s, b in ((0.8, 1e-3), (0.9, 1e-4))]
    stages = [complete(STUDY.space(FixedTrial(point))) for point in points]
    assert len({line(stage.resume) for stage in stages}) == 1 and len({line(stage) for stage in stages}) == 2


@pytest.mark.parametrize("name", ["ride_3_routed", "sade", "ncl_contrast"])
def test_a_preset_trains_and_its_experts_are_measured(name, tmp_path):
    toy = fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0)
    plan = Plan("experts", source=toy, epochs=3, batch=16, backbone=fn("resnet20", width=4))
    stage: Stage = plan.stage(STUDY, {"arm": ARM, **STUDY.presets[name]})
    store = Store(tmp_path / "store")
    found = run(stage, store)
    assert found.trained == found.asked == 3 and found.metrics["balanced"] > 0
    assert ("expert3.balanced" in found.metrics) == (name != "ride_3_routed")
    again = run(stage, store)
    assert again.trained == 0 and again.metrics == found.metrics
