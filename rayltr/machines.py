"""The machines a search runs on: Ray on this one alone, closed to the network, or a cluster; how many trials they hold.

Knows nothing of trials but what they need, and nothing of Ray Tune.
"""

import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import ray
from ray._private import ray_constants
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

DRIVER = "trial_driver"
"""The custom resource that trials of several workers run on, where the cluster has it (see cluster.yaml)."""
OWN_CPU = 0.01
USABLE = 90
"""Percent of a GPU's memory that trials may fill together: the rest is for contexts, fragments and other peaks."""

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # Tune's processes have an environment of their own, and cannot be these
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the search has its own: trials store what they have
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # Tune's state of the search is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
READY_S = 10.0
"""So long a search waits at most for its process."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


class Shortage(ValueError):
    """More is asked for than the machines have."""


class Lost(RuntimeError):
    """A machine went, and workers of a trial with it."""


def connect(address: str | None, dashboard: bool) -> str:
    """Starts Ray on this machine, or joins the cluster at an address; the HOST:PORT of its dashboard, "" without one.

    Ray on this machine listens on the loopback address alone, all its processes and the workers of a trial included.

    Raises `Shortage` when no cluster answers at the address, or Ray does not start here.
    """
    os.environ |= ENVIRONMENT
    os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = str(int(dashboard))  # for the dashboard's page of Ray Train
    context = joined(address) if address else started(dashboard)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what becomes of a trial is told by the search itself
    return context.dashboard_url or ""


def joined(address: str) -> Any:
    try:
        return ray.init(address=address, **QUIET)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Shortage(f"no Ray cluster answers at {address}: {error}") from error


def started(dashboard: bool) -> Any:
    # where this is False, as it is by default on a Mac, Ray's own address is the loopback address, and its processes
    # listen there; _node_ip_address="127.0.0.1" would not do: Ray replaces it by the address of the network
    ray_constants.ENABLE_RAY_CLUSTER = False
    for library in ("GLOO", "NCCL"):  # else the workers of a trial talk through the interface of the host's name
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less: nobody reclaims this machine
    begin = partial(ray.init, address="local", include_dashboard=dashboard, resources={DRIVER: 1000}, **QUIET)
    with suppress(Exception):  # Ray has no class of its own for processes that do not come up in time
        return begin()
    ray.shutdown()
    try:
        return begin()
    except Exception as error:
        ray.shutdown()
        raise Shortage(f"Ray does not start on this machine, which may be too busy: {error}") from error


def hasten() -> None:
    """Starts what Ray Train asks for machines, for whose process the first trial of several workers would wait."""
    with suppress(ImportError, AttributeError):  # then Ray Train starts it
        process = import_module(COORDINATOR).get_or_create_autoscaling_coordinator()
        ray.wait([process.__ray_ready__.remote()], timeout=READY_S)


def fitted(cpus: int, gpus: float, workers: int, concurrent: int, growing: int = 0) -> tuple[float, int, int]:
    """(GPUs of each worker, trials at once, those that fit now).  Raises `Shortage`, with the numbers, if none fits.

    cpus, gpus: of each of the `workers` processes of a trial; gpus < 0: one where the cluster has GPUs, else none.
    concurrent: trials at once that were asked for, 0 for as many as fit.

    growing: for a cluster that adds machines when they are wanted, perhaps from none, so many trials at once are
    waited for.  It must be said: an autoscaler keeps to itself how far it may grow, and every machine costs money.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have: Counter[str] = sum(map(Counter, machines), Counter())
    each = gpus if gpus >= 0 else float(have["GPU"] > 0)
    one = {"CPU": cpus, "GPU": each}
    reason = lacking(have, one, workers)
    places = sum(room(machine, one) for machine in machines)
    fits = 0 if reason else min(places // workers, room(have, needed(have, one, workers)))
    if growing and not fits and gpus < 0 and not have["GPU"]:
        raise Shortage("the cluster has no machine for trials yet: say how many GPUs a trial needs (--gpus-per-trial)")
    if not fits and not growing:
        kind = f"{cpus} CPUs and {each:g} GPUs on one machine"
        raise Shortage(reason or f"a trial needs {workers} x {kind}, but the machines of the cluster hold {places}")
    most = max(fits, growing)
    if concurrent > most:
        raise Shortage(f"{concurrent} trials at once do not fit: the cluster has room for {most}")
    return each, concurrent or most, fits


def gone(node: str) -> bool:
    """Whether a machine of the cluster, by its Ray identifier, is no longer there.

    Ray needs many seconds to miss one, while its processes are known to be dead at once; so the machine is asked.
    """
    for own in ray.nodes():
        if own["NodeID"] == node and own["Alive"]:
            return not answers(own["NodeManagerAddress"], own["NodeManagerPort"])
    return True


def release(group: str) -> None:
    """Gives back what a trial held for its workers, a placement group as hex digits, as far as it is not done.

    Ray's own cleaner asks the dashboard, of which there may be none or, beside another Ray on the machine, several.
    """
    remove_placement_group(held(group))


def homes(group: str) -> set[str]:
    """The machines that the workers of a trial were given, by their Ray identifiers.  group: as in `release`."""
    return {*placement_group_table(held(group))["bundles_to_node_id"].values()}


def held(group: str) -> PlacementGroup:
    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group)))


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def needed(have: Mapping[str, float], one: Mapping[str, float], workers: int) -> dict[str, float]:
    """What a trial takes of the whole cluster.  one: what each worker needs.

    A trial of several workers only waits for them: it runs on a machine that is for this, or on a bit of a CPU.
    """
    own = OWN_CPU if workers > 1 and not have.get(DRIVER) else 0
    return {"CPU": one["CPU"] * workers + own, "GPU": one["GPU"] * workers}


def lacking(have: Mapping[str, float], one: Mapping[str, float], workers: int) -> str:
    """What the whole cluster has too little of for one trial, with the numbers; "" where there is enough."""
    per = f"{workers} workers x " if workers > 1 else ""
    for name, amount in needed(have, one, workers).items():
        if amount > have.get(name, 0):
            return f"a trial needs {amount:g} {name} ({per}{one[name]:g}), but the cluster has {have.get(name, 0):g}"
    return ""


def room(have: Mapping[str, float], one: Mapping[str, float]) -> int:
    """How many processes that need `one` a machine holds; fractions of a GPU add up to it in spite of rounding."""
    return min(int(have.get(name, 0) / amount + 1e-9) for name, amount in one.items() if amount)


def share_of_gpu(peak_bytes: int, total_bytes: int, cpus: int) -> float:
    """The fraction of a GPU that a trial needs: 1 / k, where k trials fit into nine tenths of its memory.

    peak_bytes: the most GPU memory that a trial of this size was seen to use; total_bytes: what the GPU has; cpus: CPUs
    of the machine for each of its GPUs, as k trials want one each.  In (0, 1]: a trial too large for a share gets
    the whole.  Raises ValueError for sizes that are not positive.
    """
    if min(peak_bytes, total_bytes, cpus) <= 0:
        raise ValueError(f"peak, total and CPUs must be positive, not {peak_bytes}, {total_bytes}, {cpus}")
    return 1 / max(1, min(USABLE * total_bytes // (100 * peak_bytes), cpus))
