"""What a search may optimise, by the names of the command line."""

from collections.abc import Mapping

from rayltr.catalogue import nearest

OBJECTIVES = {
    "balanced_nll": "fitted_nll",
    "balanced": "fitted_balanced",
    "many": "fitted_many",
    "medium": "fitted_medium",
    "few": "fitted_few",
    "accuracy": "fitted_accuracy",
}
"""Objective -> validation metric.  All are taken at the jointly fitted tau and temperature, because raw scores rank
recipes badly: post-hoc adjustment is free, and what it can repair should not decide between recipes."""


def parse(text: str) -> tuple[str, ...]:
    """`many,few` -> ("many", "few").  Raises ValueError for an unknown or repeated name."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}: {nearest(name, OBJECTIVES)}")
    if len(set(names)) < len(names):
        raise ValueError(f"an objective is named twice in {text!r}")
    return names


def direction(name: str) -> str:
    """`min` or `max`, as Ray Tune calls them."""
    return "min" if name == "balanced_nll" else "max"


def values(metrics: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """The values of the objectives of a trial, in the order of `names`."""
    return {name: metrics[OBJECTIVES[name]] for name in names}
