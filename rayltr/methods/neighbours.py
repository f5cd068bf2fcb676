"""The nearest training images on frozen features, whose classes vote (Wu et al., CVPR 2018, section 3.4)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.parallel import all_sum

NOBODY = 1e-4
"""The share of all votes that is spread evenly over the classes, so that a class without a vote has a finite logit."""


class Method(supervised.Method):
    """A vote of the `k` nearest training images of a stage given as `init=`; the head is `main`.

    The usual stage has epochs=0, since nothing has to be learnt; in one of more epochs the temperature learns from
    the stage's loss, where an image is not its own neighbour.  The features of all training images are a part of
    what is stored.

    temperature > 0: a vote weighs exp(cosine / temperature).  Raises ValueError for values outside and for mixing
    inside the network.
    """

    head: "Vote"

    def __init__(self, parts: Parts, *, k: int = 20, temperature: float = 0.07, reduction: str = "weighted_mean"):
        if k < 1 or temperature <= 0:
            raise ValueError(f"neighbours needs k >= 1 and temperature > 0, not {k} and {temperature}")
        if parts.layer:
            raise ValueError("neighbours cannot mix inside the network, which is frozen; mix the images")
        super().__init__(parts, reduction=reduction, frozen=True)
        self.head = Vote(self.backbone.dim, parts.counts, k, temperature)  # type: ignore[arg-type]
        self.anew = ("head.",)

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], size: int) -> None:
        """Takes the features of all `size` training images, of which `batches` are those of this worker.

        batches: rows int64 [B], raw images [B,3,H,W] in [0, 1], target int64 [B].  A stage that goes on has them.
        """
        if self.head.known:
            return
        self.eval()
        bank, target = torch.zeros_like(self.head.bank), torch.zeros_like(self.head.target)
        for rows, images, classes in batches:
            bank[rows], target[rows] = F.normalize(self.backbone(images).to(bank)), classes
        self.head.bank, self.head.target = all_sum(bank), all_sum(target)
        self.head.known.fill_(True)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch.views[0])
        return {"loss": self.compared(self.head(features, batch.rows), features, batch)}


class Vote(nn.Module):
    """Log shares of the votes [B, C] for features [B, dim]; rows: images of the bank that have no vote on their own."""

    bank: Tensor
    target: Tensor
    known: Tensor

    def __init__(self, dim: int, counts: Tensor, k: int, temperature: float):
        super().__init__()
        size = int(counts.sum())
        self.classes, self.k = len(counts), min(k, size - 1)
        self.sharpness = nn.Parameter(-torch.tensor(temperature).log())
        self.register_buffer("bank", F.normalize(torch.randn(size, dim)))
        self.register_buffer("target", torch.arange(len(counts)).repeat_interleave(counts))
        self.register_buffer("known", torch.tensor(False))

    def forward(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            cosine = F.normalize(features.to(self.bank)) @ self.bank.T
        if rows is not None:
            cosine = cosine.scatter(1, rows[:, None], -torch.inf)
        near, which = cosine.topk(self.k)
        votes = (near * self.sharpness.exp()).softmax(1)
        shares = votes.new_zeros(len(votes), self.classes).scatter_add(1, self.target[which], votes)
        return (shares * (1 - NOBODY) + NOBODY / self.classes).log()
