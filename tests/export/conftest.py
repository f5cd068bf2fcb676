"""A run of one recipe of two stages, whose loss is the user's own, its export, and the images to predict."""

import json

import numpy as np
import pytest

from rayltr import catalogue, data, export, recipe, shipping
from tests.conftest import tiny
from tests.data.image_files import png
from tests.export.helpers import CPU, DATA, SOURCE, STUDY, did, said


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process of its own, no function of a study is known yet."""
    monkeypatch.setattr(catalogue, "USER", {})


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A folder for runs and models; its config.json is the recipe of one short stage."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "config.json").write_text(json.dumps({"recipe": shipping.dump(tiny(epochs=1))}))
    (folder / "mine.py").write_text(STUDY)
    return folder


@pytest.fixture(scope="package")
def run(place):
    """The run folder of one recipe of two stages, whose loss is the user's own."""
    assert did(recipe, place / "mine.py", "--preset", "plain", *DATA, "--storage", place, "--name", "run") == 0
    return place / "run"


@pytest.fixture(scope="package")
def model(run, place):
    """The folder of its export."""
    assert did(export, run, "--trial", "0000", "--out", place / "model", "--onnx") == 0
    return place / "model"


@pytest.fixture(scope="package")
def images():
    """uint8 [N, 8, 8, 3]: the validation images."""
    split = data.load(SOURCE).val
    return split.take(np.arange(len(split)))


@pytest.fixture(scope="package")
def logits(model, images):
    """[N, C]: what the exported model says of them."""
    return said(shipping.opened(model, CPU)[0], images)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with one line on standard error; returns the code and the line."""

    def check(program, *words):
        code = did(program, *words)
        error = capsys.readouterr().err
        assert error.startswith("rayltr: ") and error.count("\n") == 1, error
        return code, error

    return check


@pytest.fixture
def folder(images, tmp_path):
    """Three validation images as files, one of them deeper."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name, pixels in zip(("a.png", "b.png", "deep/c.png"), images, strict=False):
        (tmp_path / "pictures" / name).write_bytes(png(pixels))
    return tmp_path / "pictures"
