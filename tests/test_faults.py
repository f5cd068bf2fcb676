"""What a search makes of interrupts, disks and user code that fail, in processes of its own."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from rayltr import records

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

SPACE = """
import os, pathlib, signal, time
import torch
from rayltr.spec import Stage, fn

def watched(logits, target, counts, *, gamma=1.0):
    marker = pathlib.Path(MARKER)
    ACT
    return gamma * torch.nn.functional.cross_entropy(logits, target, reduction="none")

def space(trial):
    first = stage()
    return first.but(resume=first, loss=fn(watched, gamma=trial.suggest_float("gamma", 0.5, 2.0)))

def control(trial):
    return stage(optimiser=fn("sgd", lr=trial.suggest_float("lr", 0.02, 0.05)))

def stage(**changes):
    whole = Stage(source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0), epochs=10, horizon=20, batch=16,
                  backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=0.05))
    return whole.but(**changes)
"""


def study(folder, act="pass", text=SPACE):
    """A study whose trials do something at every step of their last stage; `marker` is a file to do it by."""
    path = folder / "my_space.py"
    path.write_text(text.replace("MARKER", repr(str(folder / "marker"))).replace("ACT", act))
    return path


class Search:
    """`python -m rayltr.search` in a process group of its own, as a terminal has it."""

    def __init__(self, path, storage, *words, trials=3, epochs=20, name="run"):
        self.words = [path, "--trials", trials, "--epochs", epochs, "--storage", storage, "--name", name]
        self.words = [*map(str, [*self.words, "--no-dashboard", "--sampler", "quasi", *words])]
        self.run, self.log = storage / name, storage.parent / f"{storage.name}-{name}.log"

    def start(self, *more):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "rayltr.search", *self.words, *more],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self

    def said(self):
        return self.log.read_text()

    def until(self, text, count=1):
        """Waits until the search has said something so often."""
        wait(lambda: self.said().count(text) >= count or self.process.poll() is not None)
        assert self.said().count(text) >= count, self.said()

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def ended(self, within=400):
        """The exit code."""
        self.process.wait(within)
        assert "Traceback" not in self.said(), self.said()
        return self.process.returncode

    def rows(self):
        return {row["trial"]: row for row in records.read_trials(self.run).to_pylist()}


def wait(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def each_epoch_once(search, epochs):
    """Every trial is complete, and every epoch in the store was counted for one trial; none twice, none not at all."""
    rows = search.rows()
    assert all(row["state"] == "complete" and row["epochs_asked"] == epochs for row in rows.values())
    curves = records.read_epochs(search.run).to_pylist()
    told = Counter((row["trial"], row["epoch"], row["metric"]) for row in curves)
    assert told == Counter((trial, epoch, "loss") for trial in rows for epoch in range(1, epochs + 1))
    stored = {row["address"].split("@")[0] for row in rows.values()}
    notes = [note for note in (search.run / "store").glob("*/*.json") if ".snapshot." not in note.name]
    lengths = {note.parent.name: int(note.name[:6]) for note in notes}
    assert stored <= set(lengths), "every line that a trial ended on is there"
    shared = [length for line, length in lengths.items() if line not in stored]  # first stages
    control = [row for row in rows.values() if row["p.arm"] == "control"]
    trained = sum(shared) + epochs * len(control) + (len(rows) - len(control)) * (epochs - sum(shared))
    assert sum(row["epochs_trained"] + row["epochs_resumed"] for row in rows.values()) == trained


@pytest.mark.slow
def test_ctrl_c_stores_what_is_trained_and_says_how_to_go_on(tmp_path):
    search = Search(study(tmp_path), tmp_path / "runs", "--concurrent", "2", "--snapshot-seconds", "900", epochs=240)
    search.start().until("stage 1, epoch", 2)
    search.signal(signal.SIGINT)
    assert search.ended() == 130
    assert "stopping: running trials finish and store their epoch" in search.said()
    assert len(list(search.run.glob("store/*/*.snapshot.safetensors"))) == 2, "one for each running trial"
    assert not search.rows() and not (search.run / "stop").exists()
    (command,) = re.findall(r"^  (python -m rayltr.search .+ --resume)$", search.said(), re.MULTILINE)
    search.words = shlex.split(command)[3:]
    assert search.start().ended() == 0
    assert sum(row["epochs_resumed"] > 0 for row in search.rows().values()) == 2
    each_epoch_once(search, 240)


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_a_second_ctrl_c_ends_at_once(tmp_path, first):
    search = Search(study(tmp_path, "marker.touch(); time.sleep(600)"), tmp_path / "runs", "--concurrent", "1")
    search.start()
    wait((tmp_path / "marker").exists)
    search.signal(signal.SIGINT) if first == signal.SIGINT else search.process.terminate()
    search.until("stopping: ")
    time.sleep(2)
    assert search.process.poll() is None, "it waits for an epoch that does not end"
    search.signal(signal.SIGINT)
    assert search.ended(within=30) == 130
    assert "--resume" in search.said() and set(search.rows()) == {"0000"}


@pytest.mark.slow
def test_a_signal_to_all_processes_ends_a_search_with_the_command_to_go_on(tmp_path):
    search = Search(study(tmp_path), tmp_path / "runs", "--concurrent", "1", "--snapshot-seconds", "0.1", epochs=240)
    search.start().until("stage 1, epoch", 1)
    wait(lambda: list(search.run.glob("store/*/*.snapshot.safetensors")))
    search.signal(signal.SIGTERM)
    assert search.ended(within=30) == 130
    assert "--resume" in search.said()
    assert search.start("--resume", "--trials", "1").ended() == 0
    assert set(search.rows()) == {"0000"}, "of three that the run has proposals for"


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """Leaves not a byte."""
    with open(folder / "big", "wb", buffering=0) as big:
        try:
            while True:
                big.write(bytes(4096))
        except OSError:
            return


@pytest.mark.slow
@ROOT_ONLY
def test_a_full_disk_ends_a_search_in_order_and_what_was_found_stays(tmp_path, disk):
    search = Search(study(tmp_path), disk / "runs", "--concurrent", "1", "--snapshot-seconds", "0", epochs=60)
    search.log = tmp_path / "log"
    (disk / "runs").mkdir()
    search.start().until("[1/3]")
    fill(disk)
    assert search.ended() == 130
    assert "No space left on device" in search.said() and "--resume" in search.said()
    before = search.rows()
    assert "0000" in before and all(row["state"] == "complete" for row in before.values())
    (disk / "big").unlink()
    with open(search.run / "optuna.journal", "a") as journal:
        journal.write('{"op_code":6,"tri')  # what a full disk may leave, too
    assert search.start("--resume").ended() == 0
    assert search.rows()["0000"]["ended"] == before["0000"]["ended"]
    each_epoch_once(search, 60)


@pytest.mark.slow
@ROOT_ONLY
def test_a_store_that_cannot_be_written_is_no_verdict_on_the_recipes(tmp_path):
    """The trials that could not be stored are left open, and a resumed search trains them."""
    search = Search(study(tmp_path), tmp_path / "runs", "--concurrent", "1", "--snapshot-seconds", "0", epochs=60)
    search.start().until("[1/3]")
    store = search.run / "store"
    subprocess.run(["mount", "--bind", store, store], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", store], check=True)
        assert search.ended() == 130
        assert "Read-only file system" in search.said()
        assert {row["state"] for row in search.rows().values()} == {"complete", "interrupted"}
    finally:
        subprocess.run(["umount", "--lazy", store], check=True)
    assert search.start("--resume").ended() == 0
    each_epoch_once(search, 60)


@pytest.mark.slow
def test_what_a_power_cut_took_from_the_records_is_taken_from_the_store(tmp_path):
    search = Search(study(tmp_path), tmp_path / "runs", "--concurrent", "1")
    assert search.start().ended() == 0
    before = search.rows()
    table, journal = search.run / "records" / "trials.parquet", search.run / "optuna.journal"
    os.truncate(table, 100)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:-1], lines[-1][:20], lines[-1]]))  # half a line, and the whole one behind it
    assert search.start("--resume").ended() == 0
    assert "note: records/trials.parquet is damaged; it is trials.parquet.damaged now" in search.said()
    after = search.rows()
    assert {trial: row["address"] for trial, row in after.items()} == {t: row["address"] for t, row in before.items()}
    assert {(row["state"], row["epochs_trained"], row["objective"]) for row in after.values()} == {
        ("complete", 0, row["objective"]) for row in before.values()
    }
    assert os.path.getsize(f"{table}.damaged") == 100


KILLS_ITS_TRIAL = """if not (marker.parent / "killed").exists():
        (marker.parent / "killed").touch()
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                parent, title = (entry / "stat").read_text().rsplit(")")[1].split()[1], (entry / "cmdline").read_text()
            except OSError:
                continue
            if parent == str(os.getppid()) and title.startswith("ray::ImplicitFunc"):
                os.kill(int(entry.name), 9)"""


@pytest.mark.slow
def test_a_killed_trial_gives_back_what_its_workers_held(tmp_path):
    """Else the next one would wait for two CPUs of which nobody makes use; no dashboard could tell them."""
    search = Search(study(tmp_path, KILLS_ITS_TRIAL), tmp_path / "runs", "--workers", "2", trials=2)
    assert search.start().process.wait(500) == 0
    assert (tmp_path / "killed").exists() and "0001 is run again, alone: the process of the trial died" in search.said()
    assert [row["state"] for row in search.rows().values()] == ["complete"] * 2


RAISES = """(marker.parent / f"process{os.getpid()}").touch()
    there = sorted(marker.parent.glob("error*"))
    if there:
        text = there[0].read_text()
        there[0].unlink()
        raise eval(text)"""


@pytest.mark.slow
def test_errors_of_memory_are_repeated_and_others_recorded_with_their_traceback(tmp_path):
    """In one search: two trials run out of memory once, one has a mistake of the user's, the others do not notice.

    Nor does the process that runs them all: a new one for every trial would cost seconds.
    """
    search = Search(study(tmp_path, RAISES), tmp_path / "runs", "--concurrent", "1", trials=5)
    (tmp_path / "error1").write_text("MemoryError('no more')")
    (tmp_path / "error2").write_text("ValueError('must be alone to fail')")
    (tmp_path / "error3").write_text("RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')")
    assert search.start().process.wait(400) == 4
    rows = search.rows()
    states = {trial: (row["state"], row["again"]) for trial, row in rows.items()}
    assert sorted(states.values()) == [("complete", False)] * 3 + [("complete", True), ("failed", True)], states
    (failed,) = [row for row in rows.values() if row["state"] == "failed"]
    assert "Traceback" in failed["error"] and "in watched" in failed["error"]
    assert failed["error"].strip().endswith("ValueError: must be alone to fail")
    assert "is run again, alone: MemoryError: no more" in search.said()
    assert "is run again, alone: RuntimeError: CUDA out of memory" in search.said()
    assert len(list(tmp_path.glob("process*"))) == 1
    assert "Traceback" not in search.said()
