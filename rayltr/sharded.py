"""A softmax classifier whose classes are shared by the workers: one for every image, a million and more.

A worker holds the rows of its own classes, sees the features of all workers' images, and exchanges for each of them
a maximum, two sums and the gradient of its feature; rows never travel.  They are moved by SGD with momentum while the
gradient is computed, a block of classes at a time, so that neither all logits nor the gradient of all rows need exist
(softmax over shares: An et al., Partial FC, 2021).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.parallel import all_max, all_sum, everyones, rank, returned, share, sizes_of, world

TOGETHER = 4096
"""Classes whose first rows are drawn together, so that they do not depend on the number of workers."""

Columns = slice | Tensor


@dataclass
class Step:
    """What a pass over a batch leaves for its gradient; G images of all workers.

    features [G, D]; sizes: images of each worker; place, mass [G, 1+K]: where the own and the hardest classes stand
    among this worker's columns (below 0 or beyond: not there), and their share of the target; blocks: first column,
    rows of the classifier and, if they are kept, logits [G, c]; total [G]: log of the sum of all exponentials.
    """

    features: Tensor
    sizes: list[int]
    place: Tensor
    mass: Tensor
    blocks: list[tuple[int, Columns, Tensor | None]]
    total: Tensor


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, shard: "Shard", labels: Tensor, smoothing: float) -> Tensor:
        loss, ctx.step = shard.compared(features, labels, smoothing)
        ctx.shard = shard
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        step, ctx.step = ctx.step, None
        return ctx.shard.moved(step, gradient), None, None, None


class Shard(nn.Module):
    """This worker's rows `weight` [n, dim] of a classifier of `classes`, and their `velocity` [n, dim].

    temperature > 0 divides the logits, which are cosines or, without `cosine`, inner products.  norm: length that
    rows start with.  sampled: share of a worker's classes, in (0, 1], that a step sees: those that the batch needs and
    others at random (Partial FC); what the rest miss of weight decay and momentum is made good when they are next
    seen.  block: classes at a time; kept: whether their logits are kept for the gradient instead of being computed
    twice; bf16: products in bfloat16, sums in float32.

    Rows stay as they are until `obey` names the optimiser that they follow.  Raises ValueError for values outside.
    """

    weight: Tensor
    velocity: Tensor
    last: Tensor
    missed: Tensor

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        temperature: float = 0.15,
        cosine: bool = True,
        norm: float = 1.0,
        sampled: float = 1.0,
        block: int = 8192,
        kept: bool = False,
        bf16: bool = False,
    ):
        super().__init__()
        if temperature <= 0 or norm <= 0 or not 0 < sampled <= 1 or block < 1:
            raise ValueError("a sharded classifier needs temperature, norm and block > 0 and 0 < sampled <= 1")
        self.classes = classes
        self.first, many = share(classes, rank(), world())
        self.temperature, self.cosine, self.norm = temperature, cosine, norm
        self.sampled, self.block, self.kept, self.bf16 = sampled, block, kept, bf16
        self.register_buffer("weight", _drawn(self.first, many, dim, norm))
        self.register_buffer("velocity", torch.zeros(many, dim))
        # of every row the step after which it was last up to date, of every such step what rows have missed since
        self.register_buffer("last", torch.zeros(many if sampled < 1 else 0, dtype=torch.int64), persistent=False)
        self.register_buffer("missed", torch.eye(2, dtype=torch.float64)[None], persistent=False)
        self.register_state_dict_pre_hook(lambda module, prefix, keep_vars: module.catch_up())
        self.leader: torch.optim.SGD | None = None
        self.rate = 1.0
        self.hardest: Callable[[Tensor], Tensor] | None = None

    def obey(self, optimiser: torch.optim.Optimizer, rate: float = 1.0) -> None:
        """Lets rows move with this optimiser's weight decay, momentum and `rate` times its learning rate of the step.

        Raises ValueError for anything but plain SGD.
        """
        if not isinstance(optimiser, torch.optim.SGD) or optimiser.param_groups[0]["nesterov"]:
            raise ValueError("the classifier over all images moves by the optimiser sgd without nesterov; choose that")
        self.leader, self.rate = optimiser, rate

    def forward(self, features: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean cross-entropy over the images of all workers, the same number on each of them.

        features [B, dim], labels int64 [B]: this worker's, as many as it has.  smoothing in [0, 1): share of the
        target that is spread evenly over the classes [G, K] that `hardest` gives for the labels [G] of all workers,
        if it is set.  The gradients are those of the sum of the workers' losses (see `rayltr.parallel`).  Rows move
        when the gradient is taken, which can be done once.
        """
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(torch.promote_types(features.dtype, torch.float32))
            return Loss.apply(F.normalize(wide) if self.cosine else wide, self, labels, smoothing)  # type: ignore

    @torch.no_grad()
    def fill(self, classes: Tensor, features: Tensor) -> None:
        """Makes features [B, dim] the rows of some of this worker's classes int64 [B], at the length `norm`."""
        self.weight[classes - self.first] = self.norm * F.normalize(features.to(self.weight))

    def compared(self, features: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Step]:
        """The loss, and what its gradient needs."""
        sizes = sizes_of(features)
        features, labels = everyones(features, sizes), everyones(labels, sizes)
        goals = labels[:, None]
        mass = torch.ones_like(goals, dtype=features.dtype)
        if smoothing and self.hardest:
            goals = torch.cat([goals, self.hardest(labels)], 1)
            mass = features.new_full(goals.shape, smoothing / (goals.shape[1] - 1))
            mass[:, 0] = 1 - smoothing
        rows, place = self._seen(goals - self.first)
        step = Step(features, sizes, place, mass, [], features.new_full((len(features),), -torch.inf))
        near = self._swept(step, rows)
        return (step.total - near).mean(), step

    def _swept(self, step: Step, rows: Tensor | None) -> Tensor:
        """Passes over all columns, and all workers: fills the step; the mean logits of the targets [G]."""
        top, sums = step.total, step.total.new_zeros(len(step.total), 2)
        for start in range(0, len(self.weight if rows is None else rows), self.block):
            top = self._added(step, start, self._columns(rows, start), top, sums)
        most = all_max(top)
        sums[:, 0] *= (top - most).exp()
        sums = all_sum(sums)
        step.total = most + sums[:, 0].log()
        return sums[:, 1]

    def _added(self, step: Step, start: int, columns: Columns, top: Tensor, sums: Tensor) -> Tensor:
        """Adds a block to the sums [G, 2] of exponentials, over that of the largest logit, and of targets' logits.

        Returns the largest logits [G], `top` before.  A function of its own, so that one block at a time is there.
        """
        logits = self._logits(step.features, self._units(columns)[0])
        step.blocks.append((start, columns, logits if self.kept else None))
        wide = logits.to(sums, copy=self.kept)
        peak = torch.maximum(top, wide.amax(1))
        who, what, mass = self._hits(step, start, wide.shape[1])
        sums[:, 1].index_add_(0, who, mass * wide[who, what])
        sums[:, 0].mul_((top - peak).exp()).add_(wide.sub_(peak[:, None]).exp_().sum(1))
        return peak

    @torch.no_grad()
    def moved(self, step: Step, gradient: Tensor) -> Tensor:
        """Moves the rows; the gradient [B, dim] of this worker's features."""
        scale = gradient / (len(step.features) * self.temperature)
        found, scaled = torch.zeros_like(step.features), step.features * scale
        while step.blocks:
            found += self._pulled(step, *step.blocks.pop(), scaled)
        if self.leader and self.sampled < 1:
            self._miss()
        return returned(found, step.sizes) * (scale * world())

    def _pulled(self, step: Step, start: int, columns: Columns, kept: Tensor | None, scaled: Tensor) -> Tensor:
        """Moves a block of rows by the gradient of `scaled` features; where it pulls the features [G, dim]."""
        unit, length = self._units(columns)
        error = self._logits(step.features, unit) if kept is None else kept
        error = error.to(scaled).sub_(step.total[:, None]).exp_()
        who, what, mass = self._hits(step, start, error.shape[1])
        error.index_put_((who, what), -mass, accumulate=True)
        pull = self._product(error, unit)
        if self.leader:
            slope = self._product(error.T, scaled)
            if length is not None:
                slope = slope.sub_(unit * (unit * slope).sum(1, keepdim=True)).div_(length)
            self._step(columns, slope)
        return pull

    def _step(self, columns: Columns, slope: Tensor) -> None:
        rate, momentum, decay = self._rule()
        weight, velocity = self.weight[columns], self.velocity[columns]
        velocity.mul_(momentum).add_(slope).add_(weight, alpha=decay)
        weight.sub_(velocity, alpha=rate)
        if isinstance(columns, Tensor):  # these are copies
            self.weight[columns], self.velocity[columns] = weight, velocity
            self.last[columns] = len(self.missed)  # the next that `_miss` adds

    def _rule(self) -> tuple[float, float, float]:
        """Learning rate, momentum and weight decay of the step."""
        assert self.leader is not None
        group = self.leader.param_groups[0]
        return self.rate * group["lr"], group["momentum"], group["weight_decay"]

    def _miss(self) -> None:
        """Notes what a row that was not seen has missed: a step with a gradient of zero, linear in row and velocity."""
        rate, momentum, decay = self._rule()
        missing = [[1 - rate * decay, -rate * momentum], [decay, momentum]]
        once = torch.tensor(missing, dtype=self.missed.dtype, device=self.missed.device)
        self.missed = torch.cat([once @ self.missed, torch.eye(2).to(once)[None]])

    @torch.no_grad()
    def catch_up(self, rows: Tensor | None = None) -> None:
        """Gives rows (all of them, and then nothing is left to remember) the steps that they have missed."""
        if len(self.missed) == 1:
            return
        for start in range(0, len(self.weight if rows is None else rows), self.block):
            columns = self._columns(rows, start)
            past = self.missed[self.last[columns]].to(self.weight)[..., None]
            weight, velocity = self.weight[columns], self.velocity[columns]
            self.weight[columns], self.velocity[columns] = (
                past[:, row, 0] * weight + past[:, row, 1] * velocity for row in range(2)
            )
            self.last[columns] = len(self.missed) - 1
        if rows is None:
            self.last.zero_()
            self.missed = self.missed[-1:]

    def _seen(self, goals: Tensor) -> tuple[Tensor | None, Tensor]:
        """The rows that a step sees, in order (None: all), and the places of `goals`, rows too, among them."""
        if self.sampled == 1:
            return None, goals
        chance = torch.rand(len(self.weight), device=goals.device)
        needed = goals[(goals >= 0) & (goals < len(chance))]
        chance[needed] = 2
        many = max(int(self.sampled * len(chance)), int((chance == 2).sum()))
        rows = chance.topk(many).indices.sort().values
        self.catch_up(rows)
        place = torch.full((len(chance) + 2,), -1, device=goals.device)
        place[rows] = torch.arange(many, device=goals.device)
        return rows, place[goals.clamp(-1, len(chance))]  # whatever is another worker's ends on a -1

    def _columns(self, rows: Tensor | None, start: int) -> Columns:
        part = slice(start, start + self.block)
        return part if rows is None else rows[part]

    def _hits(self, step: Step, start: int, many: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, columns and shares of the targets that lie in a block."""
        who, which = ((step.place >= start) & (step.place < start + many)).nonzero(as_tuple=True)
        return who, step.place[who, which] - start, step.mass[who, which]

    def _units(self, columns: Columns) -> tuple[Tensor, Tensor | None]:
        """What features are multiplied with [c, dim], and the lengths [c, 1] that it was divided by."""
        weight = self.weight[columns]
        if not self.cosine:
            return weight, None
        length = weight.norm(dim=1, keepdim=True).clamp_(min=1e-12)
        return weight / length, length

    def _logits(self, features: Tensor, unit: Tensor) -> Tensor:
        features = features / self.temperature
        return features.bfloat16() @ unit.bfloat16().T if self.bf16 else features @ unit.T

    def _product(self, one: Tensor, other: Tensor) -> Tensor:
        return (one.bfloat16() @ other.bfloat16()).to(one) if self.bf16 else one @ other


def _drawn(first: int, many: int, dim: int, norm: float) -> Tensor:
    """Random rows of the length `norm` for the classes from `first` on; each depends on its class alone."""
    seed, rows = int(torch.randint(2**62, ())), torch.empty(many, dim)
    for start in range(first - first % TOGETHER, first + many, TOGETHER):
        drawn = torch.randn(TOGETHER, dim, generator=torch.Generator().manual_seed(seed + start))
        low, high = max(start, first), min(start + TOGETHER, first + many)
        rows[low - first : high - first] = norm * F.normalize(drawn[low - start : high - start])
    return rows
