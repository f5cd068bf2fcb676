"""How long an epoch takes beside the field's usual loop: `python -m benchmarks.epoch`.

The same ResNet-32, images, crop, mirror, batch and optimiser in two ways, turn by turn: Pillow transforms, a DataLoader
and float32 (see `benchmarks.usual`), and the loop of `rayltr.train`.  Prints images per second, the median over the
epochs, and the ratio; the exit code is 1 when it is below the floor, 2.2 on a CPU and 6 on a GPU.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

from benchmarks import usual
from rayltr import build
from rayltr.compiled import Compiled
from rayltr.data import Data, load
from rayltr.interface import ALONE, Resources
from rayltr.spec import Stage, fn
from rayltr.train import facts, train

FLOOR = {"cpu": 2.2, "cuda": 6.0}
CLASSES = 100


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.epoch", description=__doc__.split("\n")[0])
    made.add_argument("--images", type=int, default=40, help="images of the largest of 100 classes (default: 40)")
    made.add_argument("--repeats", type=int, default=5, help="epochs of each way (default: 5)")
    made.add_argument("--batch", type=int, default=128, help="default: 128")
    made.add_argument("--workers", type=int, default=2, help="of the usual loader (default: 2)")
    made.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    made.add_argument("--compile", action="store_true", help="compile the network of rayltr (see `rayltr.compiled`)")
    made.add_argument("--device", help="cpu or cuda; default: what there is")
    return made


def ours(stage: Stage, data: Data, resources: Resources) -> float:
    """Images per second of the last of two epochs: the first one is for what happens once."""
    rates: list[float] = []
    train(
        stage, data=data, resources=resources, on_epoch=lambda record: rates.append(record["images_per_s"]), splits=()
    )
    return rates[-1]


class Usual:
    """The usual loop, which keeps its workers and its model."""

    def __init__(self, stage: Stage, data: Data, workers: int, device: torch.device):
        self.device = device
        self.model: nn.Module = network(stage, data).to(device)
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.1, 0.9, weight_decay=5e-4)
        self.batches = usual.loader(data.train, [usual.flip_crop(data)], stage.batch, workers, training=True)

    def rate(self) -> float:
        began = time.perf_counter()
        seen = usual.epoch(self.model, self.batches, self.optimiser, self.device)
        return seen / (time.perf_counter() - began)


def network(stage: Stage, data: Data) -> nn.Module:
    """The network of a stage as one module; the usual way normalises images as it loads them."""
    method = build.method(stage, facts(data))
    return nn.Sequential(method.backbone.body, method.head)  # type: ignore[union-attr]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    lane = Compiled() if options.compile else ALONE
    resources = Resources(device=options.device, threads=options.threads, lane=lane)
    device = resources.place()
    stage = Stage(
        source=fn("synthetic", classes=CLASSES, per_class=options.images, size=32, ratio=1.0),
        epochs=2,
        optimiser=fn("sgd", lr=0.1),
        batch=options.batch,
        precision="bf16",
    )
    data = load(stage.source)
    torch.set_num_threads(options.threads)
    other = Usual(stage, data, options.workers, device)
    other.rate()
    runs = [(other.rate(), ours(stage, data, resources)) for _ in range(options.repeats)]
    slow, fast = (median(way) for way in zip(*runs, strict=True))
    ratio, floor = median(b / a for a, b in runs), FLOOR[device.type]
    print(f"ResNet-32, {len(data.train)} images of 32 x 32, batch {options.batch}, {device}, {options.threads} threads")
    print(f"usual loop, {options.workers} workers, fp32{slow:10.0f} images/s")
    own = "rayltr, bf16" + ", compiled" * options.compile
    print(f"{own:30}{fast:10.0f} images/s   {ratio:5.2f} times (floor {floor})")
    return int(ratio < floor)


if __name__ == "__main__":
    sys.exit(main())
