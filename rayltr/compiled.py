"""A trial whose networks are compiled while they are trained, so that a GPU has less to launch for each step.

The numbers are the same but for the order of sums.  A network of a new structure, or images of a new size, take up to a
minute first; a process of a search keeps what it has compiled for its next trials.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rayltr.backbones import Normalised
from rayltr.interface import Lane

ENTRIES = ("forward", "tokens")
"""What methods call of a network."""
STRUCTURES = 64
"""So many networks, sizes of images and of batches a process compiles (torch's limit is 8); others stay as they are."""


class Compiled(Lane):
    """A trial that has its process to itself.  how: keywords of `torch.compile` instead of the usual one."""

    def __init__(self, **how: Any):
        self.how = how or {"mode": "reduce-overhead"}  # on a GPU, the kernels of a network are launched as one graph

    @contextmanager
    def training(self, module: nn.Module, built: Hashable) -> Iterator[None]:
        changed = [] if getattr(module, "layer", None) else list(networks(module))  # a hook inside would not be seen
        for network, entry in changed:
            setattr(network, entry, torch.compile(getattr(network, entry), dynamic=False, **self.how))
        try:
            with torch._dynamo.config.patch(recompile_limit=STRUCTURES):
                yield
        finally:
            for network, entry in changed:
                delattr(network, entry)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        torch.compiler.cudagraph_mark_step_begin()  # what the networks gave out in this step may be written over


def networks(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """The networks of a method and of its teacher, behind their normalisation, with the names of what is called."""
    for part in (part for whole in (module, *getattr(module, "teacher", ())) if whole for part in whole.modules()):
        if isinstance(part, Normalised):
            yield from ((part.body, entry) for entry in ENTRIES if hasattr(part.body, entry))
