"""Trained stages by address: whole or absent, claimed while being made, checked on every use.

`<root>/<line>/000120.safetensors` holds the tensors of a stage at epoch 120 and `000120.json`, written last, makes
them count: it carries the stage, a checksum and the history.  `000037.snapshot.json` marks a stop on the way, which
the next one replaces.  `000120.rows0.safetensors` holds what the first worker has of tensors that workers share by
rows; any number of workers may go on from them.  `000120.val.parquet` holds predictions.  Tensors that no note speaks
of go at the next write.  Nothing is ever unpickled.
"""

import contextlib
import json
import logging
import os
import re
import uuid
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyarrow import fs as arrow
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of

from rayltr.claims import Claim, take
from rayltr.files import checksum, filesystem, put
from rayltr.interface import State
from rayltr.parallel import share
from rayltr.spec import Stage, dump, end, line, start

log = logging.getLogger(__name__)

TENSORS = re.compile(r"(\d{6}(?:\.snapshot)?)(?:\.rows\d+)?\.safetensors")
"""The names of files of tensors, and what they have in common with the note that makes them count."""


class Store:
    """Artifacts under a folder: a local one or a URI `pyarrow.fs` knows.  Raises OSError if it cannot be written."""

    def __init__(self, root: str | os.PathLike):
        self.files, self.root = filesystem(root)
        try:
            self.files.create_dir(self.root, recursive=True)
            probe = f"{self.root}/.probe-{uuid.uuid4().hex}"
            put(self.files, probe, b"")
            self.files.delete_file(probe)
        except OSError as error:
            raise OSError(error.errno, f"the storage cannot be written: {error}", str(root)) from error

    def path(self, stage: Stage, suffix: str) -> str:
        """The path of a file that belongs to a stage at its end, below the store's root."""
        return f"{line(stage)}/{end(stage):06d}.{suffix}"

    def predictions(self, stage: Stage, split: str) -> str:
        return f"{self.root}/{self.path(stage, f'{split}.parquet')}"

    def epochs(self, stage: Stage) -> list[tuple[int, bool]]:
        """(epoch, is a snapshot) of what is stored on the stage's line, up to its end, longest first."""
        folder = arrow.FileSelector(f"{self.root}/{line(stage)}", allow_not_found=True)
        names = [info.base_name for info in self.files.get_file_info(folder) if info.base_name.endswith(".json")]
        found = [(int(name[:6]), ".snapshot." in name) for name in names if name[:6].isdigit()]
        return sorted(((e, s) for e, s in found if start(stage) <= e <= end(stage)), key=lambda f: (-f[0], f[1]))

    def longest(self, stage: Stage) -> State | None:
        """The longest stored prefix of a stage, or None.  What is damaged is reported, removed and passed over."""
        for epoch, partial in self.epochs(stage):
            try:
                return self._read(stage, epoch, partial)
            except (ValueError, KeyError, FileNotFoundError) as error:
                log.warning("damaged artifact %s at epoch %d is made again: %s", line(stage)[:12], epoch, error)
                self._remove(stage, epoch, partial)
        return None

    def history(self, stage: Stage) -> list[dict]:
        """The epoch records of the longest stored prefix of a stage, without its weights."""
        for epoch, partial in self.epochs(stage):
            with contextlib.suppress(ValueError, KeyError):
                return json.loads(self._bytes(f"{self._base(stage, epoch, partial)}.json"))["history"]
        return []

    def put_rows(self, stage: Stage, state: State, number: int, *, partial: bool = False) -> dict[str, Any] | None:
        """Stores the rows of worker `number`, if there are any; what `put` has to know of them."""
        if not state.rows:
            return None
        body, path = bytes_of(state.rows), f"{self._base(stage, state.epoch, partial)}.rows{number}.safetensors"
        self.files.create_dir(f"{self.root}/{line(stage)}", recursive=True)
        put(self.files, path, body)
        many = len(next(iter(state.rows.values())))
        return {"file": os.path.basename(path), "rows": many, "checksum": checksum(body)}

    def fetched(self, state: State, number: int, workers: int) -> State:
        """A stored state with the rows of worker `number` of `workers`, however many there were when it was stored."""
        first, many = share(sum(rows for _, rows in state.shards), number, workers)
        parts, begin = [], 0
        for path, rows in state.shards:
            low, high = max(first - begin, 0), min(first + many - begin, rows)
            if low < high:
                found = tensors_of(self._bytes(path))
                parts.append({name: value[low:high].clone() for name, value in found.items()})
            begin += rows
        return replace(state, rows={name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def put(self, stage: Stage, state: State, *, partial: bool = False, shards: Sequence[dict[str, Any]] = ()) -> None:
        """Stores a state of the stage, at its end or on the way (`partial`); earlier snapshots of the line go.

        shards: what `put_rows` said, in the order of the workers.
        """
        body = bytes_of(
            {f"model.{name}": value for name, value in state.model.items()}
            | {f"optimiser.{name}": value for name, value in state.optimiser.items()}
        )
        note = {
            "stage": dump(stage),
            "line": line(stage),
            "epoch": state.epoch,
            "kept": list(state.kept),
            "history": state.history,
            "checksum": checksum(body),
            **({"shards": list(shards)} if shards else {}),
        }
        base = self._base(stage, state.epoch, partial)
        self.files.create_dir(f"{self.root}/{line(stage)}", recursive=True)
        put(self.files, f"{base}.safetensors", body)
        self._clear(base, {f"{os.path.basename(base)}.safetensors", *(shard["file"] for shard in shards)})
        put(self.files, f"{base}.json", json.dumps(note, indent=1).encode())
        for epoch, old in self.epochs(stage):
            if old and (epoch, old) != (state.epoch, partial):
                self._remove(stage, epoch, old)

    def _clear(self, base: str, own: Container[str]) -> None:
        """Removes what no note speaks of, because workers died before it was written; `own`: files that one will."""
        files = self.files.get_file_info(arrow.FileSelector(os.path.dirname(base)))
        notes = {info.base_name for info in files} - {f"{os.path.basename(base)}.json"}
        for info in files:
            found = TENSORS.fullmatch(info.base_name)
            if found and f"{found[1]}.json" not in notes and info.base_name not in own:
                self.files.delete_file(info.path)

    def _base(self, stage: Stage, epoch: int, partial: bool) -> str:
        return f"{self.root}/{line(stage)}/{epoch:06d}{'.snapshot' if partial else ''}"

    def _read(self, stage: Stage, epoch: int, partial: bool) -> State:
        base = self._base(stage, epoch, partial)
        note, body = json.loads(self._bytes(f"{base}.json")), self._bytes(f"{base}.safetensors")
        shards = [(f"{os.path.dirname(base)}/{shard['file']}", shard) for shard in note.get("shards", ())]
        if note["checksum"] != checksum(body) or any(s["checksum"] != checksum(self._bytes(p)) for p, s in shards):
            raise ValueError("its checksum is wrong")
        wanted = {**dump(stage), "epochs": note["stage"]["epochs"]}
        if json.loads(json.dumps(wanted)) != note["stage"]:
            raise ValueError("it was made by another stage")
        tensors = tensors_of(body)
        model = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        moments = {name[10:]: value for name, value in tensors.items() if name.startswith("optimiser.")}
        places = tuple((path, shard["rows"]) for path, shard in shards)
        return State(model, moments, note["epoch"], tuple(note["kept"]), note["history"], shards=places)

    def _remove(self, stage: Stage, epoch: int, partial: bool) -> None:
        base = self._base(stage, epoch, partial)
        for path in (f"{base}.json", f"{base}.safetensors", *self._rows_of(base)):
            with contextlib.suppress(FileNotFoundError):
                self.files.delete_file(path)

    def _rows_of(self, base: str) -> list[str]:
        """The files of rows that belong to a state."""
        folder = self.files.get_file_info(arrow.FileSelector(os.path.dirname(base)))
        return [info.path for info in folder if info.base_name.startswith(f"{os.path.basename(base)}.rows")]

    def _bytes(self, path: str) -> bytes:
        with self.files.open_input_stream(path) as stream:
            return stream.read()

    def claim(self, stage: Stage) -> Claim | None:
        """The claim on a stage's line, or None while another living process holds it."""
        self.files.create_dir(f"{self.root}/{line(stage)}", recursive=True)
        return take(self.files, f"{self.root}/{line(stage)}/claim")
