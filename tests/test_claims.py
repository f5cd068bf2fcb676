"""What ends processes that nobody waits for any more; the claims themselves are tested with the store."""

import os
import subprocess
import sys
import time
from contextlib import suppress

from rayltr.claims import go_on, stop, told_to_stop

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


def test_trials_are_told_to_stop_by_a_file_of_their_run(tmp_path):
    assert not told_to_stop(str(tmp_path))
    go_on(str(tmp_path))
    stop(str(tmp_path))
    assert told_to_stop(str(tmp_path))
    go_on(str(tmp_path))
    assert not told_to_stop(str(tmp_path))


def test_a_disk_that_takes_no_file_is_no_second_error(tmp_path):
    stop(str(tmp_path / "gone"))
