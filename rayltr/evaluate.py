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
    found: dict[str, float] = {}
    for position, (head, z) in enumerate(logits.items()):
        prefix = f"{head}." if position else ""
        found |= {f"{prefix}{name}": value for name, value in summary(z, target, counts, members).items()}
    return found


def tested(
    val: Mapping[str, np.ndarray],
    val_target: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_target: np.ndarray,
    counts: np.ndarray,
) -> dict[str, float]:
    """Test scores of every head, raw and (`fitted_...`) at the tau and temperature that validation chose."""
    members, _ = groups(counts)
    found: dict[str, float] = {}
    for position, (head, z) in enumerate(test.items()):
        prefix = f"{head}." if position else ""
        tau, temperature, _ = fit(val[head], val_target, counts)
        found |= {f"{prefix}{name}": v for name, v in scores(z, test_target, counts, members).items()}
        fitted = scores(z, test_target, counts, members, tau, temperature)
        found |= {f"{prefix}fitted_{name}": v for name, v in fitted.items()}
    return found
