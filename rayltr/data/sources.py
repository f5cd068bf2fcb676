"""Sources known by name: digits and CIFAR, fetched when needed, and synthetic images."""

import importlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayltr.data import cache
from rayltr.data.images import digests
from rayltr.data.pool import Part, Pool

Arrays = tuple[np.ndarray, np.ndarray]
"""uint8 images [N, H, W, 3] and int64 targets [N]."""
CIFAR_NORMAL = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def digits() -> Pool:
    """The 1797 grey 8 x 8 digits of scikit-learn (a copy of UCI's test set), 0..16 scaled to 0..255; no test split."""
    parts = _kept("digits", [], lambda: {"train": _digits()})
    return Pool(tuple("0123456789"), parts, (8, 8))


def _digits() -> Arrays:
    # scikit-learn takes a second to import and is not needed again.
    found = importlib.import_module("sklearn.datasets").load_digits()
    grey = np.round(found.images * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3), found.target.astype(np.int64)


@dataclass(frozen=True)
class Batches:
    """How the Python batches of a CIFAR set are laid out: files by split, and the keys inside."""

    name: str
    folder: str
    files: dict[str, tuple[str, ...]]
    meta: str
    classes: str
    target: str


TEN = Batches(
    name="CIFAR10",
    folder="cifar-10-batches-py",
    files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    meta="batches.meta",
    classes="label_names",
    target="labels",
)
HUNDRED = Batches(
    name="CIFAR100",
    folder="cifar-100-python",
    files={"train": ("train",), "test": ("test",)},
    meta="meta",
    classes="fine_label_names",
    target="fine_labels",
)


def cifar10(*, root: str | None = None, download: bool = True) -> Pool:
    """CIFAR-10 (Krizhevsky, 2009): 50 000 and 10 000 images of 32 x 32 in 10 classes, in the original order.

    Read from the Python batches below `root` (default: the cache folder), downloaded there by torchvision if absent.
    Raises ValueError if they are absent and cannot be, or are not to be, downloaded.
    """
    return _cifar(TEN, root, download)


def cifar100(*, root: str | None = None, download: bool = True) -> Pool:
    """CIFAR-100 (Krizhevsky, 2009): 50 000 and 10 000 images of 32 x 32 in 100 fine classes, in the original order.

    Read from the Python batches below `root` (default: the cache folder), downloaded there by torchvision if absent.
    Raises ValueError if they are absent and cannot be, or are not to be, downloaded.
    """
    return _cifar(HUNDRED, root, download)


def _cifar(batches: Batches, root: str | None, download: bool) -> Pool:
    place = Path(root).expanduser() if root else cache.home() / batches.name.lower()
    files = {split: [place / batches.folder / name for name in names] for split, names in batches.files.items()}
    meta = place / batches.folder / batches.meta
    if not all(file.is_file() for file in [meta, *files["train"], *files["test"]]):
        _download(batches.name, place, download)
    stats = [cache.stat(file) for file in files["train"] + files["test"]]
    parts = _kept(batches.name, stats, lambda: {split: _read(found, batches.target) for split, found in files.items()})
    return Pool(tuple(_unpickled(meta)[batches.classes]), parts, (32, 32), CIFAR_NORMAL, in_order=True)


def _download(name: str, place: Path, allowed: bool) -> None:
    if not allowed:
        raise ValueError(f"{place} does not hold the Python batches of {name}, and download is off")
    try:
        # torchvision imports torch, which takes seconds; after the download it is not needed.
        getattr(importlib.import_module("torchvision.datasets"), name)(place, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} could not be downloaded ({error}): root= names a folder with its Python batches"
        ) from error


def _read(paths: list[Path], target: str) -> Arrays:
    found = [_unpickled(path) for path in paths]
    flat = np.concatenate([batch["data"] for batch in found])
    images = np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, np.concatenate([np.array(batch[target], np.int64) for batch in found])


class _Plain(pickle.Unpickler):
    """Reads containers, strings and arrays; refuses everything else that a pickle may call."""

    ALLOWED = {"_reconstruct", "ndarray", "dtype", "encode"}

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED or module.split(".")[0] not in ("numpy", "_codecs"):
            raise ValueError(f"a CIFAR batch does not contain {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickled(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _Plain(file, encoding="latin1").load()


def _kept(name: str, files: list[cache.Stat], read: Callable[[], dict[str, Arrays]]) -> dict[str, Part]:
    """The parts that `read` gives, from the cache after the first time."""

    def make(sink: cache.Sink) -> dict[str, Any]:
        for split, (images, target) in read().items():
            for what, array in {"images": images, "target": target, "digests": digests(images)}.items():
                sink.append(f"{split}.{what}", array)
        return {}

    arrays, _ = cache.remembered(cache.key(name, {}, files), make)
    splits = [found.removesuffix(".target") for found in arrays if found.endswith(".target")]
    return {split: Part(*(arrays[f"{split}.{what}"] for what in ("images", "target", "digests"))) for split in splits}


def synthetic(
    *, classes: int = 10, per_class: int = 100, size: int = 16, seed: int = 0, test_per_class: int = 20
) -> Pool:
    """Images that can be learnt: every class has a smooth coloured pattern, every image a shift and noise of its own.

    `per_class` training and `test_per_class` test images of `size` x `size` pixels; the same arguments give the same
    pixels.  Raises ValueError for fewer than two classes.
    """
    if classes < 2 or per_class < 1 or size < 2:
        raise ValueError("synthetic needs at least 2 classes of 1 image of 2 x 2 pixels")
    patterns = _patterns(classes, size, np.random.default_rng([seed, 0]))
    parts = {}
    for stream, (split, each) in enumerate({"train": per_class, "test": test_per_class}.items(), start=1):
        if each:
            parts[split] = _drawn(patterns, each, np.random.default_rng([seed, stream]))
    return Pool(tuple(f"class {c}" for c in range(classes)), parts, (size, size))


def _patterns(classes: int, size: int, random: np.random.Generator) -> np.ndarray:
    """[C, size, size, 3] in 0..1: three waves per class and channel, of at most two periods, so that shifts wrap."""
    turns = random.integers(-2, 3, (3, 2, classes, 1, 1, 3))
    phase = random.random((3, classes, 1, 1, 3))
    y, x = np.meshgrid(np.arange(size) / size, np.arange(size) / size, indexing="ij")
    angle = turns[:, 0] * y[..., None] + turns[:, 1] * x[..., None] + phase
    return 0.5 + np.cos(2 * np.pi * angle).sum(0) / 6


def _drawn(patterns: np.ndarray, each: int, random: np.random.Generator) -> Part:
    images = np.concatenate([_variants(pattern, each, random) for pattern in patterns])
    return Part(images, np.repeat(np.arange(len(patterns)), each), digests(images))


def _variants(pattern: np.ndarray, each: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [each, size, size, 3]: one pattern, shifted by up to an eighth of its side and with noise."""
    size = len(pattern)
    shift = random.integers(-(size // 8), size // 8 + 1, (2, each, 1))
    y, x = (np.arange(size) + shift) % size
    noisy = 255 * pattern[y[:, :, None], x[:, None, :]] + random.normal(0, 40, (each, size, size, 3))
    return noisy.round().clip(0, 255).astype(np.uint8)
