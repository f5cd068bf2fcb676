"""The studies bcl and contrastive: every preset can be trained, every point of the space is a chain."""

import pytest

from rayltr import command, recipe
from rayltr.interface import Resources
from rayltr.rehearsal import rehearse
from rayltr.spec import RandomTrial, Stage, chain, fn
from rayltr.studies import STUDY, Plan, find, listing

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
