"""What sharing stages saves: `python -m benchmarks.sharing`.

Searches the Bag of Tricks as a user does, then trains every recipe of that search again, each with a store of its own,
so that nothing is shared.  Prints the epochs of both.  The exit code is 1 when sharing trains more than 60 % of the
epochs, or when a trial did not find bit for bit what its recipe finds alone.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rayltr import records
from rayltr.command import FAILED
from rayltr.data.images import cpus
from rayltr.interface import Resources
from rayltr.records import METRIC, Predictions
from rayltr.spec import parse
from rayltr.store import Store
from rayltr.trial import run

LIMIT = 0.60
TIMES = ("cost_s",)
"""Metrics that are seconds: no two runs agree on them."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Alone:
    """What a recipe costs and finds without the search's store."""

    epochs: int
    address: str
    metrics: dict[str, float]
    predictions: Predictions


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.sharing", description=__doc__.split("\n")[0])
    made.add_argument("--study", default="bag_of_tricks", help="default: bag_of_tricks")
    made.add_argument("--trials", type=int, default=72, help="default: 72")
    made.add_argument("--epochs", type=int, default=10, help="length of every chain (default: 10)")
    made.add_argument("--data", default="digits", help="default: digits")
    made.add_argument("--ratio", type=float, default=20.0, help="largest / smallest class (default: 20)")
    made.add_argument("--seed", type=int, default=0, help="default: 0")
    made.add_argument("--backbone", default="resnet20", help="default: resnet20")
    made.add_argument("--sampler", default="quasi", help="default: quasi, which draws all kinds of recipes alike; what "
                      "others share depends on what they find good")  # fmt: skip
    made.add_argument("--concurrent", type=int, default=0, help="trials at once (default: what fits)")
    return made


def searched(options: argparse.Namespace, storage: Path) -> Path:
    """The run of a search by the command line.  Raises `CalledProcessError` where it did not come to its end."""
    words = [f"--{name}={getattr(options, name)}" for name in vars(options) if name != "study"]
    command = [sys.executable, "-m", "rayltr.search", options.study, *words, f"--storage={storage}", "--name=run"]
    done = subprocess.run([*command, "--no-dashboard"])
    if done.returncode not in (0, FAILED):
        done.check_returncode()
    return storage / "run"


def alone(row: Row, store: Path) -> Alone:
    """Runs the recipe of a trial with an empty store, on one thread as the search did."""
    found = run(parse(json.loads(row["recipe"])), Store(store), resources=Resources(threads=1))
    return Alone(found.trained, found.address, found.metrics, records.read_predictions(found.predictions))


def differences(row: Row, folder: Path, found: Alone) -> list[str]:
    """What the record of a trial says otherwise than its recipe alone; times do not count."""
    shared = {name.removeprefix(f"{METRIC}val."): value for name, value in row.items() if name[:6] == f"{METRIC}val."}
    pairs = {name: (shared.get(name), found.metrics.get(name)) for name in {*shared, *found.metrics} - {*TIMES}}
    names = [name for name, pair in sorted(pairs.items()) if not same(*pair)]
    if row["address"] != found.address:
        names.append("address")
    stored = records.read_predictions(records.within(folder, row["predictions_val"]))
    if any(not np.array_equal(stored.logits[head], logits) for head, logits in found.predictions.logits.items()):
        names.append("logits")
    return names


def same(one: float | None, other: float | None) -> bool:
    """Whether two metrics are equal bit for bit; what cannot be measured is null in the records, nan before."""
    missing = [value is None or value != value for value in (one, other)]
    return all(missing) or one == other


def table(rows: Sequence[Row], found: Sequence[Alone]) -> str:
    """Epochs by kind of recipe and in all."""
    lines = [f"{'recipes':14}{'trials':>8}{'epochs alone':>14}{'with sharing':>14}{'ratio':>8}"]
    kinds = [row.get("p.when") or row["p.arm"] for row in rows]
    for name in (*dict.fromkeys(sorted(kinds)), "all"):
        own = [place for place, kind in enumerate(kinds) if name in (kind, "all")]
        epochs, trained = sum(found[i].epochs for i in own), sum(rows[i]["epochs_trained"] for i in own)
        lines.append(f"{name:14}{len(own):8}{epochs:14}{trained:14}{trained / max(epochs, 1):8.2f}")
    return "\n".join(lines)


def judged(rows: Sequence[Row], folder: Path, found: Sequence[Alone]) -> int:
    """Prints the table and what differs; 1 when a limit is broken, else 0."""
    print(table(rows, found))
    wrong = {row["trial"]: differences(row, folder, own) for row, own in zip(rows, found, strict=True)}
    for trial, names in wrong.items():
        if names:
            print(f"trial {trial} found otherwise with sharing: {', '.join(names)}")
    differing = sum(map(bool, wrong.values()))
    trained, epochs = sum(row["epochs_trained"] for row in rows), {own.address: own.epochs for own in found}
    ratio = trained / max(sum(own.epochs for own in found), 1)
    apart = trained / max(sum(epochs.values()), 1)
    print(f"{len(rows) - len(epochs)} of {len(rows)} trials repeat another one; without them the ratio is {apart:.2f}")
    print(f"{differing} of {len(rows)} records differ; {ratio:.2f} of all epochs are trained, {LIMIT:.2f} are allowed")
    return int(not rows or bool(differing) or ratio > LIMIT)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with TemporaryDirectory(prefix="sharing") as place:
        folder = searched(options, Path(place))
        every = records.read_trials(folder).to_pylist()
        rows = [row for row in every if row["state"] == "complete"]
        if len(rows) < len(every):
            print(f"{len(every) - len(rows)} of {len(every)} trials failed and are left out")
        stores = [Path(place) / "alone" / row["trial"] for row in rows]
        with ProcessPoolExecutor(cpus(), mp_context=get_context("spawn")) as pool:
            found = list(pool.map(alone, rows, stores))
        return judged(rows, folder, found)


if __name__ == "__main__":
    sys.exit(main())
