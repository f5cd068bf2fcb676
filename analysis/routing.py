"""How the members of an ensemble are weighted: equally, by one weight each, per class group, or per class.

The corrected logits of an ensemble are z_c = sum_m w[m,c] z_mc + b_c over its members' log-probabilities, where the
weights of every class sum to 1.  Rung by rung the weights and biases may depend on more; each has to earn it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

from analysis.experts import Floats, Indices, normalised
from analysis.greedy import TINY, Condensed, weighted

PULL = 0.01
"""L2 penalty, in nats, on the distance of the weights from equal ones and on the biases (mean over slots)."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """An ensemble: positions of its members, weights [M,C] of columns that sum to 1, biases [C], "logit" or "prob".

    rung: how much the weights depend on.  In probabilities they are the same for all classes, without biases.
    """

    members: tuple[int, ...]
    weights: Floats
    bias: Floats
    mode: str = "logit"
    rung: str = "global"

    def of(self, logits: Sequence[Floats]) -> Floats:
        """Log-probabilities [N,C] of the ensemble, from those [N,C] of each of its members, in their precision."""
        kind = logits[0].dtype
        pairs = [(w.astype(kind), z) for w, z in zip(self.weights, logits, strict=True)]
        if self.mode == "prob":
            return np.log(np.maximum(sum(w * np.exp(z) for w, z in pairs), TINY))
        return normalised(sum(w * z for w, z in pairs) + self.bias.astype(kind))

    def told(self, values: Floats, groups: Mapping[str, Indices]) -> Any:
        """Weights of a member, or biases, [C]: one number, one by group, or one per class, as the rung has it."""
        if self.rung == "groups":
            return {name: float(values[classes[0]]) for name, classes in groups.items() if len(classes)}
        return values.tolist() if self.rung == "classes" else float(values[0])


def plain(weights: Mapping[int, float], classes: int, mode: str = "logit", rung: str = "global") -> Mixture:
    """A mixture of one weight per member, the same for every class."""
    column = np.array([*weights.values()])[:, None]
    return Mixture(tuple(weights), np.repeat(column, classes, 1), np.zeros(classes), mode, rung)


def equal(members: Sequence[int], classes: int, mode: str = "logit") -> Mixture:
    return plain(dict.fromkeys(members, 1 / len(members)), classes, mode, "equal")


def routed(
    experts: Condensed, members: Sequence[int], classes: int, groups: Mapping[str, Indices], rung: str
) -> Mixture:
    """Weights and biases per group (rung "groups") or per class ("classes") of least balanced NLL on the items.

    experts: all of them; members: those of the ensemble.  In logits only.
    """
    slots = _slots(classes, groups, rung)
    chosen = experts.of(members)
    weight, bias = _fitted(chosen, slots[chosen.column], int(slots.max()) + 1)
    own = slots[:classes]
    return Mixture(tuple(members), weight[:, own], bias[own], "logit", rung)


def _slots(classes: int, groups: Mapping[str, Indices], rung: str) -> Indices:
    """The slot of each class, and then of the rest of each group: with "classes" every one has its own."""
    if rung == "classes":
        return np.arange(classes + len(groups))
    slots = np.zeros(classes + len(groups), np.int64)
    for position, members in enumerate(groups.values()):
        slots[np.asarray(members, np.int64)] = position
        slots[classes + position] = position
    return slots


def _fitted(experts: Condensed, slots: Indices, number: int) -> tuple[Floats, Floats]:
    """Weights [M,S], columns summing to 1, and biases [S] of S slots that minimise the penalised balanced NLL.

    slots [J,N]: the slot of each column of each item.  The weights are a softmax, so that all is unconstrained.
    """
    logs, item_weight = experts.logs.astype(np.float64), weighted(experts.target)
    m, flat = len(logs), slots.ravel()

    def loss(parameters: Floats) -> tuple[float, Floats]:
        w, b = softmax(parameters[: m * number].reshape(m, number), 0), parameters[m * number :]
        z = np.einsum("mjn,mjn->jn", w[:, slots], logs) + b[slots]
        p = softmax(z, 0)
        nll = -np.log(np.maximum(p[0], TINY)) @ item_weight
        p[0] -= 1
        change = p * item_weight
        to_b = np.bincount(flat, change.ravel(), number) + 2 * PULL * b / number
        to_w = np.stack([np.bincount(flat, (change * own).ravel(), number) for own in logs])
        to_w += 2 * PULL * (w - 1 / m) / number
        value = nll + PULL * (((w - 1 / m) ** 2).sum() + (b**2).sum()) / number
        return value, np.concatenate([(w * (to_w - (w * to_w).sum(0))).ravel(), to_b])

    found = minimize(loss, np.zeros((m + 1) * number), jac=True, method="L-BFGS-B", options={"maxiter": 60})
    return softmax(found.x[: m * number].reshape(m, number), 0), found.x[m * number :]
