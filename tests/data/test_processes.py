import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from rayltr.data import processes
from rayltr.data.images import cpus
from rayltr.data.processes import in_order, mapping, share

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two(monkeypatch):
    """Two CPUs, and processes that pay for anything."""
    monkeypatch.setattr(processes, "MANY", 0)
    monkeypatch.setattr(processes, "cpus", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def about(number):
    """What a process knows of itself."""
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return number, os.getpid(), blocked, hasattr(sys.modules["__mp_main__"], "__file__")


def slow(number):
    time.sleep(0.2)
    return number


@pytest.mark.parametrize(("said", "found"), [("1", 1), ("1,4", 1), ("many", None), ("", None), ("9999", None)])
def test_the_share_of_the_machine_is_what_the_environment_says(monkeypatch, said, found):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert share() == (found or cpus())


def test_few_images_or_one_cpu_start_no_process(monkeypatch, two):
    monkeypatch.setattr(processes, "MANY", 10)
    with mapping(9) as run:
        assert run is map
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with mapping(10) as run:
        assert run is map


def test_results_come_in_order_from_processes_that_end(two):
    with mapping(1) as run:
        found = list(run(about, range(40)))
    assert [number for number, *_ in found] == list(range(40))
    assert os.getpid() not in {process for _, process, *_ in found}
    assert len({process for _, process, *_ in found}) <= 2
    assert all(blocked for _, _, blocked, _ in found), "no Ctrl-C"
    assert not any(again for *_, again in found), "no main module"
    assert not multiprocessing.active_children()
    assert hasattr(sys.modules["__main__"], "__file__"), "here it is as before"


def test_who_stops_early_leaves_no_process(two):
    with mapping(1) as run:
        assert next(run(slow, range(1000))) == 0
    assert not multiprocessing.active_children()


def test_a_killed_process_is_one_clear_error(two):
    with pytest.raises(ChildProcessError, match="^a process that decodes images was killed"), mapping(1) as run:
        list(run(os._exit, range(1, 9)))


def test_no_more_is_under_way_than_asked_for():
    submitted = []

    def submit(task):
        submitted.append(task)
        future = Future()
        future.set_result(-task)
        return future

    found = in_order(submit, range(9), 3)
    assert not submitted and next(found) == 0 and submitted == [0, 1, 2, 3]
    assert next(found) == -1 and submitted == [0, 1, 2, 3, 4]
    assert list(found) == [*range(-2, -9, -1)]


SCRIPT = """
import signal
from rayltr.data import processes
from tests.data.test_processes import about, slow
print("begun", flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
processes.MANY, processes.share = 0, lambda: 2
try:
    with processes.mapping(1) as run:
        print(next(run(about, range(1)))[1], flush=True)
        list(run(slow, range(10000)))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def script(tmp_path):
    """A program that does not ask for its __name__, with processes at work; and the number of one of these."""
    (tmp_path / "script.py").write_text(SCRIPT)
    begun = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with begun:
        assert begun.stdout.readline() == "begun\n"
        yield begun, int(begun.stdout.readline())
        begun.kill()


def test_ctrl_c_is_heard_by_the_program_alone(script):
    program, _ = script
    os.killpg(program.pid, signal.SIGINT)
    assert program.communicate(timeout=60) == ("interrupted\n", "")


def test_processes_end_with_a_program_that_is_killed(script):
    program, process = script
    program.kill()
    until = time.monotonic() + 60
    while os.path.exists(f"/proc/{process}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{process}")
