"""Single classes: what a handful of images says of each, and which frequent class a rare one is taken for."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln
from scipy.stats import beta

from analysis.estimates import LEVEL, Estimate

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

BINS = 10
"""Means run over about this many bins of equally many classes of similar frequency."""

STRENGTHS: Floats = np.geomspace(1, 1000, 13)
"""The trend may be worth so many images of a class."""


def bins(counts: Indices) -> list[Indices]:
    """Classes in bins of equally many, from the rarest to the most frequent."""
    order = np.argsort(counts, kind="stable")
    return [part for part in np.array_split(order, min(BINS, max(2, len(counts) // 3))) if len(part)]


def pooled(hits: Floats, images: Indices, members: Indices) -> Estimate:
    """The mean accuracy of some classes, with the Beta interval of as many images (Jeffreys' prior)."""
    members = members[images[members] > 0]
    if not len(members):
        return Estimate(np.nan, np.nan, np.nan)
    value = float((hits[members] / images[members]).mean())
    total = int(images[members].sum())
    low, high = beta.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], value * total + 0.5, (1 - value) * total + 0.5)
    return Estimate(value, float(low), float(high))


def single(per_class: Floats, images: Indices, counts: Indices, draws: int = 2000, seed: int = 0) -> list[Estimate]:
    """The accuracy of every class as measured, with a Beta interval whose prior is the trend over frequency.

    Empirical Bayes: how many images the trend is worth is drawn by the likelihood of what the classes scatter around
    it (Beta-binomial).  nan for a class without images.
    """
    known = np.flatnonzero(images > 0)
    ends = np.full((2, len(images)), np.nan)
    if len(known):
        n, random = images[known], np.random.default_rng(seed)
        right, centre = per_class[known] * n, trend(per_class, images, counts)[known]
        strength = random.choice(STRENGTHS, draws, p=_weights(right, n, centre))[:, None]
        drawn = random.beta(right + strength * centre, n - right + strength * (1 - centre))
        ends[:, known] = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [Estimate(*map(float, values)) for values in zip(per_class, *ends, strict=True)]


def trend(per_class: Floats, images: Indices, counts: Indices) -> Floats:
    """The accuracy [C] that classes of such frequency have: a parabola over the logarithm, within (0, 1)."""
    known, x = images > 0, np.log(np.maximum(counts, 1))
    degree = min(2, len(np.unique(x[known])) - 1)
    return np.clip(np.polynomial.Polynomial.fit(x[known], per_class[known], degree)(x), 0.01, 0.99)


def _weights(right: Floats, images: Indices, centre: Floats) -> Floats:
    """How likely each of STRENGTHS is, sum 1, given the images predicted right of every class.

    Before that, every share 1 / (1 + strength) of the variance of one image that lies between classes is as likely.
    """
    one, other = STRENGTHS[:, None] * centre, STRENGTHS[:, None] * (1 - centre)
    likely = (betaln(right + one, images - right + other) - betaln(one, other)).sum(1)
    likely = np.exp(likely - likely.max()) * STRENGTHS / (1 + STRENGTHS) ** 2
    return likely / likely.sum()


@dataclass(frozen=True)
class Confusion:
    """share: of the images of class `true` that are taken for class `said`, of a more frequent group."""

    true: int
    said: int
    share: float
    images: int


def confusions(
    pred: NDArray[np.integer], target: Indices, groups: Mapping[str, Indices], classes: int
) -> list[Confusion]:
    """Of the few-shot classes taken for others, and the medium ones taken for many: the largest shares first."""
    rank = np.zeros(classes, np.int64)
    for position, members in enumerate(groups.values()):
        rank[members] = position
    pairs, numbers = np.unique(np.stack([target, pred.astype(np.int64)], 1), axis=0, return_counts=True)
    images = np.bincount(target, minlength=classes)
    found = [
        Confusion(int(true), int(said), float(number / images[true]), int(number))
        for (true, said), number in zip(pairs, numbers, strict=True)
        if rank[said] < rank[true]
    ]
    return sorted(found, key=lambda one: (-one.share, -one.images, one.true, one.said))
