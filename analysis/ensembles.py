"""Which experts of a run to ship together, if any: greedy ensembles, their growth, their weights and their rivals."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from analysis.crossfit import Bench, Judged, Score
from analysis.diversity import Diversity, divergence, diversity
from analysis.estimates import Estimate
from analysis.experts import Expert, Floats, Indices, Panel, experts
from analysis.greedy import MODES, Condensed, greedy, select, weighted
from analysis.outofbag import Rechosen, draws, rechosen
from analysis.routing import Mixture, equal, plain, routed
from rayltr.choice import ENOUGH

LIMIT = 5
"""Distinct members at most, because each costs a whole network."""


BAGGED, BAGS = 40_000, (4, 20)
"""Ensembles are chosen in bags of so many images in all, few bags where there are many images."""


@dataclass(frozen=True)
class Rung:
    """A rung of the ladder (see `Mixture.rung`) and its cross-fitted gain in NLL over the one before, if there is one.

    accepted: whether that gain is above zero with its whole interval; the first rung that fails ends the ladder.
    """

    name: str
    score: Score
    gain: Estimate | None
    accepted: bool


@dataclass(frozen=True, eq=False)
class Ensembles:
    """What a report shows of the ensembles of a run; where something is None, `reason` says why.

    left_out: heads that are no experts, and why.  recommended: "ensemble" or "single".  best, single: the best single
    expert.  members, mixture, ensemble: the best ensemble of two experts or more, recommended or not.  baselines: the
    best experts averaged, and one recipe with several seeds if there is one.  modes: the greedy ensemble by mode.
    growth: with at most 1, 2, ... distinct members.  rechosen: what a greedy one delivers where it was not chosen.
    differences, kl [M,C]: between the members, and of each to the ensemble per class.
    """

    reason: str = ""
    groups: Mapping[str, Indices] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    experts: int = 0
    recommended: str = "single"
    best: Expert | None = None
    single: Score | None = None
    members: list[Expert] = field(default_factory=list)
    mixture: Mixture | None = None
    ensemble: Score | None = None
    baselines: list[Score] = field(default_factory=list)
    modes: dict[str, Score] = field(default_factory=dict)
    growth: list[Score] = field(default_factory=list)
    rechosen: Rechosen | None = None
    ladder: list[Rung] = field(default_factory=list)
    differences: Diversity | None = None
    kl: Floats | None = None


def study(run: str | os.PathLike, **search: Any) -> Ensembles:
    """`studied` of the experts of a run folder.  Raises ValueError for what is no run."""
    return studied(experts(run), **search)


def studied(
    panel: Panel, *, limit: int = LIMIT, seed: int = 0, times: int = 1000, again: bool = False, **search: Any
) -> Ensembles:
    """The ensembles of a panel of experts.

    limit: distinct members at most; times: bootstrap draws behind an interval; again: whether the greedy ensemble is
    chosen again in such draws, too; search: other keywords of `analysis.greedy.select`, such as `penalty`.  Logits are
    averaged unless probabilities beat them; the size is the smallest that the best size does not beat, of two at
    least.  To beat is to have a lower cross-fitted NLL by a 95 % interval.  Raises ValueError for a limit below 2.
    """
    if limit < 2:
        raise ValueError(f"the limit of an ensemble is at least 2 members, not {limit}")
    found = Ensembles(groups=panel.groups, left_out=panel.left_out, experts=panel.own)
    if found.experts < 2:
        return replace(found, reason=f"an ensemble needs two experts; there are {found.experts}")
    search.setdefault("bags", int(np.clip(BAGGED // max(len(panel.target), 1), *BAGS)))
    bench = Bench(panel, seed, times)
    grown = {mode: _grown(bench, mode, limit=limit, seed=seed, **search) for mode in MODES}
    single = grown["logit"][0]
    best = {mode: own[_smallest(bench, own, 1)] for mode, own in grown.items()}
    climbs = {mode: climbed(bench, own, single) for mode, own in best.items()}
    mode = "prob" if bench.gain(climbs["prob"][1], climbs["logit"][1]).low > 0 else "logit"
    ladder, shipped = climbs[mode]
    alone = panel.experts[single.mixtures[-1].members[0]]
    found = replace(
        found,
        best=alone,
        single=bench.score("best single", single, single),
        modes={name: bench.score(name, own, single) for name, own in best.items()},
        growth=[bench.score(f"at most {n + 1}", own, single) for n, own in enumerate(grown[mode])],
    )
    if len(shipped.mixtures[-1].members) < 2:
        return replace(found, reason=f"no combination of experts is better than {alone.name} alone")
    once_more = {"mode": mode, "limit": limit, "penalty": search.get("penalty", 0.0), "seed": seed}
    wanted = _smallest(bench, grown[mode], 0) > 0 and bench.gain(shipped, single).low > 0
    return replace(
        found,
        recommended="ensemble" if wanted else "single",
        ensemble=bench.score("ensemble", shipped, single),
        ladder=ladder,
        baselines=_baselines(bench, shipped, single),
        rechosen=rechosen(panel, bench.view, times=draws(len(panel.target)), **once_more) if again else None,
        **_described(panel, shipped.mixtures[-1]),
    )


def _grown(bench: Bench, mode: str, *, limit: int, **search: Any) -> list[Judged]:
    """The greedy ensembles with at most 1, 2, ... `limit` distinct members."""
    own = list(range(bench.panel.own))
    paths = [select(view.of(own), mode=mode, limit=limit, **search) for view in bench.views()]
    sizes = range(1, min(limit, len(own)) + 1)

    def made(size: int, _: Condensed, fold: int) -> Mixture:
        return plain(paths[fold].best(size), bench.classes, mode)

    return [bench.judged(partial(made, size)) for size in sizes]


def _smallest(bench: Bench, grown: Sequence[Judged], least: int) -> int:
    """The first position from `least` on that the best one there does not beat."""
    best = min(grown[least:], key=lambda own: bench.estimate(own.nll).value)
    return next(n for n in range(least, len(grown)) if bench.gain(best, grown[n]).low <= 0)


def climbed(bench: Bench, members: Judged, single: Judged) -> tuple[list[Rung], Judged]:
    """The ladder for the members of a greedy ensemble, up to the first rung that fails, and the last that did not.

    After a rung that is no better than the single expert the next one is accepted, whatever its interval.
    """
    ladder: list[Rung] = []
    now: Judged | None = None
    for name in _rungs(bench.panel, members.mixtures[-1]):
        own = bench.judged(partial(_weighted, bench, members, name))
        gain = bench.gain(own, now) if now else None
        accepted = now is None or gain is None or gain.low > 0 or bench.gain(now, single).value < 0
        ladder.append(Rung(name, bench.score(name, own, single), gain, accepted))
        if not accepted:
            break
        now = own
    assert now is not None
    return ladder, now


def _rungs(panel: Panel, mixture: Mixture) -> list[str]:
    """The rungs that there are: routing is for logits, and for classes with enough images."""
    names = ["equal", "global"] if len(mixture.members) > 1 else ["equal"]
    if mixture.mode == "logit" and sum(len(classes) > 0 for classes in panel.groups.values()) > 1:
        names.append("groups")
        enough = np.bincount(panel.target, minlength=len(panel.counts)).min() >= ENOUGH
        names += ["classes"] if enough and len(mixture.members) > 1 else []
    return names


def _weighted(bench: Bench, greedily: Judged, rung: str, view: Condensed, fold: int) -> Mixture:
    """The members of the greedy ensemble of a fold, weighted as a rung of the ladder does it on the fold's items."""
    members, mode = greedily.mixtures[fold].members, greedily.mixtures[fold].mode
    if rung == "equal":
        return equal(members, bench.classes, mode)
    if rung == "global":
        weights = greedy(view.of(members), mode=mode, limit=len(members)).best(len(members))
        return plain({members[m]: share for m, share in weights.items()}, bench.classes, mode)
    return routed(view, members, bench.classes, bench.panel.groups, rung)


