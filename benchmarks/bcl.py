"""What balanced contrastive learning costs: `python -m benchmarks.bcl`.

Trains the same short stage of a ResNet-32 on 32 x 32 images of 100 classes with one view and the method `supervised`,
and with three views and `bcl`, turn by turn, and compares the median seconds of an epoch; then times the balanced
contrastive loss alone, forward and backward, against a step.  The exit code is 1 when three views take more than 3.3
times as long as one, or when the loss takes more than a twentieth of the step.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch.nn import functional as F

from rayltr.contrast import balanced
from rayltr.data import Data, load
from rayltr.interface import Resources
from rayltr.spec import Stage, fn
from rayltr.train import train

VIEWS_LIMIT, LOSS_LIMIT = 3.3, 0.05
CLASSES = 100


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.bcl", description=__doc__.split("\n")[0])
    made.add_argument("--images", type=int, default=20, help="images of the largest of 100 classes (default: 20)")
    made.add_argument("--repeats", type=int, default=5, help="epochs of each method (default: 5)")
    made.add_argument("--batch", type=int, default=256, help="default: 256")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    made.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    made.add_argument("--device", help="cpu or cuda; default: what there is")
    return made


def epoch(stage: Stage, data: Data, resources: Resources) -> float:
    """Seconds of the one epoch of a stage."""
    seconds: list[float] = []
    train(stage, data=data, resources=resources, on_epoch=lambda record: seconds.append(record["wall_s"]), splits=())
    return seconds[0]


def loss_alone(batch: int, resources: Resources, repeats: int) -> float:
    """Seconds of the contrastive loss of a batch, forward and backward, with vectors of 128 numbers."""
    device, g = resources.place(), torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(2 * batch + CLASSES, 128, generator=g)).to(device).requires_grad_()
    target = torch.randint(0, CLASSES, (batch,), generator=g).repeat(2).to(device)
    place, seconds = torch.arange(2 * batch, device=device), []
    for _ in range(4 * repeats):
        began = time.perf_counter()
        anchors, prototypes = vectors.split([2 * batch, CLASSES])
        balanced(anchors, anchors, target, target, place, prototypes).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(device=options.device, threads=options.threads)
    one = Stage(
        source=fn("synthetic", classes=CLASSES, per_class=options.images, size=32, ratio=1.0),
        epochs=1,
        views=(fn("autoaugment", crop="padded", cutout=0.5),),
        loss=fn("logit_adjusted"),
        batch=options.batch,
        precision=options.precision,
    )
    three = one.but(views=(*one.views, fn("simaugment"), fn("simaugment")), method=fn("bcl"))
    data, stages = load(one.source), {"supervised": one, "bcl": three}
    runs = [{name: epoch(stage, data, resources) for name, stage in stages.items()} for _ in range(options.repeats)]
    steps = max(1, len(data.train) // options.batch)
    found = {name: median(run[name] for run in runs) / steps for name in stages}
    loss = loss_alone(options.batch, resources, options.repeats)
    views, share = median(run["bcl"] / run["supervised"] for run in runs), loss / found["bcl"]
    print(f"ResNet-32, batch {options.batch}, {options.precision}, {resources.place()}, {options.threads} threads")
    print(f"supervised, 1 view   {1000 * found['supervised']:9.1f} ms a step")
    print(f"bcl, 3 views         {1000 * found['bcl']:9.1f} ms a step   {views:6.2f} times (limit {VIEWS_LIMIT})")
    print(
        f"its loss alone       {1000 * loss:9.1f} ms          {100 * share:6.2f} % of it (limit {100 * LOSS_LIMIT:g})"
    )
    return int(views > VIEWS_LIMIT or share > LOSS_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
