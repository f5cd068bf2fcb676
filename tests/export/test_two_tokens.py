"""A student with two tokens is exported as a model of timm, whose mean of two classifiers says the same."""

import json

import numpy as np
import pytest
import torch

from rayltr import data, export, recipe, records, shipping
from rayltr.metrics import fit
from rayltr.spec import fn
from tests.conftest import tiny
from tests.data.image_files import noise
from tests.export.helpers import CPU, did, floats, said
from tests.export.test_export import centred

STUDENT = fn("deit", size=8, patch=4, width=8, depth=2, heads=2)


def exported(folder, **changes):
    """The export of a student that was trained for an epoch, and its config.json; it says what was measured."""
    stage = tiny(**{"method": fn("tokens"), "backbone": STUDENT, "teacher": tiny(epochs=1), "epochs": 1, **changes})
    (folder / "config.json").write_text(json.dumps({"recipe": shipping.dump(stage)}))
    assert did(recipe, folder / "config.json", "--storage", folder, "--name", "run") == 0
    assert did(export, folder / "run", "--out", folder / "model") == 0
    (row,) = records.read_trials(folder / "run").to_pylist()
    stored = records.read_predictions(folder / "run" / row["predictions_val"])
    tau, temperature, _ = fit(stored.logits["main"], stored.target, stored.counts)
    expected = stored.logits["main"] / temperature - tau * np.log(stored.counts / stored.counts.sum())
    model, config = shipping.opened(folder / "model", CPU)
    val = data.load(stage.source).val
    found = said(model, val.take(np.arange(len(val))))
    np.testing.assert_allclose(centred(found), centred(expected), rtol=1e-3, atol=0.01)  # stored as halves
    return model, config


def test_timm_loads_the_student_and_says_the_same(tmp_path):
    timm = pytest.importorskip("timm")
    ours, config = exported(tmp_path)
    assert config["architecture"] == "deit_tiny_distilled_patch16_224" and "head" not in config
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    seen = noise((6, 8, 8, 3))
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        found = theirs((floats(seen) - mean) / std).numpy()
    np.testing.assert_allclose(found, said(ours, seen), atol=1e-5)


@pytest.mark.parametrize("changes", [{"backbone": STUDENT.but(size=16, crop=0.8)}, {"head": fn("cosine")}], ids=str)
def test_a_student_that_resizes_its_images_or_has_other_heads_is_exported_whole(tmp_path, changes):
    _, config = exported(tmp_path, **changes)
    assert config["head"] == "main" and "model_args" not in config
