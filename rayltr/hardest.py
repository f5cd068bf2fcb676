"""The classes that are the hardest to tell from each class of a classifier which the workers share (`rayltr.sharded`).

They are found anew by comparing all rows with all others, so that is something to do once an epoch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from rayltr.parallel import everyones, rank, share, world

QUERIES = 1024
"""Rows that are compared together with a block of others."""


class Hardest:
    """The `many` other classes with the largest cosine to each class, from this worker's rows [n, dim] of `classes`.

    Every worker remembers those of its own classes, int32 [n, many] in the memory of the host.  block: rows that the
    workers send each other at a time.
    """

    def __init__(self, rows: Tensor, classes: int, many: int, block: int = 8192):
        self.classes, self.first = classes, share(classes, rank(), world())[0]
        self.table = _found(rows, classes, many, block).cpu()

    def __call__(self, labels: Tensor) -> Tensor:
        """The hardest others int64 [G, many] of classes int64 [G], which are the same on every worker."""
        begins = [share(self.classes, number, world())[0] for number in range(1, world())]
        owner = torch.bucketize(labels, torch.tensor(begins, dtype=torch.int64, device=labels.device), right=True)
        mine = self.table[(labels[owner == rank()] - self.first).cpu()].to(labels.device)
        found = everyones(mine, owner.bincount(minlength=world()).tolist()).long()
        return torch.empty_like(found).index_copy_(0, owner.argsort(stable=True), found)


@torch.no_grad()
def _found(rows: Tensor, classes: int, many: int, block: int) -> Tensor:
    first, _ = share(classes, rank(), world())
    best = rows.new_full((len(rows), many), -torch.inf)
    table = torch.zeros(len(rows), many, dtype=torch.int32, device=rows.device)
    for start, others in _passed_round(rows, classes, block):
        numbers = torch.arange(start, start + len(others), dtype=torch.int32, device=rows.device)
        for low in range(0, len(rows), QUERIES):
            part = slice(low, low + QUERIES)
            cosine = F.normalize(rows[part]) @ others.T
            own = torch.arange(first + low, first + low + len(cosine), device=rows.device)
            cosine.masked_fill_(own[:, None] == numbers, -torch.inf)
            best[part], place = torch.cat([best[part], cosine], 1).topk(many)
            table[part] = torch.cat([table[part], numbers.expand(len(cosine), -1)], 1).gather(1, place)
    return table


def _passed_round(rows: Tensor, classes: int, block: int) -> Iterator[tuple[int, Tensor]]:
    """The rows of all workers at unit length, a block at a time, and the class that each block begins with."""
    for number in range(world()):
        first, many = share(classes, number, world())
        for low in range(0, many, block):
            part = rows.new_empty(min(block, many - low), rows.shape[1])
            if number == rank():
                part = F.normalize(rows[low : low + block])
            if world() > 1:
                distributed.broadcast(part, number)
            yield first + low, part
