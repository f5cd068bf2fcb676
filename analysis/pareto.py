"""The front of two quantities that are both wanted large, and how sure it is."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis import estimates, resample
from rayltr.metrics import area as covered

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def front(points: ArrayLike) -> Indices:
    """Indices of the points [N, 2] that no other point dominates, by ascending first coordinate.

    A point is dominated by one that is nowhere smaller and somewhere larger.  Of equal points the first counts;
    a point with a nan is left out.
    """
    xy = np.asarray(points, float).reshape(-1, 2)
    order = np.lexsort((-xy[:, 1], -xy[:, 0]))
    order = order[~np.isnan(xy[order]).any(1)]
    height = np.append(-np.inf, xy[order, 1])
    return order[height[1:] > np.maximum.accumulate(height)[:-1]][::-1]


def hypervolume(points: ArrayLike, reference: ArrayLike = 0.0) -> float:
    """The area or volume between `reference` and the front: what a point of [N, 2] or [N, 3] is nowhere worse than.

    reference: one number, or one per coordinate.  The volume is summed over slices of the third coordinate.
    """
    found = np.asarray(points, float)
    found = found - np.asarray(reference, float)
    found = found[(found > 0).all(-1)] if found.size else np.empty((0, 2))
    if found.shape[1] == 2:
        return covered(*found.T)
    found = found[np.argsort(-found[:, 2], kind="stable")]
    volume, base = 0.0, np.empty((0, 2))
    for point, thickness in zip(found, -np.diff(found[:, 2], append=0), strict=True):
        base = np.vstack([base, point[:2]])
        base = base[front(base)]
        volume += thickness * hypervolume(base)
    return float(volume)


def thinned(points: ArrayLike, eps: float = 0.003) -> Indices:
    """The shortest list of front points [K] that every other exceeds by at most `eps` in either coordinate.

    Indices into points [N, 2], by ascending first coordinate (an additive epsilon-approximate front, Laumanns et al.
    2002, "Combining convergence and diversity in evolutionary multiobjective optimization").
    """
    xy, rest = np.asarray(points, float).reshape(-1, 2), front(points)
    kept = []
    while len(rest):
        best = rest[xy[rest, 1] >= xy[rest[0], 1] - eps][-1]
        kept.append(best)
        rest = rest[xy[rest, 0] > xy[best, 0] + eps]
    return np.array(kept, np.int64)


def on_front(many: ArrayLike, few: ArrayLike) -> Floats:
    """Share of the draws [B, M] in which no trial dominates this one, [M]; nan for a trial that was never measured."""
    x, y = np.asarray(many, float), np.asarray(few, float)
    unbeaten = np.array([_unbeaten(*draw) for draw in zip(x, y, strict=True)]).reshape(x.shape)
    measured = ~np.isnan(x + y)
    return np.where(measured.any(0), unbeaten.sum(0) / np.maximum(measured.sum(0), 1), np.nan)


def area(
    hits: ArrayLike, target: ArrayLike, groups: Mapping[str, ArrayLike], times: int = 100, seed: int = 0
) -> estimates.Estimate:
    """The area under the front of many against few accuracy, corrected for having been chosen among P points.

    hits: bool [P, N], one row per trial and tau.  In each bootstrap draw of the images the front is found anew, and
    the images that the draw left out say what it covers, as in `estimates.corrected`.  Among the points of one draw's
    front the left-out images still choose, so that up to a third of the optimism remains.
    """
    hits = np.asarray(hits)
    drawn = resample.draws(target, times, seed)
    inside = resample.grouped(hits, target, groups, drawn)
    chosen = [front(np.stack(draw, 1)) for draw in zip(inside["many"], inside["few"], strict=True)]
    draw = np.repeat(np.arange(times), [len(found) for found in chosen])
    outside = estimates.left_out(hits, target, groups, drawn, draw, np.concatenate(chosen))
    points = np.stack([outside["many"], outside["few"]], 1)
    return estimates.narrowed(np.array([_area(points[draw == b]) for b in range(times)]), drawn)


def attainment(fronts: Sequence[ArrayLike], share: float = 0.5) -> Floats:
    """The points [K, 2] that at least this share of the fronts [K, 2] reach, by ascending first coordinate.

    The empirical attainment surface (Grunert da Fonseca et al. 2001, "Inferential performance assessment of
    stochastic optimisers and the attainment function").
    """
    found = [np.asarray(one, float).reshape(-1, 2) for one in fronts]
    needed = max(int(np.ceil(share * len(found) - 1e-9)), 1)
    if len(found) < needed:
        return np.empty((0, 2))
    x = np.unique(np.concatenate([one[:, 0] for one in found]))
    reached = np.array([[one[one[:, 0] >= at, 1].max(initial=-np.inf) for at in x] for one in found])
    points = np.stack([x, np.sort(reached, axis=0)[::-1][needed - 1]], 1)
    points = points[np.isfinite(points).all(1)]
    return points[front(points)]


def _unbeaten(x: Floats, y: Floats) -> NDArray[np.bool_]:
    """Which points [M] no other dominates; unlike `front` all of equal ones."""
    best = front(np.stack([x, y], 1))
    if not len(best):
        return np.zeros(len(x), bool)
    place = np.minimum(np.searchsorted(x[best], x), len(best) - 1)
    return (x[best][place] == x) & (y[best][place] == y)


def _area(points: Floats) -> float:
    return hypervolume(points) if (~np.isnan(points)).all(1).any() else np.nan
