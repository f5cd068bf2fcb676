"""What the report of a large run takes: `python -m benchmarks.report`.

Makes a run folder of finished trials with random but plausible logits in a temporary folder, writes its report in a
fresh process and prints seconds and peak memory.  Logits are drawn once and leaned towards the head differently for
each of a few files; trials share these, but each is read on its own.  The exit code is 1 above 60 s or 4 GiB.
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from rayltr import metrics, records

SECONDS, BYTES = 60.0, 4 << 30
FILES = 24
LOSSES = ("cross_entropy", "balanced_softmax", "ldam", "focal")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.split("\n")[0])
    made.add_argument("--trials", type=int, default=1000, help="default: 1000")
    made.add_argument("--classes", type=int, default=100, help="default: 100")
    made.add_argument("--images", type=int, default=10_000, help="validation images (default: 10000)")
    made.add_argument("--folder", help="where to make the run, and leave it (default: a temporary folder)")
    return made


def make(folder: Path, trials: int, classes: int, images: int) -> None:
    """A run folder; every fifth trial is of the control arm."""
    counts = np.array([int(500 * 100 ** (-i / max(classes - 1, 1))) for i in range(classes)])
    files = [stored(folder, number, counts, images) for number in range(min(FILES, trials))]
    rows = [row(number, *files[number % len(files)]) for number in range(trials)]
    records.write_trials(folder, rows)
    records.append_epochs(folder, [epoch for one in rows for epoch in learned(one["trial"])])
    data = {"counts": counts.tolist(), "images": {"train": int(counts.sum()), "val": images}, "digest": "benchmark"}
    records.write_run(folder, {"study": "benchmark", "data": data, "openings": [], "versions": {}})


def stored(folder: Path, number: int, counts: np.ndarray, images: int) -> tuple[str, dict[str, float]]:
    """The name of a file of predictions, and the scores of a trial that made them."""
    shared, own = np.random.default_rng(0), np.random.default_rng(number + 1)
    target = np.sort(np.arange(images) % len(counts))
    z = 2 * shared.normal(size=(images, len(counts))) + own.normal(size=(images, len(counts)))
    z[np.arange(images), target] += 4 + own.normal(0, 0.3)
    z += own.uniform(0, 1) * np.log(counts / counts.sum())
    name = f"store/{number:04d}/val.parquet"
    records.write_predictions(
        folder / name, row=np.arange(images), target=target, logits={"main": z}, counts=counts,
        classes=[str(i) for i in range(len(counts))], split="val", digest="",
    )  # fmt: skip
    found = metrics.summary(z.astype(np.float32), target, counts, metrics.groups(counts)[0])
    return name, {f"m.val.{key}": value for key, value in found.items()}


def row(number: int, name: str, found: dict[str, float]) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    begun = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    params: dict[str, Any] = {"arm": "study" if number % 5 else "control"}
    if number % 5:
        params |= {"loss": LOSSES[number % 4], "lr": [0.05, 0.1, 0.2][number % 3], "deferred": bool(number % 2)}
        params |= {"mixup.alpha": float(rng.uniform(0.1, 1))} if number % 3 else {}
    return {
        "study": "benchmark", "trial": f"{number:04d}", "number": number, "state": "complete", "address": str(number),
        "seed": 0, "epochs_asked": 200, "epochs_trained": 200, "share": 1.0, "wall_s": float(rng.uniform(500, 900)),
        "objective": found["m.val.fitted_nll"], "predictions_val": name, "started": begun, "ended": begun,
        **{f"p.{key}": value for key, value in params.items()}, **found,
    }  # fmt: skip


def learned(trial: str) -> list[dict[str, Any]]:
    return [
        {"trial": trial, "stage": 0, "epoch": epoch, "split": "train", "metric": "loss",
         "value": 4 * math.exp(-epoch / 60), "wall_s": 3.0}
        for epoch in range(1, 201)
    ]  # fmt: skip


def measured(folder: Path) -> tuple[float, float, int]:
    """Seconds, seconds of processors and peak bytes of the command, in a process of its own."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "analysis", str(folder)], check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        make(folder, options.trials, options.classes, options.images)
        seconds, busy, peak = measured(folder)
    print(f"{options.trials} trials, {options.images} images, {options.classes} classes")
    print(f"{seconds:.1f} s (limit {SECONDS:.0f}), of which processors worked {busy:.1f} s (both together)")
    print(f"{peak / (1 << 30):.2f} GiB (limit {BYTES >> 30})")
    return int(seconds > SECONDS or peak > BYTES)


if __name__ == "__main__":
    sys.exit(main())
