"""How differently the members of an ensemble err: disagreement, correlation of errors, rescues, and divergence.

Every number is a mean over classes of the mean over a class's items, so that frequent classes do not decide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.experts import Floats, Indices


@dataclass(frozen=True, eq=False)
class Diversity:
    """Matrices [M,M] by "all" and by group; nan where a group has no items, or no errors to speak of.

    disagreement: share of items that the two predict differently.  correlation: of their errors (phi coefficient).
    rescue[i, j]: share of the errors of i that j gets right.
    """

    disagreement: dict[str, Floats]
    correlation: dict[str, Floats]
    rescue: dict[str, Floats]


def diversity(pred: Floats, target: Indices, groups: Mapping[str, Indices]) -> Diversity:
    """Of predicted classes [M,N] and target [N], over all classes and over the class indices of each group."""
    parts = {"all": np.ones(len(target), bool)} | {name: np.isin(target, members) for name, members in groups.items()}
    found = {name: _matrices(pred[:, part], target[part]) for name, part in parts.items()}
    return Diversity(*({name: three[position] for name, three in found.items()} for position in range(3)))


def _matrices(pred: Floats, target: Indices) -> tuple[Floats, Floats, Floats]:
    if not len(target):
        nothing = np.full((len(pred), len(pred)), np.nan)
        return nothing, nothing, nothing
    weight = class_weight(target)
    wrong = (pred != target).astype(np.float64)
    differ = np.array([[(one != other) @ weight for other in pred] for one in pred])
    both, rate = (wrong * weight) @ wrong.T, wrong @ weight
    spread = np.sqrt(rate * (1 - rate))
    with np.errstate(divide="ignore", invalid="ignore"):
        return differ, (both - np.outer(rate, rate)) / np.outer(spread, spread), 1 - both / rate[:, None]


def class_weight(target: Indices) -> Floats:
    """Weights [N] that sum to 1, the same in all for every class that occurs."""
    _, which, images = np.unique(target, return_inverse=True, return_counts=True)
    return 1 / (images[which] * len(images))


def divergence(members: Sequence[Floats], ensemble: Floats, target: Indices) -> Floats:
    """KL(member, ensemble) in nats [M,C], the mean over the items of each class; nan for a class without items.

    members and ensemble: log-probabilities [N,C].
    """
    images = np.bincount(target, minlength=ensemble.shape[1])
    far = [(np.exp(z) * (z - ensemble)).sum(1) for z in members]
    sums = np.stack([np.bincount(target, kl, len(images)) for kl in far])
    return np.where(images > 0, sums / np.maximum(images, 1), np.nan)
