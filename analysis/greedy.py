"""Greedy selection of ensemble members with replacement, and its bagged form.

Caruana et al. 2004, "Ensemble selection from libraries of models": start from the best single expert, add again and
again the one (a repeated one, too) that helps most, keep the prefix that was best.  Bags over halves of the members
and of the items (sections 2.3) keep experts out that are good by luck.  What is minimised is the class-balanced NLL.

Thousands of combinations are scored, so every item is condensed to its target, the classes that the experts think
likeliest, and the rest of each class group as one.  A condensed ensemble is never better than the whole one: the
probability of a rest, averaged in the logits, is an upper bound (Hölder's inequality).  So what holds for the choice
on condensed experts, not to be worse than the best single, holds for the ensemble itself.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.experts import Floats, Indices

KEPT = 16
"""Likeliest classes of an item that are kept apart; with no more classes than these nothing is condensed."""
SHORT = 30
"""The best single experts, those that an ensemble is chosen from."""
TINY = 1e-30
"""The least probability, which no sum of single precision loses."""
FLOOR = math.log(TINY)
EQUAL = 1e-9
"""Losses this close, in nats, are a tie."""


@dataclass(frozen=True, eq=False)
class Condensed:
    """Experts on items.  logs [M,J,N]: log-probabilities, the target first, the rests of the groups last.

    kept: how many of the J are classes.  column [J,N]: which class, or C + the position of the group, each is.
    """

    logs: Floats
    column: Indices
    kept: int
    target: Indices

    def at(self, items: Indices) -> "Condensed":
        """The same experts on some of the items."""
        return Condensed(self.logs[..., items], self.column[:, items], self.kept, self.target[items])

    def of(self, members: Sequence[int] | Indices) -> "Condensed":
        """Some of the experts on the same items."""
        return Condensed(self.logs[np.asarray(members, np.int64)], self.column, self.kept, self.target)


def condensed(logits: Sequence[Floats], target: Indices, groups: Iterable[Indices], kept: int = KEPT) -> Condensed:
    """Condenses log-probabilities, each [N,C], of several experts."""
    rows, classes = np.arange(len(target)), logits[0].shape[1]
    kept = classes if classes <= kept else kept
    likely = np.sum([np.exp(z) for z in logits], 0)
    likely[rows, target] = np.inf
    column = np.argsort(-likely, axis=1, kind="stable")[:, :kept]
    if kept == classes:
        logs = np.stack([np.take_along_axis(z, column, 1).T for z in logits])
        return Condensed(np.maximum(logs, FLOOR), column.T, kept, target)
    members = np.stack([np.isin(np.arange(classes), group) for group in groups], 1)
    whole = [np.concatenate([np.take_along_axis(z, column, 1), _rests(z, column, members)], 1).T for z in logits]
    rests = np.broadcast_to(classes + np.arange(members.shape[1]), (len(target), members.shape[1]))
    logs = np.maximum(np.stack(whole), FLOOR)
    return Condensed(logs, np.concatenate([column, rests], 1).T, kept, target)


def _rests(z: Floats, column: Indices, members: Floats) -> Floats:
    """Log-probability [N,G] of all classes of each group that are not kept."""
    rest = np.exp(z)
    np.put_along_axis(rest, column, 0, 1)
    with np.errstate(divide="ignore"):
        return np.log(rest @ members.astype(z.dtype))


def weighted(target: Indices) -> Floats:
    """Weights [N] of items that sum to 1 and give every class that occurs the same."""
    images = np.bincount(target)
    return 1 / (images[target] * np.count_nonzero(images))


def _in_logits(total: Floats, share: float) -> Floats:
    z = share * total  # above log TINY, so the sum is not 0
    return np.log(np.exp(z).sum(-2)) - z[..., 0, :]


def _in_probabilities(total: Floats, share: float) -> Floats:
    return -np.log(share * total[..., 0, :])


MODES = {"logit": _in_logits, "prob": _in_probabilities}
"""How experts are averaged; each function gives the NLL [...,N] of a sum [...,J,N] times a share."""


@dataclass(frozen=True, eq=False)
class Path:
    """The picks of a greedy selection, positions among the experts, and the loss after each."""

    picks: list[int]
    losses: list[float]

    def best(self, distinct: int) -> dict[int, float]:
        """Weight by member, summing to 1, of the best prefix of at most so many distinct members."""
        sizes = [len(set(self.picks[: k + 1])) for k in range(len(self.picks))]
        end = int(np.argmin([loss if n <= distinct else np.inf for loss, n in zip(self.losses, sizes, strict=True)]))
        chosen = self.picks[: end + 1]
        return {member: chosen.count(member) / len(chosen) for member in dict.fromkeys(chosen)}


def greedy(experts: Condensed, *, mode: str = "logit", rounds: int = 40, limit: int = 5, penalty: float = 0.0) -> Path:
    """Greedy selection with replacement: class-balanced NLL, balanced accuracy among equals, then the first.

    limit: distinct members at most.  penalty: nats that each distinct member costs.
    """
    sums = np.exp(experts.logs) if mode == "prob" else experts.logs
    needed = slice(1 if mode == "prob" else None)
    weight = weighted(experts.target).astype(sums.dtype)
    total, allowed = np.zeros_like(sums[0]), list(range(len(sums)))
    picks: list[int] = []
    losses: list[float] = []
    for k in range(1, rounds + 1):
        nll = [float(MODES[mode](total[needed] + sums[m, needed], 1 / k) @ weight) for m in allowed]
        loss = np.array(nll) + penalty * np.array([len({*picks, m}) for m in allowed])
        ties = np.flatnonzero(loss <= loss.min() + EQUAL)
        if len(ties) > 1:
            right = [_right((total + sums[allowed[t]])[: experts.kept]) @ weight for t in ties]
            ties = ties[np.equal(right, max(right))]
        picks.append(allowed[ties[0]])
        losses.append(float(loss[ties[0]]))
        total = total + sums[picks[-1]]
        if len(set(picks)) == limit:
            allowed = sorted(set(picks))
    return Path(picks, losses)


def _right(total: Floats) -> Floats:
    """Which items [N] a combination [J,N], the target first, predicts right."""
    return (total[0] >= total).all(0)


def select(
    experts: Condensed,
    *,
    mode: str = "logit",
    rounds: int = 40,
    limit: int = 5,
    penalty: float = 0.0,
    bags: int = 20,
    seed: int = 0,
) -> Path:
    """Greedy selection among the `limit` experts with the greatest weight over bags, the best single always one.

    Each bag sees half of the short list and half of the items of every class.
    """
    weight = weighted(experts.target).astype(experts.logs.dtype)
    single = -experts.logs[:, 0] @ weight
    short = np.argsort(single, kind="stable")[:SHORT]
    listed = experts.of(short)
    if len(short) > limit:
        rng = np.random.default_rng(seed)
        counted = np.zeros(len(short))
        for _ in range(bags):
            some = np.sort(rng.permutation(len(short))[: (len(short) + 1) // 2])
            bag = listed.of(some).at(half(experts.target, rng))
            path = greedy(bag, mode=mode, rounds=rounds, limit=limit, penalty=penalty)
            for member, share in path.best(limit).items():
                counted[some[member]] += share
        counted[0] = np.inf  # the best single
        kept = np.sort(np.argsort(-counted, kind="stable")[:limit])
        short, listed = short[kept], listed.of(kept)
    path = greedy(listed, mode=mode, rounds=rounds, limit=limit, penalty=penalty)
    return Path([int(short[pick]) for pick in path.picks], path.losses)


def half(target: Indices, rng: np.random.Generator) -> Indices:
    """Half of the items of every class, ascending; of an odd number, one more or less by chance."""
    order = rng.permutation(len(target))
    order = order[np.argsort(target[order], kind="stable")]
    images = np.bincount(target)
    rank = np.arange(len(target)) - np.repeat(np.cumsum(images) - images, images)
    take = (images + rng.integers(0, 2, len(images))) // 2
    return np.sort(order[rank < take[target[order]]])
