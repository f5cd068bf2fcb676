"""Several runs of one draw of images as one run."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from analysis.load import Run


def merged(runs: Sequence[Run]) -> Run:
    """Several runs as one, if their trials were trained and judged on the same images; one run as it is.

    Trials are named after their run.  Raises ValueError, in one line, for runs of different draws.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    if len({os.path.abspath(run.folder) for run in runs}) < len(runs):
        raise ValueError(f"a run is named twice: {', '.join(run.folder for run in runs)}")
    for other in runs[1:]:
        if reason := _differs(first, other):
            raise ValueError(f"{other.folder} cannot be compared with {first.folder}: {reason}")
    names = _names(runs)
    parts = tuple(
        replace(run, trials=[replace(trial, run=name) for trial in run.trials])
        for name, run in zip(names, runs, strict=True)
    )
    items = next((run.items for run in runs if run.items), None)
    return replace(first, trials=[trial for part in parts for trial in part.trials], rows=[], items=items, parts=parts)


def _differs(one: Run, other: Run) -> str:
    """Why two runs have not the same draw of images; empty if they have."""
    mine, theirs = one.info["data"], other.info["data"]
    if not np.array_equal(one.counts, other.counts) or one.classes != other.classes:
        return "they have other classes, or another number of training images per class"
    if mine.get("digest") != theirs.get("digest"):
        return f"other images (digest {str(theirs.get('digest'))[:12]}, not {str(mine.get('digest'))[:12]})"
    rows = [data.get("hashes", {}).get("val") for data in (mine, theirs)]
    same = not (one.items and other.items) or np.array_equal(one.items.target, other.items.target)
    return "" if rows[0] == rows[1] and same else "other validation images (another split, fold or protocol)"


def _names(runs: Iterable[Run]) -> list[str]:
    """The last parts of the folders' names, numbered where they are not unique, with no number that is a name."""
    names = [os.path.basename(os.path.abspath(run.folder)) for run in runs]
    free = {name: (own for n in count(1) if (own := f"{name}-{n}") not in names) for name in names}
    return [name if names.count(name) == 1 else next(free[name]) for name in names]
