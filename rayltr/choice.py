"""Which trials a run would ship, from its records alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

SCORES = ("balanced", "many", "medium", "few")
"""What recipes are judged by, as it is shown: over all classes, and over each group of them."""
BEST = ("balanced", "many", "few")
"""The choices on offer, by one of these scores each."""

ACCURACY, NLL = "accuracy", "NLL"
ENOUGH = 20
"""Validation images that every class needs before accuracy decides, or it has weights of its own in an ensemble."""

SEEDS = 3
"""Fresh seeds of each finalist."""


@dataclass(frozen=True)
class Criterion:
    """What decides which trial is best.

    by: ACCURACY or NLL, both at the fitted tau and temperature.  why: the reason, as the end of a sentence.
    """

    by: str
    why: str

    def merit(self, row: Mapping[str, Any], name: str) -> float:
        """What a trial is worth by one of SCORES, more is better; nan where that was not measured."""
        if self.by == ACCURACY:
            return score(row, f"fitted_{name}")
        return -score(row, "fitted_nll" if name == "balanced" else f"fitted_{name}_nll")


def criterion(rows: Iterable[Mapping[str, Any]]) -> Criterion:
    """What decides between the trials of a run: accuracy where every measured class has images enough, else the NLL.

    Over the same images the NLL is much less noisy than the accuracy.  It ranks recipes better where a class has fewer
    than about 20 validation images, and worse where it has more, because it is not what is asked for.  Older records
    hold neither the NLL of single groups nor the number of images: with any of them, accuracy decides.
    """
    judged = [row for row in rows if row["state"] == "complete" and math.isfinite(score(row, "fitted_balanced"))]
    images = [score(row, "fewest_images") for row in judged]
    if not images or not all(map(math.isfinite, images)):
        return Criterion(ACCURACY, "the records do not say on how many images a class was judged")
    least = min(images)
    if least >= ENOUGH:
        return Criterion(ACCURACY, f"every measured class has at least {ENOUGH} validation images")
    seen = f"{least:.0f} validation image{'s' if least > 1 else ''}"
    return Criterion(NLL, f"some classes have only {seen}; below {ENOUGH}, accuracy ranks worse")


def ranked(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials that may be chosen, best on balance first, by what decides; of equals the lower NLL is first.

    They are complete, of full length and measured, and do not repeat another with a seed of its own.
    """
    rows = [*rows]
    merit = partial(criterion(rows).merit, name="balanced")
    done = [row for row in rows if row["state"] == "complete" and whole(row) and not repeated(row)]
    measured = [row for row in done if math.isfinite(merit(row))]
    return sorted(measured, key=lambda row: (-merit(row), score(row, "fitted_nll")))


def best(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The best trial on balance, on many and on few, by what decides, and the best of the control arm (`control`).

    A trial that is worse than the control on balance is no choice, however good it is at one end.  Of equals the better
    on balance is taken.
    rows: of the trials table.  A choice that no trial allows (no finite score) is absent.
    """
    rows = [*rows]
    merit, order = criterion(rows).merit, ranked(rows)
    control = next((row for row in order if row.get("p.arm") == "control"), None)
    worthy = [row for row in order if control is None or merit(row, "balanced") >= merit(control, "balanced")]
    found = {name: top(worthy, partial(merit, name=name)) for name in BEST} | {"control": control}
    return {name: row for name, row in found.items() if row is not None}


def finalists(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """The trials to train again with other seeds: what a run would ship, then the best on balance.

    Of these `most`, and the best of the control arm beside them.
    """
    if not most:
        return []
    choices = best(rows)
    control = choices.pop("control", None)
    found = {row["trial"]: row for row in (*choices.values(), *ranked(rows))}
    kept = dict(list(found.items())[:most])
    return list((kept | ({control["trial"]: control} if control else {})).values())


def share(row: Mapping[str, Any]) -> float:
    """The length of a trial as a share of the full one; 1 where nothing else is recorded."""
    return row.get("share") or 1.0


def whole(row: Mapping[str, Any]) -> bool:
    """Whether a trial was trained at full length, not only on a lower rung."""
    return share(row) == 1


def rung_of(row: Mapping[str, Any]) -> int:
    """The rung of a row of the trials table: 0007 is on the lowest, 0007.1 on the next."""
    return int(row["trial"].partition("+")[0].partition(".")[2] or 0)


WHOLE = "nothing"
"""What is set back in the trial that an ablation compares the others with."""


def repeated(row: Mapping[str, Any]) -> bool:
    """Whether a trial is another one with a seed of its own, 0007+1, 0007+2, and perhaps `ablated`."""
    return "+" in row["trial"].rpartition("/")[2]


def ablated(row: Mapping[str, Any]) -> str:
    """The choice of the winner that is set back in a trial, mixing in 0007+1-mixing; empty in all but an ablation."""
    return row["trial"].rpartition("/")[2].partition("+")[2].partition("-")[2]


def finalist(row: Mapping[str, Any]) -> bool:
    """Whether a trial is a recipe of the search, unchanged, with a fresh seed."""
    return repeated(row) and not ablated(row)


def top(rows: Iterable[Mapping[str, Any]], merit: Callable[[Mapping[str, Any]], float]) -> Mapping[str, Any] | None:
    """The first of the best; None where none is measured."""
    return max((row for row in rows if math.isfinite(merit(row))), key=merit, default=None)


def score(row: Mapping[str, Any], name: str) -> float:
    """A validation metric of a row of the trials table; nan where there is none."""
    value = row.get(f"m.val.{name}")
    return math.nan if value is None else value


def signed(row: Mapping[str, Any], name: str) -> float:
    """A score so that more is better: the NLL counts against."""
    value = score(row, name)
    return -value if name.endswith("nll") else value
