"""Balanced contrastive learning: three views, one for the classifier and two to compare (Zhu et al., CVPR 2022)."""

import torch
from torch import Tensor

from rayltr.contrast import VARIANTS, Projector, balanced
from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.parallel import gather_rows, mean


class Method(supervised.Method):
    """The classification loss of view 1 and the balanced contrastive loss of views 2 and 3; the head is `main`.

    The terms are `loss`, `ce` times the stage's loss (published: `logit_adjusted`), and `contrast`, `contrast` times
    `rayltr.contrast.balanced`.  The prototypes are the raw rows of the classifier's weight after a projector of their
    own (section 3.3 of the paper and its code).  One pass through the network serves all views.

    ce, contrast >= 0 (published: 2 and 0.6 for CIFAR, 1 and 0.35 for larger sets); temperature > 0; hidden, out:
    sizes of both projectors (512 and 128, 2048 and 1024); variant, complement: see `balanced`.  The other keywords
    are those of `supervised`.  Raises ValueError for values outside, a head without one weight row per class and
    mixing inside the network.
    """

    views = 3

    def __init__(
        self,
        parts: Parts,
        *,
        ce: float = 2.0,
        contrast: float = 0.6,
        temperature: float = 0.1,
        hidden: int = 512,
        out: int = 128,
        variant: str = "L1",
        complement: bool = True,
        reduction: str = "weighted_mean",
    ):
        if min(ce, contrast) < 0 or temperature <= 0:
            raise ValueError(
                f"bcl needs ce >= 0, contrast >= 0 and temperature > 0, not {ce}, {contrast}, {temperature}"
            )
        if variant not in VARIANTS or (variant == "L3" and not complement):
            raise ValueError(f"bcl: variant is one of {', '.join(VARIANTS)} (L3 with the complement), not {variant!r}")
        if parts.layer:
            raise ValueError("bcl cannot mix inside the network, where all views pass at once; mix the images")
        super().__init__(parts, reduction=reduction)
        dim: int = self.backbone.dim  # type: ignore[assignment]
        if getattr(self.head, "weight", torch.empty(0)).shape != (len(parts.counts), dim):
            raise ValueError("bcl needs a head with one weight row per class, such as linear or cosine")
        self.ce, self.contrast = ce, contrast
        self.temperature, self.variant = temperature, variant
        self.project = Projector(dim, hidden, out)
        self.project_class = Projector(dim, hidden, out, fixed=True) if complement else None
        self.fresh = (*self.fresh, "project.", "project_class.")

    def keep(self) -> list[str]:
        """What predicts: the projectors have served."""
        return [name for name in self.state_dict() if not name.startswith("project")]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat(batch.views))
        first, others = features.tensor_split([len(batch.views[0])])
        loss = self.ce * self.compared(self.head(first), first, batch)
        return {"loss": loss, "contrast": self.contrast * self._contrast(others, batch.target)}

    def _contrast(self, features: Tensor, target: Tensor) -> Tensor:
        """The mean over the anchors of all workers; `features` [2B, D] are view 2 above view 3."""
        anchors = self.project(features)
        prototypes = self.project_class(self.head.weight) if self.project_class else None
        twice = target.repeat(2)
        bank, first = gather_rows(anchors)
        labels, _ = gather_rows(twice)
        place = first + torch.arange(len(twice), device=twice.device)
        losses = balanced(
            *(anchors, bank, twice, labels, place, prototypes), temperature=self.temperature, variant=self.variant
        )
        return mean(losses)
