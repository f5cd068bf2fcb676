"""A second network that follows a first one slowly, and a queue of what it has seen (He et al., MoCo, 2020).

Both move with every batch.  SAM, which passes the batches of a step twice, tells them by `passing`: 1 before the first
pass, 2 before the second, 0 after it.  Then the follower moves once, before the first batch, the queue with every batch
of the first pass, and each batch of the second meets what it met in the first.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Change = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a queue: the place [n], rows [n, dim], labels [n] and where the oldest row is."""


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
        self.due: bool | None = None

    def passing(self, number: int) -> None:
        """Due once in a first pass and not in a second, when the leaders are not where they belong."""
        self.due = number == 1 if number else None

    @torch.no_grad()
    def follow(self, *leaders: nn.Module, momentum: float) -> None:
        """parameters <- momentum * parameters + (1 - momentum) * the leaders', if that is due."""
        if self.due is False:
            return
        if self.due:
            self.due = False
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
        self.replaced: list[Change] | None = None
        self.ahead: list[Change] = []

    @torch.no_grad()
    def passing(self, number: int) -> None:
        """Only the rows that the first pass replaces are remembered: a second one begins by putting them back."""
        if number == 2:
            self.ahead = [self._exchange(*change) for change in reversed(self.replaced or [])]
        while number == 0 and self.ahead:  # a second pass that failed
            self._exchange(*self.ahead.pop())
        self.replaced = [] if number == 1 else None

    @torch.no_grad()
    def push(self, rows: Tensor, labels: Tensor) -> None:
        """Takes [n, dim] rows and their labels [n]; of more than `size`, the last ones.

        In a second pass it takes what it was given in the first, whatever these are.
        """
        if self.ahead:
            self._exchange(*self.ahead.pop())
            return
        size = len(self.rows)
        rows, labels = rows[-size:], labels[-size:]
        place = (self.oldest + torch.arange(len(rows), device=rows.device)) % size
        replaced = self._exchange(place, rows.to(self.rows), labels, (self.oldest + len(rows)) % size)
        if self.replaced is not None:
            self.replaced.append(replaced)

    def _exchange(self, place: Tensor, rows: Tensor, labels: Tensor, oldest: Tensor) -> Change:
        """Writes rows and labels at a place, and returns what undoes it."""
        before = place, self.rows[place], self.labels[place], self.oldest.clone()
        self.rows[place], self.labels[place] = rows, labels
        self.oldest.copy_(oldest)
        return before

    def content(self) -> tuple[Tensor, Tensor]:
        """Copies of rows and labels as they are now, for what must outlive a push: a product's backward does."""
        return self.rows.clone(), self.labels.clone()
