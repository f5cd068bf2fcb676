"""A small plausible run, made of known logits instead of trained models."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.report import write
from rayltr import metrics, records
from tests.analysis.browser import browser

__all__ = ["browser"]

LOSSES = {"cross_entropy": 0.0, "balanced_softmax": 1.0, "ldam": 0.5, "logit_adjusted": 0.8}
"""How much of the prior each loss takes out of the logits."""

CONTROL, TESTED = (0, 4), (3, 4)
"""The trials of the control arm, and those with test predictions."""

LENGTH = 200
BEGUN = datetime(2025, 3, 1, 9, tzinfo=UTC)


def long_tail(classes: int = 100, largest: int = 500, ratio: float = 100.0) -> np.ndarray:
    """The published exponential profile: 500, 477, ... 5 images for 100 classes."""
    return np.array([int(largest * ratio ** (-i / max(classes - 1, 1))) for i in range(classes)])


def logits(
    counts: np.ndarray, images: int | Sequence[int], skill: float, removed: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] float32 and target [N]: rare classes are harder, and the prior leans on what is not removed.

    images: of a class, or of each class.  Half of what makes an image hard is the same for every trial.
    """
    own, shared = np.random.default_rng(seed), np.random.default_rng(int(np.sum(images)))
    classes = len(counts)
    target = np.repeat(np.arange(classes), images)
    luck = np.random.default_rng(classes).uniform(0.75, 1.25, classes)
    ease = skill * (0.6 + 0.4 * np.log(counts + 1.0) / np.log(counts.max() + 1.0)) * luck
    z = 0.9 * shared.normal(size=(len(target), classes)) + 0.45 * own.normal(size=(len(target), classes))
    z[np.arange(len(target)), target] += ease[target]
    prior = np.log(counts / counts.sum())
    return (2.0 * (z + 0.45 * (1 - removed) * (prior - prior.mean()))).astype(np.float32), target


def predictions(folder: Path, name: str, counts: np.ndarray, made: dict[str, np.ndarray], target: np.ndarray) -> None:
    """Stores logits by head."""
    records.write_predictions(
        folder / name,
        row=np.arange(len(target)),
        target=target,
        logits=made,
        counts=counts,
        classes=class_names(counts),
        split=name.rpartition("/")[2].partition(".")[0],
        digest="",
    )


def class_names(counts: np.ndarray) -> list[str]:
    return [f"class {i}" for i in range(len(counts))]


def trial_row(number: int, classes: int) -> dict[str, Any]:
    """The columns of a trial that do not depend on its predictions."""
    rng = np.random.default_rng((classes, number))
    begun = BEGUN + timedelta(minutes=7 * number)
    return {
        "study": "bag_of_tricks",
        "trial": f"{number:04d}",
        "number": number,
        "state": "complete",
        "address": f"{number:064x}@{LENGTH}",
        "seed": 0,
        "classes": classes,
        "epochs_asked": LENGTH,
        "epochs_trained": LENGTH,
        "wall_s": float(rng.uniform(300, 420)),
        "recipe": f'{{"epochs": {LENGTH}, "seed": 0, "batch": {number}}}',
        "started": begun,
        "ended": begun + timedelta(minutes=6),
        "p.arm": "control" if number in CONTROL else "study",
        "p.loss": list(LOSSES)[number % len(LOSSES)],
        "p.mixup.alpha": None if number % 3 == 0 else round(float(rng.uniform(0.1, 1.0)), 3),
        "p.lr": [0.05, 0.1][number % 2],
        "p.deferred": number % 4 == 3,
    }


def make_run(
    folder: Path,
    *,
    trials: int = 10,
    classes: int = 100,
    each: int | Sequence[int] = 20,
    failed: int = 1,
    heads: Sequence[str] = ("main",),
) -> Path:
    """A run folder: trials 0 and 4 are of the control arm, the last `failed` have no result.

    each: validation images of a class, or of each class; there are five times as many test images.
    """
    counts = long_tail(classes)
    images = np.broadcast_to(each, classes)
    rows = []
    for number in range(trials):
        row = trial_row(number, classes)
        if number >= trials - failed:
            error = "Traceback (most recent call last):\n  ...\nDiverged: the loss is nan at epoch 3 <lr 0.1>"
            rows.append({**row, "state": "failed", "epochs_trained": 3, "error": error})
            continue
        noise = float(np.random.default_rng(number).normal(0, 0.06))
        skill = 2.7 + 0.12 * (row["p.mixup.alpha"] is not None) + 0.1 * row["p.deferred"] + noise
        for split, size in (("val", images), ("test", 5 * images))[: 2 if number in TESTED else 1]:
            row[f"predictions_{split}"] = f"store/{number:04d}/{split}.parquet"
            made = {}
            for k, head in enumerate(heads):
                made[head], target = logits(counts, size, skill, LOSSES[row["p.loss"]], 1000 * number + k)
            predictions(folder, row[f"predictions_{split}"], counts, made, target)
            if split == "val" and len(target):
                row |= recorded(made[heads[0]], target, counts)
        rows.append(row)
    records.write_trials(folder, rows)
    records.append_epochs(folder, [epoch for row in rows for epoch in learned(row)])
    records.write_run(folder, run_info(counts, images))
    return folder


