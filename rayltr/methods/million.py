"""Every training image is a class of its own, told from all others by a classifier that the workers share.

Parametric instance classification at any number of images, after the "one-million-way instance classifier" (AAAI
2021), of which no code is public: what its text leaves open is a keyword here.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayltr.hardest import Hardest
from rayltr.interface import Batch, Parts
from rayltr.sharded import Shard


class Method(nn.Module):
    """The cross-entropy of an image against all images, through a two-layer projector; the term is `instance`.

    It learns features alone: the head `main` stays as it starts, for a later stage.  What is kept is the network; the
    classifier has one row per image, is never sent between workers and stays behind.  A stage initialised from
    another starts it anew.  Its rows move by the stage's optimiser, which has to be sgd without nesterov.

    prior: rows start as the features of the images in the network as it is, with BatchNorm statistics of each batch
    (the "contrastive prior"); else they are random.  augmented: of the images as the view makes them, which are plain
    otherwise.  norm: length of the rows at the start.  As the gradient of a cosine falls with the length of the row, it
    is a learning rate: `rate`, which multiplies the optimiser's for the rows alone, does about what a norm
    1 / sqrt(rate) times as long does.
    smoothing: share of the target that goes to the `hardest` classes with the most similar rows, found anew before
    every epoch, which takes a product of all rows with all rows.
    hidden 0 means as wide as the features; out: dimensions that are compared.  temperature, cosine, sampled, block,
    kept, bf16: see `rayltr.sharded.Shard`.  Raises ValueError for values outside.
    """

    own_loss = True
    stacks = True
    ids: Tensor
    begun: Tensor

    def __init__(
        self,
        parts: Parts,
        *,
        smoothing: float = 0.2,
        hardest: int = 100,
        prior: bool = True,
        augmented: bool | None = None,
        norm: float = 1.0,
        rate: float = 1.0,
        hidden: int = 0,
        out: int = 128,
        temperature: float = 0.15,
        cosine: bool = True,
        sampled: float = 1.0,
        block: int = 8192,
        kept: bool = False,
        bf16: bool = False,
    ):
        super().__init__()
        if not 0 <= smoothing < 1 or hardest < 1 or rate <= 0:
            given = f"{smoothing}, {hardest}, {rate}"
            raise ValueError(f"million needs 0 <= smoothing < 1, hardest >= 1 and rate > 0, not {given}")
        self.backbone = parts.backbone()
        dim: int = self.backbone.dim  # type: ignore[assignment]
        self.head = parts.head(dim).requires_grad_(False)
        self.project = nn.Sequential(nn.Linear(dim, hidden or dim), nn.ReLU(), nn.Linear(hidden or dim, out))
        size = int(parts.counts.sum())
        if size < 2:
            raise ValueError("million tells training images from each other: it needs at least two")
        how = {"cosine": cosine, "norm": norm, "sampled": sampled, "block": block, "kept": kept, "bf16": bf16}
        self.classes = Shard(size, out, temperature=temperature, **how)  # type: ignore[arg-type]
        self.smoothing, self.hardest, self.prior, self.rate = smoothing, min(hardest, size - 1), prior, rate
        self.augmented = bool(augmented)
        # Neighbours in a folder are of one class: mixed, every batch and every worker has some of each.  This generator
        # is the one whose draws NumPy promises to keep, because a row must mean the same image for ever.
        ids = torch.from_numpy(np.random.RandomState(0).permutation(size))
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("begun", torch.tensor(False))
        self.sharded = ("classes.weight", "classes.velocity")
        self.fresh = ("project.", "classes.", "begun")
        own = [f"classes.{name}" for name, _ in self.classes.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ["ids", *own])

    def keep(self) -> list[str]:
        """What later stages use."""
        return [name for name in self.state_dict() if name.startswith(("backbone.", "head."))]

    def obey(self, optimiser: torch.optim.Optimizer) -> None:
        """Lets the rows follow the stage's optimiser."""
        self.classes.obey(optimiser, self.rate)

    def wanted(self, size: int, batch: int) -> list[Tensor]:
        """The images whose rows this worker has, int64 [B] each, in random batches that are whole over all workers."""
        if size != self.classes.classes:
            raise ValueError(f"million has a class for each of {self.classes.classes} training images, not for {size}")
        if self.begun or not self.prior:
            return []
        image, first, steps = self.ids.argsort().cpu(), self.classes.first, max(1, size // batch)
        last = first + len(self.classes.weight)
        return [image[first + (step - first) % steps : last : steps] for step in range(steps)]

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], size: int) -> None:
        """Fills this worker's rows with the features of their images, once; the running statistics move."""
        self.train()
        for rows, images, _ in batches:
            self.classes.fill(self.ids[rows], self.project(self.backbone(images)))
        self.begun.fill_(True)

    def between(self, epoch: int) -> None:
        """Brings all rows up to date and finds the hardest classes of each class anew."""
        self.classes.catch_up()
        if self.smoothing:
            rows = self.classes.weight
            self.classes.hardest = Hardest(rows, self.classes.classes, self.hardest, self.classes.block)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.project(self.backbone(batch.views[0]))
        return {"instance": self.classes(features, self.ids[batch.rows], self.smoothing)}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        return {"main": self.head(self.backbone(images))}
