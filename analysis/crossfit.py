"""What an ensemble is worth, judged on items that neither chose its members nor fitted its weights.

Everything is chosen and fitted again on each half of the validation items and judged on the other half, twice.  Gains
found so are compared with zero, with a bootstrap over items; the scores on all items, which an export reproduces, are
those of the choice on all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis import resample
from analysis.estimates import Estimate, estimate
from analysis.experts import Floats, Indices, Panel
from analysis.greedy import Condensed, condensed, half, weighted
from analysis.routing import Mixture
from rayltr import metrics

Part = tuple[Indices, Indices]


@dataclass(frozen=True)
class Score:
    """What is known of one way to predict.

    nll, balanced, groups: cross-fitted, as are gain_nll, gain_balanced and gain_groups, the gain over the best single
    expert; positive is better.  whole: the same scores by name on all validation items, which chose it; an export
    reproduces them.  passes: networks that an image goes through; cost: seconds of training them all.
    """

    name: str
    members: tuple[str, ...]
    nll: Estimate
    balanced: Estimate
    groups: dict[str, Estimate]
    gain_nll: Estimate
    gain_balanced: Estimate
    gain_groups: dict[str, Estimate]
    whole: dict[str, float]
    passes: int
    cost: float


@dataclass(frozen=True, eq=False)
class Judged:
    """A way to predict, made on every fold and last on all items, and what it says of each item out of fold."""

    mixtures: list[Mixture]
    nll: Floats
    hits: Floats


def folds(target: Indices, seed: int = 0, repeats: int = 2) -> list[Part]:
    """(items to choose on, items to judge on): the two halves of every class in both roles, `repeats` times."""
    found: list[Part] = []
    for number in range(repeats):
        one = half(target, np.random.default_rng((seed, number)))
        other = np.setdiff1d(np.arange(len(target)), one)
        found += [(one, other), (other, one)]
    return found


def crossfitted(
    logits: Sequence[Floats], target: Indices, parts: Sequence[Part], mixtures: Sequence[Mixture]
) -> tuple[Floats, Floats]:
    """NLL [N] and hits [N] of every item under the mixtures that were made without it; means over the repeats.

    logits: of all experts, [N,C] each; mixtures: one for each part.
    """
    nll, hits, seen = np.zeros((3, len(target)))
    for (_, items), mixture in zip(parts, mixtures, strict=True):
        z = mixture.of([logits[m][items] for m in mixture.members])
        nll[items] -= z[np.arange(len(items)), target[items]]
        hits[items] += z.argmax(1) == target[items]
        seen[items] += 1
    return nll / seen, hits / seen


class Bench:
    """A panel of experts with the folds and the bootstrap draws with which every way to predict is judged."""

    def __init__(self, panel: Panel, seed: int = 0, times: int = 1000):
        self.panel, self.classes = panel, len(panel.counts)
        self.view = condensed(panel.logits, panel.target, list(panel.groups.values()))
        self.parts = folds(panel.target, seed)
        images = np.bincount(panel.target)[panel.target]
        self.draws = resample.draws(panel.target, times, seed) * (images / np.maximum(images - 1, 1)).astype(np.float32)

    def views(self) -> list[Condensed]:
        """The experts on the items of every fold to choose on, and last on all."""
        return [*(self.view.at(items) for items, _ in self.parts), self.view]

    def judged(self, made: Callable[[Condensed, int], Mixture]) -> Judged:
        """A procedure, given the experts on the items of a fold and the number of the fold, last of all items."""
        mixtures = [made(view, number) for number, view in enumerate(self.views())]
        return Judged(mixtures, *crossfitted(self.panel.logits, self.panel.target, self.parts, mixtures[:-1]))

    def estimate(self, values: Floats, classes: Indices | None = None) -> Estimate:
        """The mean over classes (those given) of the class means of item values [N], bootstrapped over items."""
        target = self.panel.target
        part = np.flatnonzero(np.isin(target, np.arange(self.classes) if classes is None else classes))
        if not len(part):
            return Estimate(np.nan, np.nan, np.nan)
        terms = values[part] * weighted(target[part])
        return estimate(float(terms.sum()), self.draws[:, part] @ terms.astype(np.float32))

    def grouped(self, values: Floats) -> dict[str, Estimate]:
        """`estimate` over the classes of each group."""
        return {group: self.estimate(values, classes) for group, classes in self.panel.groups.items()}

    def gain(self, one: Judged, over: Judged) -> Estimate:
        """The cross-fitted gain in class-balanced NLL."""
        return self.estimate(over.nll - one.nll)

    def score(self, name: str, one: Judged, single: Judged) -> Score:
        """Everything about a way to predict, beside the best single experts of the same folds."""
        whole, panel = one.mixtures[-1], self.panel
        chosen = [panel.experts[m] for m in whole.members]
        z = whole.of([expert.logits for expert in chosen])
        per_class = metrics.class_accuracy(z.argmax(1), panel.target, self.classes)
        cost = {expert.trial: expert.cost for expert in chosen}
        more = one.hits - single.hits
        return Score(
            name=name,
            members=tuple(expert.name for expert in chosen),
            nll=self.estimate(one.nll),
            balanced=self.estimate(one.hits),
            groups=self.grouped(one.hits),
            gain_nll=self.gain(one, single),
            gain_balanced=self.estimate(more),
            gain_groups=self.grouped(more),
            whole={
                "nll": metrics.balanced_nll(z, panel.target, self.classes),
                "balanced": float(np.nanmean(per_class)),
                **metrics.group_means(per_class, panel.groups),
            },
            passes=len(cost),
            cost=float(sum(cost.values())),
        )
