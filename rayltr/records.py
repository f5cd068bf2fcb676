"""What a run leaves on disk, besides weights: `run.json`, two Parquet tables and the stored predictions.

    run.json                     what was asked, of what data, by which versions
    records/trials.parquet       a row per trial; `p.<name>` its parameters (null: not active), `m.<name>` its metrics
    records/epochs.parquet       a row per trial, stage, epoch, split and metric
    store/*/*.parquet            logits of one split, one column per head

Every file appears whole (see `rayltr.files`).  There is one writer, the driver.  A folder may be a local path or a URI
that `pyarrow.fs` knows (`s3://...`).  Parquet keeps the tables open to DuckDB, Polars, pandas.
"""

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from pyarrow import fs

from rayltr.files import filesystem, read, save

SCHEMA = 1
"""Version of the layout of a run folder."""

STATES = ("complete", "pruned", "failed", "interrupted")
PARAMETER, METRIC = "p.", "m."

TRIALS = pa.schema(
    {
        "study": pa.string(),
        "trial": pa.string(),
        "number": pa.int32(),
        "state": pa.string(),
        "address": pa.string(),
        "seed": pa.int64(),
        "classes": pa.int32(),
        "epochs_asked": pa.int32(),
        "epochs_trained": pa.int32(),
        "epochs_resumed": pa.int32(),
        "share": pa.float64(),
        "again": pa.bool_(),
        "wall_s": pa.float64(),
        "objective": pa.float64(),
        "predictions_val": pa.string(),
        "predictions_test": pa.string(),
        "error": pa.string(),
        "recipe": pa.string(),
        "started": pa.timestamp("ms", "UTC"),
        "ended": pa.timestamp("ms", "UTC"),
    }
)
"""The fixed columns of trials.parquet.  Paths are relative to the run folder; `recipe` is the stage as JSON.

`share` is the length of the training as a share of the search's full length, `epochs_resumed` what an interrupted
attempt had trained, `again` marks a trial that died once and was repeated alone.
"""

EPOCHS = pa.schema(
    {
        "trial": pa.string(),
        "stage": pa.int16(),
        "epoch": pa.int32(),
        "split": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "wall_s": pa.float64(),
    }
)
"""The columns of epochs.parquet; `stage` is the position in the chain."""


@dataclass(frozen=True)
class Predictions:
    """Stored predictions of one split: row and target int32 [N], pred int32 [N] and logits float32 [N, C] by head.

    counts are the training counts int64 [C]; logits are shifted so that the largest of a row is 0.
    """

    row: NDArray[np.int32]
    target: NDArray[np.int32]
    pred: dict[str, NDArray[np.int32]]
    logits: dict[str, NDArray[np.float32]]
    counts: NDArray[np.int64]
    classes: list[str]
    split: str
    digest: str


def within(folder: str | os.PathLike, name: str) -> str:
    """The path or URI of something in a run folder."""
    return f"{os.fspath(folder).rstrip('/')}/{name}"


def write_run(folder: str | os.PathLike, run: Mapping[str, Any]) -> None:
    """Write run.json."""
    save(within(folder, "run.json"), json.dumps({**run, "schema": SCHEMA}, indent=1).encode())


