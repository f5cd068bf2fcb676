"""How long data take to be ready, beside torchvision's ImageFolder: `python -m benchmarks.loading`.

Makes 60 000 images of 32 x 32 pixels in 100 classes, as the Python batches of CIFAR-100 and as PNG files in class
folders, and times: `load` of both once they are in the cache, as every trial but the first finds them; the start of a
trial, from its stage to its first batch on the device; and the files when nobody has read them yet.  The usual way is
an ImageFolder that a DataLoader reads once, with Pillow: that comes before its first epoch can end, and again in every
epoch.  Ours decodes the files once, by the same library, keeps the pixels and identifies them by their content.

Then 2 000 photographs (JPEG, 256 x 256) are seen as 64 x 64 pixels, as a set that does not fit in memory: an epoch's
images in a random order, decoded by as many processes on either side, which run already.  Ours has JPEG files decoded
at the smallest size that is twice what is needed.

The exit code is 1 when the cache or the start of a trial takes more than half a second, files more than a fifth of the
usual time once they are known or more than 1 / FIRST of it the first time, or an epoch's images more than 1 / EPOCH.
"""

import argparse
import os
import pickle
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize, ToTensor

from rayltr.ahead import Reader
from rayltr.catalogue import complete
from rayltr.data import load
from rayltr.interface import Resources
from rayltr.spec import Fn, Stage, fn
from rayltr.train import assembled, batches, facts

CLASSES, LIMIT_S, KNOWN, FIRST, EPOCH = 100, 0.5, 5, 1.3, 1.1
BATCH, SIDE = 128, 64
SPLITS = {"train": 5 / 6, "test": 1 / 6}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.loading", description=__doc__.split("\n")[0])
    made.add_argument("--images", type=int, default=60_000, help="a sixth of them for testing (default: 60000)")
    made.add_argument("--photographs", type=int, default=2_000, help="for an epoch (default: 2000)")
    made.add_argument("--repeats", type=int, default=5, help="of what the cache has, and of epochs (default: 5)")
    made.add_argument("--workers", type=int, default=2, help="of the usual loader (default: 2)")
    made.add_argument("--threads", type=int, default=2, help="CPU threads, and processes that decode (default: 2)")
    return made


def write(place: Path, images: int) -> None:
    """The same smooth random images as `place`/cifar-100-python and as `place`/files/SPLIT/CLASS/*.png."""
    random = np.random.default_rng(0)
    (place / "cifar-100-python").mkdir(parents=True)
    names = [f"class {c:02}" for c in range(CLASSES)]
    (place / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    for split, share in SPLITS.items():
        count = round(images * share / CLASSES) * CLASSES
        coarse = random.integers(0, 256, (count, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        pixels = coarse // 2 + random.integers(0, 32, coarse.shape, np.uint8)
        target = np.arange(count) % CLASSES
        flat = pixels.transpose(0, 3, 1, 2).reshape(count, -1)
        content = pickle.dumps({"data": flat, "fine_labels": target.tolist()})
        (place / "cifar-100-python" / split).write_bytes(content)
        for name in names:
            (place / "files" / split / name).mkdir(parents=True)
        for number, (image, c) in enumerate(zip(pixels, target, strict=True)):
            Image.fromarray(image).save(place / "files" / split / names[c] / f"{number:05}.png", compress_level=1)


def photographs(place: Path, images: int) -> None:
    """`place`/SPLIT/CLASS/*.jpg: `images` for training, and one of every class for validation and test."""
    random = np.random.default_rng(0)
    for split, count in {"train": images, "val": 10, "test": 10}.items():
        for number in range(count):
            folder = place / split / f"class {number % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8))
            coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number:05}.jpg", quality=90)


def usual(place: Path, workers: int) -> None:
    """Every image once."""
    for split in SPLITS:
        for _ in DataLoader(ImageFolder(place / split, ToTensor()), BATCH, num_workers=workers):
            pass


def epochs(place: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds for an epoch's images, ours and the usual ones, turn by turn."""
    train = load(fn("folder", root=str(place), size=SIDE, in_memory_gb=0.0)).train
    read = Reader(train, torch.device("cpu"))
    transform = Compose([Resize(SIDE), CenterCrop(SIDE), PILToTensor()])
    loader = DataLoader(
        ImageFolder(place / "train", transform), BATCH, True, num_workers=options.workers, persistent_workers=True
    )
    times = []
    for _ in range(options.repeats + 1):
        parts = np.split(np.random.default_rng(0).permutation(len(train)), range(BATCH, len(train), BATCH))
        times.append((seconds(lambda parts=parts: deque(read(parts), 0)), seconds(lambda: deque(loader, 0))))
    ours, theirs = zip(*times[1:], strict=True)  # in the first epoch processes start
    return median(ours), median(theirs)


def begun(source: Fn, resources: Resources) -> None:
    """A trial up to its first batch."""
    stage, device = complete(Stage(source=source, epochs=1)), resources.place()
    data = load(stage.source)
    assembled(stage, facts(data), {}, None, device)
    next(batches(Reader(data.train, device), torch.arange(len(data.train)), stage.batch, 1))


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The median."""
    found = []
    for _ in range(repeats):
        before = time.perf_counter()
        work()
        found.append(time.perf_counter() - before)
    return median(found)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(threads=options.threads)
    resources.settle()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["RAYLTR_CACHE"] = str(place / "cache")
        write(place, options.images)
        files, arrays = fn("folder", root=str(place / "files")), fn("cifar100", root=name, ratio=10.0)
        load(arrays)
        first = seconds(lambda: load(files))
        slow = seconds(lambda: usual(place / "files", options.workers))
        begun(arrays, resources)  # the first network of a process imports what the others find
        cached, start, known = (
            seconds(work, options.repeats)
            for work in (lambda: load(arrays), lambda: begun(arrays, resources), lambda: load(files))
        )
        rows = {
            "CIFAR-100, in the cache": (cached, LIMIT_S, slow),
            "a trial up to its first batch": (start, LIMIT_S, slow),
            "PNG files, in the cache": (known, slow / KNOWN, slow),
            "PNG files, the first time": (first, slow / FIRST, slow),
        }
        photographs(place / "photographs", options.photographs)
        epoch, usually = epochs(place / "photographs", options)
        rows["an epoch's photographs"] = (epoch, usually / EPOCH, usually)
    print(f"{options.images} images, {options.photographs} photographs; ImageFolder with {options.workers} workers")
    print(f"{'ready':32}{'seconds':>10}{'limit':>10}{'ImageFolder':>14}")
    for row, (taken, limit, beside) in rows.items():
        print(f"{row:32}{taken:10.3f}{limit:10.2f}{beside:14.2f}{beside / taken:10.1f} times")
    return int(any(taken > limit for taken, limit, _ in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
