"""What methods with several classifiers, the experts, have in common.  Features are [B, E, D], logits [B, E, C]."""

from typing import Any

import torch
from torch import Tensor, nn


class Heads(nn.ModuleList):
    """One classifier per expert: features [B, E, D] -> logits [B, E, C]."""

    @property
    def fresh(self) -> tuple[str, ...]:
        """What may be missing from the heads that these take over from (see `rayltr.heads`)."""
        found: Any = enumerate(self)
        return tuple(f"{number}.{name}" for number, head in found for name in getattr(head, "fresh", ()))

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(own) for head, own in zip(self, features.unbind(1), strict=True)], 1)


def is_expert(head: str) -> bool:
    """Whether a prediction of this name is that of one expert, and not of all or of something else."""
    return head.startswith("expert")


def named(logits: Tensor) -> dict[str, Tensor]:
    """Logits [B, E, C] as predictions [B, C]: `main`, the mean of the logits, then `expert1`, `expert2`, ...

    In float32 or wider.  All published multi-expert methods average logits, not probabilities.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return {"main": wide.mean(1), **{f"expert{number}": own for number, own in enumerate(wide.unbind(1), 1)}}
