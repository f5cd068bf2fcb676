import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import reading
from analysis.load import load
from analysis.merging import merged
from rayltr import metrics, records
from tests.analysis.conftest import change, forget, make_run, predictions


def test_every_finished_trial_has_scores_and_a_curve(small: Path):
    loaded = load(small)
    assert [trial.row["number"] for trial in loaded.trials] == list(range(9))
    assert len(loaded.finished) == len(loaded.measured) == 8
    for trial in loaded.finished:
        assert trial.val == {name: trial.recorded[f"val.{name}"] for name in metrics.SUMMARY}
        assert trial.per_class is not None and trial.curve is not None
        assert np.mean(trial.per_class) == pytest.approx(trial.val["fitted_balanced"], abs=0.005)
        assert trial.heads == ("main",)
    assert [bool(trial.test) for trial in loaded.trials] == [number in (3, 4) for number in range(9)]
    balanced = [trial.val["fitted_balanced"] for trial in loaded.measured]
    assert balanced == sorted(balanced, reverse=True) and loaded.chosen["balanced"] is loaded.measured[0]


def test_hits_and_curves_are_those_of_every_tau_on_its_own(small: Path):
    loaded = load(small)
    assert loaded.items is not None
    for trial in loaded.measured[:3]:
        z, tau = loaded.logits(trial) / trial.val["temperature"], trial.val["tau"]
        assert trial.curve is not None and trial.pred is not None
        for k, at in enumerate(metrics.TAUS):
            pred = metrics.predicted(z, loaded.counts, at)
            np.testing.assert_array_equal(trial.swept()[k], pred == loaded.items.target)
            means = metrics.class_accuracy(pred, loaded.items.target, len(loaded.counts))
            expected = {"balanced": np.nanmean(means), **metrics.group_means(means, loaded.groups)}
            assert {name: trial.curve[name][k] for name in expected} == pytest.approx(expected)
        np.testing.assert_array_equal(trial.hits(0.0), loaded.logits(trial).argmax(1) == loaded.items.target)
        np.testing.assert_array_equal(trial.pred, metrics.predicted(z, loaded.counts, tau))
        np.testing.assert_array_equal(trial.hits(), trial.pred == loaded.items.target)


def test_a_sweep_in_half_precision_is_that_in_single(small: Path):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 12)).astype(np.float32) * 4
    counts = np.asarray(records.read_run(small)["data"]["counts"])
    half = (z - z.max(1, keepdims=True)).astype(np.float16).astype(np.float32)
    assert (reading.swept(half, counts, 1.0) != reading.swept(z, counts, 1.0)).mean() < 0.002


def test_a_class_without_images_is_known_to_be_unmeasured(make: Callable[..., Path]):
    loaded = load(make(trials=2, classes=12, each=[20] * 9 + [0, 1, 5], failed=0))
    assert loaded.unmeasured.tolist() == [9] and loaded.items is not None
    assert loaded.items.images.tolist() == [20] * 9 + [0, 1, 5]
    trial = loaded.measured[0]
    assert trial.per_class is not None and trial.curve is not None
    assert np.isnan(trial.per_class).tolist() == [False] * 9 + [True, False, False]
    assert np.isfinite(trial.curve["few"]).all()


def test_logits_of_every_head_are_read_on_demand(make: Callable[..., Path]):
    folder = make(trials=1, classes=12, failed=0, heads=("main", "soft"))
    loaded = load(folder)
    (trial,) = loaded.trials
    stored = records.read_predictions(folder / trial.row["predictions_val"])
    assert trial.heads == ("main", "soft")
    np.testing.assert_array_equal(loaded.logits(trial), stored.logits["main"])
    np.testing.assert_array_equal(loaded.logits(trial, "soft"), stored.logits["soft"])


def test_predictions_speak_where_the_records_are_silent(small: Path):
    told = load(small).trials[3].val
    forget(small, 3, "m.")
    assert load(small).trials[3].val == pytest.approx(told, abs=0.01)


def test_the_chosen_trials_are_finished_ones_with_a_score(small: Path):
    rows = records.read_trials(small).to_pylist()
    finished = [row for row in rows if row["state"] == "complete"]
    control = max((rows[0], rows[4]), key=lambda row: row["m.val.fitted_balanced"])
    assert load(small).chosen["control"].id == control["trial"]
    worthy = [row for row in finished if row["m.val.fitted_balanced"] >= control["m.val.fitted_balanced"]]
    for name in ("balanced", "many", "few"):
        winner = max(worthy, key=lambda row: row[f"m.val.fitted_{name}"])
        assert load(small).chosen[name].val[f"fitted_{name}"] == winner[f"m.val.fitted_{name}"]
    best = load(small).chosen["balanced"].id
    change(small, int(best), state="pruned")
    assert load(small).chosen["balanced"].id != best and len(load(small).finished) == 7


def test_test_scores_use_what_validation_fitted(small: Path):
    trial = load(small).trials[3]
    stored = records.read_predictions(small / trial.row["predictions_test"])
    z = stored.logits["main"] / trial.val["temperature"]
    pred = metrics.adjust(z, stored.counts, trial.val["tau"]).argmax(1)
    assert trial.test["balanced"] == pytest.approx(np.mean(metrics.class_accuracy(pred, stored.target, 12)))
    change(small, 3, **{"m.test.fitted_balanced": 0.25})
    assert load(small).trials[3].test == {"balanced": 0.25}


