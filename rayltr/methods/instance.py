"""Instance discrimination beside the classifier, with a queue that knows classes (Li et al., SSD, ICCV 2021, stage I).

A momentum contrast (He et al., MoCo, 2020) whose negatives are the queued images of other classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.contrast import similarities
from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.methods.rotation import TURNS, guessed, turned
from rayltr.momentum import Followers, Queue
from rayltr.parallel import gather_rows, mean


class Method(supervised.Method):
    """The stage's loss on view 1, and view 1 told from other images by view 2; the head is `main`.

    View 1 is the query, view 2 the key, which goes through a network that follows with `momentum`: at every step it
    holds what the other one was before that step.  The terms are `loss`, `contrast`, `contrast` times the mean of
    `instance_contrast`, and with `rotation` > 0 `rotation`, as in the method of that name.

    contrast, temperature > 0, 0 <= momentum < 1 (published: 1, 0.2 and 0.999); out: size of the vectors compared.
    queue: rows; None is one epoch, the largest multiple of the batch that is not above the training images.
    queue_label_init: the class of the random rows that the queue starts with: -1, none, or as published 0, so that
    images of class 0 have no negatives until the queue is filled.
    groups: keys pass in so many parts of the batch, images of neighbouring places in different ones, and BatchNorm
    sees one part at a time (MoCo's shuffled BatchNorm on so many devices).  Whatever the number of workers, a part is
    normalised over all of them, and each needs an image in it.
    Raises ValueError for values outside, for mixing and for a worker with fewer images than groups.
    """

    views = 2

    def __init__(
        self,
        parts: Parts,
        *,
        contrast: float = 1.0,
        rotation: float = 0.0,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue: int | None = None,
        queue_label_init: int = -1,
        groups: int = 1,
        out: int = 128,
        reduction: str = "weighted_mean",
    ):
        if min(contrast, temperature) <= 0 or rotation < 0 or not 0 <= momentum < 1:
            raise ValueError("instance needs contrast > 0, rotation >= 0, temperature > 0 and 0 <= momentum < 1")
        if min(groups, out, 1 if queue is None else queue) < 1 or queue_label_init not in (-1, 0):
            raise ValueError("instance needs groups, out and queue of at least 1, and -1 or 0 as queue_label_init")
        super().__init__(parts, reduction=reduction)
        dim: int = self.backbone.dim  # type: ignore[assignment]
        self.project = projector(dim, out)
        self.slow = Followers(parts.backbone(), projector(dim, out))
        self.queue = Queue(queue or whole_epoch(parts), out)
        self.queue.labels.fill_(queue_label_init)
        if rotation:
            self.angle = nn.Linear(dim, TURNS)
        self.contrast, self.rotation, self.groups = contrast, rotation, groups
        self.temperature, self.momentum = temperature, momentum
        self.fresh = (*self.fresh, "project.", "slow.", "queue.", "angle.")

    def keep(self) -> list[str]:
        """What predicts."""
        return [name for name in self.state_dict() if name.startswith(("backbone.", "head."))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if batch.mixed is not None or self.layer:
            raise ValueError("instance compares the view that would be mixed; leave the mixing out")
        images = batch.views[0]
        copies, turns = turned(images, batch.rows) if self.rotation else (None, None)
        seen = self.backbone(images if copies is None else torch.cat([images, copies]))
        features, others = seen.tensor_split([len(images)])
        losses = self._instances(self.project(features), batch)
        terms = {"loss": self.compared(self.head(features), features, batch), "contrast": self.contrast * mean(losses)}
        if turns is not None:
            terms["rotation"] = self.rotation * guessed(self.angle(others), turns)
        return terms

    def _instances(self, projected: Tensor, batch: Batch) -> Tensor:
        """The contrast [B] with the queue as the batch finds it; then the keys of all workers join it."""
        self.slow.follow(self.backbone, self.project, momentum=self.momentum)
        rows, known = self.queue.content()
        labels, start = gather_rows(batch.target)
        keys = self._keys(batch.views[1], start)
        if self.training:
            self.queue.push(gather_rows(keys)[0], labels)
        return instance_contrast(unit(projected), keys, rows, batch.target, known, self.temperature)

    def _keys(self, images: Tensor, start: int) -> Tensor:
        """What the slow network makes of view 2, [B, out]; `start`: how many images earlier workers have."""
        if len(images) < self.groups:
            raise ValueError(f"a batch of {len(images)} images per worker cannot be cut into {self.groups} groups")
        places = [slice((group - start) % self.groups, None, self.groups) for group in range(self.groups)]
        parts = [unit(self.slow(images[place])) for place in places]
        keys = parts[0].new_empty(len(images), parts[0].shape[1])
        for place, part in zip(places, parts, strict=True):
            keys[place] = part
        return keys


def projector(dim: int, out: int) -> nn.Module:
    """MoCo v2's, without BatchNorm."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)))


def whole_epoch(parts: Parts) -> int:
    """How many images an epoch of whole batches shows; at least one batch."""
    images = int(parts.counts.sum())
    return max(images - images % parts.batch, parts.batch)


def instance_contrast(
    queries: Tensor, keys: Tensor, rows: Tensor, target: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """-log(e^(q.k/T) / (e^(q.k/T) + sum of e^(q.r/T) over the rows r of other classes)) [B].

    queries, keys [B, D] and rows [K, D] have unit length; target [B] and labels [K] are their classes.  It is 0 where
    all rows are of the query's class.
    """
    own = (queries * keys).sum(1, keepdim=True) / temperature
    others = similarities(queries, rows, temperature).masked_fill(target[:, None] == labels, -torch.inf)
    return torch.cat([own, others], 1).logsumexp(1) - own[:, 0]
