"""What sharing a classifier of a million classes saves: `python -m benchmarks.million_way`.

Two workers take steps of SGD with momentum on a cosine softmax over 100 000, 300 000 and 1 000 000 classes of 128
numbers, in three ways: every worker has the full classifier (DistributedDataParallel and autograd), each has its
share and keeps all logits, each has its share and computes logits a block of classes at a time.  Seconds are the
shortest step, memory is the peak of a worker beyond what it took before, traffic is counted by the sockets.

The exit code is 1 when, at the most classes, the full classifier takes less than 2.5 (logits kept) or 6 (blocks) times
the memory, less than 1.4 times the time of the blocks, when blocks take more than 600 bytes for a class more, or when
their traffic depends on the classes or is more than 5 % off the cost model.  `--quick` looks at 50 000 and 150 000
classes, where constants weigh more, and asks for half of that, but for all of the traffic.
"""

import argparse
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from rayltr.sharded import Shard

KEPT_LIMIT, BLOCKS_LIMIT, TIME_LIMIT = 2.5, 6.0, 1.4
SLOPE_LIMIT, TRAFFIC_LIMIT = 600, 0.05
SIZES, QUICK = (100_000, 300_000, 1_000_000), (50_000, 150_000)
FLOAT, LABEL = 4, 8
"""Bytes."""
SENT = 200
"""Where in Linux's `struct tcp_info` the bytes lie that a socket has sent."""


class Full(nn.Module):
    """The classifier that every worker has whole; the mean over its own images."""

    def __init__(self, classes: int, dim: int, temperature: float = 0.15):
        super().__init__()
        self.weight, self.temperature = nn.Parameter(F.normalize(torch.randn(classes, dim))), temperature

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = F.normalize(features) @ F.normalize(self.weight).T / self.temperature
        return F.cross_entropy(logits, labels)


@dataclass
class Found:
    """Of one worker: seconds of each step, bytes sent in a step, bytes of memory at the peak."""

    seconds: list[float]
    sent: float
    peak: int


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.million_way", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="fewer classes: a minute instead of ten")
    made.add_argument("--steps", type=int, default=5, help="steps that are measured, after one more (default: 5)")
    made.add_argument("--batch", type=int, default=256, help="images of a worker (default: 256)")
    made.add_argument("--dim", type=int, default=128, help="numbers of a class (default: 128)")
    made.add_argument("--workers", type=int, default=2, help="default: 2")
    return made


