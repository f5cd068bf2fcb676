"""Panels of experts with known strengths."""

from collections.abc import Sequence

import numpy as np

from analysis.experts import Expert, Panel, standardised
from rayltr import metrics
from tests.analysis.conftest import long_tail


def panel(logits: Sequence[np.ndarray], target: np.ndarray, counts: np.ndarray | None = None, **more) -> Panel:
    """Raw logits [N,C] as experts at their fitted tau and temperature; as they are, where fitting would take long."""
    counts = long_tail(logits[0].shape[1]) if counts is None else counts
    found = []
    for number, z in enumerate(logits):
        tau, temperature, _ = metrics.fit(z, target, counts) if z.size < 1_000_000 else (0.0, 1.0, 0.0)
        logs = standardised(z.astype(np.float32), counts, tau, temperature)
        found.append(Expert(f"{number:04d}", "main", logs, tau, temperature, 10.0, **more))
    return Panel(found, target, counts, metrics.groups(counts)[0])


def noisy(good: int, noise: int, seed: int, classes: int = 10, each: int = 20) -> Panel:
    """`good` experts with errors of their own, then `noise` ones that know nothing."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(classes), each)
    logits = [rng.normal(size=(len(target), classes)) for _ in range(good + noise)]
    for z in logits[:good]:
        z[np.arange(len(target)), target] += 2.0
    return panel(logits, target)


def logs(experts: int, classes: int, images: Sequence[int], seed: int = 0, skill: float = 1.0) -> tuple:
    """Random float64 log-probabilities of experts, each [N,C], and the target [N] with so many images per class."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(classes), images)
    found = []
    for _ in range(experts):
        z = rng.normal(size=(len(target), classes))
        z[np.arange(len(target)), target] += rng.uniform(0, skill)
        found.append(z - np.log(np.exp(z).sum(1, keepdims=True)))
    return found, target
