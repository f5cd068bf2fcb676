"""Ensembles as models to ship: what the report promises, predictions reproduce."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis import ensembles, experts
from analysis.routing import Mixture
from rayltr import data, ensemble, export, metrics, predict, records, shipping, trial
from rayltr.command import PREFLIGHT, USAGE
from rayltr.methods import supervised
from rayltr.spec import dump, fn
from rayltr.store import Store
from tests.conftest import tiny
from tests.data.image_files import png
from tests.export.helpers import CPU, SOURCE, columns, did, floats, said

TOLERANCE = 2e-3
"""Of the NLL, in nats: the report knows the logits as half floats, and predictions are single precision."""


@pytest.fixture(scope="module")
def several(place, run):
    """A run folder with four more trials beside that of `run`: other losses and seeds; one has a second head."""
    folder = shutil.copytree(run, place / "several")
    for number, changes in enumerate(
        ({"seed": 1}, {"seed": 2}, {"loss": fn("balanced_softmax")}, {"loss": fn("focal"), "seed": 3}), 1
    ):
        stage = tiny(source=SOURCE, epochs=6, batch=32, **changes)
        added(folder, number, stage)
    return folder


def added(folder, number, stage):
    """Trains a recipe into the store of a run and adds its row."""
    found = trial.run(stage, Store(folder / "store"))
    row = records.read_trials(folder).to_pylist()[0]
    scores = {f"m.val.{name}": value for name, value in found.metrics.items()}
    kept = {name: value for name, value in row.items() if not name.startswith(("m.", "p."))}
    more = {"trial": f"{number:04d}", "number": number, "address": found.address, "seed": stage.seed,
            "predictions_val": trial.inside(found.predictions), "predictions_test": None,
            "recipe": json.dumps(dump(stage))}  # fmt: skip
    records.append_trial(folder, {**kept, **scores, **more})


@pytest.fixture(scope="module")
def shipped(several, place):
    """The folder of the exported ensemble of that run."""
    assert did(export, several, "--ensemble", "--out", place / "ensemble", "--onnx") == 0
    return place / "ensemble"


@pytest.fixture(scope="module")
def pictures(images, place):
    """The validation images as Parquet."""
    pq.write_table(pa.table({"image": [png(pixels) for pixels in images]}), place / "val.parquet")
    return place / "val.parquet"


@pytest.fixture(scope="module")
def target():
    return data.load(SOURCE).val.target


def predicted(folder, pictures, out):
    """Log-probabilities [N,C] by way of the command."""
    assert did(predict, folder, pictures, "--out", out) == 0
    return np.log(np.array(columns(out)[0]["probabilities"]))


def measured(z, target):
    """Class-balanced accuracy and NLL."""
    return np.nanmean(metrics.class_accuracy(z.argmax(1), target, 10)), metrics.balanced_nll(z, target, 10)


def read(folder, name="ensemble.json"):
    return json.loads((folder / name).read_text())


# ---------------------------------------------------------------------------------------- what is promised and kept


def test_predictions_reproduce_the_validation_scores_of_the_report(several, shipped, pictures, target, tmp_path):
    promised, told = ensembles.study(several), read(shipped)
    balanced, nll = measured(predicted(shipped, pictures, tmp_path / "out.parquet"), target)
    assert balanced == promised.ensemble.whole["balanced"] == told["validation"]["balanced"]
    assert nll == pytest.approx(promised.ensemble.whole["nll"], abs=TOLERANCE)
    assert told["validation"] == promised.ensemble.whole
    assert len(promised.members) > 1 and [e.trial for e in promised.members] == [m["trial"] for m in told["members"]]


GROUPS = metrics.groups([80, 62, 48, 37, 29, 22, 17, 13, 10, 8])[0]


def mixtures():
    """An ensemble of each kind, made of three experts by hand."""
    rng = np.random.default_rng(0)
    one = np.array([0.5, 0.3, 0.2])[:, None] * np.ones(10)
    free, grouped, by_group = rng.dirichlet(np.ones(3), 10).T, np.zeros((3, 10)), np.zeros(10)
    for name, weights in zip(GROUPS, rng.dirichlet(np.ones(3), 3), strict=True):
        grouped[:, GROUPS[name]], by_group[GROUPS[name]] = weights[:, None], rng.normal()
    yield "global", Mixture((0, 1, 2), one, np.zeros(10))
    yield "prob", Mixture((0, 1, 2), one, np.zeros(10), "prob")
    yield "groups", Mixture((0, 1, 2), grouped, by_group, "logit", "groups")
    yield "classes", Mixture((0, 1, 2), free, rng.normal(size=10), "logit", "classes")


@pytest.mark.parametrize("mixture", [pytest.param(mixture, id=name) for name, mixture in mixtures()])
def test_every_kind_of_ensemble_predicts_as_measured(several, images, pictures, target, tmp_path, monkeypatch, mixture):
    study = ensembles.study(several)
    members = experts.experts(several).experts[:3]
    z = mixture.of([expert.logits for expert in members])
    balanced, nll = measured(z, target)
    score = replace(study.ensemble, balanced=balanced, nll=nll)
    told = replace(study, members=members, mixture=mixture, ensemble=score, groups=GROUPS)
    monkeypatch.setattr(ensembles, "study", lambda run: told)
    once = ["--onnx"] if mixture.mode == "prob" else []  # slow, and in logits all are the graph of `shipped`
    assert did(export, several, "--ensemble", *once, "--out", tmp_path / "model") == 0
    found = predicted(tmp_path / "model", pictures, tmp_path / "out.parquet")
    assert measured(found, target)[0] == balanced
    assert measured(found, target)[1] == pytest.approx(nll, abs=TOLERANCE)
    np.testing.assert_allclose(np.exp(found), np.exp(z), atol=5e-3)
    if once:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
        for rows in (slice(0, 1), slice(1, 8), slice(0, len(images))):
            (logs,) = session.run(["logits"], {"images": floats(images[rows]).numpy()})
            np.testing.assert_allclose(logs, found[rows], atol=1e-4)


def test_one_file_of_onnx_holds_the_whole_ensemble(shipped, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, config = ensemble.opened(shipped, CPU)
    (logs,) = onnxruntime.InferenceSession(shipped / "model.onnx").run(["logits"], {"images": floats(images).numpy()})
    np.testing.assert_allclose(logs, said(model, images), atol=1e-4)
    np.testing.assert_allclose(np.exp(logs).sum(1), 1, atol=1e-5)
    assert config["label_names"] == [f"class {c}" for c in range(10)]


# --------------------------------------------------------------------------------------------------------- the folder


def test_an_ensemble_says_what_it_is_and_holds_models(several, shipped, images):
    told = read(shipped)
    members = {path.parent.relative_to(shipped).as_posix() for path in shipped.glob("members/*/config.json")}
    assert members == {entry["folder"] for entry in told["members"]}
    for entry in told["members"]:
        model, config = shipping.opened(shipped / entry["folder"], CPU)
        assert {"trial", "head", "tau", "temperature", "weight"} <= set(entry)
        assert config["posthoc"]["tau"] == entry["tau"] and config["posthoc"]["temperature"] == entry["temperature"]
        assert said(model, images[:2]).shape == (2, 10)
    assert sum(entry["weight"] for entry in told["members"]) == pytest.approx(1)
    assert {path.name for path in shipped.iterdir()} == {
        *("ensemble.json", "labels.txt", "manifest.json", "members", "metrics.json", "model.onnx", "README.md")
    }
    card = (shipped / "README.md").read_text()
    assert "resnet20 (width 4)" in card and f"{100 * told['validation']['balanced']:.1f}" in card
    assert [row["trial"] for row in read(shipped, "manifest.json")["members"]] == [m["trial"] for m in told["members"]]


def test_a_member_with_the_users_own_loss_brings_it_along(several, tmp_path, monkeypatch, pictures):
    study, three = ensembles.study(several), experts.experts(several).experts[:2]
    one = Mixture((0, 1), np.full((2, 10), 0.5), np.zeros(10))
    monkeypatch.setattr(ensembles, "study", lambda run: replace(study, members=three, mixture=one))
    assert did(export, several, "--ensemble", "--out", tmp_path / "model") == 0
    assert [path.parent.name for path in (tmp_path / "model").rglob("study.py")] == ["0000"]
    predicted(tmp_path / "model", pictures, tmp_path / "out.parquet")


def test_other_heads_are_experts_and_are_exported_whole(several, tmp_path, monkeypatch, pictures, target):
    def predicts(self, images):
        z = self.head(self.backbone(images))
        return {"main": z, "soft": z.tanh()}

    monkeypatch.setattr(supervised.Method, "predict", predicts)
    folder = shutil.copytree(several, tmp_path / "run")
    added(folder, 5, tiny(source=SOURCE, epochs=5, batch=32, seed=5))
    panel = experts.experts(folder)
    two = [expert for expert in panel.experts if expert.trial == "0005"]
    assert [expert.name for expert in two] == ["0005", "0005 soft"]
    mixture = Mixture((0, 1), np.full((2, 10), 0.5), np.zeros(10))
    monkeypatch.setattr(ensembles, "study", lambda run: replace(ensembles_of, members=two, mixture=mixture))
    ensembles_of = ensembles.studied(panel, times=20)
    assert did(export, folder, "--ensemble", "--out", tmp_path / "model") == 0
    found = predicted(tmp_path / "model", pictures, tmp_path / "out.parquet")
    assert read(tmp_path / "model" / "members" / "0005-soft", "config.json")["head"] == "soft"
    balanced, nll = measured(mixture.of([expert.logits for expert in two]), target)
    assert measured(found, target)[0] == balanced
    assert measured(found, target)[1] == pytest.approx(nll, abs=TOLERANCE)


def test_a_prediction_that_is_not_the_heads_own_is_exported_whole(several, tmp_path, monkeypatch, images):
    def predicts(self, images):
        return {"main": self.head(self.backbone(images)) + self.head(self.backbone(images.flip(3)))}

    monkeypatch.setattr(supervised.Method, "predict", predicts)
    folder = shutil.copytree(several, tmp_path / "run")
    added(folder, 5, tiny(source=SOURCE, epochs=1, batch=32, seed=6))
    assert did(export, folder, "--trial", "5", "--out", tmp_path / "model") == 0
    (expert,) = experts.experts(folder, only="0005").experts
    z = torch.from_numpy(said(shipping.opened(tmp_path / "model", CPU)[0], images)).log_softmax(1)
    np.testing.assert_allclose(z, expert.logits, atol=0.02)


def test_an_ensemble_and_a_model_replace_each_other_whole(several, shipped, tmp_path, images):
    out = tmp_path / "model"
    shutil.copytree(shipped, out)
    assert did(export, several, "--trial", "1", "--out", out) == 0
    assert not (out / "ensemble.json").exists() and not (out / "members").exists()
    assert said(shipping.opened(out, CPU)[0], images[:1]).shape == (1, 10)
    assert did(export, several, "--ensemble", "--out", out) == 0
    assert not (out / "config.json").exists() and not (out / "model.onnx").exists()
    assert did(export, several, "--ensemble", "--out", out) == 0, "an ensemble replaces an ensemble"
    ensemble.opened(out, CPU)


# --------------------------------------------------------------------------------------------- what cannot be exported


def test_a_run_of_one_trial_has_no_ensemble(refused, run, tmp_path):
    code, error = refused(export, run, "--ensemble", "--out", tmp_path / "out")
    assert code == USAGE and "has no ensemble to export: an ensemble needs two experts; there are 1" in error
    assert not (tmp_path / "out").exists()


def test_options_that_exclude_each_other(refused, run, tmp_path):
    for more in (["--trial", "0"], ["--best", "few"], ["--group-bias"]):
        assert refused(export, run, "--ensemble", *more, "--out", tmp_path / "out")[0] == USAGE


def test_members_whose_weights_are_gone(refused, several, tmp_path):
    copy = shutil.copytree(several, tmp_path / "run")
    for weights in copy.glob("store/*/000006.json"):
        weights.unlink()
    code, error = refused(export, copy, "--ensemble", "--out", tmp_path / "out")
    assert code == USAGE and "any more; train it again with" in error and not (tmp_path / "out").exists()


def test_a_folder_with_an_ensemble_of_something_else_is_left_alone(refused, several, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ensemble.json").write_text("{}")
    assert refused(export, several, "--ensemble", "--out", tmp_path / "out")[0] == PREFLIGHT


def edited(**changes):
    def edit(folder):
        (folder / "ensemble.json").write_text(json.dumps({**read(folder), **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "members"), "is no exported model, or damaged"),
        (lambda folder: (folder / "ensemble.json").write_text("[]"), "is no exported ensemble, or damaged"),
        (lambda folder: (folder / "ensemble.json").write_text("{"), "JSONDecodeError"),
        (edited(rayltr=99), "incompatible version (99, here 1)"),
        (edited(members=[]), "is no exported ensemble, or damaged"),
        (edited(mode="median"), "the mode is one of logit, prob"),
        (edited(bias={"all": 1.0}), "KeyError"),
        (edited(bias=float("nan")), "there is a bias for it"),
    ],
)
def test_damaged_ensembles(refused, shipped, folder, tmp_path, damage, message):
    copy = shutil.copytree(shipped, tmp_path / "copy")
    damage(copy)
    code, error = refused(predict, copy, folder)
    assert code == USAGE and message in error


# ------------------------------------------------------------------------------------------------- a bias per group


def test_a_group_bias_is_folded_where_it_helps_and_left_out_else(several, tmp_path, images, monkeypatch, capsys):
    assert did(export, several, "--trial", "1", "--out", tmp_path / "plain") == 0
    without = said(shipping.opened(tmp_path / "plain", CPU)[0], images)
    capsys.readouterr()
    assert did(export, several, "--trial", "1", "--group-bias", "--out", tmp_path / "asked") == 0
    panel = experts.experts(several, only="0001")
    mixture, gain = ensembles.group_bias(panel)
    assert ("applied" if gain.low > 0 else "left out") in capsys.readouterr().out
    with_it = said(shipping.opened(tmp_path / "asked", CPU)[0], images)
    np.testing.assert_allclose(with_it - without, np.broadcast_to(mixture.bias, without.shape), atol=1e-4)
    bias = np.linspace(-1, 1, 10)
    forced = Mixture((0,), np.ones((1, 10)), bias, "logit", "groups")
    monkeypatch.setattr(ensembles, "group_bias", lambda panel: (forced, gain))
    assert did(export, several, "--trial", "1", "--group-bias", "--out", tmp_path / "forced") == 0
    with_it = said(shipping.opened(tmp_path / "forced", CPU)[0], images)
    np.testing.assert_allclose(with_it - without, np.broadcast_to(bias, without.shape), atol=1e-4)
    np.testing.assert_allclose(read(tmp_path / "forced", "config.json")["posthoc"]["bias"], bias)
