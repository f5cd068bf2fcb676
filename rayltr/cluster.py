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

import torch
from ray import train
from ray.train.torch import TorchTrainer, get_device
from ray.util.placement_group import get_current_placement_group
from ray.util.queue import Empty, Queue

from rayltr.interface import Diverged

POLL_S = 0.5
RESERVED = "reserved"
"""The key of the first worker's first word: the name of what Ray holds for the workers of the trial."""


def loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs; the first one's result is the run's.

    What ends all workers alike is a result, too: an error would make Ray Train start them again.
    """
    device = get_device()
    if device.type == "cuda":  # every worker sees all GPUs of its machine
        torch.cuda.set_device(device)
    first = train.get_context().get_world_rank() == 0
    report = config["queue"].put if first else ignored
    report({RESERVED: reserved()})
    try:
        place = import_module("rayltr.trial")  # the process that only waits for the workers need not load it
        found = place.for_search(config["settings"], config["name"], config["params"], report)
    except (Diverged, InterruptedError) as error:
        error.add_note(traceback.format_exc())  # a traceback does not travel
        found = {"error": error}
    return found if first else None


def reserved() -> str:
    """The placement group of this process, as hex digits."""
    group = get_current_placement_group()
    return group.id.hex() if group else ""


def ignored(record: dict[str, Any]) -> None:
    pass


def for_search(
    settings: Any, name: str, params: dict[str, Any], report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A trial of a search on `settings.workers` workers, as plain data.  Raises what the workers raised.

    Epochs are relayed through a queue of our own: Ray's `TuneReportCallback` can wait for ever when the driver is
    slow while the run ends.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the poll delays the start and end of a run
    queue = Queue(actor_options={"num_cpus": 0})
    each = {"CPU": settings.cpus, **({"GPU": settings.gpus} if settings.gpus else {})}
    trainer = TorchTrainer(
        loop,  # type: ignore[arg-type]
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
    found = relayed(trainer, queue, report)
    if "error" in found:
        raise found["error"]
    return found


def relayed(trainer: TorchTrainer, queue: Queue, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The value that the first worker returned; what it put into the queue meanwhile goes to `report`."""
    outcome: dict[str, Any] = {}
    begun = 0

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
                continue
            if RESERVED in record:
                begun += 1
                record |= {"restarted": begun - 1} if begun > 1 else {}
            report(record)
    finally:
        queue.shutdown()
    if "error" in outcome:
        raise meant(outcome["error"]) from outcome["error"]
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
