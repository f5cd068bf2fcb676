"""What a greedy ensemble is worth, if it is chosen again in every bootstrap draw and judged on what the draw left out.

That is the correction of `analysis.estimates.corrected` for a choice among combinations instead of trials.  All
draws go through the same rounds, and most begin alike: what experts contribute is computed once per round, what a
combination of picks gives once for all draws that have it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import estimates, resample
from analysis.estimates import Estimate
from analysis.experts import Floats, Indices, Panel
from analysis.greedy import SHORT, Condensed, Path
from analysis.routing import plain

DRAWS, ITEMS = (20, 100), 1_000_000
"""At least and at most so many draws, fewer than the most where there are more than 10 000 images: their product."""

ROUNDS = 40
WORKERS = 2
"""Combinations that are weighed at the same time."""

Picks = tuple[int, ...]
Nll = Callable[[Floats, Indices], Floats]


@dataclass(frozen=True)
class Rechosen:
    """The greedy ensemble and the best single expert, chosen in every draw and judged outside of it.

    single, ensemble: balanced accuracy.  gain, gain_nll: what the ensemble has more, positive is better.
    """

    draws: int
    single: Estimate
    ensemble: Estimate
    gain: Estimate
    gain_nll: Estimate


def draws(items: int) -> int:
    """How many draws so many items allow."""
    return int(np.clip(ITEMS // max(items, 1), *DRAWS))


def rechosen(
    panel: Panel,
    view: Condensed,
    *,
    mode: str = "logit",
    limit: int = 5,
    penalty: float = 0.0,
    times: int,
    seed: int = 0,
) -> Rechosen | None:
    """The correction of a greedy selection among a panel's own experts; view: the same, condensed.

    Out of every draw the NLL of the images in it picks, as `analysis.greedy.greedy` does, among the best SHORT single
    experts there.  None where too many classes have too few images (`estimates.reliable`).
    """
    if not estimates.reliable(panel.target, panel.groups):
        return None
    drawn = resample.draws(panel.target, times, seed)
    images = np.bincount(panel.target)
    share = 1 / (np.maximum(images - 1, 1) * np.count_nonzero(images))
    weight = (drawn * share[panel.target]).astype(view.logs.dtype)
    paths = climbs(view.of(range(panel.own)), weight, mode=mode, limit=limit, penalty=penalty)
    judged = np.array([_judged(panel, path, mode, limit, np.flatnonzero(own == 0))
                       for path, own in zip(paths, drawn, strict=True)])  # fmt: skip
    (single, ensemble), (single_nll, ensemble_nll) = judged.T
    series = (single, ensemble, ensemble - single, single_nll - ensemble_nll)
    return Rechosen(times, *(estimates.narrowed(own, drawn) for own in series))


def climbs(
    view: Condensed, weight: NDArray, *, mode: str, rounds: int = ROUNDS, limit: int = 5, penalty: float = 0.0
) -> list[Path]:
    """The greedy selection for each of B weightings [B, N] of the items, among its best SHORT single experts."""
    single = -view.logs[:, 0] @ weight.T
    listed = single.argsort(0, kind="stable").argsort(0) < SHORT
    sums = np.exp(view.logs[:, :1]) if mode == "prob" else view.logs
    paths = [Path([], []) for _ in weight]
    totals: dict[Picks, Floats] = {(): np.zeros_like(sums[0])}
    for k in range(1, rounds + 1):
        nll = (_in_probabilities if mode == "prob" else _in_logits)(sums, k)
        alike: dict[Picks, list[int]] = {}
        for draw, path in enumerate(paths):
            alike.setdefault(tuple(sorted(path.picks)), []).append(draw)

        def picked(picks: Picks, nll: Any = nll, alike: Any = alike, totals: Any = totals) -> tuple[Indices, Floats]:
            own = alike[picks]
            allowed = np.unique(picks) if len(set(picks)) == limit else np.flatnonzero(listed[:, own].any(1))
            price = [[penalty * len({*picks, m})] for m in allowed]
            loss = np.where(listed[np.ix_(allowed, own)], nll(totals[picks], allowed) @ weight[own].T + price, np.inf)
            return allowed[loss.argmin(0)], loss.min(0)

        with ThreadPoolExecutor(WORKERS) as pool:
            found = dict(zip(alike, pool.map(picked, alike), strict=True))
        grown: dict[Picks, Floats] = {}
        for picks, draws_ in alike.items():
            for draw, pick, loss in zip(draws_, *found[picks], strict=True):
                paths[draw].picks.append(int(pick))
                paths[draw].losses.append(float(loss))
                grown.setdefault(tuple(sorted((*picks, int(pick)))), totals[picks] + sums[pick])
        totals = grown
    return paths


def _in_logits(sums: Floats, k: int) -> Nll:
    """How the NLL [A, N] follows from a sum of k - 1 log-probabilities [J, N] and each of some more experts.

    exp((total + own) / k) is a product of two, of which the second serves all draws.
    """
    share = np.asarray(1 / k, sums.dtype)
    factors = np.exp(sums * share)

    def nll(total: Floats, allowed: Indices) -> Floats:
        before = np.exp(total * share)
        norm = np.stack([np.einsum("jn,jn->n", before, factors[m]) for m in allowed])
        return np.log(norm) - (total[0] + sums[allowed, 0]) * share

    return nll


def _in_probabilities(sums: Floats, k: int) -> Nll:
    """The same for probabilities [1, N]."""
    return lambda total, allowed: -np.log((total[0] + sums[allowed, 0]) / np.asarray(k, sums.dtype))


def _judged(panel: Panel, path: Path, mode: str, limit: int, items: Indices) -> list[tuple[float, float]]:
    """Balanced accuracy and NLL of the best single expert and of the ensemble of a path, on some items."""
    target, classes = panel.target[items], len(panel.counts)
    found = []
    for size in (1, limit):
        mixture = plain(path.best(size), classes, mode)
        z = mixture.of([panel.experts[m].logits[items] for m in mixture.members])
        found.append((_balanced(z.argmax(1) == target, target), -_balanced(z[np.arange(len(z)), target], target)))
    return found


def _balanced(values: NDArray, target: Indices) -> float:
    """The mean over the classes that occur of the class means of item values [N]."""
    images = np.bincount(target)
    return float((np.bincount(target, values)[images > 0] / images[images > 0]).mean())
