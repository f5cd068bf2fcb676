"""What transforming the drawn images by their class activation maps costs: `python -m benchmarks.cam`.

Trains the same short class-balanced stage of a ResNet-32 on 32 x 32 images with the methods `supervised` and `cam`,
turn by turn, and compares the median seconds of an epoch, a share of what comes before the first one included.  The
exit code is 1 when `cam` takes more than 1.3 times as long.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

from rayltr.data import Data, load
from rayltr.interface import Resources, State
from rayltr.spec import Stage, fn
from rayltr.train import train

LIMIT = 1.3
LENGTH = 40
"""Epochs of the published stage, over which the computation of the maps is spread."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.cam", description=__doc__.split("\n")[0])
    made.add_argument("--images", type=int, default=150, help="images of the largest of 10 classes (default: 150)")
    made.add_argument("--epochs", type=int, default=2, help="epochs of each run (default: 2)")
    made.add_argument("--repeats", type=int, default=3, help="runs of each method (default: 3)")
    made.add_argument("--batch", type=int, default=128, help="default: 128")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    made.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    made.add_argument("--device", help="cpu or cuda; default: what there is")
    return made


def timed(stage: Stage, parent: State, data: Data, resources: Resources) -> tuple[float, list[float]]:
    """Seconds of one run outside its epochs, and of each epoch."""
    epochs: list[float] = []
    began = time.monotonic()
    train(
        stage,
        {"resume": parent, "teacher": parent},
        data=data,
        resources=resources,
        on_epoch=lambda record: epochs.append(record["wall_s"]),
        splits=(),
    )
    return time.monotonic() - began - sum(epochs), epochs


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(device=options.device, threads=options.threads)
    parent = Stage(
        source=fn("synthetic", per_class=options.images, size=32, ratio=10.0),
        epochs=1,
        batch=options.batch,
        precision=options.precision,
    )
    data = load(parent.source)
    state, _ = train(parent, data=data, resources=resources, splits=())
    plain = parent.but(epochs=options.epochs, resume=parent, sampler=fn("power", q=0.0))
    stages = {"supervised": plain, "cam": plain.but(method=fn("cam"), teacher=parent)}
    runs = [
        {name: timed(stage, state, data, resources) for name, stage in stages.items()} for _ in range(options.repeats)
    ]
    print(f"ResNet-32, {len(data.train)} images, {options.precision}, {resources.place()}, {options.threads} threads")
    print(f"{'method':12}{'s before':>10}{'s/epoch':>10}{f's/epoch of {LENGTH}':>16}{'ratio':>8}")
    whole = {}
    for name in stages:
        before = median(run[name][0] for run in runs)
        epoch = median(second for run in runs for second in run[name][1])
        whole[name] = epoch + before / LENGTH
        print(f"{name:12}{before:10.3f}{epoch:10.3f}{whole[name]:16.3f}{whole[name] / whole['supervised']:8.3f}")
    return int(whole["cam"] > LIMIT * whole["supervised"])


if __name__ == "__main__":
    sys.exit(main())
