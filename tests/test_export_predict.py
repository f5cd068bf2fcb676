"""From a trained recipe to a model that others use: what is exported is what was measured, and damage is noticed."""

import importlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rayltr import build, catalogue, command, data, export, predict, recipe, records, shipping
from rayltr.command import FAILED, PREFLIGHT, USAGE
from rayltr.interface import Facts
from rayltr.metrics import fit
from rayltr.shipping import Adjustment, folded, opened
from rayltr.spec import fn
from tests.conftest import tiny
from tests.data.image_files import noise, png

CPU = torch.device("cpu")
SOURCE = fn("synthetic", ratio=10.0, size=8)
DATA = ["--data", "synthetic", "--ratio", "10", "--size", "8"]

STUDY = """
from torch.nn.functional import cross_entropy
from rayltr.spec import Stage, fn

PAPER = {"plain": {"gamma": 1.0}, "bad": {"gamma": 1e39}}

def heavier(logits, target, counts, *, gamma=1.0):
    return gamma * cross_entropy(logits, target, reduction="none")

def space(trial):
    first = Stage(source=fn("digits"), epochs=4, horizon=8, backbone=fn("resnet20", width=4), batch=32,
                  optimiser=fn("sgd", lr=0.05))
    return first.but(resume=first, loss=fn(heavier, gamma=trial.suggest_float("gamma", 0, float("inf"))))
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process of its own, no function of a study is known yet."""
    monkeypatch.setattr(catalogue, "USER", {})


