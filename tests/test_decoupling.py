"""The study of decoupling: one network, five classifiers."""

import numpy as np
import pytest

from rayltr import studies
from rayltr.catalogue import complete
from rayltr.interface import Resources
from rayltr.records import read_predictions
from rayltr.rehearsal import rehearse
from rayltr.spec import FixedTrial, RandomTrial, chain, fn
from rayltr.store import Store
from rayltr.studies import STUDY as ARM
from rayltr.studies import Plan
from rayltr.trial import run

STUDY = studies.find("decoupling")
TOY = Plan(
    study="decoupling",
    source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0),
    epochs=5,
    batch=16,
    backbone=fn("resnet20", width=4),
)


def preset(name):
    return complete(STUDY.chains[name] if name in STUDY.chains else STUDY.space(FixedTrial(STUDY.presets[name])))


def test_published_errors_are_those_of_the_authors_table():
    found = {name.split("_")[0]: float(row["imagenet_lt"]) for name, row in STUDY.published.items()}
    assert found == {"joint": 55.6, "crt": 50.4, "lws": 50.1, "tau": 50.6, "ncm": 52.7}


@pytest.mark.parametrize(
    ("root", "model", "decay", "crt"),
    [("imagenet_lt", "resnext50_32x4d", 5e-4, 10), ("inaturalist", "resnet50", 1e-4, 30)],
)
def test_the_authors_recipes(root, model, decay, crt):
    joint, tau, ncm = (preset(f"{name}_{root}") for name in ("joint", "tau", "ncm"))
    assert (joint.epochs, joint.batch, joint.backbone.get("model")) == (90, 512, model)
    assert joint.optimiser == fn("sgd", lr=0.2, momentum=0.9, nesterov=False, weight_decay=decay)
    for name, epochs, head in (("crt", crt, "linear"), ("lws", 5, "lws")):
        last = preset(f"{name}_{root}")
        assert (last.init, last.epochs, last.head.name, last.batch) == (joint, epochs, head, 512)
        assert last.sampler == fn("class_aware", each=4, walks=1) and last.optimiser == joint.optimiser
        asked = {"frozen": True, "drift": True, "fresh_head": name == "crt"}
        assert {key: last.method.get(key) for key in asked} == asked
    assert (tau.init, tau.epochs, tau.head) == (joint, 0, fn("tau_normalised", tau=0.7, bias=False))
    assert (ncm.init, ncm.epochs, ncm.method.get("features")) == (joint, 0, "cl2n")


def test_joint_training_is_the_control_arm_and_first_for_all():
    joint = complete(STUDY.control(FixedTrial(STUDY.presets["joint"])))
    for name in ("joint", "crt", "lws", "tau", "ncm"):
        assert chain(preset(name))[0] == joint


def test_every_classifier_is_reached():
    found = [complete(STUDY.space(RandomTrial(seed))) for seed in range(60)]
    reached = {(s.method.name, s.head.name, bool(s.method.get("fresh_head")), s.init is None) for s in found}
    assert reached == {
        ("supervised", "linear", False, True),
        ("supervised", "linear", True, False),
        ("supervised", "lws", False, False),
        ("supervised", "tau_normalised", False, False),
        ("ncm", "linear", False, False),
    }


def test_one_network_serves_all_classifiers(tmp_path):
    store, logits = Store(tmp_path / "store"), {}
    for name in ("joint", "crt", "lws", "tau", "ncm"):
        stage = TOY.stage(STUDY, {"arm": ARM, **STUDY.presets[name]})
        first = {own.epochs for own in chain(stage)[:-1]} or {5}
        if name in ("crt", "lws"):  # of five epochs one is the classifier's
            assert first == {4}
        found = run(stage, store)
        logits[name] = read_predictions(found.predictions).logits["main"]
        assert run(stage, store).trained == 0
        assert found.trained == {"joint": 5, "crt": 5, "lws": 1, "tau": 0, "ncm": 0}[name]
    assert all(np.isfinite(z).all() and len(z) == len(logits["joint"]) for z in logits.values())


@pytest.mark.parametrize("name", [name for name in STUDY.chains if name.endswith("imagenet_lt")])
def test_recipes_for_photographs_can_be_trained(name):
    rehearse(TOY.changed(STUDY.chains[name]), Resources(device="cpu", threads=1))
