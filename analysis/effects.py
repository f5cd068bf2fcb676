"""What mattered: how much of the differences between trials each parameter explains, and by how many points.

A parameter that all trials have is a factor.  One that only some have is conditional: it is judged inside its branch,
the trials that have it, and never takes anything away from the factor it hangs on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict

from analysis.estimates import Estimate, estimate

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

FEWEST = 8
"""Trials below which nothing is said."""
BINS = 5
"""Numbers with more distinct values than this are cut into this many parts of equally many trials."""
TREES, FOLDS = 100, 3
"""Trees of the forest, and into how many parts the trials are split to see what it explains."""
GRID = 20_000
"""The most points of the grid of factors the forest is evaluated on; of a larger grid they are drawn."""
HEAVIEST = 5.0
"""No trial counts for more than this many."""
ALONE = 1e-4
"""A trial whose leverage leaves less than this has a level to itself, and says nothing about any other."""


@dataclass(frozen=True)
class Level:
    """A value of a parameter (of a part of a range its median), what it adds to the score, and how many trials had it.

    difference: to the mean over the levels, other factors being equal.  The interval is nan for a single trial.
    """

    value: Any
    difference: Estimate
    trials: int


@dataclass(frozen=True)
class Effects:
    """The effects of the parameters on a score, largest share first.

    shares, pairs: of the variance over the grid of all factors, of a factor alone and of the interaction of two.
    levels: the levels of each factor; conditional: those of each conditional parameter, inside its branch.
    explained: how much of the variance between trials the factors predict (cross-validated R2 of the forest, from 0).
    trials, designed: with a score, and those of them laid out as a balanced design.  reason: why there is nothing.
    """

    shares: dict[str, float] = field(default_factory=dict)
    pairs: dict[tuple[str, str], float] = field(default_factory=dict)
    levels: dict[str, list[Level]] = field(default_factory=dict)
    conditional: dict[str, list[Level]] = field(default_factory=dict)
    explained: float = np.nan
    trials: int = 0
    designed: int = 0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Coded:
    """A parameter in some trials: the place [T] of each trial's value among its levels."""

    place: Indices
    levels: list[Any]


def effects(
    params: Sequence[Mapping[str, Any]],
    values: ArrayLike,
    designed: ArrayLike | None = None,
    times: int = 500,
    seed: int = 0,
) -> Effects:
    """The effects of parameters on a score; empty, with a reason, where the trials cannot tell.

    params: the active parameters of T trials of one arm; absent or None is not active.  values: the score [T] of each,
    nan left out.  designed: which trials were laid out as a balanced design, [T]; None is none of them.

    Shares are a functional analysis of variance (Hutter et al. 2014, "An efficient approach for assessing
    hyperparameter importance") of a random forest on the levels of the factors.  A sampler that seeks good trials
    repeats what it likes, so a trial counts the less the more others share its levels: weights make every level of a
    factor equally heavy.  With them all trials together tell more than the design alone.

    Differences are weighted least squares on the same levels, with a bootstrap over trials.
    """
    score = np.asarray(values, float)
    known = np.isfinite(score)
    laid = int((known & np.asarray(designed, bool)).sum()) if designed is not None else 0
    nothing = Effects(trials=int(known.sum()), designed=laid)
    rows, score = [dict(row) for row, use in zip(params, known, strict=True) if use], score[known]
    if len(rows) < FEWEST:
        return replace(nothing, reason=f"it takes {FEWEST} scored trials, there are {len(rows)}")
    if np.ptp(score) == 0:
        return replace(nothing, reason="all trials have the same score")
    factors, inner = _sorted_out(rows)
    if not (factors or inner):
        return replace(nothing, reason="no parameter takes more than one value")
    shares, pairs, explained = _shares(factors, score, seed) if factors else ({}, {}, np.nan)
    levels = _levels(factors, score, times, seed)
    return replace(
        nothing,
        shares=dict(sorted(shares.items(), key=lambda item: -item[1])),
        pairs=dict(sorted(pairs.items(), key=lambda item: -item[1])),
        levels={name: levels[name] for name in sorted(levels, key=lambda name: -shares[name])},
        conditional={
            name: _inside(name, own, branch, factors, score, times, seed) for name, (own, branch) in inner.items()
        },
        explained=explained,
    )


def _sorted_out(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Coded], dict[str, tuple[Coded, Indices]]]:
    """The factors, and the conditional parameters with the trials of their branch; none that takes one value only."""
    factors, inner = {}, {}
    for name in dict.fromkeys(name for row in rows for name in row):
        branch = np.array([i for i, row in enumerate(rows) if row.get(name) is not None], np.int64)
        coded = _coded([rows[i][name] for i in branch])
        if len(coded.levels) < 2:
            continue
        if len(branch) == len(rows):
            factors[name] = coded
        elif len(branch) >= FEWEST:
            inner[name] = coded, branch
    return factors, inner


def _coded(values: Sequence[Any]) -> Coded:
    levels = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if len(levels) <= BINS or any(isinstance(value, (str, bool)) for value in levels):
        return Coded(np.array([levels.index(value) for value in values], np.int64), levels)
    number = np.asarray(values, float)
    edges = np.unique(np.quantile(number, np.arange(1, BINS) / BINS))
    _, place = np.unique(np.searchsorted(edges, number), return_inverse=True)
    return Coded(place, [float(np.median(number[place == part])) for part in range(place.max() + 1)])


