"""Supervised training of a backbone and a classifier: the method behind most of the field's tricks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rayltr.interface import Batch, Parts
from rayltr.mixing import blend
from rayltr.parallel import all_sum, world

REDUCTIONS = ("weighted_mean", "mean")


class Method(nn.Module):
    """Cross-entropy-like losses on the first view; the head is `main`.

    reduction: "weighted_mean" divides by the sum of the class weights of the batch (what the `weight=` of torch's
    cross-entropy does; published CSCE, CB-CE, LDAM-DRW), "mean" by the number of images (published focal losses).
    frozen: the backbone is not trained (classifier re-training, LWS); its BatchNorm statistics stay too, unless
    `drift` is True, as in the published code of cRT and LWS.
    fresh_head: a stage initialised from another starts with a new classifier (cRT).
    """

    stacks = True
    """All that is trained of the backbone goes through one call of it: see `rayltr.stacked`."""
    counts: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        parts: Parts,
        *,
        reduction: str = "weighted_mean",
        frozen: bool = False,
        drift: bool = False,
        fresh_head: bool = False,
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}: known: {', '.join(REDUCTIONS)}")
        self.backbone = parts.backbone()
        self.head = parts.head(self.backbone.dim)  # type: ignore[arg-type]
        self.backbone.requires_grad_(not frozen)
        self.anew = ("head.",) if fresh_head else ()
        self.fresh = tuple(f"head.{name}" for name in getattr(self.head, "fresh", ()))
        self.still = frozen and not drift
        self.reduction, self.loss, self.layer = reduction, parts.loss, parts.layer
        self.place()
        self.register_buffer("counts", parts.counts, persistent=False)
        self.register_buffer("class_weight", parts.weight, persistent=False)

    def train(self, mode: bool = True) -> "Method":
        super().train(mode)
        if self.still:
            self.backbone.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.compared(*self.classified(batch), batch)}

    def classified(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B,C] and features [B,D] of the first view, mixed inside the network where the batch asks for it."""
        with self.mixed_inside(batch):
            features = self.backbone(batch.views[0])
            return self.head(features), features

    def compared(self, logits: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """The reduced loss against the target, and against the other target of a mixed batch."""
        if batch.mixed is None:
            return self._mean(logits, features, batch.target, torch.ones_like(batch.target))
        assert batch.weight is not None
        own = self._mean(logits, features, batch.target, batch.weight)
        return own + self._mean(logits, features, batch.mixed, 1 - batch.weight)

    def _mean(self, logits: Tensor, features: Tensor, target: Tensor, share: Tensor) -> Tensor:
        """The reduced loss over the batches of all workers, so that the gradient is that of one process."""
        losses = self.loss(logits, target, self.counts, features)
        weight = losses.new_ones(len(losses)) if self.class_weight is None else self.class_weight[target]
        norm = weight.sum() if self.reduction == "weighted_mean" else losses.new_tensor(len(losses))
        return (share * weight * losses).sum() * world() / all_sum(norm)

    def place(self) -> nn.Module | None:
        """The part of the network whose output is mixed.  Raises ValueError for a place that does not exist."""
        places = {"pool": self.backbone, "fc": self.head, **self.backbone.layers()}  # type: ignore[operator]
        if self.layer is not None and self.layer not in places:
            raise ValueError(f"this network has no layer {self.layer!r} to mix at; it has {', '.join(places)}")
        return places.get(self.layer or "")

    @contextmanager
    def mixed_inside(self, batch: Batch) -> Iterator[None]:
        part, partner, share = self.place(), batch.partner, batch.weight
        if part is None or partner is None or share is None:
            yield
            return

        def mix(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            return blend(output, partner, share)

        handle = part.register_forward_hook(mix)
        try:
            yield
        finally:
            handle.remove()

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        return {"main": self.head(self.backbone(images))}
