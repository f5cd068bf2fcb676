"""A second network that follows a first one slowly, and a queue of what it has seen (He et al., MoCo, 2020)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Followers(nn.Module):
    """Copies of modules, never trained: their parameters are a moving average of the leaders'.

    On the first `follow` they become exact copies: whatever weights the leaders were given meanwhile.  BatchNorm
    statistics are the followers' own.
    """

    started: Tensor

    def __init__(self, *copies: nn.Module):
        super().__init__()
        self.copies = nn.ModuleList(copies).requires_grad_(False)
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def follow(self, *leaders: nn.Module, momentum: float) -> None:
        """parameters <- momentum * parameters + (1 - momentum) * the leaders'."""
        first = not self.started
        for copy, leader in zip(self.copies, leaders, strict=True):
            if first:
                copy.load_state_dict(leader.state_dict())
            for own, theirs in zip(copy.parameters(), leader.parameters(), strict=True):
                own.lerp_(theirs, 1 - momentum)
        self.started.fill_(True)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        for copy in self.copies:
            x = copy(x)
        return x


class Queue(nn.Module):
    """The last `size` rows and their labels, the oldest replaced first.

    It starts with random rows of unit length and labels of -1, which belong to no class.  rows [size, dim], labels
    int64 [size].
    """

    rows: Tensor
    labels: Tensor
    oldest: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim)))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("oldest", torch.tensor(0))

    @torch.no_grad()
    def push(self, rows: Tensor, labels: Tensor) -> None:
        """Takes [n, dim] rows and their labels [n]; of more than `size`, the last ones."""
        size = len(self.rows)
        rows, labels = rows[-size:], labels[-size:]
        place = (self.oldest + torch.arange(len(rows), device=rows.device)) % size
        self.rows[place], self.labels[place] = rows.to(self.rows), labels
        self.oldest.copy_((self.oldest + len(rows)) % size)

    def content(self) -> tuple[Tensor, Tensor]:
        """Copies of rows and labels as they are now."""
        return self.rows.clone(), self.labels.clone()
