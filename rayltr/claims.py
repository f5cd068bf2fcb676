"""Claims: which process is making an artifact.  A claim is a small file that its holder renews.

On one machine the holder's process decides whether a claim stands; from another machine its last renewal does.
Local folders decide a race by an exclusive create; elsewhere two may win in a blink, which costs work and no result.

A file of the run tells its trials, on whatever machine, to store what they have and to stop.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from pyarrow import fs as arrow

from rayltr.records import put

BEAT_S = 5.0
EXPIRY_S = 60.0
"""A claim of another machine that was not renewed for this long belongs to nobody."""
STOP = "stop"
"""In the folder of a run: its trials are to stop."""


class Claim:
    """A held claim, renewed until it is released."""

    def __init__(self, files: arrow.FileSystem, path: str, mine: dict[str, Any]):
        self.files, self.path, self.mine = files, path, mine
        self.over = threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)
        self.beating.start()

    def release(self) -> None:
        self.over.set()
        self.beating.join()
        with contextlib.suppress(OSError):
            if self._still_mine():
                self.files.delete_file(self.path)

    def _beat(self) -> None:
        while not self.over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if not self._still_mine():
                    return
                put(self.files, self.path, json.dumps({**self.mine, "time": time.time()}).encode())

    def _still_mine(self) -> bool:
        return (read(self.files, self.path) or {}).get("owner") == self.mine["owner"]


def take(files: arrow.FileSystem, path: str) -> Claim | None:
    """The claim, unless somebody who is alive holds it."""
    mine = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    held = read(files, path)
    if held is not None and (alive(held) or not removed(files, path, held)):
        return None
    return Claim(files, path, mine) if created(files, path, mine) else None


def alive(held: dict[str, Any]) -> bool:
    if held.get("host") != socket.gethostname():
        return time.time() - held.get("time", 0) < EXPIRY_S
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def removed(files: arrow.FileSystem, path: str, held: dict[str, Any]) -> bool:
    """Removes the very claim that was judged dead; another that was made meanwhile is put back."""
    aside = f"{path}.{uuid.uuid4().hex}.stale"
    try:
        files.move(path, aside)
        same = (read(files, aside) or {}).get("owner") == held.get("owner")
        if same:
            files.delete_file(aside)
        else:
            files.move(aside, path)
        return same
    except OSError:
        return False


def created(files: arrow.FileSystem, path: str, content: dict[str, Any]) -> bool:
    """Writes the claim if there is none."""
    if not isinstance(files, arrow.LocalFileSystem):
        put(files, path, json.dumps(content).encode())
        return True
    beside = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(beside, "w") as stream:
        json.dump(content, stream)
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(beside)
    return True


def read(files: arrow.FileSystem, path: str) -> dict[str, Any] | None:
    """What a claim says; {} when it cannot be understood, None when there is none."""
    try:
        with files.open_input_stream(path) as stream:
            return dict(json.loads(stream.read()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}


@cache
def end_with_parent() -> None:
    """Ends this process soon after the one that started it, which is Ray's on this machine.

    A worker can outlive it, waiting for ever to report an epoch: with its claims, and with its memory on the GPU.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(BEAT_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop(run: str) -> None:
    """Tells the trials of a run to stop after the epoch that they are in."""
    with contextlib.suppress(OSError):  # a disk that takes no file takes no snapshot either, and they end by that
        (Path(run) / STOP).touch()


def go_on(run: str) -> None:
    (Path(run) / STOP).unlink(missing_ok=True)


def told_to_stop(run: str) -> bool:
    return (Path(run) / STOP).exists()