def test_the_standard_error_is_that_of_repeated_validation(small: Path):
    trial = load(small).trials[0]
    assert trial.per_class is not None
    rng = np.random.default_rng(0)
    draws = [np.mean(rng.binomial(20, trial.per_class) / 20) for _ in range(4000)]
    assert trial.error == pytest.approx(np.std(draws), rel=0.05)


def test_a_trial_without_predictions_keeps_its_recorded_metrics(small: Path):
    forget(small, 2, predictions_val=None, **{"m.val.fitted_few": 0.123})
    loaded = load(small)
    trial = loaded.trials[2]
    assert trial.curve is None and trial.val["fitted_few"] == 0.123 and trial not in loaded.measured
    np.testing.assert_allclose(trial.points()[1], [trial.val["tau"], trial.val["fitted_many"], 0.123])


def test_damaged_predictions_are_a_problem_of_their_trial_only(small: Path):
    rows = records.read_trials(small).to_pylist()
    (small / rows[0]["predictions_val"]).write_bytes(b"PAR1")
    (small / rows[3]["predictions_test"]).unlink()
    trials = load(small).trials
    assert trials[0].problem.startswith("trial 0000: cannot read") and trials[0].curve is None
    assert trials[3].problem.startswith("trial 0003: cannot read") and trials[3].curve is not None
    assert not trials[3].test and not trials[4].problem


def test_predictions_of_other_images_or_classes_are_refused(small: Path):
    trial = load(small).trials[2]
    stored = records.read_predictions(small / trial.row["predictions_val"])
    half = slice(0, len(stored.target) // 2)
    predictions(small, trial.row["predictions_val"], stored.counts, {"main": stored.logits["main"][half]},
                stored.target[half])  # fmt: skip
    found = load(small)
    assert "has other images than the rest of the run" in found.trials[2].problem and len(found.measured) == 7
    info = records.read_run(small)
    info["data"]["counts"] = info["data"]["counts"][:-1]
    records.write_run(small, info)
    assert "has 12 classes, the run has 11" in load(small).trials[0].problem


def test_trials_of_lower_rungs_are_not_read(small: Path):
    change(small, 2, share=1 / 9)
    assert load(small).trials[2].packed is None and len(load(small).finished) == 7


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a run folder"):
        load(tmp_path)
    records.write_run(tmp_path, {"data": {"counts": [1, 2]}})
    with pytest.raises(ValueError, match="has no trials yet"):
        load(tmp_path)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "a", trials=3, classes=12), make_run(tmp_path / "b", trials=4, classes=12)


def test_runs_on_the_same_images_are_merged_under_their_names(two: tuple[Path, Path]):
    found = merged([load(folder) for folder in two])
    assert [trial.id for trial in found.trials] == [f"a/{i:04d}" for i in range(3)] + [f"b/{i:04d}" for i in range(4)]
    assert len(found.measured) == 2 + 3 and [len(part.trials) for part in found.parts] == [3, 4]
    assert found.chosen["balanced"].folder in map(str, two)
    z = found.logits(found.trials[-2])
    np.testing.assert_array_equal(z, load(two[1]).logits(load(two[1]).trials[2]))
    alone = load(two[0])
    assert merged([alone]) is alone


def test_runs_in_folders_of_one_name_are_told_apart(two: tuple[Path, Path], tmp_path: Path):
    names = ["x/run", "run-1", "y/run", "z/run"]
    runs = [load(shutil.copytree(two[0], tmp_path / "runs" / name)) for name in names]
    found = merged(runs)
    assert [part.trials[0].run for part in found.parts] == ["run-2", "run-1", "run-3", "run-4"]
    assert len({trial.id for trial in found.trials}) == 4 * 3 and len(found.ranked) == 4 * 2
    below = merged([replace(run, folder=f"{run.folder}/.") for run in runs[1:3]])
    assert [part.trials[0].run for part in below.parts] == ["run-1", "run"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("digest", "0" * 64, r"other images \(digest 000000000000, not 5f2d5f2d5f2d\)"),
        ("hashes", {"val": "d" * 64}, "other validation images"),
        ("counts", list(range(12)), "another number of training images per class"),
    ],
)
def test_runs_of_different_draws_are_refused_with_the_reason(two: tuple[Path, Path], field, value, reason):
    info = records.read_run(two[1])
    info["data"][field] = value
    records.write_run(two[1], info)
    with pytest.raises(ValueError, match=f"^{two[1]} cannot be compared with {two[0]}: .*{reason}") as error:
        merged([load(folder) for folder in two])
    assert "\n" not in str(error.value)


def test_reading_needs_neither_torch_nor_ray():
    code = "import analysis.report, sys; assert not {'torch', 'ray', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_the_first_trials_are_of_the_design_that_the_run_says(small: Path):
    assert not any(map(load(small).designed, load(small).trials)), "an older run does not say"
    records.write_run(small, {**records.read_run(small), "designed": 3})
    run = load(small)
    assert [trial.row["number"] for trial in run.trials if run.designed(trial)] == [0, 1, 2]
