"""Which rows of a pool are for training, validation and test.  Every draw starts from rows in an order of content."""

from collections.abc import Callable

import numpy as np

from rayltr.data.longtail import Rows, shuffled
from rayltr.data.pool import Part, canonical

FOLDS = 5
TEST, SURPLUS, CARVED = range(3)
"""Streams of the split seed, so that no draw follows from another."""


def by_class(part: Part, classes: int, in_order: bool) -> Rows:
    """The readable rows of every class: in the order of the source if that is the published one, else canonical."""
    rows = np.flatnonzero(part.target >= 0)
    rows = rows[np.argsort(part.target[rows], kind="stable")] if in_order else canonical(part, rows)
    return np.split(rows, np.cumsum(np.bincount(part.target[rows], minlength=classes))[:-1])


def hold_out_test(rows: Rows, fraction: float, balanced: bool, seed: int) -> tuple[Rows, Rows]:
    """(what stays, the test): round(fraction n) images of a class of n, at least 1 from n = 3; never a whole class.

    `balanced` takes as many from every class as from the one that gives fewest.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"test_fraction is a share between 0 and 1, not {fraction:g}")
    sizes = [min(max(round(fraction * len(group)), int(len(group) >= 3)), len(group) - 1) for group in rows]
    if balanced:
        sizes = [min(sizes)] * len(sizes)
    taken = [order[:size] for order, size in zip(shuffled(rows, [seed, TEST]), sizes, strict=True)]
    return _without(rows, taken), taken


def draw(rows: Rows, counts: list[int], seed: int) -> tuple[Rows, Rows]:
    """(the first `counts` rows of every class by rank, the rest).  Draws with one seed and smaller counts nest."""
    ranked = shuffled(rows, seed)
    pairs = list(zip(ranked, counts, strict=True))
    return [order[:count] for order, count in pairs], [order[count:] for order, count in pairs]


def surplus_size(classes: int, smallest: int) -> int:
    """Validation images per class out of what a draw left: 2000 / C within 20 .. 200, at most a fifth of a class."""
    if smallest < 5:
        raise ValueError(
            f"validation surplus takes a fifth of a class, but the smallest has {smallest} images: use cv or holdout"
        )
    return min(max(20, min(2000 // classes, 200)), smallest // 5)


def surplus(train: Rows, left: Rows, wanted: int, keep: bool, seed: int) -> tuple[Rows, Rows]:
    """(training rows, validation rows): `wanted` per class out of `left`.

    A class with fewer left gives up its last-ranked training rows, unless `keep` takes the smaller validation set.
    """
    kept = [
        group[: len(group) - (0 if keep else max(0, wanted - len(rest)))]
        for group, rest in zip(train, left, strict=True)
    ]
    spare = [np.concatenate([a[len(b) :], rest]) for a, b, rest in zip(train, kept, left, strict=True)]
    return kept, [order[:wanted] for order in shuffled(spare, [seed, SURPLUS])]


def carve(train: Rows, chosen: Callable[[np.ndarray], np.ndarray], seed: int) -> tuple[Rows, Rows]:
    """(training rows, validation rows): of every class, shuffled, `chosen` goes to validation."""
    val = [chosen(order) for order in shuffled(train, [seed, CARVED])]
    return _without(train, val), val


def fold_of(fold: int) -> Callable[[np.ndarray], np.ndarray]:
    """Fold `fold` of five of a class of n >= 2, at most clip(round(n / 5), 1, 20) images; fold 0 is never empty."""
    return lambda order: order[fold::FOLDS][: _fifth(len(order))] if len(order) > 1 else order[:0]


def share(order: np.ndarray) -> np.ndarray:
    """clip(round(n / 5), 1, 20) images of a class of n >= 5."""
    return order[: _fifth(len(order))] if len(order) >= 5 else order[:0]


def _without(rows: Rows, taken: Rows) -> Rows:
    return [group[~np.isin(group, out)] for group, out in zip(rows, taken, strict=True)]


def _fifth(n: int) -> int:
    return max(1, min(round(n / 5), 20))
