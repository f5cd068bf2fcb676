from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.load import load
from rayltr import metrics, records


def test_a_run_is_scored_from_its_predictions(run: Path):
    loaded = load(run)
    assert [trial.row["number"] for trial in loaded.trials] == list(range(10))
    assert len(loaded.finished) == 9 and loaded.control is loaded.trials[0]
    for trial in loaded.finished:
        assert trial.val == pytest.approx({name: trial.recorded[name] for name in metrics.SUMMARY}, abs=0.01)
        assert trial.per_class is not None and trial.curve is not None
        assert np.mean(trial.per_class) == pytest.approx(trial.val["fitted_balanced"])
    assert [bool(trial.test) for trial in loaded.trials] == [number in (0, 5) for number in range(10)]


def test_the_best_trial_is_a_finished_one_with_a_score(run: Path):
    rows = records.read_trials(run).to_pylist()
    finished = [row for row in rows if row["state"] == "complete"]
    winner = max(finished, key=lambda row: row["m.fitted_balanced"])
    best = load(run).best("fitted_balanced")
    assert best is not None and best.row["trial"] == winner["trial"]
    records.append_trial(run, {**winner, "state": "pruned"})
    best = load(run).best("fitted_balanced")
    assert best is not None and best.row["trial"] != winner["trial"]


def test_test_scores_use_what_validation_fitted(run: Path):
    loaded = load(run)
    trial = loaded.trials[5]
    stored = records.read_predictions(run / trial.row["predictions_test"])
    z = stored.logits["main"] / trial.val["temperature"]
    pred = metrics.adjust(z, stored.counts, trial.val["tau"]).argmax(1)
    assert trial.test["balanced"] == pytest.approx(np.mean(metrics.class_accuracy(pred, stored.target, 100)))


def test_the_standard_error_is_that_of_repeated_validation(run: Path):
    trial = load(run).trials[0]
    assert trial.per_class is not None
    rng = np.random.default_rng(0)
    draws = [np.mean(rng.binomial(20, trial.per_class) / 20) for _ in range(4000)]
    assert trial.error == pytest.approx(np.std(draws), rel=0.05)


def test_a_trial_without_predictions_keeps_its_recorded_metrics(run: Path):
    rows = records.read_trials(run).to_pylist()
    records.append_trial(run, {**rows[2], "predictions_val": None, "m.fitted_few": 0.123})
    trial = load(run).trials[2]
    assert trial.curve is None and trial.val["fitted_few"] == 0.123
    np.testing.assert_allclose(trial.points()[1], [trial.val["tau"], trial.val["fitted_many"], 0.123])


def test_damaged_predictions_are_a_problem_of_their_trial_only(run: Path):
    rows = records.read_trials(run).to_pylist()
    (run / rows[3]["predictions_val"]).write_bytes(b"PAR1")
    (run / rows[5]["predictions_test"]).unlink()
    trials = load(run).trials
    assert trials[3].problem.startswith("#3: cannot read") and trials[3].curve is None
    assert trials[5].problem.startswith("#5: cannot read") and trials[5].curve is not None and not trials[5].test
    assert not trials[4].problem


def test_predictions_of_other_classes_are_refused(make: Callable[..., Path], tmp_path: Path):
    folder = make(trials=2, classes=12, failed=0)
    info = records.read_run(folder)
    info["data"]["counts"] = info["data"]["counts"][:-1]
    records.write_run(folder, info)
    assert "has 12 classes, the run has 11" in load(folder).trials[0].problem


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a run folder"):
        load(tmp_path)
    records.write_run(tmp_path, {"data": {"counts": [1, 2]}})
    with pytest.raises(ValueError, match="has no trials yet"):
        load(tmp_path)
