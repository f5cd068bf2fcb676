"""Bootstrap over images: the same draws for every trial, so that trials are compared in pairs.

Images are drawn class by class, because every score is a mean over classes.  Which images a draw holds is a matrix of
counts, and the scores of all trials in all draws are one product of it with the matrix of hits.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.uint16]
Indices = NDArray[np.int64]

LIKELIHOOD = " likelihood"
"""What the names of mean log-likelihoods end with; like accuracies, more is better."""

CHUNK = 1 << 24
"""Numbers held at once while multiplying: 64 MiB of float32."""


def draws(target: ArrayLike, times: int, seed: int = 0) -> Counts:
    """How often each image is in each draw, uint16 [B, N], for `times` draws from the images of `target` [N].

    Of a class with n images n - 1 are drawn, with replacement (of a single image that one): then the variance of a
    class mean over the draws is its sampling variance without bias (Rao and Wu 1988, "Resampling inference with
    complex survey data", section 2), which matters for the few images of a rare class.
    """
    target = np.asarray(target, np.int64)
    random = np.random.default_rng(seed)
    drawn = np.zeros((times, len(target)), np.uint16)
    first = np.arange(times)[:, None]
    for images in _by_class(target):
        n = len(images)
        cells = random.integers(n, size=(times, max(n - 1, 1))) + first * n
        drawn[:, images] = np.bincount(cells.ravel(), minlength=times * n).reshape(times, n)
    return drawn


def grouped(
    hits: ArrayLike, target: ArrayLike, groups: Mapping[str, ArrayLike], weights: ArrayLike | None = None
) -> dict[str, Floats]:
    """Accuracy over classes (`balanced`) and over each group of every trial in every draw, each [B, M] in [0, 1].

    hits: bool [M, N], whether a trial predicts an image right; a row of nan is a trial that was not measured, and its
    scores are nan.  groups: disjoint sets of classes.  weights: [B, N], from `draws`, or of the images a draw left
    out; None is every image once, B = 1.  Weights are normalised per class within a draw, and a class without an
    image in a draw is left out of that draw's mean: nan if that is every class of a group.  Several draws are
    multiplied in float32 and rounded to 1e-6, so that equal scores stay equal.
    """
    target = np.asarray(target, np.int64)
    weights = np.ones((1, len(target))) if weights is None else np.asarray(weights)
    exact = len(weights) == 1
    share, present = _shares(weights, target, np.float64 if exact else np.float32)
    summed, held = np.zeros((len(weights), len(hits := np.asarray(hits)))), np.zeros((len(weights), 1))
    scores = {}
    for name, classes in _parts(groups, present.shape[1]).items():
        own = np.isin(target, classes)
        total, number = _product(share[:, own], hits, own), present[:, classes].sum(1, keepdims=True)
        summed, held = summed + total, held + number
        if name in groups:
            scores[name] = _mean(total, number, exact)
    return {"balanced": _mean(summed, held, exact), **scores}


def graded(
    hits: ArrayLike,
    likelihood: ArrayLike | None,
    target: ArrayLike,
    groups: Mapping[str, ArrayLike],
    weights: ArrayLike | None = None,
) -> dict[str, Floats]:
    """`grouped` of hits, and under names with LIKELIHOOD of log-likelihoods [M, N], if there are any."""
    found = grouped(hits, target, groups, weights)
    if likelihood is None:
        return found
    return found | {f"{name}{LIKELIHOOD}": own for name, own in grouped(likelihood, target, groups, weights).items()}


def unmeasured(target: ArrayLike, groups: Mapping[str, ArrayLike]) -> dict[str, int]:
    """How many classes have no image, in all groups together (`balanced`) and in each."""
    found = {name: int((~np.isin(np.asarray(classes), target)).sum()) for name, classes in groups.items()}
    return {"balanced": sum(found.values()), **found}


def _by_class(target: Indices) -> list[Indices]:
    order = np.argsort(target, kind="stable")
    return [part for part in np.split(order, np.cumsum(np.bincount(target))[:-1]) if len(part)] if len(order) else []


def _parts(groups: Mapping[str, ArrayLike], classes: int) -> dict[str, Indices]:
    """The groups, and under an empty name the classes of none, all cut to the classes below `classes`."""
    parts = {name: np.asarray(members, np.int64) for name, members in groups.items()}
    parts = {name: members[members < classes] for name, members in parts.items()}
    rest = np.setdiff1d(np.arange(classes), np.concatenate([*parts.values(), np.empty(0, np.int64)]))
    return {**parts, "": rest} if len(rest) else parts


def _shares(weights: NDArray, target: Indices, kind: type) -> tuple[NDArray, NDArray[np.bool_]]:
    """Weights [B, N] that sum to one over the images of a class, and which class [B, C] has images in which draw."""
    share: NDArray[Any] = np.zeros(weights.shape, kind)
    present = np.zeros((len(weights), int(target.max(initial=-1)) + 1), bool)
    for images in _by_class(target):
        own: NDArray[Any] = weights[:, images].astype(kind)
        total = own.sum(1, keepdims=True)
        share[:, images] = own / np.where(total > 0, total, 1)
        present[:, target[images[0]]] = total[:, 0] > 0
    return share, present


def _product(share: NDArray, hits: NDArray, own: NDArray[np.bool_]) -> Floats:
    """`share @ hits[:, own].T` in float64, with as many trials at a time as CHUNK allows."""
    step = max(1, CHUNK // max(share.shape[1], 1))
    found = np.empty((len(share), len(hits)))
    for begin in range(0, len(hits), step):
        found[:, begin : begin + step] = share @ hits[begin : begin + step, own].astype(share.dtype).T
    return found


def _mean(total: Floats, number: NDArray, exact: bool) -> Floats:
    mean: Floats = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return mean if exact else mean.round(6)
