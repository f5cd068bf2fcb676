"""Processes and machines that are killed while a search runs: it finishes or resumes, and counts every epoch once."""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import ray
from ray.cluster_utils import Cluster

from rayltr.interface import Resources
from rayltr.machines import DRIVER
from rayltr.spec import parse
from rayltr.store import Store
from rayltr.studies import find
from rayltr.trial import run
from tests.test_faults import Search, each_epoch_once, study, wait

psutil = import_module("psutil")  # Ray brings a copy along, which is found once Ray is imported

KILLS, EPOCHS = int(os.environ.get("RAYLTR_KILLS", "3")), 40
"""Each kill costs a start of Ray, so few are the default: `RAYLTR_KILLS=20 pytest tests/test_kills.py` is thorough."""
TIMES = ("m.val.cost_s", "wall_s", "started", "ended", "epochs_trained", "epochs_resumed", "predictions_test")


def killed_often(folder, sampler, seed):
    """A search that was killed at random moments, and how often it was.

    Its driver alone, whose workers then notice by themselves, or all processes, as if the machine was switched off.
    """
    folder.mkdir()
    search = Search(
        study(folder), folder / "runs", "--sampler", sampler, "--concurrent", "1", "--snapshot-seconds", "0",
        trials=8, epochs=EPOCHS,
    )  # fmt: skip
    draw, kills = random.Random(seed), 0
    while kills < KILLS:
        search.start(*["--resume"] * (search.run / "run.json").exists())
        if text := draw.choice(["", " begins", "epoch"]):
            wait(lambda text=text: text in search.said() or search.process.poll() is not None)
            time.sleep(draw.uniform(0, 1))
        else:
            time.sleep(draw.uniform(1, 8))
        if search.process.poll() is not None:
            break
        if draw.random() < 0.5:
            search.process.kill()
        else:
            search.signal(signal.SIGKILL)
        search.process.wait()
        kills += 1
    assert search.start("--resume").ended() == 0
    return search, kills


@pytest.fixture(scope="module")
def survivors(tmp_path_factory):
    """By sampler; both at the same time, as each of them uses one core."""
    folder = tmp_path_factory.mktemp("kills")
    with ThreadPoolExecutor() as pool:
        jobs = {name: pool.submit(killed_often, folder / name, name, 1) for name in ("quasi", "tpe")}
    return {name: job.result() for name, job in jobs.items()}


