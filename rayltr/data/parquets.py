"""The source `parquet`: image data sets as the Hugging Face hub keeps them."""

import json
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayltr.data import cache
from rayltr.data.images import Encoded
from rayltr.data.ingest import How, Listing, checked, folder_of, pooled, split_in, val_as_test
from rayltr.data.pool import Pool


@dataclass(frozen=True)
class Group:
    """A row group: its file, its number there, and the row of the file at which it starts."""

    file: Path
    number: int
    start: int


@dataclass(eq=False)
class Shards:
    """The image column of some Parquet files; group i ends before row `ends[i]`.  The last group read is kept."""

    column: str
    groups: list[Group]
    ends: np.ndarray
    kept: tuple[int, list[Any]] = field(default=(-1, []), repr=False)
    scattered = True

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, rows: np.ndarray) -> list[Encoded]:
        found: list[Encoded] = [b""] * len(rows)
        places, offsets = self._locate(rows)
        for place in np.unique(places):
            values, folder = self._values(int(place)), self.groups[place].file.parent
            for at in np.flatnonzero(places == place):
                found[at] = _item(values[offsets[at]], folder)
        return found

    def name(self, row: int) -> str:
        places, offsets = self._locate(np.array([row]))
        group = self.groups[places[0]]
        return f"{group.file}, row {group.start + offsets[0]}"

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.searchsorted(self.ends, rows, side="right")
        return places, rows - np.where(places > 0, self.ends[places - 1], 0)

    def _values(self, place: int) -> list[Any]:
        number, values = self.kept
        if number != place:
            group = self.groups[place]
            with pq.ParquetFile(group.file) as file:
                values = file.read_row_group(group.number, columns=[self.column])[self.column].to_pylist()
            self.kept = (place, values)
        return values


def _item(value: Any, folder: Path) -> Encoded:
    if not isinstance(value, dict):
        return value or b""
    if value.get("bytes") is not None:
        return value["bytes"]
    return str(folder / value["path"]) if value.get("path") else b""


def parquet(
    *,
    root: str,
    image: str | None = None,
    target: str | None = None,
    size: int | None = None,
    skip_corrupt: bool = False,
    in_memory_gb: float = 8.0,
) -> Pool:
    """A Parquet file, or a folder of them at any depth, whose names or folders tell the split (`train-00000-of-00001`).

    The image column is a struct<bytes, path> or binary, the target column an integer: `label`, else `fine_label`, else
    the one with most class names; `image` and `target` override.  Class names come from the metadata of `datasets`,
    else "0" .. "C-1".  A lone val beside train is the test; a split whose targets are all -1 is not used.  Images
    are resized (shorter side) and cut to `size` pixels a side; sets above `in_memory_gb` GB are decoded on the way.
    Raises ValueError for missing or ambiguous columns and for an unreadable image unless `skip_corrupt`.
    """
    path = folder_of(root)
    files = _files_by_split(path)
    with _opened(files["train"][0]) as first:
        schema = first.schema_arrow
    names = _class_names(schema)
    image, target = _image_column(schema, image), _target_column(schema, target, names)
    shards = {split: [_shard(file, image, target) for file in found] for split, found in files.items()}
    targets = {split: np.concatenate([shard.target for shard in found]) for split, found in shards.items()}
    unused = [split for split, found in targets.items() if len(found) and (found == -1).all()]
    classes = names.get(target) or tuple(str(c) for c in range(targets["train"].max(initial=-1) + 1))
    listing = Listing(
        tuple(classes),
        {split: (_shards(found, image), targets[split]) for split, found in shards.items() if split not in unused},
        [stat for found in shards.values() for shard in found for stat in shard.stats],
        tuple(f"all targets of {split} are -1: it is not used" for split in unused),
    )
    how = How(size, skip_corrupt, in_memory_gb)
    return pooled(f"parquet {image} {target}", val_as_test(checked(listing, path)), how)


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files that `path` is or holds at any depth, hidden ones left out."""
    found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    files = parquet_files(path)
    splits = {file: next(filter(None, map(split_in, _speaking(file, path))), None) for file in files}
    if len(files) == 1 or not any(splits.values()):
        splits = dict.fromkeys(files, "train")
    if unclear := [file for file, split in splits.items() if split is None]:
        raise ValueError(f"{unclear[0]}: neither name nor folder tells its split (train, val or test)")
    found = {split: [file for file in files if splits[file] == split] for split in ("train", "val", "test")}
    if not found["train"]:
        raise ValueError(f"{path} has no Parquet file of a training split")
    return {split: chosen for split, chosen in found.items() if chosen}


def _speaking(file: Path, root: Path) -> list[str]:
    return [file.stem, *reversed(file.relative_to(root).parts[:-1])]


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a readable Parquet file") from error


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The class names by column that the library `datasets` writes into the metadata."""
    kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = kept.get("info", {}).get("features", {})
    return {column: kind["names"] for column, kind in features.items() if isinstance(kind, dict) and "names" in kind}


