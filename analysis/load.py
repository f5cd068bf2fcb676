"""A run folder as the numbers a report is made of.  Predictions are read and dropped trial by trial."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayltr import choice, metrics, records

Floats = NDArray[np.float64]
VAL, TEST = "val.", "test.fitted_"
"""How the metrics of the validation split, and the corrected ones of the test split, begin in the records."""

Groups = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Trial:
    """One trial and, where its predictions are stored, what they say.

    row: the fixed columns of the records.  params: its active parameters.  recorded: the metrics in the records.
    val: the validation scores, names as in `metrics.SUMMARY`; recorded, or else taken from the predictions.
    curve: `metrics.sweep` at the fitted temperature.  per_class: validation accuracy [C] at the fitted tau and
    temperature.  error: one standard error of the fitted balanced accuracy, from the finite number of images.
    test: scores on the test split at the tau and temperature fitted on validation, likewise.
    problem: why something that should be there is missing.
    """

    row: dict[str, Any]
    params: dict[str, Any]
    recorded: dict[str, float]
    val: dict[str, float]
    curve: dict[str, Floats] | None = None
    per_class: Floats | None = None
    error: float = math.nan
    test: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def id(self) -> str:
        return self.row["trial"]

    @property
    def control(self) -> bool:
        """Whether this trial is of the control arm: plain cross-entropy, no tricks."""
        return self.params.get("arm") == "control"

    def points(self) -> Floats:
        """(tau, many, few) [K, 3]: along the tau curve, or raw and fitted where only metrics were recorded."""
        if self.curve is not None:
            return np.stack([self.curve["tau"], self.curve["many"], self.curve["few"]], 1)
        raw = (0.0, self.val["many"], self.val["few"])
        return np.array([raw, (self.val["tau"], self.val["fitted_many"], self.val["fitted_few"])])


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder: run.json, the training counts and names of its classes, their groups, and its trials."""

    folder: str
    info: dict[str, Any]
    counts: NDArray[np.int64]
    classes: list[str]
    groups: Groups
    rule: str
    trials: list[Trial]

    @property
    def finished(self) -> list[Trial]:
        """Trials that came to their end at full length; those of lower rungs only led to them."""
        return [trial for trial in self.trials if trial.row["state"] == "complete" and choice.whole(trial.row)]

    @cached_property
    def chosen(self) -> dict[str, Trial]:
        """The best finished trials by balanced, many and few accuracy, and the best of the control arm.

        The names are those of `rayltr.choice.best`, which also decides what an export takes.  One that no trial
        allows is absent.
        """
        rows = [{**trial.row, "p.arm": trial.params.get("arm"), **_scores(trial)} for trial in self.trials]
        by_id = {trial.id: trial for trial in self.trials}
        return {name: by_id[row["trial"]] for name, row in choice.best(rows).items()}


def load(folder: str | os.PathLike) -> Run:
    """Read a run folder.  Raises ValueError, in one line, for what is no run, has no trials or cannot be read."""
    info = records.read_run(folder)
    rows = records.read_trials(folder).to_pylist()
    if not rows:
        raise ValueError(f"{os.fspath(folder)} has no trials yet")
    data = info.get("data", {})
    if not data.get("counts"):
        raise ValueError(f"{os.fspath(folder)} does not say how many training images its classes have")
    counts = np.asarray(data["counts"], np.int64)
    names = [str(name) for name in data.get("classes") or range(len(counts))]
    groups, rule = metrics.groups(counts)
    trials = [_trial(folder, row, groups) for row in sorted(rows, key=_number)]
    return Run(os.fspath(folder), info, counts, names, groups, rule, trials)


def _number(row: Mapping[str, Any]) -> float:
    return math.inf if row["number"] is None else row["number"]


def _scores(trial: Trial) -> dict[str, float]:
    return {f"{records.METRIC}{VAL}{name}": value for name, value in trial.val.items()}


def _trial(folder: str | os.PathLike, row: dict[str, Any], groups: Groups) -> Trial:
    params = {k.removeprefix(records.PARAMETER): v for k, v in row.items() if k.startswith(records.PARAMETER)}
    recorded = {k.removeprefix(records.METRIC): v for k, v in row.items() if k.startswith(records.METRIC)}
    recorded = {name: value for name, value in recorded.items() if value is not None}
    trial = Trial(
        row={name: row.get(name) for name in records.TRIALS.names},
        params={name: value for name, value in params.items() if value is not None},
        recorded=recorded,
        val={name: recorded.get(f"{VAL}{name}", math.nan) for name in metrics.SUMMARY},
        test={name.removeprefix(TEST): value for name, value in recorded.items() if name.startswith(TEST)},
    )
    for read in (_validation, _test):
        try:
            trial = replace(trial, **read(trial, folder, groups))
        except ValueError as error:
            trial = replace(trial, problem=f"trial {trial.id}: {error}")
    return trial


def _validation(trial: Trial, folder: str | os.PathLike, groups: Groups) -> dict[str, Any]:
    """The fields of a trial that its validation predictions give; none where none are stored."""
    if not trial.row["predictions_val"]:
        return {}
    z, target, counts = _logits(folder, trial.row["predictions_val"], groups)
    val = metrics.summary(z, target, counts, groups) if math.isnan(trial.val["tau"]) else trial.val
    if math.isnan(val["tau"]):
        return {"val": val}
    per_class = metrics.class_accuracy(
        metrics.predicted(z, counts, val["tau"], val["temperature"]), target, len(counts)
    )
    return {
        "val": val,
        "curve": metrics.sweep(z, target, counts, groups, val["temperature"]),
        "per_class": per_class,
        "error": _standard_error(per_class, np.bincount(target, minlength=len(counts))),
    }


def _test(trial: Trial, folder: str | os.PathLike, groups: Groups) -> dict[str, Any]:
    """The test scores, if they are not recorded, but test predictions are, and validation gave tau and temperature."""
    if trial.test or not trial.row["predictions_test"] or math.isnan(trial.val["tau"]):
        return {}
    z, target, counts = _logits(folder, trial.row["predictions_test"], groups)
    return {"test": metrics.scores(z, target, counts, groups, trial.val["tau"], trial.val["temperature"])}


def _logits(folder: str | os.PathLike, name: str, groups: Groups) -> tuple[NDArray, NDArray, NDArray]:
    """Logits of the first head, target and training counts.  ValueError if they are not of this run's classes."""
    stored = records.read_predictions(records.within(folder, name))
    classes = sum(len(members) for members in groups.values())
    if len(stored.counts) != classes:
        raise ValueError(f"{name} has {len(stored.counts)} classes, the run has {classes}")
    return next(iter(stored.logits.values())), stored.target, stored.counts


def _standard_error(per_class: Floats, images: NDArray[np.int64]) -> float:
    """Of the mean of the class accuracies, each a share of its own number of images (binomial)."""
    measured = images > 0
    variance = per_class[measured] * (1 - per_class[measured]) / images[measured]
    return float(np.sqrt(variance.sum()) / max(measured.sum(), 1))
