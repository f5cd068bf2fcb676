"""What runs in a process of Ray Tune's: a trial of a search, or several as one."""

import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import ray
from ray import tune

from rayltr.files import MACHINE
from rayltr.ledger import Settings
from rayltr.machines import Lost


def run_trial(config: dict[str, Any], settings: Settings) -> None:
    """Runs one trial in a Tune actor, or in a Train run of its own when it has several workers.

    What the configuration has under `beside` are more trials, which are trained with it (see `rayltr.stacked`).
    """
    node = ray.get_runtime_context().get_node_id()
    jobs = [config, *config.get("beside", ())]
    if len(jobs) == 1:
        return attempt(config, settings, node, None, tune.report)
    # torch belongs in the actor: importing it in the driver would delay every start by seconds
    stacked = import_module("rayltr.stacked")
    for record in stacked.bundle([partial(attempt, job, settings, node) for job in jobs]):
        tune.report(record)


def attempt(job: dict[str, Any], settings: Settings, node: str, lane: Any, report: Callable[[Any], None]) -> None:
    """Never raises for what goes wrong inside the trial: the error is the trial's result.  lane: beside others."""
    more = {"lane": lane} if lane else {}
    facts = {"trial": job["trial"], "final": 0, "started": time.time(), "node": node}
    last: dict[str, Any] = {}

    def told(record: dict[str, Any]) -> None:
        last.update(record)
        report({**facts, **record})

    report(facts)
    try:
        if job["broken"]:
            raise ValueError(job["broken"])
        place = import_module("rayltr.cluster" if settings.workers > 1 else "rayltr.trial")
        found = place.for_search(settings.at(job["rung"], job["seed"]), job["trial"], job["params"], told, **more)
    except Exception as error:
        what = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        what["trained"] = last.get("trained", 0)  # others may go on from these epochs
        report({**facts, "final": 1, "state": verdict(error, settings.run), **what})
    else:
        report({**facts, **found, "final": 1, "state": "complete"})


def verdict(error: Exception, run: str) -> str:
    """What an error in a trial means: what the machine did, to the files of the run above all, is none on the recipe.

    An OSError otherwise is the recipe's: its code looks for a file that is not there, say, and will again.
    """
    if isinstance(error, Lost):
        return "lost"
    if isinstance(error, (InterruptedError, ChildProcessError)):
        return "interrupted"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "memory"
    if isinstance(error, OSError) and (error.errno in MACHINE or f"{run}/" in f"{error.filename} {error}"):
        return "interrupted"
    return "failed"