def _image_column(schema: pa.Schema, chosen: str | None) -> str:
    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    structs = [column.name for column in schema if pa.types.is_struct(column.type)]
    structs = [
        name
        for name in structs
        if any(child.name == "bytes" and is_bytes(child.type) for child in schema.field(name).type)
    ]
    binaries = [column.name for column in schema if is_bytes(column.type)]
    if chosen is not None:
        return _known("image", chosen, structs + binaries, schema)
    candidates = structs or binaries
    if not candidates:
        raise ValueError(f"no column holds images (struct<bytes, path> or binary); columns: {', '.join(schema.names)}")
    if len(candidates) > 1:
        raise ValueError(f"several columns hold images; choose one with image=: {', '.join(candidates)}")
    return candidates[0]


def _target_column(schema: pa.Schema, chosen: str | None, names: dict[str, list[str]]) -> str:
    candidates = [column.name for column in schema if pa.types.is_integer(column.type)]
    if chosen is not None:
        return _known("target", chosen, candidates, schema)
    if not candidates:
        raise ValueError(f"no integer column can be the target; columns: {', '.join(schema.names)}")
    for usual in ("label", "fine_label"):
        if usual in candidates:
            return usual
    if named := [name for name in candidates if name in names]:
        return max(named, key=lambda name: len(names[name]))
    if len(candidates) > 1:
        raise ValueError(f"several integer columns; choose the target with target=: {', '.join(candidates)}")
    return candidates[0]


def _known(what: str, chosen: str, candidates: list[str], schema: pa.Schema) -> str:
    if chosen not in candidates:
        fitting = ", ".join(candidates) or f"none of {', '.join(schema.names)}"
        raise ValueError(f"{what}={chosen!r} is no column that can be the {what}; possible: {fitting}")
    return chosen


@dataclass(frozen=True, eq=False)
class Shard:
    """What is known of a Parquet file without its images: rows per group, targets, and what tells a change."""

    path: Path
    groups: list[int]
    target: np.ndarray
    stats: list[cache.Stat]


def _shard(path: Path, image: str, target: str) -> Shard:
    with _opened(path) as file:
        for column in (image, target):
            if column not in file.schema_arrow.names:
                raise ValueError(f"{path} lacks the column {column!r}")
        values = file.read(columns=[target])[target]
        if values.null_count:
            raise ValueError(f"{path} has {values.null_count} rows without a value in {target!r}")
        return Shard(path, _rows(file), values.to_numpy().astype(np.int64), _stats(path, file, image))


def _rows(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def _stats(path: Path, file: pq.ParquetFile, column: str) -> list[cache.Stat]:
    """What tells a change: the Parquet file's own stat, and those of the image files that it refers to."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    held = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{column}.bytes"]
    if all(found is not None and found.null_count == 0 for found in held):
        return [cache.stat(path)]
    table = file.read(columns=[f"{column}.path"])
    values = table[column].to_pylist() if column in table.column_names else []
    outside = [path.parent / value["path"] for value in values if value and value["path"]]
    return [cache.stat(path), *(cache.stat(found) for found in outside if found.is_file())]


def _shards(shards: list[Shard], column: str) -> Shards:
    groups = [
        Group(shard.path, number, start)
        for shard in shards
        for number, start in enumerate(accumulate(shard.groups[:-1], initial=0))
        if shard.groups
    ]
    return Shards(column, groups, np.cumsum([rows for shard in shards for rows in shard.groups], dtype=np.int64))


def shards_of(path: Path, image: str | None = None) -> Shards:
    """The images of one Parquet file, whether or not it has targets.  Raises ValueError if it has none."""
    with _opened(path) as file:
        column = _image_column(file.schema_arrow, image)
        shard = Shard(path, _rows(file), np.empty(0, np.int64), [])
    return _shards([shard], column)
