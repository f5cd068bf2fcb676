"""What passes between the loop and a method, and what a training run leaves behind."""

import ctypes
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Facts:
    """What a model must know of its data: class names, training counts [C], pixel mean and std (of [0, 1]), size."""

    classes: tuple[str, ...]
    counts: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Parts:
    """What a method is built from.  Factories, because a method may want several backbones or heads.

    `loss(logits [B,C], target [B], counts [C], features [B,D]) -> [B]`; `weight` is [C] or None; `teacher` is frozen,
    in eval mode, and None where the method only predicts; teacher_scale: what its own loss multiplies its logits by.
    layer: where inside the network a mixed batch is mixed, or None when its images are mixed already.  batch: images of
    a step, of all workers.
    """

    backbone: Callable[[], nn.Module]
    head: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    weight: Tensor | None
    counts: Tensor
    teacher: nn.Module | None = None
    teacher_scale: float = 1.0
    layer: str | None = None
    batch: int = 1


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    views: float images in [0, 1], each [B,3,H,W]; the first is the one that is classified (and mixed).
    target: int64 [B].  rows: int64 [B], position of each image in the training split.
    mixed: the other target [B] of a mixed batch, or None; weight: share of `target` in it, float [B], or None.
    partner: int64 [B], the place in the batch of the image that each is mixed with, or None.
    """

    views: list[Tensor]
    target: Tensor
    rows: Tensor
    mixed: Tensor | None = None
    weight: Tensor | None = None
    partner: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """The target [B] that has the larger share of each image."""
        if self.mixed is None or self.weight is None:
            return self.target
        return torch.where(self.weight >= 0.5, self.target, self.mixed)


@dataclass
class State:
    """A training run at the end of an epoch; enough to go on bit for bit.

    model: the complete state of the method.  kept: the names that later stages and exports may read.
    optimiser: state tensors by parameter position and name.  epoch: the clock.  history: one record per epoch of this
    stage (see `rayltr.train.checked`).  rows: what is missing in `model` because the workers share it by rows, this
    worker's stretch of them (see `rayltr.parallel.share`); shards: where a store has them, file and number of rows.
    """

    model: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    epoch: int
    kept: tuple[str, ...] = ()
    history: list[dict] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    shards: tuple[tuple[str, int], ...] = ()


class Lane:
    """How the networks of a training run are computed.

    Here as they are, in a process of the run's own; see `rayltr.stacked` and `rayltr.compiled` for other ways.
    """

    members = 1
    """The runs that share the process."""

    def training(self, module: nn.Module, built: Hashable) -> AbstractContextManager:
        """Around the epochs of a stage.  built: what says how the module's backbone was made."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clock(self) -> float:
        """Seconds, of which differences count."""
        return time.monotonic()

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)


ALONE = Lane()


@dataclass(frozen=True)
class Resources:
    """Where and how fast, never what: nothing here is part of a stage's identity.

    device: "cpu", "cuda" or None for what there is.  threads: CPU threads of this process, None leaves them.
    snapshot_s: seconds between snapshots (the most that a crash can cost, besides one epoch).  lane: how networks are
    computed.
    """

    device: str | None = None
    threads: int | None = None
    snapshot_s: float = 60.0
    lane: Lane = ALONE

    def place(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def settle(self) -> None:
        """Sets this process up.

        The C library keeps the memory that tensors give back: by default glibc returns it to the system and asks for
        it anew, which takes longer than many an operation on images.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        for option, size in KEPT.items():
            getattr(LIBC, "mallopt", lambda *_: 0)(option, size)


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
KEPT = {-1: 2**30, -2: 2**26, -3: 2**25}
"""glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD (at its largest), in bytes."""


class Diverged(ValueError):
    """The loss is no number any more."""
