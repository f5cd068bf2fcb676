"""Arrays that were expensive to make, kept as .npy files in the user's cache and memory-mapped when asked for again."""

import hashlib
import io
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Version of what is stored.  Raise it when decoding or the layout changes: old entries are then left alone."""
BLOCKS, BLOCK = 64, 65536

Stat = tuple[str, int, int]
Entry = tuple[dict[str, np.ndarray], dict[str, Any]]


class NotStored(OSError):
    """The cache cannot take an entry, or give it back as it was."""


def home() -> Path:
    """The cache folder: $RAYLTR_CACHE, else $XDG_CACHE_HOME/rayltr, else ~/.cache/rayltr."""
    if chosen := os.environ.get("RAYLTR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rayltr")


def stat(path: str | Path) -> Stat:
    """(absolute path, size in bytes, time of change in ns): what tells a changed file from an unchanged one."""
    found = os.stat(path)
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def key(name: str, keywords: dict[str, Any], files: Iterable[Stat] = ()) -> str:
    """64 hex digits that name an entry: who makes it, with which keywords, from which files."""
    found = hashlib.sha256(json.dumps([FORMAT, name, keywords], sort_keys=True).encode())
    for path, size, changed in files:
        found.update(f"\0{path}\0{size}\0{changed}".encode(errors="surrogateescape"))
    return found.hexdigest()


class Sink:
    """Takes arrays piece by piece along their first axis: into .npy files of a folder, or into memory without one."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._pieces: dict[str, list[np.ndarray]] = {}
        self._lengths: dict[str, int] = {}

    def clear(self) -> None:
        """Forgets all pieces."""
        for name in self._lengths:
            (self.folder / f"{name}.npy").unlink()  # type: ignore[operator]
        self._pieces, self._lengths = {}, {}

    def append(self, name: str, piece: np.ndarray) -> None:
        """Adds `piece` [n, ...] to the array `name`.  Raises NotStored when the folder cannot take it."""
        if self.folder is None:
            self._pieces.setdefault(name, []).append(piece)
            return
        try:
            with (self.folder / f"{name}.npy").open("ab") as file:
                if name not in self._lengths:
                    file.write(_npy_header(piece, 0))
                file.write(piece.tobytes())
        except OSError as error:
            raise NotStored(str(error)) from error
        self._pieces[name] = [piece[:0]]
        self._lengths[name] = self._lengths.get(name, 0) + len(piece)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(pieces) for name, pieces in self._pieces.items()}

    def close(self, meta: dict[str, Any]) -> None:
        """Completes the files and writes `meta`, with a fingerprint of every file, into entry.json."""
        assert self.folder is not None
        try:
            for name, length in self._lengths.items():
                with (self.folder / f"{name}.npy").open("r+b") as file:
                    file.write(_npy_header(self._pieces[name][0], length))
            prints = {name: _fingerprint(self.folder / f"{name}.npy") for name in self._lengths}
            (self.folder / "entry.json").write_text(json.dumps({"meta": meta, "prints": prints}))
        except OSError as error:
            raise NotStored(str(error)) from error


def _npy_header(like: np.ndarray, length: int) -> bytes:
    # NumPy pads the header so that the first axis can grow without moving the data.
    described = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(like))
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {**described, "shape": (length, *like.shape[1:])})
    return buffer.getvalue()


def _fingerprint(path: Path) -> str:
    """The size and a hash over blocks spread evenly over a file (all of it up to 4 MiB): quick, and finds holes."""
    size = path.stat().st_size
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for start in sorted({max(BLOCK * i, (size - BLOCK) * i // (BLOCKS - 1)) for i in range(BLOCKS)}):
            file.seek(start)
            found.update(file.read(BLOCK))
    return found.hexdigest()


def remembered(name: str, make: Callable[[Sink], dict[str, Any]]) -> Entry:
    """The arrays (memory-mapped, read-only) and the JSON-able dict of the entry `name`; made by `make(sink)` if absent.

    An entry is written beside and renamed, so that it is whole or absent; of two processes that make the same entry
    the later one discards its own.  A damaged entry is made anew.  Where the cache cannot be written, a warning is
    given and the arrays stay in memory.
    """
    folder = home() / name
    if folder.is_dir():
        try:
            return _read(folder)
        except NotStored as error:
            _warn(f"the cache entry {folder} is damaged ({error}) and is made anew")
            shutil.rmtree(folder, ignore_errors=True)
    try:
        _write(folder, make)
        return _read(folder)
    except NotStored as error:
        _warn(f"the cache {home()} cannot be used ({error}); data stay in memory")
    sink = Sink(None)
    meta = make(sink)
    return sink.arrays(), meta


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=3)


def _read(folder: Path) -> Entry:
    try:
        entry = json.loads((folder / "entry.json").read_text())
        for name, expected in entry["prints"].items():
            if _fingerprint(folder / f"{name}.npy") != expected:
                raise NotStored(f"{name}.npy has changed")
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in entry["prints"]}, entry["meta"]
    except (OSError, ValueError, KeyError) as error:
        raise NotStored(str(error)) from error


def _write(folder: Path, make: Callable[[Sink], dict[str, Any]]) -> None:
    beside = folder.parent / f"making-{uuid.uuid4().hex}"
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise NotStored(str(error)) from error
    try:
        sink = Sink(beside)
        sink.close(make(sink))
        _publish(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _publish(beside: Path, folder: Path) -> None:
    try:
        os.rename(beside, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster; its entry is as good
            raise NotStored(str(error)) from error