def read_run(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of run.json.  Raises ValueError if there is none, or one of another version of rayltr."""
    system, place = filesystem(within(folder, "run.json"))
    try:
        with system.open_input_stream(place) as stream:
            run = json.loads(stream.read())
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(folder)} is not a run folder: it has no run.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {place}: {_line(error)}") from None
    if not isinstance(run, dict):
        raise ValueError(f"{place} is not the run.json of a run")
    if run.get("schema") != SCHEMA:
        theirs = f"schema {run.get('schema')}, this rayltr reads {SCHEMA}"
        raise ValueError(f"{os.fspath(folder)} was made by an incompatible version ({theirs})")
    return run


def read_trials(folder: str | os.PathLike) -> pa.Table:
    """The table of trials; without rows where none was written yet.  Raises ValueError if the file is damaged."""
    return _read_table(within(folder, "records/trials.parquet"), TRIALS)


def write_trials(folder: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table of trials.  Keys that are absent are null; ValueError for an unknown key or state."""
    _write_table(within(folder, "records/trials.parquet"), trials_table(rows))


def append_trial(folder: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Add a trial, or replace the one of the same id in its place."""
    rows = {old["trial"]: old for old in read_trials(folder).to_pylist()}
    write_trials(folder, list({**rows, row["trial"]: row}.values()))


def read_epochs(folder: str | os.PathLike) -> pa.Table:
    """The table of epochs; without rows where none was written yet.  Raises ValueError if the file is damaged."""
    return _read_table(within(folder, "records/epochs.parquet"), EPOCHS)


def write_note(folder: str | os.PathLike, kind: str, trial: str, found: Mapping[str, Any]) -> None:
    """Write what a command found about a trial; kind: "inspected" or "adapted"."""
    save(within(folder, f"{kind}/{trial}.json"), json.dumps(found, indent=1).encode())


def read_note(folder: str | os.PathLike, kind: str, trial: str) -> dict[str, Any] | None:
    """The same, read; None where there is nothing that can be read."""
    try:
        return json.loads(read(within(folder, f"{kind}/{trial}.json")))
    except (OSError, ValueError):
        return None


def append_epochs(folder: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to the table of epochs; rows of the same trials that are there already are replaced."""
    table, old = pa.Table.from_pylist(list(rows), schema=EPOCHS), read_epochs(folder)
    kept = old.filter(pc.invert(pc.is_in(old["trial"], value_set=table["trial"].combine_chunks())))
    _write_table(within(folder, "records/epochs.parquet"), pa.concat_tables([kept, table]))


def set_aside(folder: str | os.PathLike) -> list[str]:
    """Renames damaged tables to `NAME.damaged`, so that they can be written anew; the names of these tables."""
    found = []
    for name in ("records/trials.parquet", "records/epochs.parquet"):
        system, place = filesystem(within(folder, name))
        if _damaged(system, place):
            system.move(place, f"{place}.damaged")
            found.append(name)
    return found


def _damaged(system: fs.FileSystem, place: str) -> bool:
    try:
        with system.open_input_file(place) as file:
            pq.read_table(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        return getattr(error, "errno", None) is None  # what the disk or its rights say of now is no damage
    return False


def trials_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table: the fixed columns, then parameters and metrics in the order of their first appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    free = [name for name in names if name not in TRIALS.names]
    if strange := [name for name in free if not name.startswith((PARAMETER, METRIC))]:
        raise ValueError(f"no column {strange[0]!r}: {', '.join(TRIALS.names)}, or names with {PARAMETER} or {METRIC}")
    if wrong := {row.get("state") for row in rows} - set(STATES):
        raise ValueError(f"unknown state of a trial: {wrong.pop()!r} (one of {', '.join(STATES)})")
    columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in TRIALS}
    for name in sorted(free, key=lambda name: name.startswith(METRIC)):
        values = [row.get(name) for row in rows]
        columns[name] = pa.array(values, pa.float64()) if name.startswith(METRIC) else _parameter(values)
    return pa.table(columns)


def _parameter(values: list[Any]) -> pa.Array:
    """Values of one parameter in the narrowest type that holds them all: bool, int64, float64 or else string."""
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    kinds = {type(value) for value in values if value is not None}
    for allowed, kind in (({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64())):
        if kinds and kinds <= allowed:
            return pa.array([None if v is None else float(v) if kind == pa.float64() else v for v in values], kind)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def write_predictions(
    path: str | os.PathLike,
    *,
    row: ArrayLike,
    target: ArrayLike,
    logits: Mapping[str, ArrayLike],
    counts: ArrayLike,
    classes: Sequence[str],
    split: str,
    digest: str,
) -> None:
    """Store the logits [N, C] of every head for one split, as half floats below the largest of their row.

    Halves keep the swept predictions equal to those of float32 (largest error 0.008 at logits of about 10) once the
    row's maximum is subtracted; a constant per row changes no softmax.  `pred.<head>` is taken before rounding.
    """
    columns = {"row": pa.array(np.asarray(row, np.int32)), "target": pa.array(np.asarray(target, np.int32))}
    for head, values in logits.items():
        z = np.asarray(values, np.float32)
        columns[f"pred.{head}"] = pa.array(z.argmax(1).astype(np.int32))
        columns[f"logits.{head}"] = pa.FixedSizeListArray.from_arrays(pa.array(_half(z).ravel()), z.shape[1])
    about = {
        "counts": np.asarray(counts).tolist(),
        "classes": list(classes),
        "split": split,
        "digest": digest,
        "heads": list(logits),
        "shift": "row-max",
    }
    table = pa.table(columns).replace_schema_metadata({"rayltr": json.dumps(about)})
    packed: Any = {f"logits.{head}.list.element": "BYTE_STREAM_SPLIT" for head in logits}
    _write_table(path, table, use_dictionary=False, column_encoding=packed)


def read_predictions(path: str | os.PathLike) -> Predictions:
    """Predictions that `write_predictions` stored.  Raises ValueError naming a file that is missing or damaged."""
    table = _read_table(path)
    try:
        about = json.loads((table.schema.metadata or {})[b"rayltr"])
        heads = about["heads"]
        flat = {head: table[f"logits.{head}"].combine_chunks().flatten().to_numpy() for head in heads}
        return Predictions(
            row=table["row"].to_numpy(),
            target=table["target"].to_numpy(),
            pred={head: table[f"pred.{head}"].to_numpy() for head in heads},
            logits={head: flat[head].reshape(len(table), len(about["counts"])).astype(np.float32) for head in heads},
            counts=np.asarray(about["counts"], np.int64),
            classes=about["classes"],
            split=about["split"],
            digest=about["digest"],
        )
    except (KeyError, ValueError):
        raise ValueError(f"{os.fspath(path)} holds no predictions of rayltr") from None


def _half(z: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(invalid="ignore"):
        return np.maximum(z - z.max(1, keepdims=True), np.finfo(np.float16).min).astype(np.float16)


def _write_table(path: str | os.PathLike, table: pa.Table, **options: Any) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, **options)
    save(path, buffer.getvalue())


def _read_table(path: str | os.PathLike, absent: pa.Schema | None = None) -> pa.Table:
    """The table in a Parquet file, checksums verified; one without rows if there is no file and `absent` is given."""
    system, place = filesystem(path)
    if absent is not None and system.get_file_info(place).type == fs.FileType.NotFound:
        return absent.empty_table()
    try:
        with system.open_input_file(place) as file:
            return pq.read_table(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {os.fspath(path)}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
