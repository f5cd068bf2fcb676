"""How fast a network is evaluated beside the field's usual loop: `python -m benchmarks.evaluate`.

The same ResNet-32, trained for one short epoch, predicts the same images in two ways, turn by turn: Pillow images, a
DataLoader, batches of 128 and float32 (see `benchmarks.usual`), and `rayltr.train.predict`, as after a training in
bfloat16.  Prints images per second, the median over the turns, the ratio, and the share of images that both classify
alike; the exit code is 1 when the ratio is below the floor, 2.3 on a CPU and 5 on a GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import usual
from rayltr.data import load
from rayltr.interface import Resources
from rayltr.spec import Stage, fn
from rayltr.train import assembled, facts, predict, train

FLOOR = {"cpu": 2.3, "cuda": 5.0}
CLASSES = 100


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.evaluate", description=__doc__.split("\n")[0])
    made.add_argument("--images", type=int, default=30, help="images of each of 100 classes (default: 30)")
    made.add_argument("--repeats", type=int, default=5, help="evaluations in each way (default: 5)")
    made.add_argument("--batch", type=int, default=128, help="of the usual loop (default: 128)")
    made.add_argument("--workers", type=int, default=2, help="of the usual loader (default: 2)")
    made.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of rayltr (default: bf16)")
    made.add_argument("--device", help="cpu or cuda; default: what there is")
    return made


def timed(work: Callable[[], Tensor | np.ndarray]) -> tuple[float, np.ndarray]:
    """Images per second, and the class [N] of each."""
    began = time.perf_counter()
    logits = torch.as_tensor(work())
    return len(logits) / (time.perf_counter() - began), logits.argmax(1).numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(device=options.device, threads=options.threads)
    device = resources.place()
    stage = Stage(
        source=fn("synthetic", classes=CLASSES, per_class=options.images, size=32, ratio=1.0),
        epochs=1,
        optimiser=fn("sgd", lr=0.05),
        precision=options.precision,
    )
    data = load(stage.source)
    state, _ = train(stage, data=data, resources=resources, splits=())
    module, _ = assembled(stage, facts(data), {}, state, device)
    # the usual way normalises images as it loads them
    model = deepcopy(nn.Sequential(module.backbone.body, module.head))  # type: ignore[union-attr, arg-type]
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    batches = usual.loader(data.train, [usual.plain(data)], options.batch, options.workers, training=False)
    slow = partial(usual.evaluate, model, batches, device)

    def fast() -> np.ndarray:
        return predict(module, data.train, device, options.precision)["main"]

    turns = [(timed(slow), timed(fast)) for _ in range(options.repeats + 1)][1:]
    rates = [(a, b) for (a, _), (b, _) in turns]
    ratio, floor = median(b / a for a, b in rates), FLOOR[device.type]
    alike = np.mean([(a == b).mean() for (_, a), (_, b) in turns])
    print(f"ResNet-32, {len(data.train)} images of 32 x 32, {device}, {options.threads} threads")
    print(f"usual loop, {options.workers} workers, fp32{median(a for a, _ in rates):10.0f} images/s")
    print(f"rayltr, {options.precision}{'':18}{median(b for _, b in rates):10.0f} images/s   {ratio:5.2f} times "
          f"(floor {floor}); {100 * alike:.1f} % classified alike")  # fmt: skip
    return int(ratio < floor)


if __name__ == "__main__":
    sys.exit(main())
