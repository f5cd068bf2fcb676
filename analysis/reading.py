"""Stored predictions as what the statistics need of them: which images are right, at every tau.

A trial's logits are read, reduced to bits and dropped, so that a thousand trials fit into memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayltr import metrics, records

Floats = NDArray[np.float64]
Groups = Mapping[str, NDArray[np.int64]]

BLOCK = 2000
"""Images that are swept at a time: their logits stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Items:
    """The validation images of a run: row and target int [N], and how many each class has, int [C]."""

    row: NDArray[np.int64]
    target: NDArray[np.int64]
    images: NDArray[np.int64]

    def class_means(self, hits: NDArray[np.bool_]) -> Floats:
        """The accuracy of every class [K, C] from hits [K, N]; nan for a class without images."""
        order = np.argsort(self.target, kind="stable")
        found = np.flatnonzero(self.images)
        starts = np.cumsum(self.images[found]) - self.images[found]
        means = np.full((len(hits), len(self.images)), np.nan)
        if len(found):
            means[:, found] = np.add.reduceat(hits[:, order], starts, axis=1, dtype=np.int64) / self.images[found]
        return means


def items(stored: records.Predictions) -> Items:
    """The images that predictions were made for."""
    target = stored.target.astype(np.int64)
    return Items(stored.row.astype(np.int64), target, np.bincount(target, minlength=len(stored.counts)))


def swept(z: NDArray[np.float32], counts: NDArray[np.int64], temperature: float) -> NDArray[np.int16]:
    """The predicted class [K, N] at every tau of `metrics.TAUS`, for logits [N, C].

    Along tau the logit of each class is a straight line, so a class leads on one interval of tau only: where two
    values of tau agree, all between them do, and only the images that differ are looked at again.
    """
    prior = np.log(np.maximum(counts, 1) / np.maximum(counts, 1).sum())
    shifts = (metrics.TAUS[:, None] * prior).astype(np.float32)
    z = z / np.float32(temperature)
    last = len(shifts) - 1
    pred = np.empty((last + 1, len(z)), np.int16)
    for k in (0, last):
        pred[k] = (z - shifts[k]).argmax(1)
    open_ = [(0, last, np.arange(len(z)))]
    while open_:
        low, high, rows = open_.pop()
        same = pred[low, rows] == pred[high, rows]
        pred[low + 1 : high, rows[same]] = pred[low, rows[same]]
        rows, middle = rows[~same], (low + high) // 2
        if low < middle and len(rows):
            pred[middle, rows] = (z[rows] - shifts[middle]).argmax(1)
            open_ += [(low, middle, rows), (middle, high, rows)]
    return pred


def nearest(tau: float) -> int:
    """The position of a tau on the grid `metrics.TAUS`."""
    return int(np.abs(tau - metrics.TAUS).argmin())


def validation(stored: records.Predictions, items: Items, groups: Groups, val: Mapping[str, float]) -> dict[str, Any]:
    """What a trial's validation logits say of it: the fields of `analysis.load.Trial` from `heads` to `error`.

    val: the recorded scores; taken from the logits where they are not recorded.  Where the logits are not finite
    nothing but the names of the heads is known.
    """
    z = next(iter(stored.logits.values()))
    known = val if np.isfinite(val["tau"]) else metrics.summary(z, items.target, stored.counts, groups)
    if not (np.isfinite(z).all() and np.isfinite(known["tau"])):
        return {"val": dict(known), "heads": tuple(stored.logits)}
    parts = np.array_split(z, max(1, len(z) // BLOCK))
    pred = np.concatenate([swept(part, stored.counts, known["temperature"]) for part in parts], axis=1)
    hits = pred == items.target
    means = items.class_means(hits)
    at = nearest(known["tau"])
    return {
        "val": dict(known),
        "heads": tuple(stored.logits),
        "curve": curve(hits, means, groups),
        "pred": pred[at],
        "packed": np.packbits(hits, axis=1),
        "per_class": means[at],
        "error": standard_error(means[at], items.images),
    }


def likelihood(stored: records.Predictions, items: Items, val: Mapping[str, float]) -> NDArray[np.float32]:
    """The log-probability [N] of the class of every image at the fitted tau and temperature."""
    z = metrics.adjust(next(iter(stored.logits.values())) / np.float32(val["temperature"]), stored.counts, val["tau"])
    z -= z.max(1, keepdims=True)
    return z[np.arange(len(z)), items.target] - np.log(np.exp(z).sum(1))


def curve(hits: NDArray[np.bool_], means: Floats, groups: Groups) -> dict[str, Floats]:
    """Accuracy over images, over classes (`balanced`) and over each group, at every tau of the grid."""
    of = {"balanced": np.arange(means.shape[1]), **groups}
    found = {name: measured_mean(means[:, np.asarray(members, np.int64)]) for name, members in of.items()}
    return {"tau": metrics.TAUS, "accuracy": hits.mean(1), **found}


def measured_mean(means: Floats) -> Floats:
    """The mean of each row over what is not nan; nan where all is."""
    known = ~np.isnan(means)
    total, count = np.where(known, means, 0).sum(1), known.sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def standard_error(per_class: Floats, images: NDArray[np.int64]) -> float:
    """Of the mean of the class accuracies, each a share of its own number of images (binomial)."""
    measured = images > 0
    variance = per_class[measured] * (1 - per_class[measured]) / images[measured]
    return float(np.sqrt(variance.sum()) / max(measured.sum(), 1))
