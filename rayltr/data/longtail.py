"""Long tails out of balanced pools: how many images each class keeps, and which."""

from collections.abc import Callable

import numpy as np

Rows = list[np.ndarray]
"""Per class, int64 positions in a split of the source."""


def exponential(position: float, classes: int, ratio: float) -> float:
    """Equal factors from class to class (Cui et al., CVPR 2019; Cao et al., NeurIPS 2019)."""
    return (1 / ratio) ** (position / (classes - 1))


def step(position: float, classes: int, ratio: float) -> float:
    """The first half of the classes full, the others divided by `ratio` (Buda et al., 2018)."""
    return 1.0 if position < classes // 2 else 1 / ratio


def pareto(position: float, classes: int, ratio: float) -> float:
    """Quantiles of a Pareto distribution with shape 6, which ImageNet-LT was drawn from (Liu et al., CVPR 2019).

    The quantiles at (i + 1) / (C + 1), largest first, are stretched so that the ends are 1 and 1 / ratio; 1280, 1000
    classes and ratio 256 give the shape of ImageNet-LT (about 390 classes above 100 images, 130 below 20).
    """

    def quantile(i: float) -> float:
        return ((i + 1) / (classes + 1)) ** (-1 / 6)

    height = (quantile(position) - quantile(classes - 1)) / (quantile(0) - quantile(classes - 1))
    return 1 / ratio + (1 - 1 / ratio) * height


PROFILES: dict[str, Callable[[float, int, float], float]] = {f.__name__: f for f in (exponential, step, pareto)}


def long_tail_counts(n_max: int, classes: int, ratio: float, profile: str = "exponential") -> list[int]:
    """Images per class, class 0 first: from `n_max` down to `n_max / ratio`, cut to integers as published.

    `ratio` is the largest class over the smallest, at least 1.  Raises ValueError for an unknown profile, a ratio
    below 1 and when a class would be left without an image.
    """
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}; profiles: {', '.join(PROFILES)}")
    if not ratio >= 1:
        hint = f": did you mean {1 / ratio:g}?" if ratio > 0 else ""
        raise ValueError(f"ratio {ratio:g} is below 1, but ratio is largest/smallest class{hint}")
    if classes < 2:
        raise ValueError(f"a long tail needs at least 2 classes, not {classes}")
    # A whole number that floating point misses by a hair (49 * (1 / 49)) counts as that number.
    counts = [int(n_max * PROFILES[profile](i, classes, ratio) * (1 + 1e-12)) for i in range(classes)]
    if min(counts) < 1:
        raise ValueError(f"ratio {ratio:g} leaves no image in the smallest class, with {n_max} in the largest")
    return counts


def shuffled(rows: Rows, seed: int | list[int]) -> Rows:
    """Each class's rows in a random order: one legacy NumPy generator, the classes in order (Cao et al., LDAM-DRW).

    The order does not depend on how many rows are used in the end, so the smaller of two prefixes lies in the larger.
    """
    random, orders = np.random.RandomState(seed), [group.copy() for group in rows]
    for group in orders:
        random.shuffle(group)
    return orders
