"""Accuracy when the classes of the test data are as unbalanced as the training data, or the other way round."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rayltr import metrics
from rayltr.metrics import Floats, Indices

RATIOS = (2, 5, 10, 25, 50)
"""The imbalance ratios of the published protocol."""


@dataclass(frozen=True)
class Shift:
    """Accuracies in [0, 1] under one test prior; nan if a logit is not finite or no class has images.

    direction: "forward" (frequent classes stay frequent), "uniform" or "backward"; ratio: largest to smallest prior.
    plain: of the classifier as it is; adjusted: of the one that knows the prior.  error: one standard error of their
    difference, from the finite number of images.  groups: (plain, adjusted) by group, means over the measured classes.
    covered: the share of the prior that belongs to classes with images, to which the accuracies refer.
    """

    direction: str
    ratio: float
    plain: float
    adjusted: float
    error: float
    groups: dict[str, tuple[float, float]]
    covered: float


def priors(counts: ArrayLike, ratios: Iterable[float] = RATIOS) -> list[tuple[str, float, Floats]]:
    """(direction, ratio, prior [C], sum 1) from the steepest forward prior over the uniform one to the steepest back.

    They fall exponentially with the rank of a class by training images, as CIFAR-LT does; equally frequent classes
    rank by their number.  Raises ValueError for a ratio below 1.
    """
    steps = sorted(ratios)
    if steps and not steps[0] >= 1:
        raise ValueError(f"a ratio of test priors is at least 1, not {steps[0]}")
    n = np.asarray(counts)
    rank = np.argsort(np.argsort(-n, kind="stable"), kind="stable") / max(len(n) - 1, 1)
    shapes = [("forward", ratio, ratio**-rank) for ratio in reversed(steps)]
    shapes += [("uniform", 1, np.ones(len(n)))]
    shapes += [("backward", ratio, ratio**rank) for ratio in steps]
    return [(direction, float(ratio), shape / shape.sum()) for direction, ratio, shape in shapes]


def under_priors(
    z: ArrayLike,
    target: ArrayLike,
    counts: ArrayLike,
    groups: Mapping[str, ArrayLike],
    ratios: Iterable[float] = RATIOS,
) -> list[Shift]:
    """Accuracy under forward, uniform and backward test priors: the protocol of SADE (Zhang et al. 2022, NeurIPS).

    z: logits [N, C] corrected to balance (the fitted tau and temperature), so that z + log prior is the posterior
    under that prior.  Instead of drawing a smaller test set, every image gets the prior of its class over the number
    of its images as a weight: that is the mean over all such draws.  One row for every entry of `priors`.
    """
    target = np.asarray(target, np.int64)
    logits = np.asarray(z)
    logits = logits.astype(np.result_type(logits, np.float32), copy=False)
    plain, rows = _hits(logits, target), []
    for direction, ratio, prior in priors(counts, ratios):
        # relative to the largest, so that the uniform prior adds exactly 0
        relative = np.log(prior / prior.max()).astype(logits.dtype)
        rows.append(_shift(direction, ratio, prior, plain, _hits(logits + relative, target), target, groups))
    return rows


def _shift(
    direction: str,
    ratio: float,
    prior: Floats,
    plain: Floats,
    adjusted: Floats,
    target: Indices,
    groups: Mapping[str, ArrayLike],
) -> Shift:
    images = np.bincount(target, minlength=len(prior))
    measured = images > 0
    share, covered = prior[measured], float(prior[measured].sum())
    one, other, squares = (_per_class(v, target, images) for v in (plain, adjusted, (adjusted - plain) ** 2))
    variance = (squares - (other - one) ** 2)[measured] / images[measured]
    by_group = [metrics.group_means(per_class, groups) for per_class in (one, other)]
    return Shift(
        direction=direction,
        ratio=ratio,
        plain=float(share @ one[measured]) / covered if covered else np.nan,
        adjusted=float(share @ other[measured]) / covered if covered else np.nan,
        error=float(np.sqrt(share**2 @ np.maximum(variance, 0))) / covered if covered else np.nan,
        groups={name: (by_group[0][name], by_group[1][name]) for name in groups},
        covered=covered,
    )


def _hits(logits: ArrayLike, target: Indices) -> Floats:
    """1 where the prediction is right, 0 where it is wrong; all nan if a logit is not finite."""
    finite = np.isfinite(logits).all()
    return (np.argmax(logits, axis=1) == target) * 1.0 if finite else np.full(len(target), np.nan)


def _per_class(values: Floats, target: Indices, images: Indices) -> Floats:
    """The mean of the values of each class [C], nan for a class without images."""
    with np.errstate(invalid="ignore"):
        return np.bincount(target, values, minlength=len(images)) / images
