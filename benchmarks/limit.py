"""What the machine's convolutions allow: `python -m benchmarks.limit`.

Times every convolution of a ResNet-32 alone, forward and backward, in the shapes, layout and precision of training, and
an epoch of `rayltr.train` in between.  Prints GFLOP/s of each, the images per second if there were nothing else to do,
and the share of that which the epoch reaches.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.epoch import CLASSES, ours
from rayltr.backbones import resnet32
from rayltr.data import load
from rayltr.interface import Resources
from rayltr.spec import Stage, fn

Shape = tuple[int, int, int, int]
"""Channels in and out, stride, and the side of the images that come in."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.limit", description=__doc__.split("\n")[0])
    made.add_argument("--repeats", type=int, default=9, help="of each convolution (default: 9)")
    made.add_argument("--images", type=int, default=20, help="images of each of 100 classes in an epoch (default: 20)")
    made.add_argument("--batch", type=int, default=128, help="default: 128")
    made.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    made.add_argument("--device", help="cpu or cuda; default: what there is")
    return made


def shapes() -> Counter[Shape]:
    """The convolutions of the network, and how often each of them is there."""
    found: Counter[Shape] = Counter()

    def count(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        found[module.in_channels, module.out_channels, module.stride[0], given[0].shape[-1]] += 1  # type: ignore

    network = resnet32()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.zeros(2, 3, 32, 32))
    return found


def seconds(shape: Shape, batch: int, device: torch.device, repeats: int) -> float:
    """One convolution, forward and backward (the first one has no gradient for its images)."""
    inside, out, stride, side = shape
    layer = nn.Conv2d(inside, out, 3, stride, 1, bias=False).to(device, torch.bfloat16)
    layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, inside, side, side, device=device, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_(inside > 3)
    gradient, found = torch.randn_like(layer(images)), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        layer(images).backward(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return median(found[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(device=options.device, threads=options.threads)
    resources.settle()
    source = fn("synthetic", classes=CLASSES, per_class=options.images, size=32, ratio=1.0)
    stage = Stage(source=source, epochs=2, optimiser=fn("sgd", lr=0.1), batch=options.batch, precision="bf16")
    data, total = load(source), 0.0
    print(f"ResNet-32, batch {options.batch}, bf16, {resources.place()}, {options.threads} threads")
    print(f"{'convolution':24}{'number':>8}{'GFLOP/s':>10}")
    for (inside, out, stride, side), number in shapes().items():
        taken = seconds((inside, out, stride, side), options.batch, resources.place(), options.repeats)
        products = options.batch * 9 * inside * out * (side // stride) ** 2 * (3 if inside > 3 else 2)
        total += number * taken
        name = f"{inside} to {out}, {side} x {side}" + (f" / {stride}" if stride > 1 else "")
        print(f"{name:24}{number:8}{2e-9 * products / taken:10.1f}")
    limit, rate = options.batch / total, ours(stage, data, resources)
    print(f"convolutions alone {limit:8.0f} images/s")
    print(f"an epoch           {rate:8.0f} images/s, {100 * rate / limit:.0f} % of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
