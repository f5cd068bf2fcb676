"""Generalised parametric contrastive learning: both views learn, no second network (Cui et al., GPaCo, TPAMI 2023)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.contrast import parametric
from rayltr.interface import Batch, Parts
from rayltr.momentum import Queue
from rayltr.parallel import gather_rows, mean


class Method(nn.Module):
    """As `paco`, but both views go through the one network with gradient, and each is an anchor; the head is `main`.

    The queue holds what view 2 gave in earlier steps.  smoothing: share of the class's weight that is spread over
    the other classes (0 ... 1; published: 0.1 for the full ImageNet, else 0).  The other keywords are those of
    `paco`; the projector has two hidden layers.  Raises ValueError as `paco` does.
    """

    views = 2
    own_loss = True
    stacks = True
    counts: Tensor

    def __init__(
        self,
        parts: Parts,
        *,
        alpha: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 0.05,
        class_temperature: float = 1.0,
        smoothing: float = 0.0,
        queue: int = 1024,
        hidden: int = 0,
        out: int = 32,
    ):
        super().__init__()
        if min(alpha, beta, gamma, temperature, class_temperature, queue) <= 0 or not 0 <= smoothing < 1:
            raise ValueError("gpaco needs alpha, beta, gamma, queue and both temperatures > 0 and 0 <= smoothing < 1")
        self.backbone = parts.backbone()
        dim: int = self.backbone.dim  # type: ignore[assignment]
        wide = hidden or dim
        self.head = parts.head(dim)
        self.project = nn.Sequential(
            *(nn.Linear(dim, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, out))
        )
        self.queue = Queue(queue, out)
        self.class_temperature = class_temperature
        self.weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "temperature": temperature,
                        "smoothing": smoothing}  # fmt: skip
        self.register_buffer("counts", parts.counts, persistent=False)
        self.fresh = ("project.", "queue.")

    def keep(self) -> list[str]:
        """What predicts."""
        return [name for name in self.state_dict() if name.startswith(("backbone.", "head."))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(torch.cat(batch.views))
        wide = torch.promote_types(features.dtype, torch.float32)
        anchors = F.normalize(self.project(features).to(wide))
        target = batch.target.repeat(len(batch.views))
        rows, start = gather_rows(anchors)
        labels, _ = gather_rows(target)
        place = start + torch.arange(len(target), device=target.device)
        n = self.counts.to(wide).clamp(min=1)
        logits = (self.head(features).to(wide) + (n / n.sum()).log()) / self.class_temperature
        bank, known = torch.cat([rows, self.queue.rows.to(rows)]), torch.cat([labels, self.queue.labels])
        if self.training:
            keys, _ = gather_rows(anchors[len(batch.target) :].detach())
            self.queue.push(keys, gather_rows(batch.target)[0])
        losses = parametric(anchors, bank, target, known, place, logits, **self.weights)
        return {"contrast": mean(losses)}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        return {"main": self.head(self.backbone(images))}
