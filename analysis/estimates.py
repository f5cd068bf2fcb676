"""Numbers with their uncertainty: intervals, paired comparisons, and what remains of the best of many.

All take bootstrap draws of scores (`resample.grouped`), the same draws for every trial.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis import resample

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

LEVEL = 0.95
ENOUGH, TOLERATED = 5, 0.1
"""Below ENOUGH validation images a class says little; more than this share of such classes, and no correction helps."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; nan where nothing was measured."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Corrected:
    """The best of many, scored without the luck it was chosen for.

    raw: its score as measured.  corrected: what the way of choosing delivers on images it was not chosen by.
    optimism: raw minus corrected.  reliable: whether enough classes have enough validation images to say so.
    """

    raw: float
    corrected: Estimate
    optimism: float
    reliable: bool


def estimate(value: float, samples: ArrayLike, level: float = LEVEL) -> Estimate:
    """A value with the interval between the quantiles of its draws [B] (percentile bootstrap), leaving out nan."""
    measured = np.asarray(samples, float)
    measured = measured[~np.isnan(measured)]
    if not len(measured):
        return Estimate(float(value), np.nan, np.nan)
    low, high = np.quantile(measured, _tails(level))
    return Estimate(float(value), float(low), float(high))


def difference(samples: ArrayLike, one: int, other: int, values: ArrayLike | None = None) -> Estimate:
    """How much better trial `one` is than `other`, from their paired draws [B, M].

    values: the scores [M] as measured, whose difference is then the value; None takes the mean over the draws.
    """
    drawn = np.asarray(samples, float)
    values = drawn.mean(0) if values is None else np.asarray(values, float)
    return estimate(values[one] - values[other], drawn[:, one] - drawn[:, other])


def equivalents(samples: ArrayLike, best: int) -> NDArray[np.bool_]:
    """Which trials [M] cannot be told from trial `best`: the interval of the paired difference [B, M] contains 0."""
    drawn = np.asarray(samples, float)
    low, high = np.quantile(drawn - drawn[:, best, None], _tails(LEVEL), axis=0)
    return (low <= 0) & (high >= 0)


def corrected(
    hits: ArrayLike,
    target: ArrayLike,
    groups: Mapping[str, ArrayLike],
    choose: Callable[[Mapping[str, Floats]], int | None],
    name: str = "balanced",
    times: int = 1000,
    seed: int = 0,
    likelihood: ArrayLike | None = None,
) -> Corrected:
    """The score `name` of the trial that `choose` takes, corrected for having been chosen.

    In each bootstrap draw of the images the choice is made again, and the images left out score it: the bootstrap
    bias corrected estimate of Tsamardinos et al. 2018 ("Bootstrapping the out-of-sample predictions for efficient and
    accurate cross-validation", algorithm 4).  The few images left out spread more than all do; the interval takes
    that back as the delete-d jackknife does (Shao and Wu 1989), so it holds the noise of images and of the choice.

    hits: bool [M, N], rows of nan are not measured.  choose: from the scores, a name to [M], to an index or None for
    "no trial will do"; such draws are left out.  All fields are nan if that holds for the measured scores already.
    likelihood: log-likelihoods [M, N] that the choice may look at, too (see `resample.graded`).
    """
    hits = np.asarray(hits)
    seen = resample.graded(hits, likelihood, target, groups)
    first = choose({key: score[0] for key, score in seen.items()})
    trust = reliable(target, groups)
    if first is None:
        return Corrected(np.nan, Estimate(np.nan, np.nan, np.nan), np.nan, trust)
    drawn = resample.draws(target, times, seed)
    inside = resample.graded(hits, likelihood, target, groups, drawn)
    chosen = [choose({key: score[b] for key, score in inside.items()}) for b in range(times)]
    draw, trial = np.array([(b, i) for b, i in enumerate(chosen) if i is not None], np.int64).reshape(-1, 2).T
    outside = left_out(hits, target, groups, drawn, draw, trial)[name]
    found = narrowed(outside, drawn)
    raw = float(seen[name][0, first])
    return Corrected(raw, found, raw - found.value, trust)


def left_out(
    hits: NDArray, target: ArrayLike, groups: Mapping[str, ArrayLike], drawn: NDArray, draw: Indices, trial: Indices
) -> dict[str, Floats]:
    """The scores [K] of K pairs of a trial and a draw [B, N], on the images that the draw left out."""
    few, place = np.unique(trial, return_inverse=True)
    scores = resample.grouped(hits[few], target, groups, drawn == 0)
    return {key: score[draw, place] for key, score in scores.items()}


def narrowed(outside: Floats, drawn: NDArray) -> Estimate:
    """The mean of scores on images that draws [B, N] left out, with an interval as of all images."""
    if not len(outside) or np.isnan(outside).all():
        return Estimate(np.nan, np.nan, np.nan)
    share, value = (drawn == 0).mean(), float(np.nanmean(outside))
    return estimate(value, value + np.sqrt(share / (1 - share)) * (outside - value))


def reliable(target: ArrayLike, groups: Mapping[str, ArrayLike]) -> bool:
    """Whether at most a tenth of the classes have fewer than 5 validation images, and none has a single one.

    That one is in every draw, so that nothing would be left to score its class on: the others would stand for it.
    """
    classes = np.unique(np.concatenate([np.asarray(members, np.int64) for members in groups.values()]))
    images = np.bincount(np.asarray(target, np.int64), minlength=int(classes.max(initial=-1)) + 1)
    few = images[classes]
    return bool(len(classes)) and bool((few < ENOUGH).mean() <= TOLERATED) and not (few == 1).any()


def seeds(samples: Sequence[ArrayLike], seed: int = 0) -> Estimate:
    """The score of a recipe that was trained with S seeds, from the draws [B] of each of them: over seeds and images.

    In every draw S - 1 of the seeds are drawn with replacement, for the reason given at `resample.draws`.  One seed
    says nothing about seeds: its interval is of the images alone.
    """
    drawn = np.stack([np.asarray(one, float) for one in samples])
    return estimate(float(drawn.mean()), _redrawn(drawn, np.random.default_rng(seed)))


def apart(samples: Sequence[ArrayLike], others: Sequence[ArrayLike], seed: int = 0) -> Estimate:
    """How much better one recipe is than another, from the draws [B] of each seed of both.

    The images of a draw are the same for both, the seeds are drawn for each by itself (see `seeds`).
    """
    one, other = (np.stack([np.asarray(own, float) for own in both]) for both in (samples, others))
    rng = np.random.default_rng(seed)
    return estimate(float(one.mean() - other.mean()), _redrawn(one, rng) - _redrawn(other, rng))


def _redrawn(drawn: Floats, rng: np.random.Generator) -> Floats:
    """The mean [B] over seeds drawn with replacement, of draws [S, B]."""
    taken = rng.integers(len(drawn), size=(drawn.shape[1], max(len(drawn) - 1, 1)))
    return drawn[taken, np.arange(drawn.shape[1])[:, None]].mean(1)


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
