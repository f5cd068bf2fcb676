"""Supervised contrastive learning, alone or beside a classifier (Khosla et al., NeurIPS 2020)."""

import torch
from torch import Tensor

from rayltr.contrast import Projector, supervised
from rayltr.interface import Batch, Parts
from rayltr.methods import supervised as plain
from rayltr.parallel import gather_rows, mean


class Method(plain.Method):
    """The supervised contrastive loss of two views, and the stage's loss of the first; the head is `main`.

    The terms are `contrast`, `contrast` times `rayltr.contrast.supervised`, and `loss`, `ce` times the stage's loss.
    With ce = 0 only features are learnt, and a later stage with a frozen backbone trains the classifier.

    ce, contrast >= 0 (the published code has contrast = temperature / 0.07); temperature > 0; hidden, out: sizes of
    the projector.  Raises ValueError for values outside and for mixing inside the network.
    """

    views = 2

    def __init__(
        self,
        parts: Parts,
        *,
        ce: float = 0.0,
        contrast: float = 1.0,
        temperature: float = 0.1,
        hidden: int = 512,
        out: int = 128,
        reduction: str = "weighted_mean",
    ):
        if min(ce, contrast) < 0 or temperature <= 0:
            raise ValueError(
                f"supcon needs ce >= 0, contrast >= 0 and temperature > 0, not {ce}, {contrast}, {temperature}"
            )
        if parts.layer:
            raise ValueError("supcon cannot mix inside the network, where all views pass at once; mix the images")
        super().__init__(parts, reduction=reduction)
        self.ce, self.contrast, self.temperature = ce, contrast, temperature
        self.project = Projector(self.backbone.dim, hidden, out)  # type: ignore[arg-type]
        self.fresh = (*self.fresh, "project.")

    def keep(self) -> list[str]:
        """What predicts: the projector has served."""
        return [name for name in self.state_dict() if not name.startswith("project.")]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if batch.mixed is not None:
            raise ValueError("supcon compares the view that would be mixed; leave the mixing out")
        features = self.backbone(torch.cat(batch.views))
        first = features[: len(batch.views[0])]
        anchors, target = self.project(features), batch.target.repeat(len(batch.views))
        bank, start = gather_rows(anchors)
        labels, _ = gather_rows(target)
        place = start + torch.arange(len(target), device=target.device)
        losses = supervised(anchors, bank, target, labels, place, temperature=self.temperature)
        loss = self.compared(self.head(first), first, batch)
        return {"contrast": self.contrast * mean(losses), "loss": self.ce * loss}