def recorded(z: np.ndarray, target: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    found = metrics.summary(z, target, counts, metrics.groups(counts)[0])
    return {f"m.val.{name}": value for name, value in found.items()} | {"objective": found["fitted_nll"]}


def learned(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A falling loss in two stages, at every tenth epoch."""
    return [
        {"trial": row["trial"], "stage": stage, "epoch": epoch, "split": "train", "metric": "loss",
         "value": (3 - stage) / (1 + epoch / 40), "wall_s": 1.5}
        for stage in (0, 1)
        for epoch in range(10, LENGTH // 2 + 1, 10)
    ]  # fmt: skip


def run_info(counts: np.ndarray, images: np.ndarray) -> dict[str, Any]:
    """What the driver writes into run.json."""
    total = int(images.sum())
    return {
        "study": "bag_of_tricks",
        "data": {
            "counts": counts.tolist(),
            "classes": class_names(counts),
            "images": {"train": int(counts.sum()), "val": total, "test": 5 * total},
            "warnings": ["class 0 gave 20 of its training images to validation"],
            "source": {"fn": "cifar100", "ratio": 100.0},
            "protocol": {"validation": "surplus", "split_seed": 0, "fold": 0},
            "digest": "5f2d" * 16,
            "hashes": {"train": "a" * 64, "val": "b" * 64, "test": "c" * 64},
            "rows": {"train": [1, 2, 3]},
        },
        "arguments": {"study": "bag_of_tricks", "data": "cifar100", "trials": 10, "epochs": LENGTH},
        "versions": {"rayltr": "0.1.0", "ray": "2.60.0", "optuna": "5.0.0", "python": "3.11.9"},
        "seeds": {"seed": 0, "imbalance_seed": 0},
        "openings": [{"when": "2025-03-01T12:00:00+00:00", "trials": [f"{number:04d}" for number in TESTED]}],
        "command": "python -m rayltr.search bag_of_tricks --data cifar100 --ratio 100 --trials 10 --epochs 200",
    }


def change(folder: Path, number: int, /, **changes: object) -> None:
    """Changes columns of a trial's record."""
    row = records.read_trials(folder).to_pylist()[number]
    records.append_trial(folder, {**row, **changes})


def forget(folder: Path, number: int, /, *names: str, **changes: object) -> None:
    """Drops the metrics that begin with one of the names from a trial's records, and changes other columns."""
    row = records.read_trials(folder).to_pylist()[number]
    kept = {name: None if name.startswith(names) else value for name, value in row.items()}
    records.append_trial(folder, {**kept, **changes})


def disagreeing(folder: Path, each: int) -> Path:
    """A run with `each` validation images of a class; one trial has the best NLL, but not the best accuracy."""
    make_run(folder, trials=12, classes=12, each=each, failed=0)
    rows = records.read_trials(folder).to_pylist()[1:4]
    worst = min(rows, key=lambda row: row["m.val.fitted_balanced"])
    found = records.read_predictions(folder / worst["predictions_val"])
    sure = found.logits["main"] + 1.5 * np.eye(12, dtype=np.float32)[found.target]  # seldom right, never far off
    spoilt = np.where((np.arange(len(sure)) % 2)[:, None] == 0, 0.05 * sure, sure)
    predictions(folder, worst["predictions_val"], found.counts, {"main": spoilt}, found.target)
    change(folder, worst["number"], **recorded(spoilt, found.target, found.counts))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten trials on 100 classes: two of the control arm, one failed, two with test predictions."""
    return make_run(tmp_path / "run")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Nine trials on 12 classes, which is quick."""
    return make_run(tmp_path / "run", trials=9, classes=12)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger run that tests only read: 16 trials with two heads."""
    return make_run(tmp_path_factory.mktemp("shared") / "run", trials=16, classes=40, heads=("main", "soft"))


@pytest.fixture(scope="session")
def written(shared: Path) -> Path:
    """The report of the shared run."""
    return Path(write(shared))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make(trials=1, classes=2, ...)`: a run of another shape."""
    return lambda **shape: make_run(tmp_path / "run", **shape)
