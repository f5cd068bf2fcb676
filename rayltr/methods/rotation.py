"""Rotation beside the classifier, a self-supervised task for small images (Gidaris et al., 2018; Li et al., SSD, 2021).

The first stage of self-supervision to distillation; `instance` is its other task, and can have this one beside it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.parallel import gather_rows, mean

TURNS = 4


class Method(supervised.Method):
    """The stage's loss on upright images, and which way their turned copies are turned; the head is `main`.

    The terms are `loss` and `rotation`, `rotation` times the cross-entropy of four quarter turns (see `turned`).
    Both halves pass through the network at once.  Mixed images are turned as they are.

    rotation > 0: the term's weight (the paper gives none).  reduction: see `supervised`.  Raises ValueError for values
    outside, for mixing inside the network and, at the first batch, for images that are not square.
    """

    def __init__(self, parts: Parts, *, rotation: float = 1.0, reduction: str = "weighted_mean"):
        if rotation <= 0:
            raise ValueError(f"rotation needs rotation > 0, not {rotation}")
        if parts.layer:
            raise ValueError("rotation cannot mix inside the network, where turned copies pass too; mix the images")
        super().__init__(parts, reduction=reduction)
        self.rotation = rotation
        self.angle = nn.Linear(self.backbone.dim, TURNS)  # type: ignore[arg-type]
        self.fresh = (*self.fresh, "angle.")

    def keep(self) -> list[str]:
        """What predicts."""
        return [name for name in self.state_dict() if name.startswith(("backbone.", "head."))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        copies, turns = turned(batch.views[0], batch.rows)
        upright, others = self.backbone(torch.cat([batch.views[0], copies])).chunk(2)
        loss = self.compared(self.head(upright), upright, batch)
        return {"loss": loss, "rotation": self.rotation * guessed(self.angle(others), turns)}


def turned(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Turned copies of images [B,3,S,S], and by how many quarter turns, counter-clockwise to the eye: int64 [B].

    Row r at place i of the batch of all workers is turned (r + i) mod 4 times.  Places are random, so the angles of an
    image are as random as draws, though nothing is drawn here; and where a sampler gives places to classes, rows still
    differ.  Raises ValueError for images that are not square.
    """
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"rotation needs square images, not {images.shape[2]} x {images.shape[3]}; give a --size")
    _, start = gather_rows(images.new_zeros(len(images)))
    turns = (rows + start + torch.arange(len(images), device=images.device)) % TURNS
    by_angle = torch.stack([images.rot90(times, (2, 3)) for times in range(TURNS)])
    return by_angle[turns, torch.arange(len(images), device=images.device)], turns


def guessed(logits: Tensor, turns: Tensor) -> Tensor:
    """The cross-entropy of logits [B, 4], the mean over the images of all workers."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, turns, reduction="none")
    return mean(losses)
