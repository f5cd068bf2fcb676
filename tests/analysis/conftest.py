"""A small plausible run, made of known logits instead of trained models."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from rayltr import metrics, records

LOSSES = {"cross_entropy": 0.0, "balanced_softmax": 1.0, "ldam": 0.5, "logit_adjusted": 0.8}
"""How much of the prior each loss takes out of the logits."""

CONTROL, TESTED = (0, 4), (3, 4)
"""The trials of the control arm, and those with test predictions."""


def long_tail(classes: int = 100, largest: int = 500, ratio: float = 100.0) -> np.ndarray:
    """The published exponential profile: 500, 477, ... 5 images for 100 classes."""
    return np.array([int(largest * ratio ** (-i / max(classes - 1, 1))) for i in range(classes)])


def logits(counts: np.ndarray, each: int, skill: float, removed: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] float32 and target [N]: rare classes are harder, and the prior leans on what is not removed."""
    rng = np.random.default_rng(seed)
    classes = len(counts)
    luck = np.random.default_rng(classes).uniform(0.75, 1.25, classes)
    target = np.repeat(np.arange(classes), each)
    ease = skill * (0.6 + 0.4 * np.log(counts + 1.0) / np.log(counts.max() + 1.0)) * luck
    z = rng.normal(size=(len(target), classes)) + 0.6 * rng.normal(size=(len(target), 1))
    z[np.arange(len(target)), target] += ease[target]
    prior = np.log(counts / counts.sum())
    return (2.0 * (z + 0.45 * (1 - removed) * (prior - prior.mean()))).astype(np.float32), target


def make_run(folder: Path, *, trials: int = 10, classes: int = 100, each: int = 20, failed: int = 1) -> Path:
    """A run folder: trials 0 and 4 are of the control arm, the last `failed` have no result."""
    counts = long_tail(classes)
    names = [f"class {i}" for i in range(classes)]
    rng = np.random.default_rng(classes)
    rows = []
    for number in range(trials):
        loss = list(LOSSES)[number % len(LOSSES)]
        mixup = None if number % 3 == 0 else round(float(rng.uniform(0.1, 1.0)), 3)
        begun = datetime(2025, 3, 1, 9, tzinfo=UTC) + timedelta(minutes=7 * number)
        row = {
            "study": "bag_of_tricks",
            "trial": f"{number:04d}",
            "number": number,
            "state": "complete",
            "address": f"{number:064x}@200",
            "seed": 0,
            "classes": classes,
            "epochs_asked": 200,
            "epochs_trained": 200,
            "wall_s": float(rng.uniform(300, 420)),
            "started": begun,
            "ended": begun + timedelta(minutes=6),
            "p.arm": "control" if number in CONTROL else "study",
            "p.loss": loss,
            "p.mixup.alpha": mixup,
            "p.lr": [0.05, 0.1][number % 2],
            "p.deferred": number % 4 == 3,
        }
        if number >= trials - failed:
            error = "Traceback (most recent call last):\n  ...\nDiverged: the loss is nan at epoch 3 <lr 0.1>"
            rows.append({**row, "state": "failed", "epochs_trained": 3, "error": error})
            continue
        skill = 2.7 + 0.12 * (mixup is not None) + 0.1 * (number % 4 == 3) + float(rng.normal(0, 0.06))
        for split, size in (("val", each), ("test", 5 * each))[: 2 if number in TESTED else 1]:
            z, target = logits(counts, size, skill, LOSSES[loss], seed=1000 * number + size)
            row[f"predictions_{split}"] = f"store/{number:04d}/{split}.predictions"
            records.write_predictions(
                folder / row[f"predictions_{split}"],
                row=np.arange(len(target)),
                target=target,
                logits={"main": z},
                counts=counts,
                classes=names,
                split=split,
                digest=row["address"],
            )
            if split == "val":
                found = metrics.summary(z, target, counts, metrics.groups(counts)[0])
                row |= {f"m.val.{name}": value for name, value in found.items()} | {"objective": found["fitted_nll"]}
        rows.append(row)
    records.write_trials(folder, rows)
    records.write_run(folder, run_info(counts, names, each))
    return folder


def run_info(counts: np.ndarray, names: list[str], each: int) -> dict:
    """What the driver writes into run.json."""
    return {
        "study": "bag_of_tricks",
        "data": {
            "counts": counts.tolist(),
            "classes": names,
            "images": {"train": int(counts.sum()), "val": each * len(counts), "test": 5 * each * len(counts)},
            "warnings": ["class 0 gave 20 of its training images to validation"],
            "source": {"fn": "cifar100", "ratio": 100.0},
            "protocol": {"validation": "surplus", "split_seed": 0, "fold": 0},
            "digest": "5f2d" * 16,
        },
        "arguments": {"study": "bag_of_tricks", "data": "cifar100", "trials": 10, "epochs": 200},
        "versions": {"rayltr": "0.1.0", "ray": "2.60.0", "optuna": "5.0.0", "python": "3.11.9"},
        "seeds": {"seed": 0, "imbalance_seed": 0},
        "openings": [{"when": "2025-03-01T12:00:00+00:00", "trials": [f"{number:04d}" for number in TESTED]}],
        "command": "python -m rayltr.search bag_of_tricks --data cifar100 --ratio 100 --trials 10 --epochs 200",
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten trials on 100 classes: one control arm, one failed, two with test predictions."""
    return make_run(tmp_path / "run")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make(trials=1, classes=2, ...)`: a run of another shape."""
    return lambda **shape: make_run(tmp_path / "run", **shape)
