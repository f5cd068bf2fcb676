"""The study million_way: every preset can be trained, every point of the space is a chain."""

from dataclasses import replace

import pytest

from rayltr import records
from rayltr.interface import Resources
from rayltr.rehearsal import rehearse
from rayltr.spec import RandomTrial, chain, fn, line
from rayltr.studies import STUDY, Plan, find, listing
from tests.test_search import rayltr

FOUND = find("million_way")
SMALL = Plan(
    study="million_way",
    source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0),
    epochs=40,
    batch=16,
    backbone=fn("resnet20", width=4),
)


ABLATED = {"small_linear_random": {"prior": False}, "small_linear_hard": {"smoothing": 0.0, "hardest": 100}}


def stage_of(name, plan=SMALL):
    if name in FOUND.chains:
        return plan.changed(FOUND.chains[name])
    return plan.stage(FOUND, {"arm": STUDY, **FOUND.presets[name]})


@pytest.mark.parametrize("name", FOUND.named)
def test_every_preset_can_be_trained(name):
    rehearse(stage_of(name), Resources(device="cpu"))


def test_every_point_is_a_chain_that_begins_with_images_as_classes():
    uses = set()
    for seed in range(50):
        first, *rest = chain(SMALL.changed(FOUND.point(STUDY, RandomTrial(seed))))
        assert first.method.name == "million" and rest
        uses.add(tuple(stage.method.name for stage in rest))
    assert uses == {("supervised",), ("neighbours",), ("supervised", "supervised", "distil")}
    assert set(FOUND.published) <= set(FOUND.named) and len(listing(FOUND)) == len(FOUND.named)


def test_uses_share_the_first_stage():
    """At the length of the study, whatever follows; a shorter chain scales its stages with it."""
    firsts = [chain(stage_of(name, Plan(study="million_way")))[0] for name in FOUND.presets if name not in ABLATED]
    assert len({line(first) for first in firsts}) == 1 and len(firsts) == 6


def test_what_is_left_out_of_the_first_stage_changes_nothing_else():
    first, last = chain(stage_of("small_linear"))
    for name, changes in ABLATED.items():
        other, after = chain(stage_of(name))
        assert other == first.but(method=first.method.but(**changes))
        assert after == last.but(init=other)


@pytest.mark.parametrize("epochs", [500, 40, 7])
def test_training_from_scratch_takes_as_many_epochs_as_features_and_fine_tuning(epochs):
    first, fine = chain(stage_of("small_finetune_balanced", replace(SMALL, epochs=epochs)))
    alone = stage_of("small_scratch", replace(SMALL, epochs=epochs))
    assert alone.epochs == first.epochs + fine.epochs == epochs and chain(alone) == [alone]
    length = {"epochs": fine.epochs, "horizon": fine.horizon, "schedule": fine.schedule}
    assert alone.but(**length, init=first, method=fine.method) == fine
    assert not alone.method.get("fresh_head") and alone.loss.name == "balanced_softmax"


def test_the_rest_of_ssd_is_a_teacher_of_these_features_and_a_student_of_random_weights():
    million, fine, teacher, student = chain(stage_of("small_ssd"))
    assert (fine.init, teacher.init, student.teacher) == (million, fine, teacher)
    assert student.init is None and student.method.name == "distil" and teacher.head.name == "lws"


def test_the_published_recipe():
    first, last = chain(FOUND.chains["paper"])
    wanted = {"lr": 0.48, "momentum": 0.9, "weight_decay": 1e-4}
    assert {name: first.optimiser.get(name) for name in wanted} == wanted
    assert (first.batch, first.schedule.get("warmup") * first.epochs, len(first.views)) == (4096, 10, 1)
    whole = stage_of("paper", Plan(study="million_way")).init.method
    wanted = {"temperature": 0.15, "smoothing": 0.2, "prior": True, "cosine": True, "out": 128, "sampled": 1.0}
    assert {name: whole.get(name) for name in wanted} == wanted
    assert last.method.get("frozen") and last.optimiser.get("weight_decay") == 0


@pytest.mark.slow
def test_a_search_shares_the_classifier_among_the_workers_of_a_trial(tmp_path):
    """The command of the manual, from features to the records of a whole chain."""
    found = rayltr("search", "million_way", "--data", "digits", "--ratio", 20, "--start", "small", "--trials", 2,
                   "--epochs", 8, "--batch", 64, "--backbone", "resnet20", "--workers", 2, "--storage", tmp_path,
                   "--name", "run", "--no-dashboard")  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    _, row = sorted(records.read_trials(tmp_path / "run").to_pylist(), key=lambda row: row["trial"])
    assert (row["state"], row["p.arm"]) == ("complete", "study") and row["m.val.many"] > 0
    parts = sorted(path.name for path in (tmp_path / "run/store").glob("*/*.rows?.safetensors"))
    assert [part.split(".")[1] for part in parts] == ["rows0", "rows1"]
