"""Machines: what listens where, how many trials fit, and what share of a GPU a trial needs."""

import ipaddress
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import ray
import torch
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from ray.util.queue import Queue
from torch import distributed

from rayltr.machines import DRIVER, Shortage, answers, connect, fitted, gone, share_of_gpu
from rayltr.parallel import joined

psutil = import_module("psutil")  # Ray brings a copy along, which is found once Ray is imported


@pytest.fixture
def left_alone(monkeypatch):
    """Ray, its environment and its one setting of ours are as before when the test has ended."""
    before = dict(os.environ)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def listening(processes) -> set[tuple[str, str, int]]:
    """(process, address, port) of every TCP socket that waits for connections."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            sockets = process.net_connections(kind="tcp")
            waiting = [own.laddr for own in sockets if own.status == psutil.CONN_LISTEN]
            found |= {(process.name(), own.ip, own.port) for own in waiting}
    return found


def open_to_the_network(address: str) -> bool:
    """Whether others can reach a socket bound to it.  ::ffff:127.0.0.1 is 127.0.0.1 as IPv6 writes it."""
    own = ipaddress.ip_address(address)
    return not (getattr(own, "ipv4_mapped", None) or own).is_loopback


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "::ffff:0.0.0.0", "192.168.1.7", "fe80::1"])
def test_an_open_socket_is_recognised(address):
    assert open_to_the_network(address)
    assert not any(open_to_the_network(own) for own in ("127.0.0.1", "::1", "::ffff:127.0.0.1"))


@ray.remote(num_cpus=0.5)
def worker(rank: int, queue: Queue) -> set[tuple[str, str, int]]:
    """One of the two workers of a trial: what its process listens on while they train."""

    def told(address):
        return queue.get() if rank else queue.put(address) or address

    with joined("gloo", rank, 2, ray.util.get_node_ip_address(), told):
        distributed.all_reduce(torch.ones(1))
        found = listening([psutil.Process()])
        distributed.barrier()
    return found


@pytest.mark.slow
def test_a_local_ray_listens_on_the_loopback_address_alone(left_alone):
    """Ray's services, dashboard, agents, metrics, the driver and a worker; gloo and torch's store, too."""
    own = psutil.Process()
    before = listening([own])
    dashboard = connect(None, dashboard=True)
    assert dashboard.startswith("127.0.0.1:")
    ray.get(ray.remote(lambda: None).remote())
    found = listening([own, *own.children(recursive=True)]) - before
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", own.name()} <= {
        n for n, _, _ in found
    }
    assert int(dashboard.split(":")[1]) in {port for _, _, port in found}
    assert not [each for each in found if open_to_the_network(each[1])]

    queue = Queue(actor_options={"num_cpus": 0})
    trial = set().union(*ray.get([worker.remote(rank, queue) for rank in range(2)]))
    assert len(trial) > 4  # each worker's own port and gloo's, and the store
    assert not [each for each in trial if open_to_the_network(each[1])]


def test_joining_a_cluster_changes_nothing_about_the_network(left_alone, monkeypatch):
    """On a cluster the machines must reach each other."""
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    asked = []

    def init(**options):
        asked.append(options)
        raise ConnectionError("nobody home")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Shortage, match="no Ray cluster answers at 10.0.0.1:6379: nobody home"):
        connect("10.0.0.1:6379", dashboard=True)
    assert asked[0]["address"] == "10.0.0.1:6379" and "resources" not in asked[0]
    assert ray_constants.ENABLE_RAY_CLUSTER and "GLOO_SOCKET_IFNAME" not in os.environ
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


HEAD = {DRIVER: 1000.0}
SMALL, LARGE = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}


def on(monkeypatch, *machines, dead=()):
    """Lets Ray report these machines."""
    nodes = [{"Alive": True, "Resources": own} for own in machines]
    nodes += [{"Alive": False, "Resources": own} for own in dead]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)


@pytest.mark.parametrize(
    ("machines", "asked", "expected"),
    [
        ([{"CPU": 2.0}], (1, -1.0, 1, 0), (0.0, 2)),
        ([{"CPU": 2.0}], (2, 0.0, 1, 0), (0.0, 1)),
        ([{"CPU": 5.0}], (2, 0.0, 1, 0), (0.0, 2)),
        ([HEAD, SMALL, LARGE], (1, -1.0, 1, 0), (1.0, 5)),
        ([HEAD, SMALL, LARGE], (1, 0.0, 1, 0), (0.0, 12)),
        ([HEAD, SMALL, LARGE], (2, 0.5, 1, 0), (0.5, 6)),
        ([SMALL], (1, 1 / 3, 1, 0), (1 / 3, 3)),
        ([HEAD, SMALL, LARGE], (4, 2.0, 1, 0), (2.0, 2)),
        ([HEAD, SMALL, LARGE], (1, -1.0, 1, 3), (1.0, 3)),
        ([HEAD, SMALL, LARGE], (2, 1.0, 2, 0), (1.0, 2)),
        ([SMALL, LARGE], (4, 1.0, 2, 0), (1.0, 1)),
        ([{"CPU": 2.0, DRIVER: 1000.0}], (1, 0.0, 2, 0), (0.0, 1)),
        ([{"CPU": 5.0}], (1, 0.0, 2, 0), (0.0, 2)),
        ([SMALL, SMALL], (3, 0.0, 2, 0), (0.0, 1)),
        ([LARGE, {"CPU": 1.0, "GPU": 4.0}], (6, 2.0, 1, 0), (2.0, 1)),
    ],
)
def test_what_fits(monkeypatch, machines, asked, expected):
    """Worked out by hand; a machine that is gone counts for nothing."""
    on(monkeypatch, *machines, dead=[LARGE])
    assert fitted(*asked)[:2] == expected


@pytest.mark.parametrize(
    ("machines", "asked", "message"),
    [
        ([{"CPU": 2.0}], (4, 0.0, 1, 0), "a trial needs 4 CPU (4), but the cluster has 2"),
        ([{"CPU": 2.0}], (1, 1.0, 1, 0), "a trial needs 1 GPU (1), but the cluster has 0"),
        ([SMALL], (1, 1.0, 2, 0), "a trial needs 2 GPU (2 workers x 1), but the cluster has 1"),
        ([{"CPU": 2.0}], (1, 0.0, 2, 0), "a trial needs 2.01 CPU (2 workers x 1), but the cluster has 2"),
        ([SMALL, SMALL], (8, 0.0, 1, 0), "needs 1 x 8 CPUs and 0 GPUs on one machine, but the machines of the cluster"),
        ([{"CPU": 7.0}, {"CPU": 2.0}], (4, 0.0, 2, 0), "needs 2 x 4 CPUs and 0 GPUs on one machine, but"),
        ([SMALL, LARGE], (1, 1.0, 1, 6), "6 trials at once do not fit: the cluster has room for 5"),
        ([HEAD], (1, 1.0, 1, 0), "a trial needs 1 CPU (1), but the cluster has 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch, machines, asked, message):
    on(monkeypatch, *machines)
    with pytest.raises(Shortage) as refusal:
        fitted(*asked)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_cluster_that_grows_is_waited_for(monkeypatch):
    """It may have no machine at all yet; what it has beyond the trials named is used."""
    on(monkeypatch, HEAD)
    assert fitted(4, 1.0, 1, 0, growing=8)[:2] == (1.0, 8)
    assert fitted(4, 0.5, 1, 3, growing=8)[:2] == (0.5, 3)
    assert fitted(4, 1.0, 4, 0, growing=2)[:2] == (1.0, 2)
    with pytest.raises(Shortage, match="9 trials at once do not fit: the cluster has room for 8"):
        fitted(4, 1.0, 1, 9, growing=8)
    on(monkeypatch, HEAD, LARGE)
    assert fitted(1, -1.0, 1, 0, growing=2)[:2] == (1.0, 4)
    assert fitted(1, -1.0, 1, 0, growing=6)[:2] == (1.0, 6)


def test_a_machine_that_is_gone(monkeypatch):
    """Known to Ray, or not yet: then it does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"here": here.getsockname()[1], "silent": other.getsockname()[1], "known": here.getsockname()[1]}
        nodes = [
            {"NodeID": name, "Alive": name != "known", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in ports.items()
        ]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        other.close()
        assert [gone(name) for name in ("here", "silent", "known", "never there")] == [False, True, True, True]


def test_a_cluster_without_machines_cannot_say_whether_it_will_have_gpus(monkeypatch):
    on(monkeypatch, HEAD)
    with pytest.raises(Shortage, match="say how many GPUs a trial needs"):
        fitted(4, -1.0, 1, 0, growing=8)


@pytest.mark.slow
def test_two_machines_of_a_real_cluster(left_alone):
    """A head that only steers, and two machines; more than the larger one holds does not fit, whatever the sum."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "resources": {DRIVER: 10}})
    try:
        cluster.add_node(num_cpus=2, num_gpus=1)
        cluster.add_node(num_cpus=3, num_gpus=2)
        connect(cluster.address, dashboard=False)
        assert fitted(1, -1.0, 1, 0)[:2] == (1.0, 3)
        assert fitted(2, 0.0, 1, 0)[:2] == (0.0, 2)
        assert fitted(1, 0.5, 2, 0)[:2] == (0.5, 2)
        with pytest.raises(Shortage, match="on one machine, but the machines of the cluster hold 0"):
            fitted(4, 0.0, 1, 0)
        with pytest.raises(Shortage, match="a trial needs 4 GPU"):
            fitted(1, 4.0, 1, 0)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(
    ("peak", "total", "cpus", "trials"),
    [(10, 24, 8, 2), (1, 80, 8, 8), (30, 24, 8, 1), (24, 24, 8, 1), (9, 100, 16, 10), (2, 24, 1, 1), (11, 24, 8, 1)],
)
def test_share_of_a_gpu(peak, total, cpus, trials):
    assert share_of_gpu(peak * 2**30, total * 2**30, cpus) == 1 / trials


def test_shares_fill_a_gpu_but_not_the_last_tenth_of_its_memory():
    drawn = random.Random(0)
    for _ in range(200):
        peak, total, cpus = drawn.randint(1, 90), drawn.randint(100, 1000), drawn.randint(1, 12)
        trials = round(1 / share_of_gpu(peak, total, cpus))
        assert 10 * trials * peak <= 9 * total and trials <= cpus
        assert trials == cpus or 10 * (trials + 1) * peak > 9 * total


@pytest.mark.parametrize("sizes", [(0, 24, 8), (10, 0, 8), (10, 24, 0)])
def test_a_share_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="must be positive"):
        share_of_gpu(*sizes)


JOIN = """
import ray
from rayltr.machines import connect, fitted
connect({address!r}, dashboard=False)
print(fitted(1, 0.0, 1, 0))
print(ray.get(ray.remote(lambda: "worked").remote()))
"""


@pytest.fixture
def guarded(tmp_path):
    """A cluster that asks for a token, and the environment of those who have it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    ray_command = str(Path(sys.executable).with_name("ray"))
    subprocess.run([ray_command, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    short = tempfile.mkdtemp()  # the names of Ray's sockets must not be long
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false",
             "--node-ip-address=127.0.0.1", f"--temp-dir={short}"]  # fmt: skip
    head = subprocess.Popen([ray_command, *words], env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not answers("127.0.0.1", port):
        assert head.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    yield f"127.0.0.1:{port}", env
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(60)
    shutil.rmtree(short, ignore_errors=True)


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_lets_in_who_has_it(guarded, tmp_path):
    address, env = guarded
    joining = [sys.executable, "-c", JOIN.format(address=address)]
    inside = subprocess.run(joining, env=env, capture_output=True, text=True, timeout=180)
    assert inside.stdout.split("\n")[:2] == ["(0.0, 1, 1)", "worked"], inside.stderr
    (tmp_path / "stranger").mkdir()
    stranger = {**env, "HOME": str(tmp_path / "stranger"), "RAY_AUTH_MODE": "disabled"}
    outside = subprocess.run(joining, env=stranger, capture_output=True, text=True, timeout=180)
    assert outside.returncode and "worked" not in outside.stdout
    assert f"Shortage: no Ray cluster answers at {address}" in outside.stderr