def _baselines(bench: Bench, shipped: Judged, single: Judged) -> list[Score]:
    """Averages of as many experts as were shipped: the best ones, and those of one recipe with several seeds."""
    size, mode, own = len(shipped.mixtures[-1].members), shipped.mixtures[-1].mode, list(range(bench.panel.own))
    best = bench.judged(lambda view, _: equal(_ranked(view.of(own))[:size], bench.classes, mode))
    found = [bench.score(f"the best {size} averaged", best, single)]
    if recipes := _repeated(bench.panel.experts):
        same = bench.judged(lambda view, _: equal(_best_recipe(view, recipes, size, mode), bench.classes, mode))
        found.append(bench.score("one recipe, several seeds", same, single))
    return found


def _ranked(view: Condensed) -> list[int]:
    """The experts, the one with the lowest balanced NLL first."""
    return np.argsort(-view.logs[:, 0] @ weighted(view.target), kind="stable").tolist()


def _repeated(all_experts: Sequence[Expert]) -> list[list[int]]:
    """Positions of experts of the same recipe with other seeds, for every recipe that has some."""
    recipes: dict[str, list[int]] = {}
    for position, expert in enumerate(all_experts):
        recipes.setdefault(expert.recipe, []).append(position)
    return [members for recipe, members in recipes.items() if recipe and len(members) > 1]


def _best_recipe(view: Condensed, recipes: Sequence[Sequence[int]], size: int, mode: str) -> list[int]:
    """The recipe whose average, of its best `size` seeds, has the lowest NLL on these items."""
    rank = _ranked(view)
    chosen = [sorted(members, key=rank.index)[:size] for members in recipes]

    def loss(members: Sequence[int]) -> float:
        logs = view.logs[list(members)]
        total = (np.exp(logs) if mode == "prob" else logs).sum(0)
        return float(MODES[mode](total, 1 / len(members)) @ weighted(view.target))

    return min(chosen, key=loss)


def _described(panel: Panel, mixture: Mixture) -> dict[str, Any]:
    """The members of a mixture, the mixture of these alone, and how they differ."""
    members = [panel.experts[m] for m in mixture.members]
    logits = [expert.logits for expert in members]
    pred = np.stack([z.argmax(1) for z in logits])
    return {
        "members": members,
        "mixture": replace(mixture, members=tuple(range(len(members)))),
        "differences": diversity(pred, panel.target, panel.groups),
        "kl": divergence(logits, mixture.of(logits), panel.target),
    }


def group_bias(panel: Panel, seed: int = 0, times: int = 1000) -> tuple[Mixture, Estimate]:
    """The first expert of a panel with one additive bias per class group, and its cross-fitted gain in NLL.

    Where the interval of the gain contains 0, the mixture has no bias.
    """
    bench = Bench(replace(panel, experts=panel.experts[:1]), seed, times)
    alone = bench.judged(lambda *_: equal([0], bench.classes))
    ladder, now = climbed(bench, alone, alone)
    return now.mixtures[-1], ladder[-1].gain or Estimate(0.0, 0.0, 0.0)
