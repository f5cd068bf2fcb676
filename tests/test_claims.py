"""Who a claim belongs to, and what ends processes that nobody waits for any more; see also the tests of the store."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from pyarrow import fs

from rayltr import claims
from rayltr.claims import alive, go_on, myself, stop, take, told_to_stop

LINUX = pytest.mark.skipif(not claims.boot(), reason="only Linux tells when a process began")

CHILD = """
import sys, time
from rayltr import claims
claims.BEAT_S = 0.1
claims.end_with_parent()
claims.end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_process_does_not_outlive_the_one_that_started_it():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    os.kill(child, 0)  # it is there as long as its parent is
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(child, 0)
            time.sleep(0.05)
        raise AssertionError("it is still there")


@LINUX
def test_a_process_whose_starter_was_gone_before_it_looked_ends_as_well():
    """Its parent is the machine's first process by then, which stays."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    child = [sys.executable, "-c", CHILD]
    late = subprocess.run(child, env={**os.environ, "RAY_RAYLET_PID": str(gone.pid)}, stdout=subprocess.DEVNULL)
    assert late.returncode == 1, "it does not wait its minute"


def test_trials_are_told_to_stop_by_a_file_of_their_run(tmp_path):
    assert not told_to_stop(str(tmp_path))
    go_on(str(tmp_path))
    stop(str(tmp_path))
    assert told_to_stop(str(tmp_path))
    go_on(str(tmp_path))
    assert not told_to_stop(str(tmp_path))


def test_a_disk_that_takes_no_file_is_no_second_error(tmp_path):
    stop(str(tmp_path / "gone"))


def of_parent(**changes):
    """A claim of a process of this machine that lives as long as this one."""
    pid = os.getppid()
    return {**myself(), "owner": "x", "pid": pid, "began": claims.began(pid), "time": time.time(), **changes}


def test_a_living_process_of_this_machine_holds_its_claim_however_long_it_was_silent():
    assert alive(of_parent(time=0))
    assert alive({"owner": "x", "host": socket.gethostname(), "pid": os.getppid(), "time": 0}), "nothing else is known"


@LINUX
def test_a_process_that_has_ended_holds_nothing_though_nobody_has_fetched_its_result():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(of_parent(pid=child.pid, began=claims.began(child.pid)))
    child.wait()


@LINUX
def test_a_process_id_that_came_again_holds_nothing():
    assert not alive(of_parent(began=claims.began(os.getppid()) - 1))
    assert not alive({**myself(), "owner": "of a process that had my id", "time": time.time()})


@LINUX
def test_a_process_whose_beginning_cannot_be_seen_goes_by_its_id(monkeypatch):
    held = of_parent()
    monkeypatch.setattr(claims, "began", lambda pid: None)
    assert alive(held)


@LINUX
def test_a_reboot_ends_the_claims_of_a_machine_within_a_minute():
    """Another machine may have the same name, so its claim is not nobody's at once."""
    assert alive(of_parent(boot="before", time=time.time()))
    assert not alive(of_parent(boot="before", time=time.time() - claims.EXPIRY_S - 1))


def test_what_this_process_does_not_hold_is_nobodys(tmp_path):
    """A claim that could not be removed, say, because the disk gave an error."""
    files, path = fs.LocalFileSystem(), str(tmp_path / "claim")
    first = take(files, path)
    body = (tmp_path / "claim").read_bytes()
    assert take(files, path) is None
    first.release()
    (tmp_path / "claim").write_bytes(body)
    take(files, path).release()
    assert not claims.HELD & {json.loads(body)["owner"]}


def test_threads_of_one_process_exclude_each_other(tmp_path):
    files, path = fs.LocalFileSystem(), str(tmp_path / "claim")
    inside, most, done = [], [], []

    def work():
        while len(done) < 200:
            claim = take(files, path)
            if claim:
                inside.append(claim)
                most.append(len(inside))
                done.append(inside.pop())
                claim.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and not os.listdir(tmp_path) and not claims.HELD
