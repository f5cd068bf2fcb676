"""The study that reproduces the Bag of Tricks: its presets are the published rows, its points can all be trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayltr import studies
from rayltr.catalogue import complete
from rayltr.spec import FixedTrial, RandomTrial, chain, end, fn, line, parents, parse, start
from tests.conftest import CIFAR100

STUDY = studies.find("bag_of_tricks")
ROOT = Path(__file__).parents[1]


def preset(name):
    return complete(STUDY.space(FixedTrial(STUDY.presets[name])))


def points(count=400):
    return [complete(STUDY.space(RandomTrial(seed))) for seed in range(count)]


def test_every_published_row_is_a_preset_and_every_error_is_a_number():
    assert set(STUDY.published) <= set(STUDY.presets)
    adjusted = set(STUDY.presets) - set(STUDY.published)
    assert all(name.rsplit("_", 2)[0] in STUDY.published for name in adjusted)
    for row in STUDY.published.values():
        for data, error in row.items():
            assert data == "note" or 10 < float(error) < 75
    assert STUDY.published["bag_of_tricks"]["cifar100_100"] == "52.17"
    assert STUDY.published["dive"]["cifar10_50"] == "17.56"
    assert "cifar10_100" not in STUDY.published["seql"]


def test_the_plain_protocol():
    (stage,) = chain(preset("ce"))
    assert (stage.epochs, stage.batch, stage.precision) == (200, 128, "fp32")
    assert stage.optimiser == fn("sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-4)
    schedule = dict(stage.schedule.keywords)
    assert schedule["milestones"] == (159 / 200, 179 / 200) and schedule["gamma"] == 0.01
    assert (schedule["warmup"], schedule["warmup_from"]) == (5 / 200, 1 / 3)


def test_mixing_trains_twice_as_long():
    for name in ("input_mixup", "manifold_mixup", "remix", "input_mixup_bsce", "input_mixup_bbn"):
        (stage,) = chain(preset(name))
        assert stage.epochs == 400 and stage.schedule.get("milestones") == (319 / 400, 359 / 400)
    assert preset("remix").mixing.get("reduce") == "batch", "as the published numbers were made"
    assert preset("manifold_mixup").mixing.get("layer") == "pool"


def test_pairs_are_mixed_128_at_a_time():
    stage = preset("input_mixup_bbn")
    assert (stage.batch, stage.sampler.name, stage.mixing) == (256, "reverse", fn("bbn_mix", alpha=1.0))
    beside = preset("bbn")
    assert (beside.batch, beside.sampler.name, beside.mixing) == (128, "reverse", None)


@pytest.mark.parametrize(
    ("name", "weight", "before", "after", "reduction"),
    [
        ("drw_csce", fn("inverse_frequency", gamma=1.0), "cross_entropy", "cross_entropy", "weighted_mean"),
        ("drw_focal", fn("inverse_frequency", gamma=1.0), "focal", "focal", "mean"),
        ("drw_cb_focal", fn("effective_number", beta=0.9), "focal", "focal", "mean"),
        ("drw_cb_ce", fn("effective_number", beta=0.9), "cross_entropy", "cross_entropy", "weighted_mean"),
        ("ldam_drw", fn("effective_number", beta=0.9999), "ldam", "ldam", "weighted_mean"),
        ("drw_cdt", None, "cross_entropy", "cdt", "weighted_mean"),
        ("drw_bsce", None, "cross_entropy", "balanced_softmax", "weighted_mean"),
    ],
)
def test_deferred_reweighting(name, weight, before, after, reduction):
    first, last = chain(preset(name))
    assert (first.epochs, end(last), first.horizon, last.resume) == (160, 200, 200, first)
    assert (first.weight, first.loss.name) == (None, before)
    assert (last.weight, last.loss.name, last.method.get("reduction")) == (weight, after, reduction)


def test_influence_balancing_begins_in_the_middle():
    first, last = chain(preset("drw_ib"))
    assert (first.epochs, last.epochs, last.loss) == (100, 100, fn("influence_balanced", alpha=1000.0))
    assert last.schedule.get("milestones") == (99 / 200, 159 / 200, 179 / 200)
    assert first.schedule == last.schedule, "the last epoch before the switch has the smaller learning rate already"
    late = complete(STUDY.space(FixedTrial({**STUDY.presets["drw_ib"], "switch": 0.8})))
    assert late.schedule.get("milestones") == (159 / 200, 179 / 200)


@pytest.mark.parametrize("name", ["balance", "square", "progressive"])
def test_deferred_resampling_with_and_without_maps(name):
    plain, cam = preset(f"drs_{name}"), preset(f"cam_{name}")
    assert plain.resume == cam.resume == cam.teacher, "the first stage is shared, and its maps are used"
    assert (plain.method.name, cam.method.name) == ("supervised", "cam")
    assert cam.method.get("threshold") == 0.75
    if name == "progressive":
        assert (plain.sampler.get("start"), cam.sampler.get("start")) == (0.0, 0.8)
    else:
        assert plain.sampler == cam.sampler == fn("power", q={"balance": 0.0, "square": 0.5}[name])


def test_classifiers_are_trained_on_the_plain_network():
    assert preset("crt").init == preset("lws").init == preset("tau_norm").init == preset("ce")
    assert [preset(name).epochs for name in ("crt", "lws", "tau_norm")] == [30, 30, 0]
    assert preset("crt").optimiser.get("weight_decay") == 5e-4


def test_dive_learns_from_a_balanced_teacher():
    teacher, student = chain(preset("dive"))
    assert student.teacher == teacher and teacher.loss == student.loss == fn("balanced_softmax")
    assert student.schedule.get("milestones") == (119 / 200, 159 / 200)
    asked = {"alpha": 0.5, "temperature": 2.0, "power": 0.5}
    assert {key: student.method.get(key) for key in asked} == asked


def test_the_whole_bag_is_three_stages():
    mixup, cam, fine = chain(preset("bag_of_tricks"))
    assert [s.epochs for s in (mixup, cam, fine)] == [320, 80, 20]
    assert (cam.resume, cam.teacher, cam.mixing.name, cam.sampler) == (mixup, mixup, "mixup", fn("power", q=0.0))
    assert (fine.init, fine.mixing, fine.method.name, fine.sampler) == (cam, None, "supervised", fn("power", q=0.0))
    assert fine.optimiser.get("lr") == pytest.approx(0.001)
    assert preset("input_mixup_cam") == cam


def test_every_point_can_be_trained_and_every_trick_is_reached():
    """That each one completes is the test: what cannot be (a weight on a loss that takes none, ...) would raise."""
    found = points()
    last = [chain(stage)[-1] for stage in found]
    reached = {
        axis: {getattr(s, axis).name for s in last if getattr(s, axis)} for axis in ("loss", "sampler", "weight")
    }
    assert len(reached["loss"]) == 10 and len(reached["weight"]) == 2
    assert reached["sampler"] == {"power", "progressive", "reverse"}
    assert {s.method.name for s in last} == {"supervised", "cam", "dive"}
    assert {s.mixing.name for s in last if s.mixing} == {"mixup", "cutmix", "manifold", "remix", "bbn_mix"}
    assert any(len(chain(stage)) == 3 for stage in found)
    assert {s.method.name for stage in found for s in chain(stage)[-2:]} == {"supervised", "cam", "dive"}
    two = [trial for trial in map(RandomTrial, range(400)) if STUDY.space(trial) and trial.asked["when"] != "whole"]
    assert {trial.asked["when"] for trial in two} == {"reweighted", "resampled", "mapped", "finished"}
    assert {trial.asked["then"] for trial in two if "then" in trial.asked} == {"crt", "lws", "tau", "dive"}


def test_first_stages_are_few():
    """What differs in a first stage is the mirroring, the mixing and what a loss needs from the start."""
    plan, firsts = studies.Plan("bag_of_tricks", epochs=20), {}
    for trial in map(RandomTrial, range(400)):
        first, *more = chain(plan.changed(STUDY.space(trial)))
        if more and trial.asked["when"] != "whole" and trial.asked.get("loss") not in ("focal", "ldam"):
            firsts.setdefault(line(first), []).append(trial)
    assert len(firsts) <= 24 and sum(map(len, firsts.values())) > 200


@pytest.mark.parametrize("seed", range(40))
def test_what_comes_late_changes_something(seed):
    """A trial that defers nothing would only repeat another one."""
    trial = RandomTrial(seed)
    stage = complete(STUDY.space(trial))
    if trial.asked["when"] in ("reweighted", "resampled", "mapped"):
        before, after = chain(stage)[:2]
        assert after.but(epochs=before.epochs, resume=None) != before.but(resume=None)


def test_a_search_trains_little_more_than_half_of_its_epochs():
    """Drawn at random, without any training: a stage is trained from the longest stored part of its line."""
    plan, points = studies.Plan("bag_of_tricks", epochs=20), map(RandomTrial, range(96))
    stages = [
        plan.changed((STUDY.control if number % studies.EVERY == 0 else STUDY.space)(point))
        for number, point in enumerate(points)
    ]
    stored: dict[str, set[int]] = {}
    trained = sum(made(stage, stored) for stage in stages)
    assert trained <= 0.6 * sum(own.epochs for stage in stages for own in chain(stage))


def made(stage, stored):
    """The epochs to train for a stage; `stored` holds the ends of what there is, by line."""
    there = [at for at in stored.get(line(stage), ()) if start(stage) <= at <= end(stage)]
    if end(stage) in there:
        return 0
    needed = [parent for role, parent in parents(stage).items() if role == "teacher" or not there]
    before = sum(made(parent, stored) for parent in needed)
    stored.setdefault(line(stage), set()).add(end(stage))
    return before + end(stage) - max(there, default=start(stage))


def whole_bag(tmp_path, *words):
    done = subprocess.run(
        [sys.executable, "-m", "rayltr.train", "bag_of_tricks", "--preset", "bag_of_tricks", "--storage", str(tmp_path),
         "--name", "r", *words],
        capture_output=True, text=True, cwd=ROOT, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recipe = parse(json.loads((tmp_path / "r/run.json").read_text())["settled"]["recipe"])
    assert [(s.method.name, bool(s.mixing)) for s in chain(recipe)] == [
        ("supervised", True), ("cam", True), ("supervised", False)
    ]  # fmt: skip
    assert len([*(tmp_path / "r/store").rglob("*.safetensors")]) == 3
    return done.stdout


def test_the_whole_bag_runs_by_one_command(tmp_path):
    out = whole_bag(tmp_path, "--data", "digits", "--ratio", "20", "--epochs", "6", "--backbone", "resnet20")
    assert "3 stage(s), 6 epochs" in out


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not CIFAR100.exists(), reason="no CIFAR-100 here")
def test_the_whole_bag_runs_on_cifar(tmp_path):
    out = whole_bag(tmp_path, "--data", str(CIFAR100), "--ratio", "100", "--paper-split", "--epochs", "3",
                    "--backbone", "resnet20", "--precision", "bf16")  # fmt: skip
    assert "10847" in out.replace(" ", "").replace(",", "")
