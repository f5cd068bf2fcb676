"""The studies bcl and contrastive: every preset can be trained, every point of the space is a chain."""

import pytest

from rayltr import command, recipe
from rayltr.interface import Resources
from rayltr.optim import SCHEDULES
from rayltr.rehearsal import rehearse
from rayltr.spec import RandomTrial, Stage, chain, fn
from rayltr.studies import STUDY, Plan, find, listing, rungs

STUDIES = ("bcl", "contrastive")
SMALL = Plan(
    study="",
    source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0),
    epochs=40,
    batch=16,
    backbone=fn("resnet20", width=4),
)
NAMED = [(study, name) for study in STUDIES for name in find(study).named]


def stage_of(study: str, name: str, plan: Plan = SMALL) -> Stage:
    found = find(study)
    if name in found.chains:
        return plan.changed(found.chains[name])
    return plan.stage(found, {"arm": STUDY, **found.presets[name]})


@pytest.mark.parametrize(("study", "name"), NAMED)
def test_every_preset_can_be_trained(study, name):
    rehearse(stage_of(study, name), Resources(device="cpu"))


@pytest.mark.parametrize("study", STUDIES)
def test_every_point_is_a_chain_and_the_table_names_presets(study):
    found = find(study)
    for seed in range(100):
        SMALL.changed(found.point(STUDY, RandomTrial(seed)))
    assert found.published and set(found.published) <= set(found.named)
    assert len(listing(found)) == len(found.named)


def test_the_paper_s_recipe_of_bcl():
    stage = stage_of("bcl", "paper", Plan(study="", source=fn("cifar100", ratio=100.0)))
    assert (stage.epochs, stage.batch, stage.backbone.name, stage.head.name) == (200, 256, "resnet32", "linear")
    assert stage.loss == fn("logit_adjusted", tau=1.0)
    wanted = {"ce": 2.0, "contrast": 0.6, "temperature": 0.1, "variant": "L1", "complement": True, "hidden": 512,
              "out": 128}  # fmt: skip
    assert {name: stage.method.get(name) for name in wanted} == wanted
    assert {name: stage.optimiser.get(name) for name in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.15, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}  # fmt: skip
    assert stage.schedule.get("milestones") == (0.8, 0.9) and stage.schedule.get("warmup") == 5 / 200
    assert [view.name for view in stage.views] == ["autoaugment", "simaugment", "simaugment"]


def test_the_baseline_differs_in_the_branch_alone():
    paper, plain = stage_of("bcl", "paper"), stage_of("bcl", "compensation")
    assert plain == paper.but(method=plain.method, views=paper.views[:1]) and plain.method.name == "supervised"


@pytest.mark.parametrize(
    ("name", "method", "hidden"),
    [("imagenet_lt", "bcl", 2048), ("inaturalist", "bcl", 2048), ("paper_400", "bcl", 512)],
)
def test_chains_outside_the_space_are_presets_too(name, method, hidden):
    stage = find("bcl").chains[name]
    assert len(chain(stage)) == 1 and stage.method.name == method
    assert stage_of("bcl", name).method.get("hidden") == hidden


def test_paco_of_the_paper():
    stage = stage_of("contrastive", "paco", Plan(study=""))
    wanted = {
        "alpha": 0.01,
        "beta": 1.0,
        "gamma": 1.0,
        "temperature": 0.05,
        "queue": 1024,
        "out": 32,
        "momentum": 0.999,
    }
    assert {name: stage.method.get(name) for name in wanted} == wanted
    assert (stage.epochs, stage.batch, stage.optimiser.get("lr")) == (400, 128, 0.05)


SIM, RAND, RANDCLS = (fn("simaugment", **keywords) for keywords in (
    {}, {"n": 2}, {"jitter": 1.0, "hue": 0.0, "grayscale": 0.0, "n": 2}))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "root", "model", "epochs", "lr", "decay", "others"),
    [
        ("imagenet_lt", "imagenet_lt", "resnext50_32x4d", 90, 0.1, 5e-4, (SIM, SIM)),
        ("imagenet_lt_sim_rand", "imagenet_lt", "resnext50_32x4d", 90, 0.1, 5e-4, (RAND, SIM)),
        ("imagenet_lt_rand_rand", "imagenet_lt", "resnext50_32x4d", 90, 0.1, 5e-4, (RAND, RAND)),
        ("imagenet_lt_180", "imagenet_lt", "resnext50_32x4d", 180, 0.1, 5e-4, (SIM, SIM)),
        ("imagenet_lt_resnet50", "imagenet_lt", "resnet50", 90, 0.1, 5e-4, (SIM, SIM)),
        ("inaturalist", "inaturalist", "resnet50", 100, 0.2, 1e-4, (SIM, SIM)),
    ],
)
def test_bcl_on_photographs(name, root, model, epochs, lr, decay, others):
    stage = find("bcl").chains[name]
    assert (stage.epochs, stage.batch, stage.source.get("root"), stage.backbone.get("model")) == (
        epochs, 256, root, model)  # fmt: skip
    assert stage.optimiser == fn("sgd", lr=lr, momentum=0.9, weight_decay=decay)
    assert stage.method == fn("bcl", ce=1.0, contrast=0.35, temperature=0.07, hidden=2048, out=1024)
    assert (stage.head, stage.schedule) == (fn("cosine", scale=30.0), fn("cosine"))
    assert stage.views == (RANDCLS, *others)


