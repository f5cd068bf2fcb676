"""The nearest class mean on frozen features (Kang et al., Decoupling, ICLR 2020, section 4.1)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.interface import Parts
from rayltr.methods import supervised
from rayltr.parallel import all_sum

FEATURES = ("cl2n", "l2n", "un")
FAR = -1e4
"""Added to the logit of a class without images."""


class Method(supervised.Method):
    """The means of the classes' features, taken from a stage given as `init=`; the head is `main`.

    The means are those of the plain training images, before the first epoch: the published classifier has epochs=0,
    and in a stage of more epochs they go on learning from the stage's loss, on frozen features.

    features: how they are compared, "un" as they are, "l2n" at unit length, "cl2n" at unit length after the mean of
    all images is taken away.  reduction: see `supervised`.  Raises ValueError for others.
    """

    def __init__(self, parts: Parts, *, features: str = "cl2n", reduction: str = "weighted_mean"):
        if features not in FEATURES:
            raise ValueError(f"ncm: features is one of {', '.join(FEATURES)}, not {features!r}")
        super().__init__(parts, reduction=reduction, frozen=True)
        self.head: Nearest = Nearest(self.backbone.dim, len(parts.counts), features)  # type: ignore[arg-type]
        self.anew = ("head.",)

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], size: int) -> None:
        """Takes the means of all `size` training images, of which `batches` are those of this worker.

        batches: rows int64 [B], raw images [B,3,H,W] in [0, 1], target int64 [B].  A stage that goes on has them.
        """
        if not self.head.known:
            self.eval()
            # all features at once, on the host: a mean of normalised features needs the mean of all of them first
            found = [(wide(self.backbone(images)).cpu(), target.cpu()) for _, images, target in batches]
            self.head.learn(found, size)


class Nearest(nn.Module):
    """Minus the squared distances [B, C] of features [B, D] from the class means `weight` [C, D]."""

    centre: Tensor
    bias: Tensor
    known: Tensor

    def __init__(self, dim: int, classes: int, features: str):
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("known", torch.tensor(False))

    def placed(self, features: Tensor) -> Tensor:
        """The features as they are compared."""
        if self.features == "un":
            return features
        return F.normalize(features - self.centre if self.features == "cl2n" else features)

    def forward(self, features: Tensor) -> Tensor:
        found = self.placed(wide(features))
        with torch.autocast(found.device.type, enabled=False):
            inner = found @ self.weight.to(found).T
        squares = found.square().sum(1, keepdim=True) + self.weight.square().sum(1)
        return 2 * inner - squares + self.bias

    @torch.no_grad()
    def learn(self, found: list[tuple[Tensor, Tensor]], size: int) -> None:
        """Takes the means of features [B, D] by class [B], from the batches of all workers, `size` images in all."""
        total, sums = (torch.zeros_like(own, dtype=torch.float64) for own in (self.centre, self.weight))
        counts = torch.zeros_like(self.bias)
        for features, _ in found:
            total += features.to(total.device).double().sum(0)
        self.centre.copy_(all_sum(total) / size)
        for features, target in found:
            sums.index_add_(0, target.to(sums.device), self.placed(features.to(sums.device)).double())
            counts += torch.bincount(target, minlength=len(counts)).to(counts)
        counts = all_sum(counts)
        self.weight.copy_(all_sum(sums) / counts.clamp(min=1)[:, None])
        self.bias.copy_(torch.where(counts > 0, 0.0, FAR))
        self.known.fill_(True)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
