"""Encoded images: read, decoded to RGB, resized, and named by a digest of their pixels."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

DIGEST = 16
THREADED = 16_384
"""Encoded bytes from which threads pay: Pillow decodes without the interpreter's lock, but opens files with it."""

Encoded = bytes | str
"""One encoded image: its bytes, or the path of the file that holds them."""


class Items(Protocol):
    """Encoded images by their position in a split of the source."""

    @property
    def scattered(self) -> bool:
        """Whether reading one image costs the reading of many others."""
        ...

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> list[Encoded]: ...

    def name(self, row: int) -> str:
        """Where the image lies, for messages."""
        ...


@dataclass(frozen=True)
class Files:
    """One image per file."""

    paths: Sequence[str]
    scattered = False

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: np.ndarray) -> list[Encoded]:
        return [self.paths[row] for row in rows]

    def name(self, row: int) -> str:
        return self.paths[row]


@dataclass(frozen=True, eq=False)
class Flat:
    """Images one after the other in a single uint8 array; image i ends at `ends[i]`."""

    data: np.ndarray
    ends: np.ndarray
    scattered = False

    def __len__(self) -> int:
        return len(self.ends)

    def read(self, rows: np.ndarray) -> list[Encoded]:
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        return [self.data[start:end].tobytes() for start, end in zip(starts, self.ends[rows], strict=True)]

    def name(self, row: int) -> str:
        return f"the cached copy of image {row}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file again; a copy of its content could be larger than the memory."""
        if isinstance(self.data, np.memmap):
            return _mapped, (str(self.data.filename), self.ends)
        return Flat, (self.data, self.ends)


def _mapped(file: str, ends: np.ndarray) -> Flat:
    return Flat(np.load(file, mmap_mode="r"), ends)


@dataclass(frozen=True, eq=False)
class Lazy:
    """Images [N, H, W, 3] that are decoded when they are taken."""

    items: Items
    side: int | None
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3].  Raises ValueError naming an image that cannot be read."""
        images = np.empty((len(rows), *self.size, 3), np.uint8)
        for place, image in enumerate(decode_all(self.items.read(rows), self.side)):
            if image is None:
                raise ValueError(f"{self.items.name(int(rows[place]))} cannot be read as an image any more")
            images[place] = image
        return images


def decode(item: Encoded | Path, side: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of one encoded image (bytes or path): RGB; 16-bit values are scaled to 8 bits, alpha is dropped.

    With `side`, the shorter side is resized to `side` pixels (bicubic, antialiased) and the middle
    [side, side, 3] is cut out; without, the image keeps its size.
    """
    with Image.open(BytesIO(item if isinstance(item, bytes) else _content(item))) as image:
        if side:
            image.draft(
                None, (2 * side, 2 * side)
            )  # JPEG: decode at a fraction of the size, still twice what is needed
        rgb = _rgb(image)
        if side and rgb.size != (side, side):
            rgb = ImageOps.fit(rgb, (side, side), Image.Resampling.BICUBIC)
        return np.asarray(rgb)


def _content(path: str | Path) -> bytes:
    with open(path, "rb") as file:  # at once, which is quicker than the small pieces that Pillow asks for
        return file.read()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: convert would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def shape_of(item: Encoded) -> tuple[int, int] | None:
    """(height, width) from an image's header; None if it cannot be read."""
    try:
        with Image.open(BytesIO(item) if isinstance(item, bytes) else item) as image:
            return image.height, image.width
    except Exception:  # Pillow's readers raise whatever their parsing meets
        return None


def decode_all(items: Sequence[Encoded], side: int | None = None) -> list[np.ndarray | None]:
    """The decoded images in order, None where one cannot be read; large ones are decoded by a thread per CPU.

    A process that was started to decode is one of several, and has one thread.
    """
    workers = 1 if parent_process() else min(cpus(), len(items))
    if workers < 2 or _bytes_in(items[0]) < THREADED:
        return _decode_slice(items, side)
    share = -(-len(items) // workers)
    with ThreadPoolExecutor(workers) as pool:
        slices = [items[start : start + share] for start in range(0, len(items), share)]
        return [image for part in pool.map(lambda part: _decode_slice(part, side), slices) for image in part]


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_slice(items: Sequence[Encoded], side: int | None) -> list[np.ndarray | None]:
    return [_decode_or_none(item, side) for item in items]


def _decode_or_none(item: Encoded, side: int | None) -> np.ndarray | None:
    try:
        return decode(item, side)
    except Exception:  # Pillow's readers raise whatever their parsing meets
        return None


def _bytes_in(item: Encoded) -> int:
    if isinstance(item, bytes):
        return len(item)
    return os.path.getsize(item) if os.path.exists(item) else 0


def digests(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 16]: BLAKE2b over shape and pixels of every image of [N, H, W, 3]."""
    shape = repr(images.shape[1:]).encode()
    found = b"".join(hashlib.blake2b(shape + image.tobytes(), digest_size=DIGEST).digest() for image in images)
    return np.frombuffer(found, np.uint8).reshape(-1, DIGEST)
