"""A chain on several workers: one Ray Train run holds all its stages.  The only importer of `ray.train`.

The workers run the same `rayltr.trial` as a single process; the first one writes the store.  A worker that dies is
replaced by Ray Train, and the chain goes on from the store's last snapshot.
"""

import os
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import ray
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import get_current_placement_group
from ray.util.queue import Empty, Queue

from rayltr.claims import told_to_stop
from rayltr.machines import Lost, gone, homes

POLL_S = 0.5
WAIT_S = str(7 * 24 * 3600)
"""So long the workers may wait for machines, which a cluster may still have to get, before that counts as an error."""
UNUSED = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
"""Parts of Ray Train with a process each: for data sets of Ray's, and for what `rayltr.machines.release` does."""
RESERVED = "reserved"
"""The key of the first worker's first word: the name of what Ray holds for the workers of the trial."""


def loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs; the first one's result is the run's.

    What ends all workers alike is a result, too: an error would make Ray Train start them again.
    """
    context, settings = train.get_context(), config["settings"]
    number, host = context.get_world_rank(), ray.util.get_node_ip_address()
    report = ignored if number else config["queue"].put
    report({RESERVED: reserved()})
    # torch takes seconds to load, which the processes that only wait for the workers need not spend
    interface, parallel, trial = (import_module(f"rayltr.{name}") for name in ("interface", "parallel", "trial"))
    kind = "nccl" if settings.gpus else "gloo"
    with parallel.joined(kind, number, settings.workers, host, broadcast_from_rank_zero):
        try:
            found = trial.for_search(settings, config["name"], config["params"], report)
        except (interface.Diverged, InterruptedError) as error:
            error.add_note(traceback.format_exc())  # a traceback does not travel
            found = {"error": error}
    return None if number else found


def reserved() -> str:
    """The placement group of this process, as hex digits."""
    group = get_current_placement_group()
    return group.id.hex() if group else ""


def ignored(record: dict[str, Any]) -> None:
    pass


class Trainer(DataParallelTrainer):
    """Ray Train's, without its parts that are of no use here; each would delay the first step by seconds."""

    def _create_default_callbacks(self) -> list[Any]:
        return [part for part in super()._create_default_callbacks() if type(part).__name__ not in UNUSED]


def for_search(
    settings: Any, name: str, params: dict[str, Any], report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A trial of a search on `settings.workers` workers, as plain data.  Raises what the workers raised.

    Epochs are relayed through a queue of our own: Ray's `TuneReportCallback` can wait for ever when the driver is
    slow while the run ends.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the poll delays the start and end of a run
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WAIT_S)
    queue = Queue(actor_options={"num_cpus": 0})
    each = {"CPU": settings.cpus, **({"GPU": settings.gpus} if settings.gpus else {})}
    trainer = Trainer(
        loop,
        train_loop_config={"settings": settings, "name": name, "params": params, "queue": queue},
        scaling_config=train.ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpus > 0, resources_per_worker=each
        ),
        run_config=train.RunConfig(  # type: ignore[call-arg]
            storage_path=f"{settings.run}/ray/train",
            failure_config=train.FailureConfig(max_failures=1, controller_failure_limit=5),  # type: ignore[call-arg]
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    found = relayed(trainer, queue, report, lambda: told_to_stop(settings.run))
    if "error" in found:
        raise found["error"]
    return found


def relayed(
    trainer: DataParallelTrainer,
    queue: Queue,
    report: Callable[[dict[str, Any]], None],
    leave: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The value that the first worker returned; what it put into the queue meanwhile goes to `report`.

    leave: whether to give up; asked while the workers wait for machines, else they ask themselves.  Raises
    InterruptedError then, `Lost` where a machine of the workers is gone, and otherwise what is `meant`.
    """
    outcome: dict[str, Any] = {}
    begun, nodes = 0, set[str]()

    def fit() -> None:
        try:
            outcome["found"] = trainer.fit().return_value  # type: ignore[attr-defined]
        except Exception as error:
            outcome["error"] = error

    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    try:
        while fitting.is_alive() or not queue.empty():
            try:
                record = queue.get(timeout=POLL_S)
            except Empty:
                if (not begun or any(map(gone, nodes))) and leave():
                    raise InterruptedError("told to stop") from None
                continue
            if RESERVED in record:
                begun, nodes = begun + 1, homes(record[RESERVED])
                record |= {"restarted": begun - 1} if begun > 1 else {}
            report(record)
    finally:
        queue.shutdown()
    if error := outcome.get("error"):
        lost = any(map(gone, nodes))  # whatever the other workers say of it
        raise (Lost(f"a machine of the workers was lost\n{error}") if lost else meant(error)) from error
    return outcome["found"]


def meant(error: Exception) -> Exception:
    """The error of a Train run, so that one can tell what the machines did from what the recipe did."""
    causes = getattr(error, "worker_failures", {}).values()
    if any(hasattr(cause, "health_check_failure") for cause in causes):  # the process is gone
        return MemoryError(f"a worker died twice (killed, or out of memory)\n{error}")
    for cause in causes:
        if isinstance(cause, ChildProcessError):
            return ChildProcessError(str(error))
        if isinstance(cause, OSError):
            return OSError(cause.errno, str(error), cause.filename) if cause.errno else OSError(str(error))
    return error
