"""Claims: which process is making an artifact.  A claim is a small file that its holder renews.

On one machine the holder's process decides whether a claim stands, known by its beginning as well, because process
ids come again; from another machine, or from before a reboot, its last renewal does.
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

from rayltr.files import put

BEAT_S = 5.0
EXPIRY_S = 60.0
"""A claim of another machine that was not renewed for this long belongs to nobody."""
HELD: set[str] = set()
"""The owners of the claims that this process holds, in whichever of its threads."""
LOCK = threading.Lock()
"""Of its threads, one at a time looks whether a claim stands: a claim that another one gives up meanwhile does not."""
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
        with LOCK:
            with contextlib.suppress(OSError):
                if self._still_mine():
                    self.files.delete_file(self.path)
            HELD.discard(self.mine["owner"])

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
    mine = {"owner": uuid.uuid4().hex, **myself(), "time": time.time()}
    with LOCK:
        held = read(files, path)
        if held is not None and (alive(held) or not removed(files, path, held)) or not created(files, path, mine):
            return None
        HELD.add(mine["owner"])
        return Claim(files, path, mine)


def myself() -> dict[str, Any]:
    """This process, so that no other one is ever taken for it."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot(), "pid": pid, "began": began(pid)}


@cache
def boot() -> str:
    """A name of the time since this machine was started; empty where it has none (outside of Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def began(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None where that cannot be seen."""
    found = facts(pid)
    return int(found[19]) if found else None


def state(pid: int) -> str:
    """A letter, Z for a process that has ended; empty where that cannot be seen."""
    return "".join(facts(pid)[:1])


def facts(pid: int) -> list[str]:
    """What Linux tells of a process behind its name, from its state on; nothing elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(held: dict[str, Any]) -> bool:
    if held.get("host") != socket.gethostname() or held.get("boot", boot()) != boot():
        return time.time() - held.get("time", 0) < EXPIRY_S
    if held["pid"] == os.getpid():
        return held.get("owner") in HELD
    return running(held["pid"], held.get("began"))


def running(pid: int, since: int | None) -> bool:
    """Whether a process of this machine that began then, if that is known, has not ended."""
    if state(pid) == "Z" or len({began(pid), since} - {None}) > 1:
        return False
    try:
        os.kill(pid, 0)
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
    parent = int(os.environ.get("RAY_RAYLET_PID", os.getppid()))  # it may be gone by now, and an heir has taken over
    since = began(parent)

    def watch() -> None:
        while running(parent, since):
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
