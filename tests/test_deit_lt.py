"""The study deit_lt: every preset is the published chain, and what trials can share they share."""

import pytest

from rayltr import command, recipe
from rayltr.catalogue import complete
from rayltr.interface import Resources
from rayltr.rehearsal import rehearse
from rayltr.spec import FixedTrial, RandomTrial, Stage, chain, fn, line, mapped
from rayltr.studies import STUDY, Plan, find
from search_spaces.deit_lt import SMALL

FOUND = find("deit_lt")
WHOLE = Plan("")
PLAN = Plan("", source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0), batch=8)


def stage_of(name: str, plan: Plan = WHOLE) -> Stage:
    if name in FOUND.chains:
        return plan.changed(FOUND.chains[name])
    return plan.stage(FOUND, {"arm": STUDY, **FOUND.presets[name]})


def light(stage: Stage) -> Stage:
    """With a network of the same kind that is small."""
    if stage.backbone.name == "deit":
        return stage.but(backbone=stage.backbone.but(width=16, depth=1, heads=1))
    return stage.but(backbone=stage.backbone.but(model="resnet18") if stage.backbone.get("model") else stage.backbone)


@pytest.mark.parametrize("name", FOUND.named)
def test_presets_can_be_trained(name):
    rehearse(mapped(stage_of(name, PLAN), light), Resources(device="cpu"))


def test_every_point_is_a_chain_and_the_table_names_presets():
    for seed in range(100):
        PLAN.changed(FOUND.point(STUDY, RandomTrial(seed)))
    assert FOUND.published and set(FOUND.published) == set(FOUND.named)


def changed(one: Stage, other: Stage) -> set[str]:
    return {name for name in Stage.__dataclass_fields__ if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize("name", ["small", "laptop", "paper", "paper_ldam"])
def test_the_last_epochs_have_hard_targets_and_class_weights(name):
    last = stage_of(name)
    first = last.resume
    assert changed(first, last) <= {"epochs", "resume", "mixing", "loss", "weight", "horizon"}
    assert (first.mixing.name, first.loss, first.weight) == (
        "mixup_or_cutmix", fn("label_smoothing", epsilon=0.1), None)  # fmt: skip
    assert (last.mixing, last.loss) == (None, fn("cross_entropy"))
    assert last.weight == fn("effective_number", beta=0.9999)
    assert first.teacher == last.teacher and last.horizon == first.epochs + last.epochs == first.horizon


def test_photographs_are_mixed_to_the_end():
    last = stage_of("imagenet_lt")
    assert changed(last.resume, last) <= {"epochs", "resume", "weight"} and last.mixing
    assert last.backbone.get("imagenet") and not last.views[0].get("erase_own")
    assert (last.resume.epochs, last.epochs, last.batch, last.optimiser.get("lr")) == (1200, 200, 2048, 5e-4)


def test_the_recipe_of_the_paper():
    last = stage_of("paper")
    first = last.resume
    assert (first.epochs, last.epochs, first.batch) == (1100, 100, 1024)
    network = {"size": 224, "patch": 16, "width": 768, "depth": 12, "heads": 12, "drop_path": 0.1, "crop": 0.875,
               "imagenet": True}  # fmt: skip
    assert first.backbone == fn("deit", **network)
    (view,) = first.views
    strong = {"n": 2, "m": 9.0, "deviation": 0.5, "space": "timm_increasing", "crop": "resized", "size": 224,
              "interpolation": "bicubic", "fill": (124, 116, 104), "erase": 0.25, "flip": 0.5}  # fmt: skip
    assert {name: view.get(name) for name in strong} == strong
    assert first.mixing == fn("mixup_or_cutmix", alpha=0.8, cutmix_alpha=1.0, switch=0.5)
    assert first.sampler == fn("repeated", repeats=3)
    told = {"alpha": 0.5, "distil": "hard", "teacher_size": 32, "teacher_renorm": False, "antialias": False}
    assert {name: first.method.get(name) for name in told} == told
    assert first.optimiser == fn("adamw", lr=2.5e-4, weight_decay=0.05, beta1=0.9, beta2=0.999, spare=True)
    assert first.schedule.get("warmup") == 5 / 1200 and first.schedule.get("final") == pytest.approx(0.04)


@pytest.mark.parametrize("name", FOUND.named)
def test_the_noise_of_erasing_is_normal_once_images_are_normalised(name):
    """By ImageNet's statistics or by the data's, as the student has it."""
    for stage in chain(stage_of(name)):
        for view in stage.views:
            if view.get("erase"):
                assert bool(view.get("erase_own")) != bool(stage.backbone.get("imagenet"))


def test_an_ablation_leaves_distillation_out():
    trial = FixedTrial({**SMALL, "distil": "none"})
    found = complete(FOUND.point(STUDY, trial))
    assert found.method.get("distil") == found.resume.method.get("distil") == "none" and found.teacher


def test_the_teachers_of_the_paper():
    last = stage_of("teacher_ldam")
    first = last.resume
    assert (first.epochs, last.epochs, first.batch, first.backbone.name) == (160, 40, 128, "resnet32")
    assert first.loss == fn("ldam", max_margin=0.5, scale=30.0) and first.head == fn("cosine", scale=1.0)
    assert changed(first, last) == {"epochs", "resume", "weight"}
    assert last.weight == fn("effective_number", beta=0.9999)
    told = {"lr": 0.1, "rho": 0.8, "adaptive": False, "base": "sgd", "momentum": 0.9, "weight_decay": 2e-4}
    assert {name: first.optimiser.get(name) for name in told} == told
    steps = {"warmup": 5 / 200, "warmup_from": 0.2, "milestones": (0.8, 0.9), "gamma": 0.01}
    assert {name: first.schedule.get(name) for name in steps} == steps
    slow = stage_of("teacher_paco")
    assert (slow.epochs, slow.optimiser.name, slow.optimiser.get("lr"), slow.method.get("queue")) == (
        400, "sam", 0.05, 1024)  # fmt: skip


def test_trials_share_teachers_and_what_comes_before_the_switch():
    def trial(**changes):
        return Plan("", epochs=70).stage(FOUND, {"arm": STUDY, **SMALL, **changes})

    plain = trial()
    late = [trial(one_minus_beta=1e-3), trial(mixing_late=True), trial(cls_loss="logit_adjusted", tau=1.2)]
    assert all(line(other.resume) == line(plain.resume) and line(other) != line(plain) for other in late)
    assert line(trial(switch=0.8).resume) == line(plain.resume)
    other = trial(student="narrow", alpha=0.7, teacher_view="weak")
    assert line(other.resume) != line(plain.resume) and other.teacher == plain.teacher
    assert len({line(trial(rho=rho).teacher) for rho in (0.0, 0.2, 0.8)}) == 3


def test_soft_distillation_knows_the_scale_of_cosines():
    for teacher, scale in (("ldam", 30.0), ("ce", 1.0)):
        trial = FixedTrial({**SMALL, "distil": "soft", "temperature": 2.0, "teacher": teacher})
        assert complete(FOUND.point(STUDY, trial)).method.get("scale") == scale


def test_one_command_trains_the_small_preset(tmp_path, capsys):
    words = ["deit_lt", "--preset", "laptop", "--data", "digits", "--ratio", "20", "--epochs", "4"]
    assert command.run(recipe.main, [*words, "--batch", "64", "--device", "cpu", "--storage", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "4 stage(s), 4 epochs" in said and "stage 4, epoch 2/2: cls" in said and "test: balanced" in said
    assert len(chain(stage_of("laptop"))) == 4
