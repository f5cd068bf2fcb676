"""What a trial of several workers makes of errors, without any workers; with them see test_search and test_kills."""

import ast
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import train

from rayltr import cluster, machines, parallel, trial
from rayltr.actor import verdict
from rayltr.interface import Diverged
from rayltr.machines import Lost


class Gone(Exception):
    """Stands for what Ray Train says of a worker whose process has died."""

    health_check_failure = "the actor is dead"


class Failed(Exception):
    """Stands for the error of a Train run."""

    def __init__(self, *causes):
        super().__init__(f"Training failed: {causes}")
        self.worker_failures = dict(enumerate(causes))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Failed(RuntimeError("connection closed by peer"), Gone()), MemoryError),
        (Failed(OSError(28, "No space left on device"), RuntimeError("connection closed")), OSError),
        (Failed(KeyError("my own mistake")), Failed),
        (ValueError("no room"), ValueError),
    ],
)
def test_the_error_of_a_run_is_that_of_a_single_process(error, kind):
    found = cluster.meant(error)
    assert type(found) is kind and str(error) in str(found)


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        (OSError(28, "No space left on device"), "interrupted"),
        (PermissionError(13, "Permission denied", "/runs/own/store/1"), "interrupted"),
        (ChildProcessError("a process that decodes images was killed"), "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "/home/me/weights.csv"), "failed"),
        (OSError("something else"), "failed"),
    ],
)
def test_what_a_worker_raised_means_what_it_means_in_a_single_process(cause, state):
    assert verdict(cluster.meant(Failed(cause)), "/runs/own") == verdict(cause, "/runs/own") == state


@pytest.mark.parametrize(("rank", "gpus"), [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("error", [Diverged("the term 'loss' became nan"), InterruptedError("told to stop")])
def test_what_ends_all_workers_alike_is_no_reason_to_start_them_again(monkeypatch, rank, gpus, error):
    def ends(*arguments):
        raise error

    monkeypatch.setattr(trial, "for_search", ends)
    joined = []
    monkeypatch.setattr(parallel, "joined", lambda *arguments: joined.append(arguments) or nullcontext())
    monkeypatch.setattr(cluster.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: rank))
    told, settings = [], SimpleNamespace(gpus=gpus, workers=2)
    config = {"queue": SimpleNamespace(put=told.append), "settings": settings, "name": "0000", "params": {}}
    found = cluster.loop(config)
    assert [arguments[:3] for arguments in joined] == [("nccl" if gpus else "gloo", rank, 2)]
    if rank:
        assert found is None and not told
    else:
        assert found == {"error": error} and told == [{"reserved": ""}]
        assert "in ends" in error.__notes__[-1], "the traceback travels along"


class Relay:
    """A queue that holds these records, then nothing."""

    def __init__(self, *records):
        self.records = list(records)

    def get(self, timeout):
        if not self.records:
            raise cluster.Empty
        return self.records.pop(0)

    def empty(self):
        return not self.records

    def shutdown(self):
        self.records = None


@pytest.fixture
def placed(monkeypatch):
    """Where the workers were placed, by group; the machine `m2` is gone."""
    places = {"a": {"m1", "m2"}, "b": {"m1", "m3"}}
    monkeypatch.setattr(cluster, "homes", places.__getitem__)
    monkeypatch.setattr(cluster, "gone", lambda node: node == "m2")
    return places


def failing(error):
    def fit():
        raise error

    return SimpleNamespace(fit=fit)


@pytest.mark.parametrize("cause", [Gone(), RuntimeError("connection closed by peer")])
def test_a_worker_that_is_lost_with_its_machine_is_no_fault_of_the_trial(placed, cause):
    with pytest.raises(Lost, match="a machine of the workers was lost") as found:
        cluster.relayed(failing(Failed(cause)), Relay({"reserved": "a"}), lambda record: None)
    assert verdict(found.value, "/runs/own") == "lost"


def test_a_machine_that_the_workers_had_left_before_they_died_is_no_excuse(placed):
    with pytest.raises(MemoryError):
        cluster.relayed(failing(Failed(Gone())), Relay({"reserved": "a"}, {"reserved": "b"}), lambda record: None)


@pytest.mark.parametrize("records", [(), ({"reserved": "a"},)], ids=["the first ones", "another one"])
def test_a_trial_that_waits_for_machines_can_be_told_to_stop(placed, records):
    waiting = SimpleNamespace(fit=threading.Event().wait)
    with pytest.raises(InterruptedError):
        cluster.relayed(waiting, Relay(*records), lambda record: None, lambda: True)


def test_workers_that_have_begun_stop_by_themselves(placed):
    trainer = SimpleNamespace(fit=lambda: time.sleep(0.2) or SimpleNamespace(return_value={"trained": 1}))
    assert cluster.relayed(trainer, Relay({"reserved": "b"}), lambda record: None, lambda: True) == {"trained": 1}


def test_workers_that_are_started_again_are_told_of(placed):
    told = []
    queue = Relay({"reserved": "a"}, {"epoch": 1}, {"reserved": "b"}, {"epoch": 1})
    trainer = SimpleNamespace(fit=lambda: SimpleNamespace(return_value={"trained": 1}))
    assert cluster.relayed(trainer, queue, told.append) == {"trained": 1}
    assert told[0] == {"reserved": "a"} and told[2] == {"reserved": "b", "restarted": 1}
    assert [told[1], told[3]] == [{"epoch": 1}] * 2 and queue.records is None


ROOT = Path(__file__).parents[1]


def test_ray_is_installed_with_the_part_that_frees_the_machines_of_stopped_workers():
    """The API server, which only the extra `default` brings; of a killed trial `rayltr.machines.release` frees them."""
    (ray,) = [text for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
              if text.startswith("ray")]  # fmt: skip
    assert {"default", "tune", "train"} <= set(ray[ray.index("[") + 1 : ray.index("]")].split(","))


def test_the_processes_that_only_wait_for_the_workers_do_without_torch():
    """It takes seconds to load, and each of them would delay the first step of a trial by as much."""
    code = "import sys, rayltr.actor, rayltr.cluster; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_parts_of_ray_train_that_are_left_out_are_there():
    def parts(kind):
        made = kind(print, scaling_config=train.ScalingConfig(num_workers=2))
        return {type(part).__name__ for part in made._create_default_callbacks()}

    assert parts(cluster.DataParallelTrainer) - parts(cluster.Trainer) == cluster.UNUSED
    assert callable(import_module(machines.COORDINATOR).get_or_create_autoscaling_coordinator)


@pytest.mark.parametrize("name", ["TuneReportCallback", "OptunaSearch", "ASHAScheduler", "metrics", "restore"])
def test_what_loses_reports_in_ray_is_not_used(name):
    """The callback can wait for ever, and a Train run without a checkpoint has no metrics; see `rayltr.cluster`."""
    files = [ROOT / "rayltr" / file for file in ("cluster.py", "tuning.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert name not in used


def test_epochs_do_not_take_the_slow_way_of_train_report():
    """It holds every report back until the controller looks, every second or two."""
    nodes = ast.walk(ast.parse((ROOT / "rayltr/cluster.py").read_text()))
    calls = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert not [call for call in calls if (ast.unparse(call.value), call.attr) == ("train", "report")]
