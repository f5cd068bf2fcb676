"""Which trials a run would ship, from its records alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCORES = ("balanced", "many", "medium", "few")
"""Accuracies, as they are shown: over all classes, and over each group of them."""
BEST = {
    "balanced": ("fitted_balanced", "fitted_nll"),
    "many": ("fitted_many", "fitted_balanced"),
    "few": ("fitted_few", "fitted_balanced"),
}
"""The choices on offer: the validation score that decides, and the one that breaks ties (all at fitted tau)."""

SEEDS = 3
"""Fresh seeds of each finalist."""


def best(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The best trial of full length by balanced, many and few accuracy, and the best of the control arm (`control`).

    A trial that is worse than the control on balance is no choice, however good it is at one end; nor is one that
    repeats another with a seed of its own.
    rows: of the trials table.  A choice that no trial allows (no finite score) is absent.
    """
    done = [row for row in rows if row["state"] == "complete" and whole(row) and not repeated(row)]
    control = top([row for row in done if row.get("p.arm") == "control"], *BEST["balanced"])
    floor = score(control, "fitted_balanced") if control else 0.0
    worthy = [row for row in done if score(row, "fitted_balanced") >= floor]
    found = {name: top(worthy, *scores) for name, scores in BEST.items()}
    found["control"] = control
    return {name: row for name, row in found.items() if row is not None}


def finalists(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """The trials to train again with other seeds: what a run would ship, then the best by balanced accuracy.

    Of these `most`, and the best of the control arm beside them.
    """
    if not most:
        return []
    choices = best(rows)
    control = choices.pop("control", None)
    done = [row for row in rows if row["state"] == "complete" and whole(row) and not repeated(row)]
    measured = [row for row in done if math.isfinite(score(row, "fitted_balanced"))]
    ranked = sorted(measured, key=lambda row: -score(row, "fitted_balanced"))
    found = {row["trial"]: row for row in (*choices.values(), *ranked)}
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


def top(rows: Iterable[Mapping[str, Any]], first: str, second: str) -> Mapping[str, Any] | None:
    measured = [row for row in rows if math.isfinite(score(row, first))]
    return max(measured, key=lambda row: (score(row, first), signed(row, second)), default=None)


def score(row: Mapping[str, Any], name: str) -> float:
    """A validation metric of a row of the trials table; nan where there is none."""
    value = row.get(f"m.val.{name}")
    return math.nan if value is None else value


def signed(row: Mapping[str, Any], name: str) -> float:
    """A score so that more is better: the NLL counts against."""
    value = score(row, name)
    return -value if name.endswith("nll") else value
