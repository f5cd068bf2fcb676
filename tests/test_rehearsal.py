"""The rehearsal: wrong values are found before anything is written, and nothing of it reaches the training."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rayltr import command, recipe, rehearsal
from rayltr.command import USAGE
from rayltr.data import Split, load
from rayltr.interface import Resources
from rayltr.rehearsal import points, rehearse, sample
from rayltr.spec import Stage, dump, fn, mapped
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


class Memory:
    """Stands for a GPU: what is reserved is what the states of the stages trained on it are large."""

    def __init__(self):
        self.used, self.states, self.images = 0, [], 0

    def train(self, stage, *args, data, **options):
        state, logits = train(stage, *args, data=noted(data, self), **options)
        self.used = sum(value.nbytes for value in {**state.model, **state.rows}.values())
        self.states.append((stage.method.name, state))
        return state, logits


def noted(data, memory):
    """The data set, whose training images are counted as they are taken."""

    class Noted(Split):
        def take(self, rows):
            memory.images += len(rows)
            return super().take(rows)

    return replace(data, train=Noted(**vars(data.train)))


@pytest.fixture
def memory(monkeypatch):
    found = Memory()
    monkeypatch.setattr(rehearsal, "train", found.train)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (90 * 2**20, 100 * 2**20))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: found.used)
    return found


GROWING = {
    "million": ({"method": fn("million", out=6, hardest=5)}, "classes.weight"),
    "instance": ({"method": fn("instance", out=6), "views": (fn("flip_crop"),) * 2}, "queue.rows"),
    "neighbours": ({"method": fn("neighbours"), "epochs": 0, "init": PLAIN}, "head.bank"),
}


@pytest.mark.parametrize("name", GROWING)
def test_memory_is_measured_with_what_grows_with_the_number_of_images(name, memory, monkeypatch):
    changes, rows = GROWING[name]
    monkeypatch.setattr(rehearsal, "points", lambda study: [{}])
    images, used = {}, {}
    for size in (40, 400):
        source = fn("synthetic", classes=4, per_class=size, size=8, ratio=4.0)
        whole = mapped(PLAIN.but(**changes), lambda own, source=source: own.but(source=source))
        monkeypatch.setattr(Plan, "stage", lambda *_, whole=whole: whole)
        memory.states.clear()
        memory.images = 0
        used[size], total = rehearsal.peak(SimpleNamespace(plan=Plan(study="million_way"), cpus=1, compile=False))
        assert total == 100 * 2**20 and memory.images <= 3 * 16, "a batch is prepared with, and one is trained on"
        last, state = memory.states[-1]
        images[size] = len({**state.model, **state.rows}[rows])
        assert last == name and images[size] in (n := len(load(source).train), n - n % 16)
    row = state.rows[rows][0] if rows in state.rows else state.model[rows][0]
    assert used[400] - used[40] >= (images[400] - images[40]) * row.nbytes > 0
    assert used[40] > 10 * 2**20, "what other processes have counts"
