"""By what the report chooses: by accuracy where every class has images enough to tell, else by the NLL.

Over the same images the NLL is much less noisy than the accuracy.  It ranks recipes better where a class has fewer than
about 20 validation images, and worse where it has more, because it is not what is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.resample import LIKELIHOOD

ACCURACY, NLL = "accuracy", "NLL"

ENOUGH = 20
"""Validation images that every class needs before accuracy decides."""


@dataclass(frozen=True)
class Criterion:
    """by: ACCURACY or NLL, both at the fitted tau and temperature.  why: the reason, as the end of a sentence."""

    by: str
    why: str

    def of(self, score: str) -> str:
        """The name of what decides a choice by `score` (balanced, or a group), among those of `resample.graded`."""
        return score if self.by == ACCURACY else f"{score}{LIKELIHOOD}"


def criterion(images: ArrayLike | None, groups: Mapping[str, ArrayLike]) -> Criterion:
    """What decides in a run whose classes have so many validation images [C]; None: nobody knows.

    Classes without images are in no score, so they decide nothing.
    """
    if images is None:
        return Criterion(ACCURACY, "without predictions there is no NLL of single groups")
    n = np.asarray(images)
    least = {name: int(own.min()) for name, members in groups.items() if (own := _some(n, members)).size}
    name = min(least, key=lambda name: least[name], default="")
    if not name or least[name] >= ENOUGH:
        return Criterion(ACCURACY, f"every measured class has at least {ENOUGH} validation images")
    seen = f"{least[name]} validation image{'s' if least[name] > 1 else ''}"
    return Criterion(NLL, f"some classes of “{name}” have only {seen}; below {ENOUGH}, accuracy ranks worse")


def _some(images: np.ndarray, members: ArrayLike) -> np.ndarray:
    own = images[np.asarray(members, np.int64)]
    return own[own > 0]
