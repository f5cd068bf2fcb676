"""From encoded images on disk to a Pool: which split they belong to, one size for all, decoded once and cached."""

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rayltr.data import cache
from rayltr.data.images import Encoded, Flat, Items, Lazy, decode_all, digests, shape_of
from rayltr.data.pool import Part, Pool

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
    plan = _plan(listing, how.size, how.in_memory_gb)
    skipped = [
        name
        for split, (items, target) in listing.parts.items()
        for name in _fill_part(sink, split, items, target, plan, how.skip_corrupt)
    ]
    return {"plan": asdict(plan), "skipped": skipped}


def _plan(listing: Listing, side: int | None, in_memory_gb: float) -> Plan:
    note = None
    shape = (side, side) if side else _small_shape(listing)
    if shape is None:
        side, shape = SMALL, (SMALL, SMALL)
        note = f"images are larger than {SMALL} px or differ in size; resized to {SMALL} px; use size= for more"
    pixels = sum(len(target) for _, target in listing.parts.values()) * shape[0] * shape[1]
    return Plan(side, shape, lazy=3 * pixels > in_memory_gb * 1e9, note=note)


def _small_shape(listing: Listing) -> tuple[int, int] | None:
    """The (height, width) of all images if they share one of at most SMALL pixels a side."""
    shapes: set[tuple[int, int]] = set()
    for items, _ in listing.parts.values():
        for rows in _chunks(items):
            shapes |= {shape for item in items.read(rows) if (shape := shape_of(item))}
            if len(shapes) > 1 or any(max(shape) > SMALL for shape in shapes):
                return None
    return shapes.pop() if shapes else None


def _chunks(items: Items) -> list[np.ndarray]:
    return np.array_split(np.arange(len(items)), -(-len(items) // CHUNK))


def _fill_part(
    sink: cache.Sink, split: str, items: Items, target: np.ndarray, plan: Plan, skip_corrupt: bool
) -> list[str]:
    """Decodes a split into the sink; the names of the images that were left out because they cannot be read."""
    skipped, blank = [], np.zeros((*plan.size, 3), np.uint8)
    for rows in _chunks(items):
        encoded = items.read(rows)
        images = decode_all(encoded, plan.side)
        bad = np.array([image is None for image in images])
        skipped += [items.name(int(row)) for row in rows[bad]]
        if skipped and not skip_corrupt:
            raise ValueError(f"{skipped[0]} cannot be read as an image; --skip-corrupt goes on without such images")
        pixels = np.stack([blank if image is None else image for image in images])
        sink.append(f"{split}.target", np.where(bad, -1, target[rows]))
        sink.append(f"{split}.digests", digests(pixels))
        if not plan.lazy:
            sink.append(f"{split}.images", pixels)
        elif items.scattered and sink.folder:
            contents = [_content(item) for item in encoded]
            sink.append(f"{split}.encoded", np.frombuffer(b"".join(contents), np.uint8))
            sink.append(f"{split}.lengths", np.array([len(content) for content in contents]))
    return skipped


def _content(item: Encoded) -> bytes:
    if isinstance(item, bytes):
        return item
    return Path(item).read_bytes() if Path(item).is_file() else b""
