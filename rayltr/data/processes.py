"""Processes beside this one, for work that Python's lock would keep on one CPU; results come in order.

They are children of a small server, as from Python 3.14 on by default.  A fork of this process would for ever hold the
locks that other threads, of Ray or pyarrow say, hold at that moment; without a server each would import everything.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import current_process, get_context, parent_process, resource_tracker
from threading import Lock, Thread
from types import ModuleType
from typing import Any

from rayltr.data.images import cpus

CONTEXT = get_context("forkserver")
MANY = 10_000
"""Images, however small, from which the half a second that processes need to start is worth it."""
MOST = 16
"""Processes at most: each holds some hundred images."""
STARTING = Lock()
LOST = "a process that decodes images was killed, perhaps because the machine ran out of memory"

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Does as `map` does."""


def share() -> int:
    """The CPUs that this process should use: as OMP_NUM_THREADS says, which Ray sets to those of a trial, or all."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(cpus(), MOST, int(said) if said.isdecimal() else MOST)


def may_start() -> bool:
    """Whether this process may have children; a daemon of `multiprocessing` may not."""
    return not current_process().daemon


@contextmanager
def mapping(images: int) -> Iterator[Map]:
    """A `map` for work on so many images: by a process per CPU where they are many, else in this one.

    Raises ChildProcessError when such a process was killed.
    """
    count = share()
    if count < 2 or images < MANY or not may_start():
        yield map
        return
    preload("rayltr.data")
    pool = ProcessPoolExecutor(count, CONTEXT, initializer=follow)

    def run(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        return in_order(lambda task: _submitted(pool, work, task), tasks, 2 * count)

    try:
        yield run
    except BrokenProcessPool as error:
        raise ChildProcessError(LOST) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(submit: Callable[[Any], Future], tasks: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The results of submitted tasks one by one; at most `ahead` are under way before the one that is asked for."""
    waiting: deque[Future] = deque()
    for task in tasks:
        waiting.append(submit(task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _submitted(pool: ProcessPoolExecutor, work: Callable[[Any], Any], task: Any) -> Future:
    with apart():  # submitting starts processes, as long as none is idle
        return pool.submit(work, task)


def preload(module: str) -> None:
    """Has the server import a module once for all its children, if it does not run yet."""
    CONTEXT.set_forkserver_preload([module])


@contextmanager
def apart() -> Iterator[None]:
    """Processes that start meanwhile never hear of Ctrl-C, and do not import this program's main module once more.

    They need nothing of it, and a script that does not ask for its `__name__` would begin again in each of them.
    """
    with STARTING:
        resource_tracker.ensure_running()  # to start it afterwards would unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server and its children inherit that
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow(number: int = 0) -> None:
    """Ends this process with the one that it works for, which may be killed and can then tell nobody."""
    parent = parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
