"""Parametric contrastive learning: class centres, two views and a queue in one loss (Cui et al., PaCo, ICCV 2021)."""

import torch
from torch import Tensor, nn

from rayltr.contrast import Projector, parametric
from rayltr.interface import Batch, Parts
from rayltr.momentum import Followers, Queue
from rayltr.parallel import gather_rows, mean


class Method(nn.Module):
    """One loss over the classes, the batch and a queue; the head, whose rows are the centres, is `main`.

    View 1 goes through the network, view 2 through one that follows it with `momentum` (its keys carry no gradient
    and fill the queue).  The term is `contrast`, the mean of `rayltr.contrast.parametric` with the log prior added to
    the logits; it takes the place of the stage's loss, class weight and mixing (positives need one class).

    alpha, beta, gamma > 0: see `parametric`; temperature, class_temperature > 0; queue: rows (published: 1024 for
    CIFAR, 8192); hidden 0 means as wide as the features.  Raises ValueError for values outside.
    """

    views = 2
    own_loss = True
    stacks = True
    counts: Tensor

    def __init__(
        self,
        parts: Parts,
        *,
        alpha: float = 0.01,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 0.05,
        class_temperature: float = 1.0,
        momentum: float = 0.999,
        queue: int = 1024,
        hidden: int = 0,
        out: int = 32,
    ):
        super().__init__()
        if min(alpha, beta, gamma, temperature, class_temperature, queue) <= 0 or not 0 <= momentum < 1:
            raise ValueError("paco needs alpha, beta, gamma, queue and both temperatures > 0 and 0 <= momentum < 1")
        self.backbone = parts.backbone()
        dim: int = self.backbone.dim  # type: ignore[assignment]
        self.head = parts.head(dim)
        self.project = Projector(dim, hidden or dim, out)
        self.slow = Followers(parts.backbone(), Projector(dim, hidden or dim, out))
        self.queue = Queue(queue, out)
        self.momentum, self.class_temperature = momentum, class_temperature
        self.weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "temperature": temperature}
        self.register_buffer("counts", parts.counts, persistent=False)
        self.fresh = ("project.", "slow.", "queue.")

    def keep(self) -> list[str]:
        """What predicts."""
        return [name for name in self.state_dict() if name.startswith(("backbone.", "head."))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch.views[0])
        queries, logits = self.project(features), self.head(features)
        rows, labels, start = self._bank(batch, queries)
        place = start + torch.arange(len(queries), device=queries.device)
        centred = self.rebalanced(logits)
        losses = parametric(queries, rows, batch.target, labels, place, centred, **self.weights)
        return {"contrast": mean(losses)}

    def rebalanced(self, logits: Tensor) -> Tensor:
        """The logits with the log prior added, over their temperature, in float32 or wider."""
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        n = self.counts.to(z).clamp(min=1)
        return (z + (n / n.sum()).log()) / self.class_temperature

    def _bank(self, batch: Batch, queries: Tensor) -> tuple[Tensor, Tensor, int]:
        """What the queries are compared with: those of all workers, all keys, the queue; where one's own begin.

        Then the keys join the queue.
        """
        self.slow.follow(self.backbone, self.project, momentum=self.momentum)
        keys, _ = gather_rows(self.slow(batch.views[1]))
        labels, _ = gather_rows(batch.target)
        own, start = gather_rows(queries)
        bank = torch.cat([own, keys, self.queue.rows.to(own)])
        known = torch.cat([labels, labels, self.queue.labels])
        if self.training:
            self.queue.push(keys, labels)
        return bank, known, start

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        return {"main": self.head(self.backbone(images))}
