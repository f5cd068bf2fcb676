"""From a trained recipe to a model that others use: what is exported is what was measured."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rayltr import build, data, export, model_card, recipe, records
from rayltr.command import FAILED, PREFLIGHT, USAGE
from rayltr.folding import Adjustment, Headed, folded, shipped
from rayltr.interface import Facts
from rayltr.metrics import fit
from rayltr.shipping import opened
from rayltr.spec import fn
from tests.conftest import tiny
from tests.data.image_files import noise
from tests.export.helpers import CPU, DATA, SOURCE, did, floats, said


def centred(z):
    return z - z.mean(1, keepdims=True)


# ------------------------------------------------------------------------------------------------------ the numbers


def corrected(run):
    """z / T - tau * log prior of the stored validation predictions (halves, up to a constant per row), tau and T."""
    stored = records.read_predictions(run / records.read_trials(run).to_pylist()[0]["predictions_val"])
    z = stored.logits["main"]
    tau, temperature, _ = fit(z, stored.target, stored.counts)
    return z / temperature - tau * np.log(stored.counts / stored.counts.sum()), tau, temperature


def test_exported_logits_are_the_measured_ones_corrected(run, model, logits):
    expected, tau, temperature = corrected(run)
    assert tau > 0, "else this test would not see the shift"
    np.testing.assert_allclose(centred(logits), centred(expected), rtol=1e-3, atol=0.01)  # stored as halves
    config = json.loads((model / "config.json").read_text())
    assert config["posthoc"]["tau"] == tau and config["posthoc"]["temperature"] == temperature


def test_an_export_says_what_it_is(run, model):
    names = {path.name for path in model.iterdir()}
    assert names == {"config.json", "model.safetensors", "labels.txt", "metrics.json", "manifest.json", "README.md",
                     "model.onnx", "study.py"}  # fmt: skip
    row = records.read_trials(run).to_pylist()[0]
    labels = (model / "labels.txt").read_text().splitlines()
    assert labels == [f"class {c}" for c in range(10)]
    config, found = (json.loads((model / f"{name}.json").read_text()) for name in ("config", "manifest"))
    assert config["recipe"] == json.loads(row["recipe"]) and config["label_names"] == labels
    assert found["data"]["digest"] == data.load(SOURCE).digest and found["address"] == row["address"]
    assert json.loads((model / "metrics.json").read_text())["val.fitted_balanced"] == row["m.val.fitted_balanced"]
    card = (model / "README.md").read_text()
    assert f"{100 * row['m.test.fitted_balanced']:.1f}" in card and "None" not in card


def test_the_card_says_how_the_model_was_chosen_and_what_it_is(run, model, tmp_path):
    card = (model / "README.md").read_text()
    assert "It is the only complete trial of its run: nothing was chosen." in card
    assert "Backbone: resnet20 (width 4)." in card
    copy = shutil.copytree(run, tmp_path / "run")
    records.append_trial(copy, {**records.read_trials(copy).to_pylist()[0], "trial": "0001"})
    for options, told in (
        (["--trial", "1"], "It was named by hand, one of 2 complete trials."),
        (["--best", "few"], "It was chosen on validation, for the best `few` of 2 complete trials, by accuracy: "),
    ):
        assert did(export, copy, *options, "--out", tmp_path / "model") == 0
        assert told in (tmp_path / "model" / "README.md").read_text()


def test_the_price_of_a_model_is_told(model):
    price = json.loads((model / "manifest.json").read_text())["price"]
    weights = load_file(model / "model.safetensors")
    assert 0 < price["weights"] <= sum(value.numel() for value in weights.values()) and price["ms_per_image"] > 0
    assert f"{price['weights']:,} weights; an image alone takes" in (model / "README.md").read_text()


def test_the_card_knows_the_seeds_of_its_recipe():
    row = {"trial": "0003", "seed": 0, "state": "complete", "m.val.fitted_balanced": 0.5}
    more = [{**row, "trial": f"0003+{n}", "seed": n, "m.val.fitted_balanced": 0.5 + n / 10} for n in (0, 1, 2)]
    assert model_card.seeds(row, [row, {**row, "trial": "0004"}]) == "One seed (0)."
    assert "3 fresh seeds of its recipe reach 60.0 % balanced (standard deviation 10.0)" in model_card.seeds(
        row, [row, *more]
    )


def test_the_weights_may_be_read_like_the_other_files(model):
    assert len({path.stat().st_mode & 0o777 for path in model.iterdir()}) == 1


def test_onnx_says_the_same_for_batches_of_any_size(model, images, logits):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model / "model.onnx")
    for rows in (slice(0, 1), slice(1, 8), slice(0, len(images))):
        found = session.run(["logits"], {"images": floats(images[rows]).numpy()})[0]
        np.testing.assert_allclose(found, logits[rows], atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_timm_loads_the_export_of_a_model_of_its_own(place, images, name):
    timm = pytest.importorskip("timm")
    chain = ["--storage", place, "--name", name, "--backbone", f"timm:{name}", "--size", "32"]
    assert did(recipe, place / "config.json", "--data", "synthetic", "--ratio", "4", *chain) == 0
    assert did(export, place / name, "--out", place / f"{name}-model") == 0
    theirs = timm.create_model(f"local-dir:{place / f'{name}-model'}", pretrained=True).eval()
    seen = noise((6, 32, 32, 3))
    ours, config = opened(place / f"{name}-model", CPU)
    assert config["architecture"] == name and "backbone" not in config
    normal = theirs.pretrained_cfg
    mean, std = (torch.tensor(normal[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert normal["input_size"] in ((3, 32, 32), [3, 32, 32]) and len(normal["mean"]) == 3
    with torch.no_grad():
        found = theirs((floats(seen) - mean) / std).numpy()
    np.testing.assert_allclose(found, said(ours, seen), atol=1e-4)


@pytest.mark.parametrize("head", [fn("linear"), fn("cosine", scale=4.0), fn("lws"), fn("tau_normalised", tau=0.5)])
def test_every_head_folds_into_one_linear_classifier(head, images):
    facts = Facts(("a", "b", "c"), np.array([90, 9, 1]), (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), (8, 8))
    method = build.method(tiny(head=head), facts).eval()
    with torch.no_grad():
        z = method.predict(floats(images))["main"].numpy()
    expected = z / 0.7 - 1.5 * np.log(facts.counts / 100)
    found = folded(method, Adjustment(1.5, 0.7, facts.counts))
    assert found.normalise == (head.name == "cosine")
    np.testing.assert_allclose(said(found.eval(), images), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["ride", "sade", "ncl", "supervised"])
def test_models_with_a_head_for_each_expert_are_shipped_whole(name, images):
    facts = Facts(("a", "b", "c"), np.array([90, 9, 1]), (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), (8, 8))
    method = build.method(tiny(method=fn(name)), facts).eval()
    with torch.no_grad():
        z = method.predict(floats(images))["main"].numpy()
    made = shipped(method, "main", Adjustment(1.5, 0.7, facts.counts), (8, 8), fold=True)
    assert isinstance(made, Headed) == (name != "supervised")
    np.testing.assert_allclose(said(made, images), z / 0.7 - 1.5 * np.log(facts.counts / 100), atol=1e-4)


def test_a_head_that_is_not_linear_is_refused():
    method = build.method(tiny(), Facts(("a", "b"), np.array([2, 1]), (0.5,) * 3, (0.5,) * 3, (8, 8)))
    method.head = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match="not linear in its features"):
        folded(method, Adjustment(1.0, 1.0, np.array([2, 1])))


# ---------------------------------------------------------------------------------------------------------- exports


def test_an_exported_recipe_with_a_loss_of_its_own_can_be_trained_again(model, tmp_path, images, logits):
    assert did(recipe, model / "config.json", "--storage", tmp_path, "--name", "again") == 0
    assert did(export, tmp_path / "again", "--out", tmp_path / "model") == 0
    np.testing.assert_array_equal(said(opened(tmp_path / "model", CPU)[0], images), logits)


def test_a_trial_of_a_run_can_be_trained_again(run, tmp_path):
    assert did(recipe, run, "--trial", "0000", "--storage", tmp_path, "--name", "again") == 0
    first, again = (records.read_trials(folder).to_pylist()[0] for folder in (run, tmp_path / "again"))
    assert again["address"] == first["address"] and again["m.val.nll"] == first["m.val.nll"]


def test_an_earlier_export_is_replaced_whole(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    assert did(export, run, "--out", tmp_path / "model") == 0
    assert {path.name for path in model.iterdir()} - {path.name for path in (tmp_path / "model").iterdir()} == {
        "model.onnx"
    }, "an ONNX file of another trial must not stay"


@pytest.mark.parametrize("content", [None, "{no json", "[]", "3", '{"model_type": "bert"}'])
def test_a_folder_that_is_no_export_is_left_alone(refused, run, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    if content is not None:
        (out / "config.json").write_text(content)
    before = {path.name: path.read_text() for path in out.iterdir()}
    code, error = refused(export, run, "--out", out)
    assert code == PREFLIGHT and "exists and is no earlier export; choose another --out" in error
    assert {path.name: path.read_text() for path in out.iterdir()} == before


def test_files_in_the_way_of_an_export(refused, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused(export, run, "--out", tmp_path / "file")[0] == PREFLIGHT
    code, error = refused(export, run, "--out", tmp_path / "file" / "deep")
    assert code == PREFLIGHT and "cannot be written" in error
    assert refused(export, run, "--out", run)[0] == PREFLIGHT


def test_trials_that_do_not_exist_or_did_not_complete(refused, run, tmp_path):
    out = tmp_path / "out"
    code, error = refused(export, run, "--trial", "0007", "--out", out)
    assert code == USAGE and "which --trial?" in error and "has 0000" in error
    code, error = refused(export, run, "--best", "control", "--out", out)
    assert code == USAGE and "no complete trial for --best control; it has balanced, many, few" in error
    copy = shutil.copytree(run, tmp_path / "run")
    row = records.read_trials(copy).to_pylist()[0]
    records.append_trial(copy, {**row, "trial": "0001", "state": "failed", "error": "boom"})
    code, error = refused(export, copy, "--trial", "0001", "--out", out)
    assert code == USAGE and "trial 0001 is failed and cannot be exported" in error
    assert not out.exists()


def weights_of(run):
    """The file with the weights of the trial, at the end of its second stage."""
    place = run / records.read_trials(run).to_pylist()[0]["predictions_val"]
    return place.with_name(place.name.replace(".val.parquet", ".safetensors"))


@pytest.mark.filterwarnings("ignore")
def test_damaged_weights_are_not_exported(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    weights = weights_of(copy)
    weights.write_bytes(weights.read_bytes()[:-8])
    assert did(export, copy, "--out", tmp_path / "out") == USAGE
    assert f"are damaged; train it again with `python -m rayltr.train {copy} --trial 0000`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_of_a_shorter_training_are_not_exported_instead(refused, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    weights = weights_of(copy)
    note = json.loads(weights.with_suffix(".json").read_text())
    earlier = weights.with_name("000006.safetensors")
    weights.rename(earlier)
    earlier.with_suffix(".json").write_text(json.dumps({**note, "epoch": 6}))
    code, error = refused(export, copy, "--out", tmp_path / "out")
    assert code == USAGE and "weights of trial 0000" in error and "are damaged" in error
    code, error = refused(export, copy, "--out", tmp_path / "out")
    assert code == USAGE and "are not in" in error and "any more; train it again with" in error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- training that fails


def test_a_recipe_that_diverges_ends_with_one_line(refused, run, place, tmp_path):
    code, error = refused(recipe, place / "mine.py", "--preset", "bad", *DATA, "--storage", tmp_path, "--name", "bad")
    assert code == FAILED and "the recipe cannot be trained: " in error
    code, error = refused(recipe, place / "config.json", "--backbone", "timm:resnet9999", "--storage", tmp_path)
    assert code == USAGE and "timm has no model 'resnet9999'" in error
