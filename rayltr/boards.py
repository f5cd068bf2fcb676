"""TensorBoard logs of a search: `tensorboard --logdir RUN/tensorboard` shows its trials while they are trained.

One folder per trial.  `stage1/loss`, `stage1/images_per_s` and so on are drawn over the clock of their stage, in
epochs, so that trials that share a stage can be laid over each other; `val/...` and the parameters come at the end.
The format is tensorboardX's, which Ray Tune brings along.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

FLUSH_S = 5.0
"""Seconds between two writes to the disk: how far the pictures may lag behind."""


def parts(*names: str) -> list[ModuleType]:
    """Modules of tensorboardX without the package around them: that would import torch, 3 seconds and 200 MB."""
    spec, loaded = find_spec("tensorboardX"), "tensorboardX" in sys.modules
    assert spec is not None
    sys.modules.setdefault("tensorboardX", module_from_spec(spec))
    try:
        return [import_module(f"tensorboardX.{name}") for name in names]
    finally:
        if not loaded:  # whoever imports it later gets the whole
            del sys.modules["tensorboardX"]


event_pb2, files, framing, summary = parts("proto.event_pb2", "event_file_writer", "record_writer", "summary")


class Boards:
    """Told of every epoch and every end of a trial.  When the disk fails, the pictures end and the search goes on."""

    def __init__(self, run: str | os.PathLike):
        self.folder = Path(run) / "tensorboard"
        self.trials: dict[str, Board] = {}
        self.failed, self.flushed = False, time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, and open files cannot be restored."""
        return {}

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Adds what a running trial reports, see `rayltr.progress.Progress.moved`; that it has begun is no epoch."""
        if "epoch" in record:
            values = {**record["terms"], **record.get("measured", {}), "images_per_s": record["images_per_s"]}
            stage = f"stage{record['stage'] + 1}"
            self._add(record["trial"], record["epoch"], scalars({f"{stage}/{name}": v for name, v in values.items()}))

    def ended(self, row: Mapping[str, Any]) -> None:
        """Adds the validation metrics and the parameters of a row of the trials table; its files are complete then."""
        metrics = {f"val/{name[6:]}": value for name, value in row.items() if name.startswith("m.val.")}
        params = {name[2:]: value for name, value in row.items() if name.startswith("p.")}
        if found := scalars(metrics):
            # without a table of all parameters, which the first trial would fix for all, TensorBoard collects them
            _, begun, done = summary.hparams(params, {})
            self._add(row["trial"], row["epochs_asked"], [*found, *begun.value, *done.value])
        if board := self.trials.pop(row["trial"], None):
            self._spare(board.close)

    def close(self) -> None:
        """Writes what is left to the disk."""
        while self.trials:
            self._spare(self.trials.popitem()[1].close)

    def _add(self, trial: str, step: int, values: list[Any]) -> None:
        if not self.failed:
            self._spare(lambda: self._board(trial).add(step, values))
        if time.monotonic() - self.flushed > FLUSH_S:
            self.flushed = time.monotonic()
            for board in self.trials.values():
                self._spare(board.flush)

    def _board(self, trial: str) -> "Board":
        if trial not in self.trials:
            self.trials[trial] = Board(self.folder / trial)
        return self.trials[trial]

    def _spare(self, act: Callable[[], Any]) -> None:
        """Does what the disk may refuse, and says so the first time that it does."""
        try:
            act()
        except OSError as error:
            if not self.failed:
                log.warning("no more TensorBoard logs in %s: %s", self.folder, error)
            self.failed = True


class Board:
    """The logs of one trial: a new file beside those of earlier processes, for what these have not written."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        there = (event for file in sorted(folder.glob("events.*")) for event in events(file))
        self.seen = {(value.tag, event.step) for event in there for value in event.summary.value}
        self.file = files.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self.flush, self.close = self.file.flush, self.file.close

    def add(self, step: int, values: list[Any]) -> None:
        """Values of one step, each once: a trial that goes on from a snapshot repeats some epochs."""
        new = [value for value in values if (value.tag, step) not in self.seen]
        self.seen |= {(value.tag, step) for value in new}
        if new:
            what = event_pb2.Event(step=step, wall_time=time.time())
            what.summary.value.extend(new)
            self.file.write_event(what)


def scalars(values: Mapping[str, float | None]) -> list[Any]:
    """Values by tag as TensorBoard knows them; what was not measured is left out."""
    measured = {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}
    return [summary.Summary.Value(tag=tag, simple_value=value) for tag, value in measured.items()]


def events(file: Path) -> Iterator[Any]:
    """The events in a file, up to where it breaks off."""
    body, place = file.read_bytes(), 0
    while place < len(body):
        size = int.from_bytes(body[place : place + 8], "little")
        event = body[place + 12 : place + 12 + size]
        checksum = body[place + 12 + size : place + 16 + size]
        if not event or framing.masked_crc32c(event) != int.from_bytes(checksum, "little"):
            return
        yield event_pb2.Event.FromString(event)
        place += 16 + size
