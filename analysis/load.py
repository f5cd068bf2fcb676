"""A run folder as the numbers a report is made of.  Predictions are read and dropped trial by trial."""

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import reading
from analysis.reading import Floats, Groups, Items
from rayltr import choice, metrics, records

VAL, TEST = "val.", "test.fitted_"
"""How the metrics of the validation split, and the corrected ones of the test split, begin in the records."""

READERS = 2
"""Trials that are read at the same time."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One trial and, where its predictions are stored, what they say.

    row: the fixed columns of the records.  params: its active parameters.  recorded: the metrics in the records.
    val: the validation scores, names as in `metrics.SUMMARY`; recorded, or else taken from the predictions.
    folder, run: the run folder it lies in; a name to tell it from trials of other runs, if there are any.
    heads: the names of the logits that are stored, the trial's own prediction first.
    curve: accuracies at every tau of `metrics.TAUS`, at the fitted temperature.  pred: predicted class int16 [N] at
    the fitted tau.  packed: bits, whether an image is predicted right, at every tau; see `hits`.
    per_class: validation accuracy [C] at the fitted tau and temperature.  error: one standard error of the fitted
    balanced accuracy, from the finite number of images.
    likelihood: the log-probability of every image's class, float32 [N], there, where the NLL may decide.
    test: scores on the test split at the tau and temperature fitted on validation, likewise.
    problem: why something that should be there is missing.
    """

    row: dict[str, Any]
    params: dict[str, Any]
    recorded: dict[str, float]
    val: dict[str, float]
    folder: str = ""
    run: str = ""
    heads: tuple[str, ...] = ()
    curve: dict[str, Floats] | None = None
    pred: NDArray[np.int16] | None = None
    packed: NDArray[np.uint8] | None = None
    per_class: Floats | None = None
    error: float = math.nan
    likelihood: NDArray[np.float32] | None = None
    test: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def id(self) -> str:
        return f"{self.run}/{self.row['trial']}" if self.run else self.row["trial"]

    @property
    def judged(self) -> dict[str, Any]:
        """The trial as a row of the trials table, as far as `rayltr.choice` looks at it."""
        scores = {f"{records.METRIC}{VAL}{name}": value for name, value in self.val.items()}
        return {**self.row, "trial": self.id, "p.arm": self.params.get("arm"), **scores}

    @property
    def control(self) -> bool:
        """Whether this trial is of the control arm: plain cross-entropy, no tricks."""
        return self.params.get("arm") == "control"

    @property
    def cost(self) -> float:
        """Seconds that training the whole chain takes, whoever trained it; nan if unknown."""
        seconds = self.recorded.get("val.cost_s", self.row["wall_s"])
        return math.nan if seconds is None else seconds

    def points(self) -> Floats:
        """(tau, many, few) [K, 3]: along the tau curve, or raw and fitted where only metrics were recorded."""
        if self.curve is not None:
            return np.stack([self.curve["tau"], self.curve["many"], self.curve["few"]], 1)
        raw = (0.0, self.val["many"], self.val["few"])
        return np.array([raw, (self.val["tau"], self.val["fitted_many"], self.val["fitted_few"])])

    def hits(self, tau: float | None = None) -> NDArray[np.bool_]:
        """Whether each validation image is predicted right, bool [N], at a tau of the grid (0: raw; None: fitted)."""
        return self.swept()[reading.nearest(self.val["tau"] if tau is None else tau)]

    def swept(self) -> NDArray[np.bool_]:
        """The same at every tau of `metrics.TAUS`, bool [K, N].  Only where predictions are stored (`packed`)."""
        assert self.packed is not None and self.pred is not None
        return np.unpackbits(self.packed, axis=1, count=len(self.pred)).astype(bool)


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder: run.json, the training counts and names of its classes, their groups, and its trials.

    rows: the trials table as it was read; none of a merged run.  items: the validation images, None where no
    predictions are stored.  parts: the runs it was merged from.
    """

    folder: str
    info: dict[str, Any]
    counts: NDArray[np.int64]
    classes: list[str]
    groups: Groups
    rule: str
    trials: list[Trial]
    rows: list[dict[str, Any]] = field(default_factory=list)
    items: Items | None = None
    parts: "tuple[Run, ...]" = ()

    @property
    def searched(self) -> list[Trial]:
        """The trials of the search itself, without those that repeat finalists."""
        return [trial for trial in self.trials if not choice.repeated(trial.row)]

    @property
    def finished(self) -> list[Trial]:
        """Trials that came to their end at full length; those of lower rungs led to them, fresh seeds repeat them."""
        return [trial for trial in self.searched if _whole(trial.row)]

    def repeats(self, trial: Trial) -> list[Trial]:
        """The finished trainings of a trial's recipe with fresh seeds, which the search did not choose it by."""
        own = [one for one in self.trials if one.id.startswith(f"{trial.id}+") and choice.finalist(one.row)]
        return [one for one in own if _whole(one.row) and (one.packed is not None or trial.packed is None)]

    @property
    def ablated(self) -> list[tuple[Trial, Trial]]:
        """Pairs of a trial and the same with one choice set back."""
        done = {trial.id: trial for trial in self.trials if _whole(trial.row)}
        wholes = {i: done.get(i.removesuffix(choice.ablated(t.row)) + choice.WHOLE) for i, t in done.items()}
        return [(whole, done[i]) for i, whole in wholes.items() if whole and whole is not done[i]]

    @cached_property
    def criterion(self) -> choice.Criterion:
        """What decides which trial is best."""
        return choice.criterion(trial.judged for trial in self.trials)

    @cached_property
    def ranked(self) -> list[Trial]:
        """The finished trials with validation scores, best on balance first."""
        by_id = {trial.id: trial for trial in self.trials}
        return [by_id[row["trial"]] for row in choice.ranked(trial.judged for trial in self.trials)]

    @property
    def measured(self) -> list[Trial]:
        """Those of them whose predictions are known, image by image."""
        return [trial for trial in self.ranked if trial.packed is not None]

    @property
    def unmeasured(self) -> NDArray[np.int64]:
        """The classes without validation images."""
        return np.flatnonzero(self.items.images == 0) if self.items else np.arange(0)

    @cached_property
    def chosen(self) -> dict[str, Trial]:
        """The best finished trials on balance, on many and on few classes, and the best of the control arm.

        The names are those of `rayltr.choice.best`, which also decides what an export takes.  One that no trial
        allows is absent.
        """
        by_id = {trial.id: trial for trial in self.trials}
        return {name: by_id[row["trial"]] for name, row in choice.best(t.judged for t in self.trials).items()}

    def designed(self, trial: Trial) -> bool:
        """Whether a trial is of the design that a search begins with, not of what its sampler made of the results."""
        own = next((part for part in self.parts if part.folder == trial.folder), self)
        number = trial.row["number"]
        return number is not None and number < own.info.get("designed", 0)

    def logits(self, trial: Trial, head: str | None = None) -> NDArray[np.float32]:
        """Validation logits [N, C] of a head (None: the trial's own prediction), read now.

        Raises ValueError for a file that is missing or damaged, and KeyError for a head that is not stored.
        """
        stored = records.read_predictions(records.within(trial.folder, trial.row["predictions_val"]))
        return stored.logits[head or next(iter(stored.logits))]


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
    trials = [_recorded(os.fspath(folder), row) for row in sorted(rows, key=_order)]
    items = _items(trials, len(counts))
    with ThreadPoolExecutor(READERS) as pool:
        trials = list(pool.map(lambda trial: _read(trial, items, groups), trials))
    return Run(os.fspath(folder), info, counts, names, groups, rule, trials, rows, items)


