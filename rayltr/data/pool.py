"""What a source yields (Pool) and what training sees of it (Data): images, targets, and who they are."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayltr.data.images import Lazy

Images = np.ndarray | Lazy


@dataclass(frozen=True, eq=False)
class Part:
    """One split as the source ships it.

    `images` is uint8 [N, H, W, 3] or decoded on the way; `target` int64 [N], -1 where the image cannot be read;
    `digests` uint8 [N, 16] identify the pixels.
    """

    images: Images
    target: np.ndarray
    digests: np.ndarray


@dataclass(frozen=True, eq=False)
class Pool:
    """Everything a source has: `parts` holds "train" and, where the source ships them, "val" and "test".

    `normal` is the published mean and standard deviation if there is one.  `in_order` says that the training images
    are in the order that published subsets refer to.  `size` is (H, W).
    """

    classes: tuple[str, ...]
    parts: dict[str, Part]
    size: tuple[int, int]
    normal: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    in_order: bool = False
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Split:
    """N images of a part: `rows` int64 [N] are their positions there, `target` int64 [N] their classes."""

    images: Images
    rows: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lazy(self) -> bool:
        """Whether `take` decodes; if not, the images lie in memory or in a memory-mapped file."""
        return isinstance(self.images, Lazy)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3]: the images at the given positions (0 .. N - 1) of this split."""
        chosen = self.rows[rows]
        return self.images.take(chosen) if isinstance(self.images, Lazy) else self.images[chosen]


@dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    """What a trial trains and is judged on.

    `counts` int64 [C] are the training images per class in use; `mean` and `std` (of pixels in [0, 1]) have one value
    per channel; `size` is (H, W); `digest` (64 hex digits) identifies the content of all splits, wherever it lies;
    `manifest` (JSON-able) tells how the splits came about.
    """

    classes: tuple[str, ...]
    train: Split
    val: Split
    counts: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    digest: str
    manifest: dict[str, Any]
    _test: Split

    def unseal(self) -> Split:
        """The test split.  Nothing may be chosen by what it says; whoever opens it has to record that."""
        return self._test


def canonical(part: Part, rows: np.ndarray) -> np.ndarray:
    """The rows by (target, digest), ties by position: the same images in the same order, however they are stored."""
    high, low = part.digests[rows].view(">u8").astype(np.uint64).T
    return rows[np.lexsort((rows, low, high, part.target[rows]))]


def split_of(part: Part, rows: np.ndarray) -> Split:
    """The split of a part with these rows, in canonical order."""
    rows = canonical(part, rows)
    return Split(part.images, rows, part.target[rows])


def content_digest(frame: dict[str, Any], content: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """64 hex digits over `frame` (JSON-able) and every split's (target [N], digests [N, 16]) in order."""
    found = hashlib.sha256(json.dumps(frame, sort_keys=True).encode())
    for target, digests in content:
        found.update(len(target).to_bytes(8, "little"))
        found.update(target.astype("<i8").tobytes())
        found.update(digests.tobytes())
    return found.hexdigest()
