"""Self-distillation with two classifiers: hard targets for one, a teacher's for the other (Li et al., SSD, 2021)."""

import torch
from torch import Tensor, nn

from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.methods.dive import divergence
from rayltr.parallel import mean, synchronised

STATISTICS = ("running", "batch")


class Method(supervised.Method):
    """A student of hard and soft targets; the heads are `soft`, `hard` and `both`, the mean of their logits.

    The terms are `loss`, the stage's loss of the classifier `hard`, and `distilled`, `distil` times
    T^2 KL(softmax(z' / T), softmax(z / T)) of the classifier `head` (soft) from the teacher's logits z', averaged over
    the images (Hinton et al., 2015).  The teacher, a network whose classifier was re-balanced, sees the batch of the
    student, which has weights of its own from the start.  `student` goes on with one of the two classifiers.

    distil >= 0 and temperature T > 0 (published: 1 and 2).  teacher_bn: the teacher normalises by its "running"
    statistics, or by those of the "batch", as the published program does.  reduction: see `supervised`.
    Raises ValueError for values outside, and for mixing inside the network: the teacher sees images.
    """

    taught = True

    def __init__(
        self,
        parts: Parts,
        *,
        distil: float = 1.0,
        temperature: float = 2.0,
        teacher_bn: str = "running",
        reduction: str = "weighted_mean",
    ):
        if distil < 0 or temperature <= 0:
            raise ValueError(f"distil needs distil >= 0 and temperature > 0, not {distil} and {temperature}")
        if teacher_bn not in STATISTICS:
            raise ValueError(f"unknown teacher_bn {teacher_bn!r}: known: {', '.join(STATISTICS)}")
        if parts.layer:
            raise ValueError("distil cannot mix inside the network, where its teacher sees nothing; mix the images")
        torch.manual_seed(torch.initial_seed() + 1)  # else the weights would be those that the first stage began with
        super().__init__(parts, reduction=reduction)
        self.hard = parts.head(self.backbone.dim)  # type: ignore[arg-type]
        self.fresh = (*self.fresh, *(f"hard.{name}" for name in getattr(self.hard, "fresh", ())))
        self.distil, self.temperature = distil, temperature
        self.teacher: tuple[nn.Module | None] = (parts.teacher,)  # in a tuple: no part of this method's own weights
        if parts.teacher is not None and teacher_bn == "batch":
            by_batch(parts.teacher)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch.views[0])
        with torch.no_grad():
            taught = next(iter(self.teacher[0].predict(batch.views[0]).values()))  # type: ignore[union-attr, operator]
        far = divergence(self.head(features), taught, self.temperature, 1.0)
        return {"loss": self.compared(self.hard(features), features, batch), "distilled": self.distil * mean(far)}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        features = self.backbone(images)
        soft, hard = self.head(features), self.hard(features)
        return {"soft": soft, "hard": hard, "both": (soft + hard) / 2}


def by_batch(module: nn.Module) -> None:
    """Lets BatchNorm normalise by the batch of all workers, and nothing else behave as in training."""
    for part in synchronised(module).modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
