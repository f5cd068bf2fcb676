"""Records the table on which `benchmarks.search` plays: `python -m benchmarks.recording`.

Every point of `benchmarks/recorded_space.py` is trained on long-tailed digits, at full length and on the shorter rungs,
and what was found is kept in `tests/data/recorded_search.parquet`.  What is stored is not trained again.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.recorded_space import points
from rayltr import metrics, records, studies
from rayltr.interface import Resources
from rayltr.store import Store
from rayltr.studies import CONTROL, STUDY, Plan, Study, rungs
from rayltr.trial import run

HERE = Path(__file__).parent
TABLE = HERE.parent / "tests" / "data" / "recorded_search.parquet"
PLAN = Plan(str(HERE / "recorded_space.py"), epochs=54, precision="fp32", seed=0)
RECORDED = "halving"
"""The fidelity with the most rungs: the lengths of all others are among its own."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a training reached on validation.

    objective: class-balanced NLL in nats at the fitted tau and temperature.  error: balanced error there, in [0, 1].
    curve: accuracy on many and few [K, 2] at the fitted temperature and every tau of `metrics.TAUS`.
    """

    objective: float
    error: float
    curve: NDArray[np.float64]


Table = Mapping[tuple[str, int], Found]
"""By `key` of the parameters and epochs."""


def key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def everything(study: Study) -> list[dict[str, Any]]:
    """The points of both arms."""
    return [*points(study.space, {"arm": STUDY}), *points(study.control, {"arm": CONTROL})]


def record(path: Path, store: Store) -> None:
    """Trains what the store does not hold yet, and writes the table."""
    study, rows, trained, began = studies.find(PLAN.study), list[dict[str, Any]](), 0, time.monotonic()
    whole = everything(study)
    for position, params in enumerate(whole, 1):
        for plan in rungs(PLAN, RECORDED):
            result = run(plan.stage(study, params), store, resources=Resources(threads=1))
            trained += result.trained
            rows.append({"params": key(params), "epochs": plan.epochs, **measured(result.predictions, result.metrics)})
        left = (time.monotonic() - began) / position * (len(whole) - position) / 60
        print(f"{position} of {len(whole)} points, {trained} epochs trained, about {left:.0f} min left", flush=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    records.save(path, sink.getvalue().to_pybytes())


def measured(predictions: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """The columns of the table that one training gives."""
    seen = records.read_predictions(predictions)
    logits, groups = next(iter(seen.logits.values())), metrics.groups(seen.counts)[0]
    curve = metrics.sweep(logits, seen.target, seen.counts, groups, scores["temperature"])
    return {
        "objective": scores["fitted_nll"],
        "balanced_error": 1 - scores["fitted_balanced"],
        **{name: curve[name].tolist() for name in ("many", "few")},
    }


def read(path: Path = TABLE) -> dict[tuple[str, int], Found]:
    rows = pq.ParquetFile(path).read().to_pylist()
    return {
        (row["params"], row["epochs"]): Found(
            row["objective"], row["balanced_error"], np.stack([row["many"], row["few"]], 1)
        )
        for row in rows
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="benchmarks.recording", description=__doc__.split("\n")[0])
    made.add_argument("--table", type=Path, default=TABLE, help="the recorded table (default: tests/data/...)")
    made.add_argument("--store", default="runs/recorded_search", help="trained stages (default: %(default)s)")
    options = made.parse_args(arguments)
    record(options.table, Store(options.store))


if __name__ == "__main__":
    main()
