"""The experts of a run: every head of every finished trial, standardised so that any of them can be combined."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayltr import choice, metrics, records

MOST = 60
"""So many trials are read, those with the best recorded NLL; ensembles choose from a shorter list of them."""
CELLS = 300_000_000
"""The most numbers that the logits of all experts hold (1.2 GB), however many images and classes there are."""

Floats = NDArray[Any]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Expert:
    """One head of one trial.  logits: log-probabilities float32 [N,C] at its own fitted tau and temperature.

    cost: seconds that its training took.  recipe: what was trained, as text, the same for all seeds; "" if unknown.
    """

    trial: str
    head: str
    logits: Floats
    tau: float
    temperature: float
    cost: float = math.nan
    recipe: str = ""

    @property
    def name(self) -> str:
        return self.trial if self.head == "main" else f"{self.trial} {self.head}"


@dataclass(frozen=True, eq=False)
class Panel:
    """Experts that saw the same validation items: target [N], training counts [C], the class indices of each group.

    left_out: in one line each, which heads are not among the experts, and why.
    """

    experts: list[Expert]
    target: Indices
    counts: Indices
    groups: Mapping[str, Indices]
    left_out: list[str] = field(default_factory=list)

    @property
    def own(self) -> int:
        """How many there are of the search's trials; those with fresh seeds come after them and are not chosen."""
        return sum(not choice.repeated({"trial": expert.trial}) for expert in self.experts)

    @property
    def logits(self) -> list[Floats]:
        return [expert.logits for expert in self.experts]


def experts(folder: str | os.PathLike, *, most: int = MOST, only: str = "") -> Panel:
    """Every head of the complete full-length trials of a run that have predictions, fresh seeds after all others.

    Of more than `most` trials, those with the lowest NLL at the fitted tau in the records; or `only` one trial.
    Heads that are not finite, cannot be read or were measured on other items than the rest are left out, with the
    reason.  Raises ValueError for what is no run.
    """
    records.read_run(folder)
    rows = [row for row in records.read_trials(folder).to_pylist() if row["predictions_val"]]
    rows = [row for row in rows if only in ("", row["trial"])]
    ranked = sorted((row for row in rows if row["state"] == "complete" and choice.whole(row)), key=_recorded)
    found: list[Expert] = []
    left_out: list[str] = []
    first: records.Predictions | None = None
    for row in ranked[:most]:
        try:
            stored = records.read_predictions(records.within(folder, row["predictions_val"]))
            first = first or stored
            _check_items(first, stored)
            for expert in _heads(row, stored):
                _check_room(found, expert)
                found.append(expert)
        except ValueError as error:
            left_out.append(f"trial {row['trial']}: {error}")
    target, counts = (first.target.astype(np.int64), first.counts) if first else (np.zeros(0, np.int64),) * 2
    found.sort(key=lambda expert: (choice.repeated({"trial": expert.trial}), expert.trial))
    return Panel(found, target, counts, metrics.groups(counts)[0], left_out)


def _recorded(row: Mapping[str, Any]) -> float:
    """The lowest NLL at the fitted tau of any head; trials without one come last."""
    values = [value for name, value in row.items() if name.startswith("m.val.") and name.endswith("fitted_nll")]
    return min((value for value in values if value is not None and math.isfinite(value)), default=math.inf)


def _check_items(first: records.Predictions, other: records.Predictions) -> None:
    """Raises ValueError when predictions are not of the same items and classes as the first ones."""
    for name in ("row", "target", "counts"):
        if not np.array_equal(getattr(first, name), getattr(other, name)):
            raise ValueError("it was measured on other validation images, or trained on others, than the best")


def _check_room(found: list[Expert], expert: Expert) -> None:
    """Raises ValueError for an expert that says nothing or for which there is no room."""
    if not (expert.logits.size and np.isfinite(expert.logits).all()):
        raise ValueError(f"the logits of its head {expert.head} are not finite, or there are none")
    if (len(found) + 1) * expert.logits.size > CELLS:
        raise ValueError(f"there is no room for more experts than the best {len(found)}")


def _heads(row: Mapping[str, Any], stored: records.Predictions) -> Iterator[Expert]:
    cost = choice.score(row, "cost_s")
    seconds = (row["wall_s"] or math.nan) if math.isnan(cost) else cost
    recipe = seedless(json.loads(row["recipe"])) if row["recipe"] else None
    for number, (head, z) in enumerate(stored.logits.items()):
        prefix = f"{head}." if number else ""
        tau, temperature = (choice.score(row, f"{prefix}{name}") for name in ("tau", "temperature"))
        if math.isnan(tau) or math.isnan(temperature):
            tau, temperature, _ = metrics.fit(z, stored.target, stored.counts)
        logs = standardised(z, stored.counts, tau, temperature)
        yield Expert(row["trial"], head, logs, tau, temperature, seconds, json.dumps([recipe, head]) if recipe else "")


def seedless(value: Any) -> Any:
    """A recipe as data without the seeds of its stages."""
    if isinstance(value, Mapping):
        return {name: seedless(item) for name, item in value.items() if name != "seed"}
    return [seedless(item) for item in value] if isinstance(value, list) else value


def standardised(logits: Floats, counts: Indices, tau: float, temperature: float) -> Floats:
    """The log-probabilities [N,C] of z / T - tau * log prior, in the precision of the logits."""
    with np.errstate(invalid="ignore"):
        return normalised(metrics.adjust(logits / np.asarray(temperature, logits.dtype), counts, tau))


def normalised(z: Floats) -> Floats:
    """log softmax of [N,C]."""
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))
