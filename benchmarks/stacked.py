"""Whether trials trained as one get through more images: `python -m benchmarks.stacked`.

The same ResNet-32 and images, K trials with seeds and rates of their own: as one (see `rayltr.stacked`), one after the
other, and on a GPU in K processes at once.  Prints images per second, summed over the trials, and what the first way is
of the others; on a GPU, what large matrix products would allow, too.  The exit code is 1 when no K > 1 reaches 1.0 on a
GPU; on a CPU, which a single trial keeps busy, there is no floor.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from rayltr import stacked
from rayltr.data import Data, load
from rayltr.interface import Lane, Resources
from rayltr.spec import Stage, fn
from rayltr.train import train

FLOOR, CLASSES = 1.0, 100
IMAGES = {"cpu": 10, "cuda": 400}
"""Of each class."""
FLOP = 0.41e9
"""To train ResNet-32 on an image of 32 x 32: three times 69 million multiplications and additions."""
SIDE, PRODUCTS = 8192, 20
WAIT_S = 300


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.stacked", description=__doc__.split("\n")[0])
    made.add_argument("--trials", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="default: 1 2 4 8")
    made.add_argument("--images", type=int, help="of each of 100 classes (default: 10 on a CPU, 400 on a GPU)")
    made.add_argument("--repeats", type=int, default=3, help="epochs of each way (default: 3)")
    made.add_argument("--batch", type=int, default=128, help="default: 128")
    made.add_argument("--size", type=int, default=32, help="side of the images (default: 32)")
    made.add_argument("--width", type=int, default=16, help="of the network (default: 16)")
    made.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: bf16")
    made.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    made.add_argument("--device", help="cpu or cuda; default: what there is")
    return made


def trials(options: argparse.Namespace, images: int, most: int) -> list[Stage]:
    source = fn("synthetic", classes=CLASSES, per_class=images, size=options.size, ratio=1.0)
    return [
        Stage(
            source=source,
            epochs=2,
            backbone=fn("resnet32", width=options.width),
            optimiser=fn("sgd", lr=0.1 / (1 + seed)),
            batch=options.batch,
            precision=options.precision,
            seed=seed,
        )
        for seed in range(most)
    ]


def alone(stages: Sequence[Stage], data: Data, resources: Resources) -> float:
    """Images per second of the second epochs of trials one after the other; the first are for what happens once."""
    rates: list[float] = []
    for stage in stages:
        train(stage, data=data, resources=resources, splits=(), on_epoch=lambda one: rates.append(one["images_per_s"]))
    return len(stages) / sum(1 / rate for rate in rates[1::2])


def as_one(stages: Sequence[Stage], data: Data, resources: Resources) -> float:
    """Images per second of the second epochs of trials that are trained as one."""
    ends: list[tuple[int, float]] = []

    def job(stage: Stage, lane: Lane, report: stacked.Report) -> None:
        mine = Resources(resources.device, resources.threads, lane=lane)
        note = lambda one: ends.append((one["epoch"], time.monotonic()))  # noqa: E731
        train(stage, data=data, resources=mine, splits=(), on_epoch=note)

    assert not [*stacked.bundle([partial(job, stage) for stage in stages])]
    first, second = (max(at for epoch, at in ends if epoch == number) for number in (1, 2))
    return images_of(stages, data) / (second - first)


def at_once(stages: Sequence[Stage], data: Data, resources: Resources) -> float:
    """Images per second of the second epochs of trials in processes of their own."""
    context: Any = get_context("spawn")
    ready, ends = context.Barrier(len(stages), timeout=WAIT_S), context.SimpleQueue()
    own = [context.Process(target=process, args=(stage, resources, ready, ends)) for stage in stages]
    for each in own:
        each.start()
    for each in own:
        each.join()
    if any(each.exitcode for each in own):
        raise RuntimeError(f"{len(own)} processes at once did not come to their end")
    times = [ends.get() for _ in own]
    return images_of(stages, data) / (max(end for _, end in times) - min(begin for begin, _ in times))


def process(stage: Stage, resources: Resources, ready: Any, ends: Any) -> None:
    times: list[float] = []

    def note(record: dict[str, Any]) -> None:
        if record["epoch"] == 1:
            ready.wait()
        times.append(time.monotonic())

    train(stage, resources=resources, splits=(), on_epoch=note)
    ends.put(tuple(times))


def images_of(stages: Sequence[Stage], data: Data) -> int:
    return sum(len(data.train) // stage.batch * stage.batch for stage in stages)


def limit(device: torch.device) -> float:
    """Images per second, if ResNet-32 were a large product of matrices in bfloat16."""
    a = torch.rand(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    torch.mm(a, a)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(a, a)
    torch.cuda.synchronize(device)
    return 2 * SIDE**3 * PRODUCTS / (time.perf_counter() - began) / FLOP


def measured(ways: Sequence[Any], stages: Sequence[Stage], data: Data, resources: Resources, repeats: int) -> list:
    """The median rate of each way, which take turns."""
    runs = [[way(stages, data, resources) for way in ways] for _ in range(repeats)]
    return [median(rates) for rates in zip(*runs, strict=True)]


def verdict(found: dict[int, list[float]], gpu: bool) -> int:
    """Says whether stacking pays: found has the rates of every K, as one first.  The exit code."""
    ratios = {k: rates[0] / max(rates[1:]) for k, rates in found.items() if k > 1}
    k = max(ratios, key=ratios.__getitem__)
    floor = max(rates[0] / rates[1] for number, rates in found.items() if number > 1) if gpu else FLOOR
    says = "pays" if ratios[k] > 1 else "does not pay"
    beside = f" (beside one after the other: {floor:.2f}, floor {FLOOR})" if gpu else ""
    print(f"stacking {says} here: at best {ratios[k]:.2f} times the other ways, with {k} trials{beside}")
    return int(floor < FLOOR)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(options.device, options.threads)
    device = resources.place()
    stages = trials(options, options.images or IMAGES[device.type], max(options.trials))
    data, gpu = load(stages[0].source), device.type == "cuda"
    what = f"ResNet-32 ({options.width} channels), {len(data.train)} images of {options.size} x {options.size}"
    where = f"batch {options.batch}, {options.precision}, {device}, {options.threads} threads"
    print(f"{what}, {where}; images/s of all trials")
    print("trials    as one   one after the other" + "   processes at once" * gpu)
    found: dict[int, list[float]] = {}
    for k in options.trials:
        ways = [as_one, alone, *([at_once] if gpu else [])]
        found[k] = measured(ways, stages[:k], data, resources, options.repeats)
        beside = [f"{rate:9.0f} ({found[k][0] / rate:4.2f} times)" for rate in found[k][1:]]
        print(f"{k:6}{found[k][0]:10.0f}   {'   '.join(beside)}", flush=True)
    if gpu and (options.width, options.size) == (16, 32):
        most, single, stack = limit(device), found[min(found)][1], max(rates[0] for rates in found.values())
        print(f"as large matrix products: {most:.0f} images/s, of which one trial reaches {single / most:.1%}, "
              f"stacked ones {stack / most:.1%}")  # fmt: skip
    return verdict(found, gpu) if max(found) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
