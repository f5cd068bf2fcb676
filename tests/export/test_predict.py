"""An exported model on images of all kinds; damage is noticed."""

import importlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rayltr import predict, recipe
from rayltr.command import PREFLIGHT, USAGE
from rayltr.shipping import opened
from tests.data.image_files import png
from tests.export.helpers import CPU, columns, did


def softmax(z):
    return torch.from_numpy(z).softmax(1).numpy()


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