def full(classes: int, dim: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = DistributedDataParallel(Full(classes, dim))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def shared(classes: int, dim: int, kept: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Shard(classes, dim, kept=kept)
    leader = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9, weight_decay=1e-4)
    model.obey(leader)
    return model, leader


WAYS: dict[str, Callable[[int, int], tuple[nn.Module, torch.optim.Optimizer]]] = {
    "full": full,
    "shared, logits kept": lambda classes, dim: shared(classes, dim, True),
    "shared, blocks": lambda classes, dim: shared(classes, dim, False),
}


def worker(number: int, way: str, classes: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", options.workers)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=options.workers)
    steps(way, 100, 1, options)  # what libraries and connections take is the same for any number of classes
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    seconds, sent = steps(way, classes, options.steps, options)
    torch.save(vars(Found(seconds, sent, memory("VmHWM") - before)), f"{folder}/{number}.pt")
    distributed.destroy_process_group()


def steps(way: str, classes: int, number: int, options: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each of so many steps after a first one, and the bytes that this worker sends in one."""
    torch.manual_seed(0)
    model, optimiser = WAYS[way](classes, options.dim)
    g = torch.Generator().manual_seed(distributed.get_rank())
    seconds, sent = [], 0
    for step in range(number + 1):
        features = torch.randn(options.batch, options.dim, generator=g).requires_grad_()
        labels = torch.randint(classes, (options.batch,), generator=g)
        began = time.perf_counter()
        optimiser.zero_grad()
        model(features, labels).backward()
        optimiser.step()
        seconds.append(time.perf_counter() - began)
        sent = sent if step else bytes_sent()
    return seconds[1:], (bytes_sent() - sent) / number


def memory(what: str) -> int:
    """Bytes of this process: VmRSS, what it has, or VmHWM, the most that it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def bytes_sent() -> int:
    """By all TCP connections of this process."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(name)))
            with one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SENT + 8)
                total += struct.unpack_from("<Q", info, SENT)[0]
        except (OSError, struct.error):  # no connection by TCP
            continue
    return total


def measured(way: str, classes: int, options: argparse.Namespace) -> Found:
    """Steps in processes of their own: of the slowest worker, of all on average, of the largest."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (way, classes, options, folder), options.workers)
        each = [Found(**torch.load(f"{folder}/{number}.pt")) for number in range(options.workers)]
    seconds = [max(steps) for steps in zip(*(one.seconds for one in each), strict=True)]
    return Found(seconds, sum(one.sent for one in each) / len(each), max(one.peak for one in each))


def modelled(way: str, classes: int, options: argparse.Namespace) -> float:
    """The bytes that a worker sends in a step: gradients of the classifier, or features, labels, sums, gradients."""
    others = options.workers - 1
    if way == "full":
        return 2 * others / options.workers * FLOAT * classes * options.dim
    return others * options.batch * (2 * FLOAT * options.dim + LABEL + 6 * FLOAT)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    sizes = QUICK if options.quick else SIZES
    print(f"{options.workers} workers, 1 thread each, batch {options.batch} each, {options.dim} numbers")
    print(f"{'classes':>9}  {'way':20}{'s/step (median)':>17}{'MB sent':>10}{'model':>10}{'peak MiB':>10}")
    found: dict[tuple[str, int], Found] = {}
    for classes in sizes:
        for way in WAYS:
            one = found[way, classes] = measured(way, classes, options)
            theory = modelled(way, classes, options) / 1e6
            time_of = f"{min(one.seconds):8.2f} ({median(one.seconds):6.2f})"
            print(f"{classes:9}  {way:20}{time_of:>17}{one.sent / 1e6:10.3f}{theory:10.3f}{one.peak / 2**20:10.0f}",
                  flush=True)  # fmt: skip
    return judged(found, sizes, options)


def judged(found: dict[tuple[str, int], Found], sizes: Sequence[int], options: argparse.Namespace) -> int:
    """Prints what the ways are worth at the most classes; 1 if that is not enough."""
    *_, some, most = sizes
    whole, kept, blocks = (found[way, most] for way in WAYS)
    slope = (blocks.peak - found["shared, blocks", some].peak) / (most - some)
    sent = [found["shared, blocks", classes].sent for classes in sizes]
    share = 0.5 if options.quick else 1.0
    steepest = SLOPE_LIMIT / share
    ratios = {
        "memory, logits kept": (whole.peak / kept.peak, share * KEPT_LIMIT),
        "memory, blocks": (whole.peak / blocks.peak, share * BLOCKS_LIMIT),
        "time, blocks": (min(whole.seconds) / min(blocks.seconds), share * TIME_LIMIT),
    }
    for name, (ratio, limit) in ratios.items():
        print(f"{name:22}{ratio:8.2f} times less (at least {limit:g})")
    off = max(abs(each / modelled("shared, blocks", most, options) - 1) for each in sent)
    print(f"{'bytes a class, blocks':22}{slope:8.0f} (at most {steepest:g}; "
          f"{2 * FLOAT * options.dim / options.workers:.0f} are weights and momentum)")  # fmt: skip
    print(f"{'traffic off the model':22}{100 * off:8.2f} % (at most {100 * TRAFFIC_LIMIT:g})")
    missed = [ratio < limit for ratio, limit in ratios.values()]
    return int(any(missed) or slope > steepest or off > TRAFFIC_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