@pytest.mark.parametrize(
    ("name", "root", "model", "lr", "decay", "temperature", "view"),
    [
        ("paco_imagenet_lt_resnet50", "imagenet_lt", "resnet50", 0.02, 5e-4, 0.2, RANDCLS),
        ("paco_imagenet_lt", "imagenet_lt", "resnext50_32x4d", 0.02, 5e-4, 0.07, RAND),
        ("paco_imagenet_lt_resnext101", "imagenet_lt", "resnext101_32x4d", 0.03, 5e-4, 0.2, RAND.but(n=3)),
        ("paco_inaturalist", "inaturalist", "resnet50", 0.02, 1e-4, 0.2, RANDCLS),
        ("gpaco_imagenet_lt_resnet50", "imagenet_lt", "resnet50", 0.04, 5e-4, 0.2, RAND),
        ("gpaco_imagenet_lt", "imagenet_lt", "resnext50_32x4d", 0.04, 5e-4, 0.2, RAND),
        ("gpaco_imagenet_lt_resnext101", "imagenet_lt", "resnext101_32x4d", 0.04, 5e-4, 0.2, RAND.but(n=3)),
        ("gpaco_inaturalist", "inaturalist", "resnet50", 0.04, 1e-4, 0.2, RAND),
    ],
)
def test_paco_on_photographs(name, root, model, lr, decay, temperature, view):
    stage = find("contrastive").chains[name]
    assert (stage.epochs, stage.batch, stage.source.get("root"), stage.backbone.get("model")) == (400, 128, root, model)
    assert stage.optimiser == fn("sgd", lr=lr, momentum=0.9, weight_decay=decay)
    assert stage.method == fn(name.split("_")[0], alpha=0.05, temperature=temperature, queue=8192, out=128)
    assert stage.schedule == fn("cosine", warmup=10 / 400)
    assert stage.views == (view, fn("simaugment", scale=(0.2, 1.0), jitter=1.0, hue=0.0, blur=0.5))


def test_published_errors_of_photographs():
    wanted = {"imagenet_lt": {"imagenet_lt_rand_rand": 57.8, "imagenet_lt_sim_rand": 57.2, "imagenet_lt": 57.2,
                              "paco_imagenet_lt_resnext101": 60.0, "gpaco_imagenet_lt": 58.9,
                              "gpaco_imagenet_lt_resnext101": 60.8},
              "inaturalist": {"inaturalist": 71.8, "paco_inaturalist": 73.2, "gpaco_inaturalist": 75.4}}  # fmt: skip
    published = {**find("bcl").published, **find("contrastive").published}
    for data, accuracies in wanted.items():
        for name, accuracy in accuracies.items():
            assert float(published[name][data]) == pytest.approx(100 - accuracy)


def test_sam_is_searched_and_in_no_preset():
    for study in (*map(find, STUDIES), find("experts")):
        assert study.plain["optimiser"] == "sgd"
        assert {point["optimiser"] for point in study.presets.values()} == {"sgd"}
        found = [chain(study.space(RandomTrial(seed)))[0].optimiser for seed in range(200)]
        radii = {flag: {o.get("rho") for o in found if o.name == "sam" and bool(o.get("adaptive")) == flag}
                 for flag in (False, True)}  # fmt: skip
        assert {o.name for o in found} == {"sgd", "sam"}
        assert radii == {False: {0.02, 0.05, 0.1, 0.2, 0.5, 1.0}, True: {0.2, 0.5, 1.0, 2.0, 4.0}}
        one = [{key for key, _ in o.keywords} for o in found]
        assert all(keys - {"rho", "adaptive"} == one[0] - {"rho", "adaptive"} for keys in one)


@pytest.mark.parametrize("fidelity", ["schedules", "halving"])
def test_every_rung_of_bcl_has_passed_the_drops_of_its_learning_rate(fidelity):
    """Rungs are complete schedules, so that none is judged before the epochs after the first drop."""
    study = find("bcl")
    for plan in rungs(Plan("bcl", epochs=180), fidelity):
        stage = plan.stage(study, {"arm": STUDY, **study.presets["paper"]})
        assert stage.epochs == stage.horizon == plan.epochs
        rate = SCHEDULES[stage.schedule.name]
        rates = [rate((epoch + 1) / stage.horizon, **dict(stage.schedule.keywords)) for epoch in range(stage.epochs)]
        drops = [epoch for epoch in range(1, stage.epochs) if rates[epoch] < rates[epoch - 1]]
        assert drops == [0.8 * stage.epochs, 0.9 * stage.epochs] and rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "words",
    [
        ["bcl", "--preset", "paper_400"],
        pytest.param(["bcl"], marks=pytest.mark.slow),
        pytest.param(["contrastive", "--preset", "supcon"], marks=pytest.mark.slow),
    ],
)
def test_one_command_trains_a_preset(words, tmp_path, capsys):
    more = [
        "--data",
        "synthetic",
        "--ratio",
        "4",
        "--size",
        "8",
        "--batch",
        "32",
        "--epochs",
        "3",
        "--storage",
        tmp_path,
    ]
    assert command.run(recipe.main, [*words, *map(str, more)]) == 0
    said = capsys.readouterr().out
    assert "contrast " in said and "test: balanced" in said
