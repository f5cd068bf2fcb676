"""From logits to the numbers of a trial: per class, many / medium / few, calibration, for every head."""

from collections.abc import Mapping

import numpy as np

from rayltr.metrics import fit, groups, scores, summary


def evaluate(logits: Mapping[str, np.ndarray], target: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The metrics of `rayltr.metrics.summary` for a split.

    logits: float [N,C] by head; target: int [N]; counts: training counts [C].  The first head is the method's own
    prediction and has plain names (`balanced`); the others, each an expert of its own, are prefixed (`soft.balanced`).
    """
    members, _ = groups(counts)
    return named({head: summary(z, target, counts, members) for head, z in logits.items()})


def tested(
    val: Mapping[str, np.ndarray],
    val_target: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_target: np.ndarray,
    counts: np.ndarray,
) -> dict[str, float]:
    """Test scores of every head, raw and (`fitted_...`) at the tau and temperature that validation chose."""
    members, _ = groups(counts)
    found: dict[str, dict[str, float]] = {}
    for head, z in test.items():
        tau, temperature, _ = fit(val[head], val_target, counts)
        found[head] = both(z, test_target, counts, members, tau, temperature)
    return named(found)


def both(
    logits: np.ndarray,
    target: np.ndarray,
    counts: np.ndarray,
    members: Mapping[str, np.ndarray],
    tau: float,
    temperature: float,
) -> dict[str, float]:
    """The scores of logits [N,C] as they are and (`fitted_...`) at a tau and a temperature."""
    raw, fitted = scores(logits, target, counts, members), scores(logits, target, counts, members, tau, temperature)
    return {**raw, **{f"fitted_{name}": value for name, value in fitted.items()}}


def named(by_head: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of all heads in one dict: plain names for the first head, `<head>.<name>` for the others."""
    first = next(iter(by_head), None)
    return {
        name if head == first else f"{head}.{name}": value
        for head, metrics in by_head.items()
        for name, value in metrics.items()
    }