def same(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def replayed(row, path, store):
    """Trains the recipe of a record from the start: the metrics are the same to the last bit."""
    find(str(path))  # its functions are part of the recipe
    again = run(parse(json.loads(row["recipe"])), Store(store), resources=Resources(device="cpu", threads=1))
    metrics = {f"m.val.{name}": value for name, value in again.metrics.items() if name != "cost_s"}
    assert metrics == {name: row[name] for name in metrics}


@pytest.mark.slow
def test_kills_of_the_driver_change_no_record(survivors):
    search, kills = survivors["quasi"]
    assert kills == KILLS
    undisturbed = Search(*search.words[:1], search.run.parent, *search.words[9:], name="whole", trials=8, epochs=EPOCHS)
    assert undisturbed.start().ended() == 0
    assert list(map(same, search.rows().values())) == list(map(same, undisturbed.rows().values()))
    each_epoch_once(search, EPOCHS)
    assert kills < 20 or any(row["epochs_resumed"] for row in search.rows().values())  # few may all hit the gaps


@pytest.mark.slow
def test_after_kills_every_trial_of_tpe_equals_its_replay(survivors, tmp_path):
    search, kills = survivors["tpe"]
    assert kills == KILLS
    rows = search.rows()
    assert [row["number"] for row in sorted(rows.values(), key=lambda row: row["trial"])] == list(range(8))
    each_epoch_once(search, EPOCHS)
    for row in rows.values():
        replayed(row, search.words[0], tmp_path)


MIDWAY = """mine = marker.parent / f"gamma{gamma}"
    if not mine.exists():
        mine.touch()
        dies_in_put(len(list(marker.parent.glob("gamma*"))))"""

DIES = """

def dies_in_put(number):
    from rayltr import files, store
    calls = []

    def put(system, place, content):
        calls.append(place)
        if len(calls) < number:
            return files.put(system, place, content)
        whole = number == 4  # a disk may lose the end of a file that was renamed already
        pathlib.Path(place if whole else f"{place}.0.part").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    store.put = put
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_snapshot(tmp_path):
    """In the weights, between weights and note, in the weights after an older snapshot, and with a torn note."""
    path = study(tmp_path, MIDWAY)
    path.write_text(path.read_text() + DIES)
    search = Search(path, tmp_path / "runs", "--concurrent", "1", "--snapshot-seconds", "0", trials=5)
    assert search.start().ended() == 0
    assert search.said().count("is run again, alone: the process of the trial died") == 4
    rows = search.rows()
    assert [row["again"] for _, row in sorted(rows.items())] == [False, True, True, True, True]
    resumed = {"0001": 10, "0002": 0, "0003": 1, "0004": 1}  # 0001 has also trained the stage that all share
    assert {trial: row["epochs_resumed"] for trial, row in rows.items() if trial != "0000"} == resumed
    each_epoch_once(search, 20)
    replayed(rows["0004"], path, tmp_path / "fresh")


def processes(search, title):
    """The processes of a search, by what Ray calls them."""
    family = psutil.Process(search.process.pid).children(recursive=True)
    return [process for process in family if title in " ".join(process.cmdline())]


def stored(search):
    """The stages that have a snapshot; for a moment they have two, as the last one goes when the next is there."""
    return {path.parent for path in search.run.glob("store/*/*.snapshot.json")}


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_trial_goes_on(tmp_path):
    search = Search(
        study(tmp_path), tmp_path / "runs", "--workers", "2", "--snapshot-seconds", "0", trials=1, epochs=60
    )
    search.start()
    wait(lambda: stored(search))
    processes(search, "RayTrainWorker")[0].kill()
    assert search.ended() == 0
    assert "0000 lost a worker; its workers go on from the last snapshot" in search.said()
    (row,) = search.rows().values()
    assert row["epochs_resumed"] > 0 and row["epochs_trained"] + row["epochs_resumed"] == 60
    each_epoch_once(search, 60)


@pytest.mark.slow
def test_trials_of_a_killed_process_are_run_again_one_by_one(tmp_path):
    """Three plain ones, which were trained as one."""
    path = study(tmp_path)
    path.write_text(path.read_text() + "\nspace = control\n")
    more = ("--concurrent", "1", "--stack", "3", "--snapshot-seconds", "0")
    search = Search(path, tmp_path / "runs", *more, epochs=120)
    search.start()
    wait(lambda: len(stored(search)) == 3)
    (process,) = processes(search, "ray::ImplicitFunc.train")
    process.kill()
    assert search.ended() == 0
    assert search.said().count("is run again, alone: the process of the trial died") == 3
    rows = search.rows()
    assert all(row["again"] and row["epochs_resumed"] > 0 for row in rows.values())
    each_epoch_once(search, 120)


@pytest.mark.slow
def test_a_lost_machine_costs_its_trial_nothing_but_time(tmp_path):
    """A cluster that grows from none: two machines come, and one goes while a trial runs there."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "resources": {DRIVER: 10}})
    try:
        search = Search(
            study(tmp_path), tmp_path / "runs", "--address", cluster.address, "--concurrent", "2",
            "--gpus-per-trial", "0", "--snapshot-seconds", "0", trials=3, epochs=160,
        )  # fmt: skip
        search.start().until("3 trials to run, 2 at once")
        machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
        wait(lambda: len(stored(search)) == 2)
        machines[1].all_processes["raylet"][0].process.kill()
        assert search.ended() == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert search.said().count("is run again: its machine was lost") == 1 and "alone" not in search.said()
    rows = search.rows()
    assert len(rows) == 3 and not any(row["again"] for row in rows.values())
    assert sum(row["epochs_resumed"] > 0 for row in rows.values()) == 1
    each_epoch_once(search, 160)


@pytest.mark.slow
def test_machines_lost_with_a_worker_cost_a_trial_nothing_but_time(tmp_path):
    """Twice one of two machines goes, and another comes; Ray Train itself starts the workers again once only."""
    told = ("lost a worker; its workers go on", "is run again: its machine was lost")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "resources": {DRIVER: 10}})
    try:
        search = Search(
            study(tmp_path), tmp_path / "runs", "--address", cluster.address, "--concurrent", "1",
            "--workers", "2", "--gpus-per-trial", "0", "--snapshot-seconds", "0", trials=1, epochs=40,
        )  # fmt: skip
        search.start().until("1 trials to run, 1 at once")
        machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
        for losses in (1, 2):
            begun = search.said().count("epoch ")
            wait(lambda begun=begun: search.said().count("epoch ") > begun)
            machines.pop(0).all_processes["raylet"][0].process.kill()
            machines.append(cluster.add_node(num_cpus=1))
            wait(lambda losses=losses: sum(map(search.said().count, told)) == losses)
        assert search.ended() == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert search.said().count("is run again: its machine was lost") == 1 and "alone" not in search.said()
    (row,) = search.rows().values()
    assert not row["again"] and row["epochs_resumed"] > 0
    each_epoch_once(search, 40)
