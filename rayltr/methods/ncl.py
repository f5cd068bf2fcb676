"""Nested collaborative learning: whole networks that teach each other (Li et al., NCL, CVPR 2022)."""

import math
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.backbones import branched
from rayltr.experts import Heads, named
from rayltr.interface import Batch, Parts
from rayltr.momentum import Followers, Queue
from rayltr.parallel import gather_rows, mean

TINY = 1e-9
"""Added to the probabilities that are learnt, as published: it bounds the divergence."""


class Method(nn.Module):
    """Networks of their own, trained on one view; the heads are their mean `main`, `expert1`, `expert2`, ...

    The terms are `loss`, the cross-entropies of every network's logits plus log n, over all classes and over the hard
    ones (`focused`); `collaboration`, `distil` times the divergences between all pairs of networks, over both; and
    with `contrast` > 0, `contrast` times the instance contrast of each network with one that follows it slowly.

    experts >= 2; hard: the share of the classes that count as hard, in (0, 1] (published: 0.3); distil, contrast >= 0
    (published: 0.6, and 0 or, for CIFAR, 1, which takes a second view); temperature, momentum, queue and out: of the
    contrast (He et al., MoCo, 2020).  Raises ValueError for values outside and for a second view that is missing.
    """

    own_loss = True
    stacks = True
    counts: Tensor

    def __init__(
        self,
        parts: Parts,
        *,
        experts: int = 3,
        hard: float = 0.3,
        distil: float = 0.6,
        contrast: float = 0.0,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue: int = 1024,
        out: int = 64,
    ):
        super().__init__()
        if experts < 2 or not 0 < hard <= 1 or min(distil, contrast) < 0:
            raise ValueError("ncl needs experts >= 2, 0 < hard <= 1, distil >= 0 and contrast >= 0")
        if min(temperature, queue, out) <= 0 or not 0 <= momentum < 1:
            raise ValueError("ncl needs temperature > 0, queue > 0, out > 0 and 0 <= momentum < 1")
        self.backbone = branched([parts.backbone() for _ in range(experts)], None)
        dim: int = self.backbone.dim
        self.head = Heads(parts.head(dim) for _ in range(experts))
        self.hard = max(1, math.floor(hard * len(parts.counts) + 1e-9))
        self.distil, self.contrast, self.temperature, self.momentum = distil, contrast, temperature, momentum
        if contrast:
            self.project = Heads(_projector(dim, out) for _ in range(experts))
            copies = Heads(_projector(dim, out) for _ in range(experts))
            self.slow = Followers(branched([parts.backbone() for _ in range(experts)], None), copies)
            self.queues = nn.ModuleList(Queue(queue, out) for _ in range(experts))
        self.register_buffer("counts", parts.counts, persistent=False)
        self.fresh = ("project.", "slow.", "queues.")

    def keep(self) -> list[str]:
        """What predicts."""
        return [name for name in self.state_dict() if name.startswith(("backbone.", "head."))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch.views[0])
        logits = self.head(features)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = wide + self.counts.to(wide).clamp(min=1).log()
        focus = focused(z, hard_classes(wide[:, 0], batch.target, self.hard))
        losses = {
            "loss": cross_entropies(z, batch.target) + cross_entropies(focus, batch.target),
            "collaboration": self.distil * (disagreement(z) + disagreement(focus)),
        }
        if self.contrast:
            losses["contrast"] = self.contrast * self._instances(batch, features)
        return {name: mean(own) for name, own in losses.items()}

    def _instances(self, batch: Batch, features: Tensor) -> Tensor:
        """The instance contrast [B] with the queues as the batch finds them; then the keys join them."""
        if len(batch.views) < 2:
            raise ValueError("ncl with contrast compares two views of each image, the stage has one")
        self.slow.follow(self.backbone, self.project, momentum=self.momentum)
        queued = torch.stack([queue.rows for queue in self.queues])  # type: ignore[misc]
        keys = F.normalize(self.slow(batch.views[1]), dim=2)
        if self.training:
            rows, _ = gather_rows(keys)
            for queue, own in zip(self.queues, rows.unbind(1), strict=True):
                queue.push(own, rows.new_zeros(len(rows), dtype=torch.long))  # type: ignore[operator]
        queries = F.normalize(self.project(features), dim=2)
        return instance_contrast(queries, keys, queued, self.temperature)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        return named(self.head(self.backbone(images)))


def _projector(dim: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))


def hard_classes(logits: Tensor, target: Tensor, number: int) -> Tensor:
    """The target and, of the other classes, those with the largest logits, `number` in all: bool [B, C]."""
    chosen = logits.detach().scatter(1, target[:, None], math.inf).topk(number, 1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)


def focused(logits: Tensor, hard: Tensor) -> Tensor:
    """Logits [B, E, C] with 0, as published and not minus infinity, for classes that are not `hard` [B, C]."""
    return logits.masked_fill(~hard[:, None], 0.0)


def cross_entropies(logits: Tensor, target: Tensor) -> Tensor:
    """The sum over the experts [B] of the cross-entropies of logits [B, E, C]."""
    return F.cross_entropy(logits.transpose(1, 2), target[:, None].expand(logits.shape[:2]), reduction="none").sum(1)


def disagreement(logits: Tensor) -> Tensor:
    """sum_{i != j} KL(p_j || p_i + 1e-9) / (E - 1) [B] of logits [B, E, C] (the paper's equation 5).

    Gradients flow into both sides.  Nothing becomes infinite or NaN where a probability is 0.
    """
    log = logits.log_softmax(2)
    # log(p + tiny) without taking the logarithm of a probability that may have become 0
    learnt = torch.logaddexp(log, log.new_tensor(TINY).log())
    number = logits.shape[1]
    pairs = [log[:, j].exp() * (log[:, j] - learnt[:, i]) for i, j in permutations(range(number), 2)]
    return torch.stack(pairs).sum((0, 2)) / (number - 1)


def instance_contrast(queries: Tensor, keys: Tensor, queues: Tensor, temperature: float) -> Tensor:
    """The sum over the experts [B] of -log(e^(q.k/t) / (e^(q.k/t) + sum over the queue of e^(q.r/t))).

    queries, keys: rows of unit length [B, E, D], a query's key in its own place; queues: [E, K, D].
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    q, k = queries.to(wide), keys.to(wide)
    with torch.autocast(q.device.type, enabled=False):
        own = (q * k).sum(2, keepdim=True) / temperature
        others = torch.einsum("bed,ekd->bek", q, queues.to(wide)) / temperature
    return (torch.cat([own, others], 2).logsumexp(2) - own[:, :, 0]).sum(1)
