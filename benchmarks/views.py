"""What views of whole batches save over views of one image after the other: `python -m benchmarks.views`.

Makes the three views of balanced contrastive learning on CIFAR (AutoAugment with Cutout, twice SimAugment) of the same
uint8 images in two ways, turn by turn: with Pillow and torchvision image by image, and with `rayltr.views`.  Prints
microseconds for each image and view, in CPU time of one process (on a GPU, of the clock), and the ratio.  The exit
code is 1 when the three views together are not made `--least` times as fast.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from rayltr.interface import Resources
from rayltr.train import pixels
from rayltr.views import VIEWS

OURS: dict[str, dict[str, Any]] = {"autoaugment": {"crop": "padded", "cutout": 0.5}, "simaugment": {}}
TIMES = {"autoaugment": 1, "simaugment": 2}
"""How often each is among the three views."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.views", description=__doc__.split("\n")[0])
    made.add_argument("--batch", type=int, default=256, help="images of a batch (default: 256)")
    made.add_argument("--side", type=int, default=32, help="pixels of a side (default: 32)")
    made.add_argument("--repeats", type=int, default=9, help="batches of each kind (default: 9)")
    made.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    made.add_argument("--device", help="cpu or cuda, for the batches; default: what there is")
    made.add_argument("--least", type=float, default=8.0, help="the ratio asked for (default: 8)")
    return made


def cutout(image: Tensor) -> Tensor:
    """A black square of half the height, as in the published code."""
    side = image.shape[1] // 2
    top, left = (int(torch.randint(length, ())) - side // 2 for length in image.shape[1:])
    image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    return image


def one_by_one(side: int) -> dict[str, Callable[[Image.Image], Tensor]]:
    """The usual views, of a Pillow image."""
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    crop, flip = transforms.RandomCrop(side, padding=side // 8), transforms.RandomHorizontalFlip()
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    return {
        "autoaugment": transforms.Compose([crop, flip, policy, transforms.ToTensor(), cutout]),
        "simaugment": transforms.Compose(
            [transforms.RandomResizedCrop(side), flip, jitter, transforms.RandomGrayscale(0.2), transforms.ToTensor()]
        ),
    }


def each(view: Callable[[Image.Image], Tensor], images: np.ndarray) -> Tensor:
    return torch.stack([view(Image.fromarray(image)) for image in images])


def at_once(view: Callable[..., Tensor], images: np.ndarray, generator: torch.Generator, keywords: dict) -> Tensor:
    return view(pixels(images, generator.device), generator, **keywords)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    cuda = device.type == "cuda"
    clock = time.monotonic if cuda else time.process_time
    began = clock()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - began


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(device=options.device, threads=options.threads)
    resources.settle()
    torch.manual_seed(0)
    device, cpu = resources.place(), torch.device("cpu")
    images = torch.randint(256, (options.batch, options.side, options.side, 3), dtype=torch.uint8).numpy()
    generator, usual = torch.Generator(device).manual_seed(0), one_by_one(options.side)
    seconds: dict[str, list[float]] = {f"{way} {name}": [] for way in ("usual", "batched") for name in OURS}
    for _ in range(options.repeats + 1):
        for name, keywords in OURS.items():
            slow = timed(partial(each, usual[name], images), cpu)
            fast = timed(partial(at_once, VIEWS[name], images, generator, keywords), device)
            seconds[f"usual {name}"].append(slow)
            seconds[f"batched {name}"].append(fast)
    found = {name: 1e6 * median(values[1:]) / options.batch for name, values in seconds.items()}
    print(f"{options.batch} images of {options.side} x {options.side}, {device}, {options.threads} threads")
    print(f"{'view':24}{'one by one':>12}{'batched':>12}{'ratio':>8}    (microseconds for an image)")
    whole = [sum(TIMES[name] * found[f"{way} {name}"] for name in OURS) for way in ("usual", "batched")]
    rows = {name: [found[f"{way} {name}"] for way in ("usual", "batched")] for name in OURS}
    for name, (slow, fast) in {**rows, "all three": whole}.items():
        print(f"{name:24}{slow:12.1f}{fast:12.1f}{slow / fast:8.1f}")
    return int(whole[0] < options.least * whole[1])


if __name__ == "__main__":
    sys.exit(main())
