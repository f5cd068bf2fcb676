"""What a search may optimise, by the names of the command line."""

from collections.abc import Mapping

from rayltr.catalogue import nearest

SCORES = ("many", "medium", "few", "balanced", "accuracy", "worst_decile", "ece")

OBJECTIVES = {
    "balanced_nll": "fitted_nll",
    **{name: f"fitted_{name}" for name in SCORES},
    "area": "area",
    "cost": "cost_s",
    **{f"raw_{name}": name for name in ("balanced_nll", *SCORES)},
}
"""Objective -> validation metric.  They are taken at the jointly fitted tau and temperature, because raw scores rank
recipes badly: post-hoc adjustment is free, and what it can repair should not decide between recipes.  `raw_...` is the
classifier as it was trained; `cost` is the training of the whole chain in seconds."""

BALANCED = ("balanced_nll", "balanced")
"""The objectives that stand for both ends of the front; a search for one of them also looks at the area below it."""

FEWER = ("balanced_nll", "ece", "cost")
"""The objectives of which less is better."""

MOST = 3
"""Objectives of one search: beyond three nearly every trial lies on the front, and none can be told from another."""


def parse(text: str) -> tuple[str, ...]:
    """`many,few` -> ("many", "few").  Raises ValueError for an unknown or repeated name, and for more than three."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}: {nearest(name, OBJECTIVES)}")
    if len(set(names)) < len(names):
        raise ValueError(f"an objective is named twice in {text!r}")
    if len(names) > MOST:
        raise ValueError(f"a search has at most three objectives, not {len(names)}: {', '.join(names)}")
    return names


def direction(name: str) -> str:
    """`min` or `max`, as Ray Tune calls them."""
    return "min" if name.removeprefix("raw_") in FEWER else "max"


def values(metrics: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """The values of the objectives of a trial, in the order of `names`."""
    return {name: metrics[OBJECTIVES[name]] for name in names}
