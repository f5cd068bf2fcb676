from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.load import load
from rayltr import metrics, records


def forget(folder: Path, number: int, *names: str, **changes: object) -> None:
    """Drop the metrics that begin with one of the names from a trial's records, and change other columns."""
    row = records.read_trials(folder).to_pylist()[number]
    kept = {name: None if name.startswith(names) else value for name, value in row.items()}
    records.append_trial(folder, {**kept, **changes})


def test_every_finished_trial_has_scores_and_a_curve(run: Path):
    loaded = load(run)
    assert [trial.row["number"] for trial in loaded.trials] == list(range(10))
    assert len(loaded.finished) == 9
    for trial in loaded.finished:
        assert trial.val == {name: trial.recorded[f"val.{name}"] for name in metrics.SUMMARY}
        assert trial.per_class is not None and trial.curve is not None
        assert np.mean(trial.per_class) == pytest.approx(trial.val["fitted_balanced"], abs=0.002)
    assert [bool(trial.test) for trial in loaded.trials] == [number in (3, 4) for number in range(10)]


def test_predictions_speak_where_the_records_are_silent(run: Path):
    told = load(run).trials[3].val
    forget(run, 3, "m.")
    assert load(run).trials[3].val == pytest.approx(told, abs=0.005)


def test_the_chosen_trials_are_finished_ones_with_a_score(run: Path):
    rows = records.read_trials(run).to_pylist()
    finished = [row for row in rows if row["state"] == "complete"]
    for name in ("balanced", "many", "few"):
        winner = max(finished, key=lambda row: row[f"m.val.fitted_{name}"])
        assert load(run).chosen[name].id == winner["trial"]
    control = max((rows[0], rows[4]), key=lambda row: row["m.val.fitted_balanced"])
    assert load(run).chosen["control"].id == control["trial"]
    best = load(run).chosen["balanced"].id
    forget(run, int(best), state="pruned")
    assert load(run).chosen["balanced"].id != best and len(load(run).finished) == 8


def test_test_scores_use_what_validation_fitted(run: Path):
    trial = load(run).trials[3]
    stored = records.read_predictions(run / trial.row["predictions_test"])
    z = stored.logits["main"] / trial.val["temperature"]
    pred = metrics.adjust(z, stored.counts, trial.val["tau"]).argmax(1)
    assert trial.test["balanced"] == pytest.approx(np.mean(metrics.class_accuracy(pred, stored.target, 100)))
    forget(run, 3, **{"m.test.fitted_balanced": 0.25})
    assert load(run).trials[3].test == {"balanced": 0.25}


def test_the_standard_error_is_that_of_repeated_validation(run: Path):
    trial = load(run).trials[0]
    assert trial.per_class is not None
    rng = np.random.default_rng(0)
    draws = [np.mean(rng.binomial(20, trial.per_class) / 20) for _ in range(4000)]
    assert trial.error == pytest.approx(np.std(draws), rel=0.05)


def test_a_trial_without_predictions_keeps_its_recorded_metrics(run: Path):
    forget(run, 2, predictions_val=None, **{"m.val.fitted_few": 0.123})
    trial = load(run).trials[2]
    assert trial.curve is None and trial.val["fitted_few"] == 0.123
    np.testing.assert_allclose(trial.points()[1], [trial.val["tau"], trial.val["fitted_many"], 0.123])


def test_damaged_predictions_are_a_problem_of_their_trial_only(run: Path):
    rows = records.read_trials(run).to_pylist()
    (run / rows[2]["predictions_val"]).write_bytes(b"PAR1")
    (run / rows[3]["predictions_test"]).unlink()
    trials = load(run).trials
    assert trials[2].problem.startswith("trial 0002: cannot read") and trials[2].curve is None
    assert trials[3].problem.startswith("trial 0003: cannot read") and trials[3].curve is not None
    assert not trials[3].test and not trials[4].problem


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
