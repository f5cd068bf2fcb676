"""From encoded images on disk to a Pool: which split they belong to, one size for all, decoded once and cached."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from rayltr.data import cache
from rayltr.data.images import Encoded, Flat, Items, Lazy, decode_all, digests, shape_of
from rayltr.data.pool import Part, Pool
from rayltr.data.processes import Map, mapping

CHUNK = 128
SMALL = 64
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


@dataclass(frozen=True, eq=False)
class Listing:
    """What lies on disk, nothing decoded: per split the images and their targets (int64 [N])."""

    classes: tuple[str, ...]
    parts: dict[str, tuple[Items, np.ndarray]]
    files: list[cache.Stat]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class How:
    """What the user may ask of images on disk: the side in pixels, going on without unreadable ones, a limit in GB."""

    size: int | None
    skip_corrupt: bool
    in_memory_gb: float


@dataclass(frozen=True)
class Plan:
    """How the images of a listing become pixels: `side` to resize to or None, their (height, width), lazily or not."""

    side: int | None
    size: tuple[int, int]
    lazy: bool
    note: str | None


def split_in(name: str) -> str | None:
    """The split that a file or folder name speaks of (`train-00000-of-00001`, `val2018`), None if none or several."""
    words = re.split("[^a-z]+", name.lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def val_as_test(listing: Listing) -> Listing:
    """A source with exactly two splits, train and val, means the second as its test."""
    if set(listing.parts) != {"train", "val"}:
        return listing
    parts = {"train": listing.parts["train"], "test": listing.parts["val"]}
    return replace(listing, parts=parts, notes=(*listing.notes, "the only other split, val, is the test"))


def checked(listing: Listing, root: Path) -> Listing:
    """The listing without empty splits.  Raises ValueError without training images and for a target out of range."""
    order = sorted(listing.parts, key=list(SPLITS.values()).index)
    parts = {split: listing.parts[split] for split in order if len(listing.parts[split][1])}
    if "train" not in parts:
        raise ValueError(f"{root} has no training images")
    for split, (items, target) in parts.items():
        if len(wrong := np.flatnonzero((target < 0) | (target >= len(listing.classes)))):
            at, known = int(wrong[0]), f"the training classes 0 to {len(listing.classes) - 1}"
            raise ValueError(f"{split}: {items.name(at)} has target {target[at]}, outside {known}")
    notes = tuple(f"{split} has no images and is not used" for split in listing.parts if split not in parts)
    return replace(listing, parts=parts, notes=listing.notes + notes)


def folder_of(root: str) -> Path:
    """`root` as an absolute path.  Raises ValueError if nothing is there."""
    path = Path(root).expanduser().absolute()
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return path


def pooled(name: str, listing: Listing, how: How) -> Pool:
    """The Pool of a listing, decoded into the cache the first time, or lazy if the pixels exceed the limit.

    Raises ValueError naming the first unreadable image, unless these are to be skipped.
    """
    if how.size is not None and how.size < 1:
        raise ValueError(f"size is the side of the images in pixels, at least 1, not {how.size}")
    targets = {split: hashlib.sha256(target.tobytes()).hexdigest() for split, (_, target) in listing.parts.items()}
    key = cache.key(name, {**asdict(how), "targets": targets}, listing.files)
    arrays, meta = cache.remembered(key, partial(_fill, listing, how))
    plan = Plan(**{**meta["plan"], "size": tuple(meta["plan"]["size"])})
    return Pool(
        classes=listing.classes,
        parts={split: _part(split, items, arrays, plan) for split, (items, _) in listing.parts.items()},
        size=plan.size,
        notes=(*listing.notes, plan.note) if plan.note else listing.notes,
        skipped=tuple(meta["skipped"]),
    )


def _part(split: str, items: Items, arrays: dict[str, np.ndarray], plan: Plan) -> Part:
    if f"{split}.encoded" in arrays:
        items = Flat(arrays[f"{split}.encoded"], np.cumsum(arrays[f"{split}.lengths"]))
    images = Lazy(items, plan.side, plan.size) if plan.lazy else arrays[f"{split}.images"]
    return Part(images, arrays[f"{split}.target"], arrays[f"{split}.digests"])


def _fill(listing: Listing, how: How, sink: cache.Sink) -> dict[str, Any]:
    images = sum(len(target) for _, target in listing.parts.values())
    with mapping(images) as run:
        try:  # the size of the first image is that of all, unless another one shows up on the way
            plan = _plan(how, images, None if how.size else _first_shape(listing))
            skipped = _fill_parts(sink, listing, plan, how.skip_corrupt, run)
        except SizesDiffer:
            sink.clear()
            plan = _plan(how, images, None)
            skipped = _fill_parts(sink, listing, plan, how.skip_corrupt, run)
    return {"plan": asdict(plan), "skipped": skipped}


class SizesDiffer(Exception):
    """Images that were to keep their size do not share one."""


def _plan(how: How, images: int, shape: tuple[int, int] | None) -> Plan:
    """How so many images are decoded.  shape: (height, width) of all of them, to be kept if it is a small one."""
    side = note = None
    if shape is None or max(shape) > SMALL:
        side = how.size or SMALL
        shape = (side, side)
    if side and not how.size:
        note = f"images are larger than {SMALL} px or differ in size; resized to {SMALL} px; use size= for more"
    return Plan(side, shape, lazy=3 * images * shape[0] * shape[1] > how.in_memory_gb * 1e9, note=note)


def _first_shape(listing: Listing) -> tuple[int, int] | None:
    """The (height, width) of the first image that can be read."""
    chunks = (items.read(rows) for items, _ in listing.parts.values() for rows in _chunks(items))
    return next((shape for encoded in chunks for item in encoded if (shape := shape_of(item))), None)


def _chunks(items: Items) -> list[np.ndarray]:
    return np.array_split(np.arange(len(items)), -(-len(items) // CHUNK))


def _fill_parts(sink: cache.Sink, listing: Listing, plan: Plan, skip_corrupt: bool, run: Map) -> list[str]:
    return [
        name
        for split, (items, target) in listing.parts.items()
        for name in _fill_part(sink, split, items, target, plan, skip_corrupt, run)
    ]


def _fill_part(
    sink: cache.Sink, split: str, items: Items, target: np.ndarray, plan: Plan, skip_corrupt: bool, run: Map
) -> list[str]:
    """Decodes a split into the sink; the names of the images that were left out because they cannot be read."""
    skipped, chunks = [], _chunks(items)
    contents, sent = tee(map(items.read, chunks))
    for rows, encoded, (bad, prints, pixels) in zip(chunks, contents, run(partial(_decoded, plan), sent), strict=True):
        skipped += [items.name(int(row)) for row in rows[bad]]
        if skipped and not skip_corrupt:
            raise ValueError(f"{skipped[0]} cannot be read as an image; --skip-corrupt goes on without such images")
        sink.append(f"{split}.target", np.where(bad, -1, target[rows]))
        sink.append(f"{split}.digests", prints)
        if not plan.lazy:
            sink.append(f"{split}.images", pixels)
        elif items.scattered and sink.folder:
            copies = [_content(item) for item in encoded]
            sink.append(f"{split}.encoded", np.frombuffer(b"".join(copies), np.uint8))
            sink.append(f"{split}.lengths", np.array([len(copy) for copy in copies]))
    return skipped


def _decoded(plan: Plan, encoded: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which images cannot be read (bool [B]), the digests of all (uint8 [B,16]), and their pixels unless they are lazy.

    The pixels of an image that cannot be read are black.  Raises SizesDiffer for one that has not the size planned.
    """
    images, blank = decode_all(encoded, plan.side), np.zeros((*plan.size, 3), np.uint8)
    found = (shape_of(item) if image is None else image.shape[:2] for item, image in zip(encoded, images, strict=True))
    if plan.side is None and any(shape not in (None, plan.size) for shape in found):
        raise SizesDiffer
    pixels = np.stack([blank if image is None else image for image in images])
    return np.array([image is None for image in images]), digests(pixels), pixels[: 0 if plan.lazy else None]


def _content(item: Encoded) -> bytes:
    if isinstance(item, bytes):
        return item
    return Path(item).read_bytes() if Path(item).is_file() else b""
