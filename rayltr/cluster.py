"""A chain on several workers: one Ray Train run holds all its stages.  The only importer of `ray.train`.

The workers run the same `rayltr.trial` as a single process; the first one writes the store.  A worker that dies is
replaced by Ray Train, and the chain goes on from the store's last snapshot.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from ray import train
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Empty, Queue

from rayltr import trial

POLL_S = 0.5


def loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs; the first one's result is the run's."""
    device = get_device()
    if device.type == "cuda":  # every worker sees all GPUs of its machine
        torch.cuda.set_device(device)
    first = train.get_context().get_world_rank() == 0
    report = config["queue"].put if first else ignored
    found = trial.for_search(config["settings"], config["params"], report)
    return found if first else None


def ignored(record: dict[str, Any]) -> None:
    pass


def for_search(settings: Any, params: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A trial of a search on `settings.workers` workers, as plain data.  Raises what the workers raised.

    Epochs are relayed through a queue of our own: Ray's `TuneReportCallback` can wait for ever when the driver is
    slow while the run ends.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the poll delays the start and end of a run
    queue = Queue(actor_options={"num_cpus": 0})
    each = {"CPU": settings.cpus, **({"GPU": settings.gpus} if settings.gpus else {})}
    trainer = TorchTrainer(
        loop,  # type: ignore[arg-type]
        train_loop_config={"settings": settings, "params": params, "queue": queue},
        scaling_config=train.ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpus > 0, resources_per_worker=each
        ),
        run_config=train.RunConfig(  # type: ignore[call-arg]
            storage_path=f"{settings.run}/ray/train",
            failure_config=train.FailureConfig(max_failures=1, controller_failure_limit=5),  # type: ignore[call-arg]
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    return relayed(trainer, queue, report)


def relayed(trainer: TorchTrainer, queue: Queue, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The value that the first worker returned; what it put into the queue meanwhile goes to `report`."""
    outcome: dict[str, Any] = {}

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
                report(queue.get(timeout=POLL_S))
            except Empty:
                continue
    finally:
        queue.shutdown()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["found"]