def _one_hot(places: Sequence[Indices], sizes: Sequence[int]) -> Floats:
    return np.concatenate([np.eye(size)[place] for place, size in zip(places, sizes, strict=True)], 1)


def _even(factors: Mapping[str, Coded], rounds: int = 50) -> Floats:
    """Weights of the trials [T], mean 1, under which the levels of each factor are equally heavy (Deming and Stephan
    1940, iterative proportional fitting), except that none exceeds HEAVIEST."""
    weight = np.ones(len(next(iter(factors.values())).place))
    for _ in range(rounds):
        for coded in factors.values():
            weight = weight / np.bincount(coded.place, weight)[coded.place]
    return np.minimum(weight / weight.mean(), HEAVIEST)


def _shares(
    factors: Mapping[str, Coded], score: Floats, seed: int
) -> tuple[dict[str, float], dict[tuple[str, str], float], float]:
    """Shares of variance of the factors and of their pairs, and the forest's cross-validated R2."""
    sizes = [len(coded.levels) for coded in factors.values()]
    hot, weight = _one_hot([coded.place for coded in factors.values()], sizes), _even(factors)
    forest = RandomForestRegressor(TREES, random_state=seed)
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    unseen = cross_val_predict(forest, hot, score, cv=folds, params={"sample_weight": weight})
    forest.fit(hot, score, weight)
    grid = _grid(sizes, seed)
    surface = forest.predict(_one_hot(grid, sizes))
    surface = surface - surface.mean()
    whole = max(float((surface**2).mean()), np.finfo(float).tiny)
    alone = {name: _means(surface, place) for name, place in zip(factors, grid, strict=True)}
    places = dict(zip(factors, zip(grid, sizes, strict=True), strict=True))
    both = {}
    for one, other in combinations(factors, 2):
        (first, _), (second, size) = places[one], places[other]
        rest = _means(surface, first * size + second) - alone[one] - alone[other]
        both[one, other] = float((rest**2).mean()) / whole
    main = {name: float((part**2).mean()) / whole for name, part in alone.items()}
    return main, both, max(float(r2_score(score, unseen)), 0.0)


def _grid(sizes: Sequence[int], seed: int) -> list[Indices]:
    """Every combination of levels, a column per factor; above GRID of them as many drawn at random."""
    if prod(sizes) <= GRID:
        return [axis.ravel() for axis in np.indices(sizes)]
    random = np.random.default_rng(seed)
    return [random.integers(size, size=GRID) for size in sizes]


def _means(surface: Floats, place: Indices) -> Floats:
    """Each point's mean over the points of the same place."""
    return (np.bincount(place, surface) / np.maximum(np.bincount(place), 1))[place]


def _levels(factors: Mapping[str, Coded], score: Floats, times: int, seed: int) -> dict[str, list[Level]]:
    """The levels of all factors, adjusted for each other where there are trials enough, at least two per level."""
    if 2 * sum(len(coded.levels) for coded in factors.values()) > len(score) and len(factors) > 1:
        return {name: _levels({name: coded}, score, times, seed)[name] for name, coded in factors.items()}
    if not factors:
        return {}
    sizes = [len(coded.levels) for coded in factors.values()]
    drawn = _fitted(_one_hot([coded.place for coded in factors.values()], sizes), score, _even(factors), times, seed)
    parts = np.split(drawn, np.cumsum(sizes)[:-1], axis=1)
    return {
        name: [_level(coded, part - part.mean(1, keepdims=True), i) for i in range(len(coded.levels))]
        for (name, coded), part in zip(factors.items(), parts, strict=True)
    }


def _inside(
    name: str, own: Coded, branch: Indices, factors: Mapping[str, Coded], score: Floats, times: int, seed: int
) -> list[Level]:
    """The levels of a conditional parameter among the trials of its branch, adjusted for the factors there."""
    there = {other: _coded([coded.levels[i] for i in coded.place[branch]]) for other, coded in factors.items()}
    there = {other: coded for other, coded in there.items() if len(coded.levels) > 1}
    return _levels({name: own, **there}, score[branch], times, seed)[name]


def _fitted(hot: Floats, score: Floats, weight: Floats, times: int, seed: int) -> Floats:
    """Least-squares coefficients [1 + B, D] of one-hot levels: as measured, then in bootstrap draws of the trials.

    The levels of a factor sum to the constant; what is not determined is settled by the smallest coefficients.  A
    draw moves the coefficients by its trials' residuals, each divided by 1 - leverage as in MacKinnon and White 1985
    ("Some heteroskedasticity-consistent covariance matrix estimators", HC3): with few trials per level plain
    residuals are far too small.
    """
    trials, wide = hot.shape
    squares = hot.T @ (weight[:, None] * hot) + 1e-6 * weight.sum() / wide * np.eye(wide)
    pull = np.linalg.solve(squares, (weight[:, None] * hot).T).T
    found = (score - score.mean()) @ pull
    free = 1 - (pull * hot).sum(1)
    rest = np.where(free > ALONE, (score - score.mean() - hot @ found) / np.maximum(free, ALONE), 0)
    drawn = np.random.default_rng(seed).multinomial(trials, np.full(trials, 1 / trials), size=times)
    return np.vstack([found, found + ((drawn - 1) * rest) @ pull])


def _level(coded: Coded, drawn: Floats, i: int) -> Level:
    """Level i from its coefficients [1 + B, L]."""
    trials = int((coded.place == i).sum())
    return Level(coded.levels[i], estimate(drawn[0, i], drawn[1:, i] if trials > 1 else []), trials)