def did(program, *words):
    return command.run(program.main, [*map(str, words)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def run(place):
    """The run folder of one recipe of two stages, whose loss is the user's own."""
    (place / "mine.py").write_text(STUDY)
    assert did(recipe, place / "mine.py", "--preset", "plain", *DATA, "--storage", place, "--name", "run") == 0
    return place / "run"


@pytest.fixture(scope="module")
def model(run, place):
    """The folder of its export."""
    assert did(export, run, "--trial", "0000", "--out", place / "model", "--onnx") == 0
    return place / "model"


@pytest.fixture(scope="module")
def images():
    """uint8 [N, 8, 8, 3]: the validation images."""
    split = data.load(SOURCE).val
    return split.take(np.arange(len(split)))


@pytest.fixture(scope="module")
def logits(model, images):
    """[N, C]: what the exported model says of them."""
    return said(opened(model, CPU)[0], images)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with one line on standard error; returns the code and the line."""

    def check(program, *words):
        code = did(program, *words)
        error = capsys.readouterr().err
        assert error.startswith("rayltr: ") and error.count("\n") == 1, error
        return code, error

    return check


def floats(images):
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def said(module, images):
    return module(floats(images)).numpy()


def centred(z):
    return z - z.mean(1, keepdims=True)


def softmax(z):
    return torch.from_numpy(z).softmax(1).numpy()


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


@pytest.fixture(scope="module", autouse=True)
def plain(place):
    """config.json: the recipe of one short stage."""
    (place / "config.json").write_text(json.dumps({"recipe": shipping.dump(tiny(epochs=1))}))


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


# ------------------------------------------------------------------------------------------------------ predictions


@pytest.fixture
def folder(images, tmp_path):
    """Three validation images as files, one of them deeper."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name, pixels in zip(("a.png", "b.png", "deep/c.png"), images, strict=False):
        (tmp_path / "pictures" / name).write_bytes(png(pixels))
    return tmp_path / "pictures"


def columns(path):
    table = pq.read_table(path)
    found = {name: table[name].to_pylist() for name in table.column_names}
    return found, table.schema.metadata[b"classes"].decode().splitlines()


def test_a_file_a_folder_and_parquet_get_the_same_predictions(model, folder, images, logits, tmp_path, capsys):
    expected, out = softmax(logits)[:3], tmp_path / "out.parquet"
    pq.write_table(pa.table({"image": [png(pixels) for pixels in images[:3]]}), tmp_path / "images.parquet")
    for place, rows in ((folder / "b.png", [1]), (folder, [0, 1, 2]), (tmp_path / "images.parquet", [0, 1, 2])):
        assert did(predict, model, place, "--out", out) == 0
        found, classes = columns(out)
        np.testing.assert_allclose(found["probabilities"], expected[rows], atol=1e-5)
        assert found["prediction"] == [classes[c] for c in expected[rows].argmax(1)]
        np.testing.assert_allclose(found["probability"], expected[rows].max(1), atol=1e-5)
        assert len(found["path"]) == len(rows) and str(place) in found["path"][0]
        first, best = capsys.readouterr().out.splitlines()[0], expected[rows[0]].argmax()
        assert f": {classes[best]} {100 * expected[rows[0], best]:.1f} %, " in first


def test_images_of_other_sizes_and_kinds_are_brought_to_the_models(model, tmp_path, images):
    large = Image.fromarray(images[0]).resize((31, 24), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.png")
    large.convert("L").save(tmp_path / "grey.jpg")
    large.convert("RGBA").save(tmp_path / "transparent.png")
    assert did(predict, model, tmp_path, "--out", tmp_path / "out.parquet") == 0
    found, classes = columns(tmp_path / "out.parquet")
    assert len(found["path"]) == 3 and len(classes) == 10
    np.testing.assert_allclose(np.sum(found["probabilities"], 1), 1, atol=1e-5)


def test_corrupt_images_are_named_or_left_out(refused, model, folder, tmp_path, capsys):
    bad = folder / "b.png"
    bad.write_bytes(bad.read_bytes()[:40])
    code, error = refused(predict, model, folder, "--out", tmp_path / "out.parquet")
    assert code == PREFLIGHT and f"{bad} cannot be read as an image; --skip-corrupt" in error
    assert not (tmp_path / "out.parquet").exists()
    assert did(predict, model, folder, "--skip-corrupt", "--out", tmp_path / "out.parquet") == 0
    assert "1 images cannot be read and are left out" in capsys.readouterr().err
    assert columns(tmp_path / "out.parquet")[0]["path"] == [str(folder / "a.png"), str(folder / "deep" / "c.png")]
    code, error = refused(predict, model, bad, "--skip-corrupt")
    assert code == PREFLIGHT and f"no image at {bad} can be read" in error


def test_corrupt_rows_of_parquet_are_named(refused, model, images, tmp_path):
    pq.write_table(pa.table({"image": [png(images[0]), b"junk"]}), tmp_path / "images.parquet")
    code, error = refused(predict, model, tmp_path / "images.parquet")
    assert code == PREFLIGHT and "images.parquet, row 1 cannot be read as an image" in error


def test_nothing_to_predict(refused, model, tmp_path):
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_text("PAR0")
    for place, message in (
        ("empty", "there is no image at"),
        ("missing.png", "there is no image at"),
        ("numbers.parquet", "no column holds images"),
        ("broken.parquet", "is not a readable Parquet file"),
    ):
        code, error = refused(predict, model, tmp_path / place)
        assert code == USAGE and message in error


def test_predictions_that_cannot_be_written(refused, model, folder, tmp_path):
    (tmp_path / "a.parquet").mkdir()
    for out in (tmp_path / "no" / "folder.parquet", tmp_path / "a.parquet"):
        code, error = refused(predict, model, folder, "--out", out)
        assert code == PREFLIGHT and f"{out} cannot be written" in error
    code, error = refused(predict, model, folder, "--out", tmp_path / "table.csv")
    assert code == USAGE and "table.csv is no .parquet file" in error


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_devices_that_are_not_there(refused, model, folder, place, tmp_path, device):
    code, error = refused(predict, model, folder, "--device", device)
    assert code == PREFLIGHT and f"the device {device} cannot be used" in error
    assert refused(recipe, place / "config.json", "--device", device, "--storage", tmp_path / "runs")[0] == PREFLIGHT
    assert not (tmp_path / "runs").exists()


def edited(**changes):
    def edit(model):
        config = json.loads((model / "config.json").read_text())
        kept = {name: value for name, value in {**config, **changes}.items() if value is not None}
        (model / "config.json").write_text(json.dumps(kept))

    return edit


def cut(name, size):
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "is no exported model: it has no config.json"),
        (lambda model: (model / "config.json").unlink(), "is no exported model: it has no config.json"),
        (lambda model: (model / "model.safetensors").unlink(), "FileNotFoundError"),
        (lambda model: (model / "config.json").write_text("[]"), "is no exported model, or damaged"),
        (cut("config.json", 100), "is no exported model, or damaged: JSONDecodeError"),
        (cut("model.safetensors", -8), "is no exported model, or damaged: SafetensorError"),
        (cut("model.safetensors", 0), "is no exported model, or damaged"),
        (edited(rayltr=99), "was exported by an incompatible version (99, here 1)"),
        (edited(rayltr=None), "was exported by an incompatible version (None, here 1)"),
        (edited(pretrained_cfg=None), "is no exported model, or damaged: KeyError"),
        (edited(label_names=["one"]), "is no exported model, or damaged: RuntimeError"),
        (edited(backbone={"fn": "resnet32"}), "is no exported model, or damaged: RuntimeError"),
        (edited(backbone={"fn": "resnet99"}), "unknown backbone 'resnet99'"),
        (edited(backbone=None, architecture="no_such_model"), "is no exported model, or damaged"),
    ],
)
def test_damaged_exports(refused, model, folder, tmp_path, damage, message):
    copy = shutil.copytree(model, tmp_path / "copy")
    damage(copy)
    code, error = refused(predict, copy, folder)
    assert code == USAGE and message in error


def test_pretrained_weights_are_not_fetched_again(model, tmp_path, monkeypatch):
    """The weights are the export's: neither a hub nor a cache is asked."""
    importlib.import_module("timm")
    asked = []

    def create(name, pretrained=False, **keywords):
        asked.append(pretrained)
        raise RuntimeError("stop")

    monkeypatch.setattr("timm.create_model", create)
    copy = shutil.copytree(model, tmp_path / "copy")
    edited(backbone={"fn": "timm", "model": "test_resnet", "pretrained": True})(copy)
    with pytest.raises(ValueError, match="stop"):
        opened(copy, CPU)
    assert asked == [False]


# ---------------------------------------------------------------------------------------------- training that fails


def test_a_recipe_that_diverges_ends_with_one_line(refused, run, place, tmp_path):
    code, error = refused(recipe, place / "mine.py", "--preset", "bad", *DATA, "--storage", tmp_path, "--name", "bad")
    assert code == FAILED and "the recipe cannot be trained: " in error
    code, error = refused(recipe, place / "config.json", "--backbone", "timm:resnet9999", "--storage", tmp_path)
    assert code == USAGE and "timm has no model 'resnet9999'" in error
