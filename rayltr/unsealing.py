"""The test split: opened once, for the trials that a search would ship and its finalists; each opening is counted."""

from importlib import import_module
from typing import Any

import ray

from rayltr import command, records
from rayltr.choice import best, finalist
from rayltr.ledger import Settings
from rayltr.progress import Progress


def sealed(run: str) -> list[dict[str, Any]]:
    """The trials that would be shipped, and finalists, that have not met the test split yet."""
    rows = records.read_trials(run).to_pylist()
    chosen = {row["trial"]: dict(row) for row in best(rows).values()}
    chosen |= {row["trial"]: row for row in rows if finalist(row) and row["state"] == "complete"}
    return [row for row in chosen.values() if not row["predictions_test"]]


def unseal(settings: Settings, progress: Progress) -> None:
    """Opens the test split for the chosen trials, once, and notes it in the records and in run.json."""
    rows = sealed(settings.run)
    if not rows:
        return
    remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(tested)
    command.count_opening(settings.run, [row["trial"] for row in rows])
    asked = [(row, remote.remote(settings, row["recipe"])) for row in rows]
    for row, answer in asked:
        try:
            path, metrics = ray.get(answer)
        except Exception as error:  # one failure must not cost the others their scores
            progress.say(f"no test scores for trial {row['trial']}: {str(error).strip().splitlines()[-1]}")
            continue
        scores = {f"m.test.{name}": value for name, value in metrics.items()}
        records.append_trial(settings.run, {**row, "predictions_test": path, **scores})


def tested(settings: Settings, recipe: str) -> tuple[str, dict[str, float]]:
    """Runs where the trials ran; see `rayltr.trial.for_test`."""
    return import_module("rayltr.trial").for_test(settings, recipe)  # torch stays out of the driver
