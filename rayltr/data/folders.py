"""The source `folder`: class folders, or split folders of class folders."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rayltr.data import cache
from rayltr.data.images import Files
from rayltr.data.ingest import SPLITS, How, Listing, checked, folder_of, pooled, val_as_test
from rayltr.data.pool import Pool

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def folder(*, root: str, size: int | None = None, skip_corrupt: bool = False, in_memory_gb: float = 8.0) -> Pool:
    """`root/CLASS/*` or `root/SPLIT/CLASS/*`, images at any depth below their class; hidden files are ignored.

    Classes are the sorted folder names of the training split.  A lone val beside train is the test.  Images are
    resized (shorter side) and cut to `size` pixels a side; sets above `in_memory_gb` GB are decoded on the way.
    Raises ValueError without class folders, for a class that only a val or test split has, and for an unreadable
    image unless `skip_corrupt`.
    """
    path = folder_of(root)
    splits = splits_of(path)
    classes = tuple(entry.name for entry in subfolders(splits["train"]))
    if not classes:
        raise ValueError(f"{splits['train']} has no class folders")
    found = {split: _files(place, classes) for split, place in splits.items()}
    paths = {split: [name for name, _ in files] for split, files in found.items()}
    targets = {split: np.array([target for _, target in files], np.int64) for split, files in found.items()}
    stats = [cache.stat(name) for names in paths.values() for name in names]
    listing = Listing(classes, {split: (Files(paths[split]), targets[split]) for split in splits}, stats)
    return pooled("folder", val_as_test(checked(listing, path)), How(size, skip_corrupt, in_memory_gb))


def splits_of(path: Path) -> dict[str, Path]:
    """The folder of every split; a folder without split folders is all training.

    Raises ValueError if other folders lie beside the split folders, or two folders mean the same split.
    """
    names = [entry.name for entry in subfolders(path)]
    found = [name for name in names if name.lower() in SPLITS]
    splits = {SPLITS[name.lower()]: path / name for name in found}
    if "train" not in splits or (len(splits) == 1 and len(names) > 1):  # "train" may also be a class
        return {"train": path}
    if len(splits) != len(names):
        raise ValueError(f"{path} should hold class folders, or a folder per split alone; it holds {', '.join(names)}")
    return splits


def subfolders(path: Path) -> list[os.DirEntry]:
    """The folders in a folder by name, hidden ones left out; none in a file."""
    if not path.is_dir():
        return []
    entries = (entry for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    return sorted(entries, key=lambda entry: entry.name)


def images_in(path: str) -> Iterable[str]:
    """The paths of the images at any depth below a folder, hidden files and folders left out."""
    for place, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        yield from (os.path.join(place, name) for name in images)


def _files(place: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    positions = {name: position for position, name in enumerate(classes)}
    if unknown := [entry.name for entry in subfolders(place) if entry.name not in positions]:
        raise ValueError(f"{place / unknown[0]} is a class that the training images do not have")
    return [(path, positions[entry.name]) for entry in subfolders(place) for path in sorted(images_in(entry.path))]