def _order(row: Mapping[str, Any]) -> float:
    return math.inf if row["number"] is None else row["number"]


def _whole(row: Mapping[str, Any]) -> bool:
    return row["state"] == "complete" and choice.whole(row)


def _recorded(folder: str, row: dict[str, Any]) -> Trial:
    """A trial as the records know it."""
    params = {k.removeprefix(records.PARAMETER): v for k, v in row.items() if k.startswith(records.PARAMETER)}
    found = {k.removeprefix(records.METRIC): v for k, v in row.items() if k.startswith(records.METRIC)}
    found = {name: value for name, value in found.items() if value is not None}
    return Trial(
        row={name: row.get(name) for name in records.TRIALS.names},
        params={name: value for name, value in params.items() if value is not None},
        recorded=found,
        val={name: found.get(f"{VAL}{name}", math.nan) for name in metrics.SUMMARY},
        test={name.removeprefix(TEST): value for name, value in found.items() if name.startswith(TEST)},
        folder=folder,
    )


def _items(trials: Iterable[Trial], classes: int) -> Items | None:
    """The validation images, from the first finished trial whose predictions can be read."""
    for trial in trials:
        try:
            if _whole(trial.row) and trial.row["predictions_val"]:
                return reading.items(_stored(trial, "val", classes))
        except ValueError:
            continue
    return None


def _read(trial: Trial, items: Items | None, groups: Groups) -> Trial:
    """A trial with what its stored predictions say; with a `problem` where they cannot be used."""
    if not _whole(trial.row):
        return trial
    for read in (_validation, _test):
        try:
            trial = replace(trial, **read(trial, items, groups))
        except ValueError as error:
            trial = replace(trial, problem=f"trial {trial.id}: {error}")
    return trial


def _validation(trial: Trial, items: Items | None, groups: Groups) -> dict[str, Any]:
    if not trial.row["predictions_val"]:
        return {}
    stored = _stored(trial, "val", sum(len(members) for members in groups.values()))
    if items is None or not np.array_equal(stored.target, items.target):
        raise ValueError(f"{trial.row['predictions_val']} has other images than the rest of the run")
    found = reading.validation(stored, items, groups, trial.val)
    if "pred" in found and found["val"]["fewest_images"] < choice.ENOUGH:
        found["likelihood"] = reading.likelihood(stored, items, found["val"])
    return found


def _test(trial: Trial, items: Items | None, groups: Groups) -> dict[str, Any]:
    """The test scores, if they are not recorded, but test predictions are, and validation gave tau and temperature."""
    if trial.test or not trial.row["predictions_test"] or math.isnan(trial.val["tau"]):
        return {}
    stored = _stored(trial, "test", sum(len(members) for members in groups.values()))
    z = next(iter(stored.logits.values()))
    tau, temperature = trial.val["tau"], trial.val["temperature"]
    return {"test": metrics.scores(z, stored.target, stored.counts, groups, tau, temperature)}


def _stored(trial: Trial, split: str, classes: int) -> records.Predictions:
    """The predictions of a split.  Raises ValueError if they are not of this run's classes."""
    name = trial.row[f"predictions_{split}"]
    stored = records.read_predictions(records.within(trial.folder, name))
    if len(stored.counts) != classes:
        raise ValueError(f"{name} has {len(stored.counts)} classes, the run has {classes}")
    return stored
