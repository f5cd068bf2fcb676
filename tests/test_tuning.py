"""The search itself, as far as it needs no Ray; with Ray see test_search, test_faults and test_kills."""

from types import SimpleNamespace

import pytest

from rayltr import tuning
from rayltr.actor import verdict
from rayltr.data.processes import LOST
from rayltr.ledger import Settings
from rayltr.studies import Plan


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (MemoryError("no more"), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: Out of memory"), "memory"),
        (OSError(28, "No space left on device"), "interrupted"),
        (InterruptedError("told to stop"), "interrupted"),
        (PermissionError(13, "Permission denied", "/runs/own/store/1"), "interrupted"),
        (OSError(13, "Failed to open local file '/runs/own/store/1'. Detail: Permission denied"), "interrupted"),
        (PermissionError(13, "Permission denied", "/runs/ownweights.csv"), "failed"),
        (ChildProcessError(LOST), "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "/home/me/weights.csv"), "failed"),
        (ValueError("the term 'loss' became nan in epoch 1"), "failed"),
        (KeyError("my own mistake"), "failed"),
    ],
)
def test_what_the_machine_did_is_no_verdict_on_the_recipe(error, state):
    assert verdict(error, "/runs/own") == state


@pytest.fixture
def heard(monkeypatch):
    """A ledger that remembers what it is told, on machines of which `away` is gone."""
    ended, released = [], []
    monkeypatch.setattr(tuning, "gone", lambda node: node == "away")
    monkeypatch.setattr(tuning, "release", released.append)
    return SimpleNamespace(nodes={}, reserved={}, end=lambda *what, **more: ended.append((what, more)),
                           ended=ended, released=released)  # fmt: skip


@pytest.mark.parametrize(("node", "lost"), [("here", False), ("away", True), (None, False)])
def test_a_trial_whose_process_dies_ends_once_with_what_ray_says_of_it(heard, tmp_path, node, lost):
    heard.nodes, heard.reserved = {"a": node} if node else {}, {"a": "group"}
    (tmp_path / "error.txt").write_text("Traceback\nImportError: no such thing")
    tuning.Agent(heard).on_trial_complete("a", error=True)
    tuning.Listener(heard).on_trial_error(1, [], SimpleNamespace(trial_id="a", error_file=tmp_path / "error.txt"))
    (((trial, died), more),) = heard.ended
    assert (trial, died["error"], more["lost"]) == ("a", "ImportError: no such thing", lost)
    assert heard.released == ["group"]


def test_a_trial_ends_as_well_where_the_disk_had_no_room_for_what_ray_says_of_it(heard, tmp_path):
    for file in (None, tmp_path / "none"):
        tuning.Listener(heard).on_trial_error(1, [], SimpleNamespace(trial_id="a", error_file=file))
    assert [died["state"] for (_, died), _ in heard.ended] == ["memory", "memory"]


def test_what_a_trial_held_for_its_workers_is_given_back_however_it_ends(heard):
    """Its workers' own process may have died and left it; nothing would ever run there again."""
    heard.reserved = {"a": "group"}
    tuning.Agent(heard).on_trial_complete("a", {})
    assert heard.released == ["group"] and heard.ended == [(("a",), {})] and not heard.reserved


class Seen:
    """What is said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def gpus(monkeypatch):
    """Two machines with GPUs, of which nothing is asked but the look at the memory, which this replaces."""

    def set_up(answer, machines=({"CPU": 16.0, "GPU": 2.0}, {"CPU": 12.0, "GPU": 1.0}, {"CPU": 4.0})):
        class Remote:
            def remote(self, settings):
                return answer

        nodes = [{"Alive": True, "Resources": resources} for resources in machines]
        monkeypatch.setattr(tuning.ray, "nodes", lambda: nodes)
        monkeypatch.setattr(tuning.ray, "remote", lambda **need: lambda function: Remote())
        monkeypatch.setattr(tuning.ray, "get", lambda answer: answer())

    return set_up


def broken():
    raise RuntimeError("in a worker\nCUDA out of memory")


@pytest.mark.parametrize(
    ("peak", "cpus", "share"), [(10, 1, 1 / 7), (2, 1, 1 / 8), (2, 4, 1 / 2), (2, 8, 1.0), (50, 1, 1.0)]
)
def test_trials_share_a_gpu_by_memory_and_processors(gpus, peak, cpus, share):
    """Nine tenths of 80 GiB, and the machine with the fewest processors to a GPU: 8."""
    gpus(lambda: (peak << 30, 80 << 30))
    seen = Seen()
    assert tuning.measured(Settings("run", Plan("s"), 1, (), "tpe", cpus=cpus), seen) == pytest.approx(share)
    assert seen.lines == [f"a trial takes up to {peak}.0 of 80 GiB of a GPU: {round(1 / share)} trials share one"]


def test_a_trial_that_no_machine_holds_is_not_waited_for(gpus):
    gpus(broken)
    with pytest.raises(tuning.Shortage, match="20 CPUs and 1 GPUs on one machine"):
        tuning.measured(Settings("run", Plan("s"), 1, (), "tpe", cpus=20), Seen())


def test_where_nothing_is_to_be_shared(gpus):
    one, several = (Settings("run", Plan("s"), 1, (), "tpe", workers=workers) for workers in (1, 2))
    gpus(broken)
    seen = Seen()
    assert tuning.measured(one, seen) == 1.0
    assert seen.lines == ["the memory of a trial cannot be measured: CUDA out of memory"]
    assert tuning.measured(several, seen) == -1.0
    gpus(broken, ({"CPU": 4.0},))
    assert tuning.measured(one, seen) == -1.0
