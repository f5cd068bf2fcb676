"""The rehearsal: wrong values are found before anything is written, and nothing of it reaches the training."""

import json

import pytest

from rayltr import command, recipe, rehearsal
from rayltr.command import USAGE
from rayltr.data import load
from rayltr.interface import Resources
from rayltr.rehearsal import points, rehearse, sample
from rayltr.spec import Stage, dump, fn
from rayltr.studies import CONTROL, STUDY, Plan, find
from rayltr.train import train

SOURCE = fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0)
PLAIN = Stage(source=SOURCE, epochs=3, backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=0.05), batch=16)
WRONG = {
    "epsilon": PLAIN.but(loss=fn("label_smoothing", epsilon=1.5)),
    "beta": PLAIN.but(weight=fn("effective_number", beta=1.5)),
    "layer": PLAIN.but(mixing=fn("manifold", layer="layer9")),
    "second stage": PLAIN.but(resume=PLAIN, weight=fn("effective_number", beta=1.5)),
}


@pytest.mark.parametrize("stage", WRONG.values(), ids=WRONG)
def test_values_that_cannot_be_are_refused_and_leave_nothing(stage, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(dump(stage)))
    words = [str(tmp_path / "config.json"), "--storage", str(tmp_path / "runs")]
    assert command.run(recipe.main, words) == USAGE
    said = capsys.readouterr().err
    assert "the recipe cannot be trained: " in said and len(said.strip().splitlines()) == 1
    assert not list((tmp_path / "runs").iterdir())


def test_a_rehearsal_sees_one_batch_of_all_classes_and_changes_no_training():
    data = load(SOURCE)
    few = sample(data, 16)
    assert len(few.train) == 16 and set(few.train.target) == {0, 1, 2, 3}
    assert few.counts.sum() == 16 and len(few.counts) == len(data.counts)
    before = train(PLAIN.but(epochs=1), data=data)[0].model
    rehearse(PLAIN, Resources())
    after = train(PLAIN.but(epochs=1), data=data)[0].model
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("preset", ["drs_balance", "cam_balance", "dive", "tau_norm", "bag_of_tricks"])
def test_chains_of_several_stages_are_rehearsed_whole(preset, monkeypatch):
    seen = []

    def noted(stage, *args, **options):
        seen.append(stage.epochs)
        return train(stage, *args, **options)

    monkeypatch.setattr(rehearsal, "train", noted)
    study = find("bag_of_tricks")
    stage = Plan(source=SOURCE, epochs=40, study="bag_of_tricks", backbone=fn("resnet20", width=4)).stage(
        study, {"arm": STUDY, **study.presets[preset]}
    )
    rehearse(stage, Resources())
    assert len(seen) > 1 and set(seen) <= {0, 1}


def test_the_points_that_are_measured_are_of_both_arms():
    study = find("bag_of_tricks")
    found = points(study)
    assert [point["arm"] for point in found] == [CONTROL, *[STUDY] * rehearsal.PROBED]
    plan = Plan(study="bag_of_tricks", source=SOURCE, epochs=30)
    for point in found:
        assert plan.stage(study, point).source.name == SOURCE.name
