"""The source `list`: files that list images and their classes, as text, iNaturalist's JSON or BagofTricks-LT's JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rayltr.data import cache
from rayltr.data.images import Files
from rayltr.data.ingest import How, Listing, checked, folder_of, pooled
from rayltr.data.pool import Pool

Pairs = list[tuple[str, int]]


def list_files(
    *,
    root: str,
    train: str,
    test: str | None = None,
    val: str | None = None,
    size: int | None = None,
    skip_corrupt: bool = False,
    in_memory_gb: float = 8.0,
) -> Pool:
    """Images below `root` that list files name; the lists lie there too, or anywhere.

    Text: `relative/path<space>class number` a line, split at the last space (ImageNet-LT, Places-LT).  JSON: `images`
    with `file_name` and `annotations` with `image_id` and `category_id` (iNaturalist), or `annotations` with `fpath`
    and `category_id` (BagofTricks-LT).  Class numbers are taken as they are; names come from `categories`.  Images
    are resized (shorter side) and cut to `size` pixels a side; sets above `in_memory_gb` GB are decoded on the way.
    Raises ValueError for a line that cannot be read, missing files, and an unreadable image unless `skip_corrupt`.
    """
    path = folder_of(root)
    named = {"train": train, "val": val, "test": test}
    lists = {split: _located(path, name) for split, name in named.items() if name is not None}
    read = {split: _read(file) for split, file in lists.items()}
    paths = {split: [str(path / name) for name, _ in pairs] for split, (pairs, _) in read.items()}
    targets = {split: np.array([target for _, target in pairs], np.int64) for split, (pairs, _) in read.items()}
    stats = [cache.stat(file) for file in lists.values()]
    stats += [stat for split, file in lists.items() for stat in _stats(paths[split], file)]
    classes = read["train"][1] or [str(c) for c in range(targets["train"].max(initial=-1) + 1)]
    listing = Listing(tuple(classes), {split: (Files(paths[split]), targets[split]) for split in lists}, stats)
    return pooled("list", checked(listing, path), How(size, skip_corrupt, in_memory_gb))


def _located(root: Path, name: str) -> Path:
    for path in (root / name, Path(name).expanduser().absolute()):
        if path.is_file():
            return path
    raise ValueError(f"there is no list {name} in {root}")


def _stats(paths: list[str], listed: Path) -> list[cache.Stat]:
    found = []
    for path in paths:
        try:
            found.append(cache.stat(path))
        except OSError:
            raise ValueError(f"{path}, listed in {listed}, does not exist") from None
    return found


def _read(path: Path) -> tuple[Pairs, list[str]]:
    """The (image, class) pairs of a list, and the class names if it has them."""
    if path.suffix.lower() != ".json":
        return _read_text(path), []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _read_json(content), _names(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of images in a known JSON form ({error!r})") from error


def _read_text(path: Path) -> Pairs:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            name, _, target = line.strip().rpartition(" ")
            if not name or not target.lstrip("-").isdecimal():
                raise ValueError(f"{path}, line {number}: expected a path, a space and a class number, found {line!r}")
            pairs.append((name, int(target)))
    return pairs


def _read_json(content: dict[str, Any]) -> Pairs:
    annotations = content["annotations"]
    if "images" not in content:
        return [(found["fpath"], int(found["category_id"])) for found in annotations]
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return [(names[found["image_id"]], int(found["category_id"])) for found in annotations]


def _names(content: dict[str, Any]) -> list[str]:
    """The class names by number: from `categories`, or the bare numbers below `num_classes`."""
    names = {category["id"]: category["name"] for category in content.get("categories", [])}
    count = max(names, default=content.get("num_classes", 0) - 1) + 1
    return [names.get(c, str(c)) for c in range(count)]
