"""The front of two quantities that are both wanted large."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(points: ArrayLike) -> NDArray[np.int64]:
    """Indices of the points [N, 2] that no other point dominates, by ascending first coordinate.

    A point is dominated by one that is nowhere smaller and somewhere larger.  Of equal points the first counts;
    a point with a nan is left out.
    """
    xy = np.asarray(points, float).reshape(-1, 2)
    order = np.lexsort((-xy[:, 1], -xy[:, 0]))
    kept, highest = [], -np.inf
    for i in order:
        if xy[i, 1] > highest and not np.isnan(xy[i, 0]):
            kept.append(i)
            highest = xy[i, 1]
    return np.array(kept[::-1], np.int64)


def hypervolume(points: ArrayLike, reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """The area between `reference` and the front: what at least one of the points [N, 2] is nowhere worse than."""
    xy = np.asarray(points, float).reshape(-1, 2) - reference
    xy = xy[front(xy)]
    xy = xy[(xy > 0).all(1)]
    return float((np.diff(xy[:, 0], prepend=0) * xy[:, 1]).sum())
