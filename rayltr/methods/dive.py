"""Virtual examples from a balanced teacher: DiVE (He et al., Distilling Virtual Examples, ICCV 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.parallel import mean


class Method(supervised.Method):
    """Distillation from a teacher whose predictions are flattened, beside the supervised loss; the head is `main`.

    The teacher, in the paper a network trained with the balanced softmax, sees the batch of the student.  The terms
    are `distilled`, alpha T^2 KL(q, softmax(z / T)), where q is the teacher's softmax(z / T) to the power `power` and
    normalised again, and `loss`, (1 - alpha) times the supervised loss (He et al., 2021, section 3).
    alpha in [0, 1]; temperature T > 0; power > 0, where 1 leaves the teacher as it is.  The other keywords are those
    of `supervised`.  Raises ValueError for values outside, and for mixing inside the network: the teacher sees images.
    """

    taught = True

    def __init__(
        self,
        parts: Parts,
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
        power: float = 0.5,
        reduction: str = "weighted_mean",
        frozen: bool = False,
        drift: bool = False,
        fresh_head: bool = False,
    ):
        if not 0 <= alpha <= 1 or temperature <= 0 or power <= 0:
            raise ValueError(f"dive needs 0 <= alpha <= 1, temperature > 0 and power > 0, not {alpha}, {temperature} "
                             f"and {power}")  # fmt: skip
        if parts.layer:
            raise ValueError("dive cannot mix inside the network, where its teacher sees nothing; mix the images")
        super().__init__(parts, reduction=reduction, frozen=frozen, drift=drift, fresh_head=fresh_head)
        self.alpha, self.temperature, self.power = alpha, temperature, power
        self.teacher: tuple[nn.Module | None] = (parts.teacher,)  # in a tuple: no part of this method's own weights

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits, features = self.classified(batch)
        with torch.no_grad():
            taught = next(iter(self.teacher[0].predict(batch.views[0]).values()))  # type: ignore[union-attr, operator]
        far = divergence(logits, taught, self.temperature, self.power)
        loss = self.compared(logits, features, batch)
        return {"distilled": self.alpha * mean(far), "loss": (1 - self.alpha) * loss}


def divergence(logits: Tensor, taught: Tensor, temperature: float, power: float) -> Tensor:
    """T^2 KL(q, p) [B] of logits [B,C] from a teacher's: p = softmax(z / T), q = softmax(power z' / T).

    A softmax to a power, normalised again, is the softmax of the logits times that power.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    found = F.log_softmax(logits.to(wide) / temperature, 1)
    wanted = F.log_softmax(taught.to(wide) * power / temperature, 1)
    return temperature**2 * F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)
