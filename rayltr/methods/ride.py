"""Routing diverse distribution-aware experts: RIDE's first stage (Wang et al., ICLR 2021); `route` is the second."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rayltr.backbones import branched
from rayltr.experts import Heads, named
from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.parallel import all_sum, world


class Method(supervised.Method):
    """Experts that share the beginning of a network; the heads are their mean `main`, `expert1`, `expert2`, ...

    The terms are `loss`, the sum over the experts of the stage's loss, and `diversity`, `diversity` times the sum of
    their divergences from the mean of all (see `divergence`).  The published loss is LDAM of logits that the head has
    scaled already: after `cosine(scale=30)`, `ldam(scale=1, max_margin=15)` takes margins of up to 0.5 from cosines.

    experts >= 2; own: the last residual stages that each expert has for itself (published: 2).
    diversity: published -0.45 for CIFAR, -0.2 for larger sets; 0 leaves the term out and changes nothing else.
    together: the loss is that of the mean of the logits, once per expert (what the published code turns to, unasked,
    where its factor is 0).  tempered: see `temperatures`; published 0 until classes are re-weighted, then 0.05 for
    CIFAR, 0.02 and 0.015 for larger sets.  reduction: see `supervised`.
    Raises ValueError for values outside and for a backbone that cannot be shared.
    """

    temperature: Tensor

    def __init__(
        self,
        parts: Parts,
        *,
        experts: int = 3,
        own: int = 2,
        diversity: float = -0.2,
        together: bool = False,
        tempered: float = 0.0,
        reduction: str = "weighted_mean",
    ):
        if experts < 2 or not 0 <= tempered <= 1:
            raise ValueError(f"ride needs experts >= 2 and 0 <= tempered <= 1, not {experts} and {tempered}")
        several = replace(
            parts,
            backbone=lambda: branched([parts.backbone() for _ in range(experts)], own),
            head=lambda dim: Heads(parts.head(dim) for _ in range(experts)),
        )
        super().__init__(several, reduction=reduction)
        self.diversity, self.together = diversity, together
        self.register_buffer("temperature", temperatures(parts.counts, tempered).float(), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits, features = self.classified(batch)
        judged = logits.mean(1, keepdim=True).expand_as(logits) if self.together else logits
        pairs = zip(judged.unbind(1), features.unbind(1), strict=True)
        terms = {"loss": torch.stack([self.compared(own, seen, batch) for own, seen in pairs]).sum()}
        if self.diversity:
            far = divergence(logits, self.temperature)
            terms["diversity"] = self.diversity * far.sum() * world() / all_sum(far.new_tensor(len(far)))
        return terms

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        return named(self.head(self.backbone(images)))


def temperatures(counts: Tensor, tempered: float) -> Tensor:
    """Temperatures in (0, 1], float64 [C], that rise with the share p of a class: C p r + 1 - r over their maximum.

    tempered: r in [0, 1]; 0 gives 1 for every class.
    """
    n = counts.double().clamp(min=1)
    found = len(n) * n / n.sum() * tempered + 1 - tempered
    return found / found.max()


def divergence(logits: Tensor, temperature: Tensor) -> Tensor:
    """mean(t)^2 sum_e KL(softmax(mean of all / t) || softmax(z_e / t)) [B], of logits [B, E, C] and t [C].

    No gradient flows through the mean.
    """
    t = temperature.to(torch.promote_types(logits.dtype, torch.float32))
    z = logits.to(t) / t
    mean = z.mean(1, keepdim=True).detach().log_softmax(2).expand_as(z)
    return t.mean() ** 2 * F.kl_div(z.log_softmax(2), mean, reduction="none", log_target=True).sum((1, 2))
