"""Classifiers on top of features: `(dim, classes, *, ...) -> nn.Module`, features [B, dim] -> logits [B, classes].

Parameters are called `weight` [classes, dim], `bias` [classes] and `scale` [classes] everywhere, so that one head
takes over from another by name.  What `fresh` lists on a head may be missing from the head it takes over from.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cosine(nn.Module):
    """`scale` times the cosine between the features and each class's weight; no bias.

    The weight starts uniform in (-1, 1) with every column scaled to unit length (Cao et al., LDAM, 2019).
    """

    def __init__(self, dim: int, classes: int, scale: float):
        super().__init__()
        self.factor = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(classes, dim).uniform_(-1, 1), dim=0))

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * F.linear(F.normalize(features), F.normalize(self.weight))


class Scaled(nn.Linear):
    """(W h + b) s, where only s learns; it starts at 1."""

    fresh = ("scale",)

    def __init__(self, dim: int, classes: int):
        super().__init__(dim, classes)
        self.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(classes))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) * self.scale


class TauNormalised(nn.Linear):
    """A frozen linear head whose weights are divided by their length to the power tau."""

    def __init__(self, dim: int, classes: int, tau: float, with_bias: bool):
        super().__init__(dim, classes)
        self.requires_grad_(False)
        self.tau, self.with_bias = tau, with_bias

    def forward(self, features: Tensor) -> Tensor:
        length = self.weight.norm(dim=1, keepdim=True)
        length = length.masked_fill(length == 0, 1)  # a class with zero weight keeps it
        return F.linear(features, self.weight / length**self.tau, self.bias if self.with_bias else None)


def linear(dim: int, classes: int) -> nn.Module:
    """W h + b."""
    return nn.Linear(dim, classes)


def cosine(dim: int, classes: int, *, scale: float = 1.0) -> nn.Module:
    """Cosine similarities times `scale`.  With the loss `ldam`, which scales by itself, leave it at 1."""
    return Cosine(dim, classes, scale)


def lws(dim: int, classes: int) -> nn.Module:
    """Learnable weight scaling: a frozen linear head times one learnt factor per class (Kang et al., 2020, eq. 5)."""
    return Scaled(dim, classes)


def tau_normalised(dim: int, classes: int, *, tau: float = 1.0, bias: bool = True) -> nn.Module:
    """W divided row by row by its length to the power tau, nothing learns (Kang et al., 2020, eq. 4).

    The bias stays as it is or, with `bias=False`, is left out.  tau = 0 is the linear head.
    """
    return TauNormalised(dim, classes, tau, bias)


HEADS = {f.__name__: f for f in (linear, cosine, lws, tau_normalised)}
