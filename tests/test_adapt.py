"""`rayltr.adapt`: weights of experts from images without classes, and the export that has them."""

import json

import numpy as np
import pytest
import torch

from rayltr import adapt, export, recipe, records
from rayltr.command import PREFLIGHT, USAGE
from rayltr.data import load
from rayltr.metrics import fit, groups, scores
from rayltr.shipping import opened
from rayltr.spec import dump, fn
from tests.conftest import tiny
from tests.data.image_files import png
from tests.export.helpers import CPU, did, said

SADE = tiny(source=fn("digits", ratio=20.0), method=fn("sade"), epochs=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs, one with experts and one without."""
    folder = tmp_path_factory.mktemp("runs")
    for name, stage in {"experts": SADE, "single": tiny(epochs=1)}.items():
        (folder / f"{name}.json").write_text(json.dumps({"recipe": dump(stage)}))
        assert did(recipe, folder / f"{name}.json", "--storage", folder, "--name", name) == 0
    return folder


def learnt(run, capsys, *words):
    """What the command keeps and prints."""
    assert did(adapt, run, *words) == 0
    return json.loads((run / "adapted/0000.json").read_text()), capsys.readouterr().out.splitlines()


def stored(run):
    (row,) = records.read_trials(run).to_pylist()
    return records.read_predictions(run / row["predictions_val"])


def test_validation_images_without_their_classes_weigh_the_experts(runs, capsys):
    run = runs / "experts"
    openings = records.read_run(run)["openings"]
    found, lines = learnt(run, capsys, "--epochs", "2")
    weights = [*found["weights"].values()]
    assert [*found["weights"]] == ["expert1", "expert2", "expert3"] and sum(weights) == pytest.approx(1)
    assert min(weights) >= 0.05 and max(weights) > 0.34, "else nothing was learnt"
    val = stored(run)
    assert (found["images"], found["measured_on"], found["number"]) == ("validation", "validation", len(val.target))
    tau, temperature, _ = fit(val.logits["main"], val.target, val.counts)
    weighed = sum(weight * val.logits[head].astype(np.float64) for head, weight in found["weights"].items())
    for when, z in {"before": val.logits["main"], "after": weighed}.items():
        for prefix, correction in (("", ()), ("fitted_", (tau, temperature))):
            expected = scores(z, val.target, val.counts, groups(val.counts)[0], *correction)
            # as close as single precision: an image may lie on an edge
            own = {name: found[when][prefix + name] for name in expected}
            assert own == pytest.approx(expected, abs=0.02)
    shown = ", ".join(f"{head} {weight:.2f}" for head, weight in found["weights"].items())
    assert lines[0] == f"weights: {shown} (of {len(val.target)} images: validation)"
    assert lines[2].split()[2:] == [f"{100 * found['before'][name]:.1f}" for name in adapt.SCORES]
    assert lines[5].split()[2:] == [f"{100 * found['after']['fitted_' + name]:.1f}" for name in adapt.SCORES]
    assert records.read_run(run)["openings"] == openings
    assert learnt(run, capsys, "--epochs", "2")[0] == found, "it learns the same again"
    assert learnt(run, capsys, "--steps", "1")[0]["weights"] != found["weights"]


def test_the_test_split_is_opened_only_when_asked_and_the_opening_is_counted(runs, capsys):
    run, target = runs / "experts", load(SADE.source).unseal().target
    openings = records.read_run(run)["openings"]
    found, lines = learnt(run, capsys, "--test", "--epochs", "1")
    after = records.read_run(run)["openings"]
    assert len(after) == len(openings) + 1 and after[-1]["trials"] == ["0000"]
    assert (found["images"], found["measured_on"], found["number"]) == ("test", "test", len(target))
    assert lines[1].startswith("test, %")
    (row,) = records.read_trials(run).to_pylist()
    for name in ("balanced", "fitted_balanced"):
        assert found["before"][name] == pytest.approx(row[f"m.test.{name}"], abs=1e-6)


def test_a_folder_of_images_is_learnt_from_and_the_export_predicts_so(runs, tmp_path, capsys):
    run, data, val = runs / "experts", load(SADE.source), stored(runs / "experts")
    (tmp_path / "new").mkdir()
    for number, pixels in enumerate(data.val.take(np.arange(40))):
        (tmp_path / "new" / f"{number}.png").write_bytes(png(pixels))
    found, _ = learnt(run, capsys, "--images", tmp_path / "new", "--epochs", "20")
    assert found["number"] == 40 and found["measured_on"] == "validation"
    assert did(export, run, "--adapted", "--out", tmp_path / "model") == 0
    tau, temperature, _ = fit(val.logits["main"], val.target, val.counts)
    z = sum(weight * val.logits[head] for head, weight in found["weights"].items())
    expected = z / temperature - tau * np.log(val.counts / val.counts.sum())
    result = said(opened(tmp_path / "model", CPU)[0], data.val.take(np.arange(len(val.target))))
    np.testing.assert_allclose(torch.tensor(result).softmax(1), torch.tensor(expected).softmax(1), atol=0.01)
    assert json.loads((tmp_path / "model/manifest.json").read_text())["adapted"] == found
    assert "Its experts were weighed for unlabelled images" in (tmp_path / "model/README.md").read_text()


def test_what_cannot_be_weighed_is_said_in_one_line(runs, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for code, told, words in (
        (USAGE, "trial 0000 is of the method supervised, which has no experts to weigh", [runs / "single"]),
        (USAGE, "--steps must be at least 1, not 0", [runs / "experts", "--steps", 0]),
        (USAGE, "there is no image at", [runs / "experts", "--images", tmp_path / "nothing"]),
        (USAGE, "not allowed with argument", [runs / "experts", "--images", tmp_path, "--test"]),
        (PREFLIGHT, "broken.png cannot be read as an image", [runs / "experts", "--images", tmp_path]),
    ):
        assert did(adapt, *words) == code
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    for told, words in (
        ("has no weights of experts for trial 0000", [runs / "single", "--adapted"]),
        ("--adapted is for one trial", [runs / "experts", "--adapted", "--ensemble"]),
    ):
        assert did(export, *words, "--out", tmp_path / "out") == USAGE
        assert told in capsys.readouterr().err


def test_weights_of_another_training_are_not_exported(runs, tmp_path, capsys):
    note = runs / "experts/adapted/0000.json"
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"address": "another", "weights": {"expert1": 1.0}}))
    assert did(export, runs / "experts", "--adapted", "--out", tmp_path / "out") == USAGE
    assert "rayltr.adapt" in capsys.readouterr().err and not (tmp_path / "out").exists()
