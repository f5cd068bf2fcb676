"""The search itself: Optuna proposes points of a study's space, Ray Tune runs them as trials, records keep them.

What survives a crash is ours, not Tune's: the Optuna journal (what was asked), the records (what was found) and the
store (what was trained).  A resumed search is a new Tune run over what is left to do.
"""

import json
import logging
import math
import os
import shutil
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rayltr import records
from rayltr.choice import best
from rayltr.objectives import direction, values
from rayltr.progress import Progress
from rayltr.proposals import SAMPLERS, Space, StudySearch, asked_study, ended
from rayltr.spec import chain, dump
from rayltr.studies import Plan, find

DRIVER = "trial_driver"
"""The custom resource that trials of several workers run on, where the cluster has it (see cluster.yaml)."""
OWN_CPU = 0.01


class Shortage(ValueError):
    """More is asked for than the machines have."""


@dataclass(frozen=True)
class Settings:
    """A whole search: what (plan, objectives, sampler, trials) and where (the rest).  Plain values, so that it pickles.

    cpus, gpus: per worker process.  concurrent: trials at once, 0 for as many as fit.
    """

    run: str
    plan: Plan
    trials: int
    objectives: tuple[str, ...]
    sampler: str
    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    concurrent: int = 0
    address: str | None = None
    dashboard: bool = True
    snapshot_s: float = 10.0


def run_trial(config: dict[str, Any], settings: Settings) -> None:
    """Runs one trial in a Tune actor, or in a Train run of its own when it has several workers.

    Never raises for what goes wrong inside the trial: the error is the trial's result.
    """
    blank = dict.fromkeys(settings.objectives, math.nan)
    facts = {"number": config["number"], "final": 0, "started": time.time(), **blank}
    tune.report(facts)
    try:
        if "broken" in config:
            raise ValueError(config["broken"])
        # torch belongs in the actor: importing it in the driver would delay every start by seconds
        place = "rayltr.cluster" if settings.workers > 1 else "rayltr.trial"
        found = import_module(place).for_search(
            settings, drawn(config), lambda record: tune.report({**facts, **record})
        )
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        # what the machine did is no verdict on the recipe: such a trial is asked again
        state = "interrupted" if isinstance(error, OSError) else "failed"
        tune.report({**facts, "final": 1, "state": state, **failed})
        return
    metrics = found.pop("metrics")
    tune.report({**facts, **found, **values(metrics, settings.objectives), "metrics": metrics, "final": 1,
                 "state": "complete"})  # fmt: skip


class Recorder(tune.Callback):
    """Writes a trial's records before the sampler is told of it, and shows progress."""

    def __init__(self, settings: Settings, progress: Progress):
        self.settings, self.progress = settings, progress
        self.error: OSError | None = None

    def written(self, row: dict[str, Any], epochs: list[dict[str, Any]]) -> None:
        """Records a trial.  A disk that is full ends the search, but in order: what was found is kept."""
        try:
            records.append_epochs(self.settings.run, [{"trial": row["trial"], **epoch} for epoch in epochs])
            records.append_trial(self.settings.run, row)
        except OSError as error:
            self.error = error
            os.kill(os.getpid(), signal.SIGINT)
            return
        self.progress.ended(row)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if not result["final"]:
            self.progress.moved(result)
            return
        self.written(trial_row(self.settings, trial.config, result), result.get("epochs", []))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The process of a trial died, more often than is retried: out of memory, most likely."""
        error = "the process of the trial died (out of memory, or killed)"
        row = trial_row(self.settings, trial.config, {"state": "failed", "error": error, "started": time.time()})
        self.written(row, [])


def drawn(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a trial: its Tune configuration without our own constants."""
    return {key: value for key, value in config.items() if key not in ("number", "broken")}


def trial_row(settings: Settings, config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    study = find(settings.plan.study)
    stage = None if "broken" in config else settings.plan.stage(study, drawn(config))
    metrics = {f"m.val.{name}": value for name, value in result.get("metrics", {}).items()}
    errors = result.get("traceback") or result.get("error")
    return {
        "study": study.name,
        "trial": f"{config['number']:04d}",
        "number": config["number"],
        "state": result["state"],
        "address": result.get("address"),
        "seed": settings.plan.seed,
        "classes": result.get("classes"),
        "epochs_asked": sum(own.epochs for own in chain(stage)) if stage else 0,
        "epochs_trained": result.get("trained", 0),
        "wall_s": result.get("wall_s"),
        "objective": result.get(settings.objectives[0]) if result["state"] == "complete" else None,
        "predictions_val": result.get("predictions"),
        "error": errors,
        "recipe": json.dumps(dump(stage)) if stage else None,
        "started": datetime.fromtimestamp(result["started"], UTC),
        "ended": datetime.now(UTC),
        **{f"p.{name}": value for name, value in drawn(config).items()},
        **metrics,
    }


def search(settings: Settings, progress: Progress) -> bool:
    """Runs what is left of a search, then opens the test split once for what it would ship.

    Returns whether all its trials ended; records and store hold what was found.  Raises `Shortage` when the machines
    cannot hold a single trial.
    """
    study = asked_study(settings.run, settings.objectives, settings.trials)
    left = settings.trials - len(ended(settings.run))
    if left <= 0 and not sealed(settings.run):
        return True
    if dashboard := connect(settings):
        progress.say(f"Ray dashboard: http://{dashboard} (if it asks for a token: ray get-auth-token)")
    settings = fitted(settings)
    if left > 0:
        several, modes = len(settings.objectives) > 1, [direction(name) for name in settings.objectives]
        searcher = StudySearch(
            Space(settings.plan),
            metric=list(settings.objectives) if several else settings.objectives[0],
            mode=modes if several else modes[0],
            # a resumed search draws anew: the state of the sampler's random numbers is not kept
            sampler=SAMPLERS[settings.sampler]((settings.plan.seed or 0) + len(study.trials)),
            storage=study._storage,
            study_name=study.study_name,
        )
        recorder = Recorder(settings, progress)
        progress.begin(left, settings.concurrent)
        try:
            tuner(settings, searcher, left, recorder).fit()
        finally:
            progress.close()
        if recorder.error:
            raise recorder.error
    done = len(ended(settings.run)) >= settings.trials
    if done:
        unseal(settings, progress)
        shutil.rmtree(Path(settings.run) / "ray", ignore_errors=True)
    return done


def sealed(run: str) -> list[dict[str, Any]]:
    """The trials that would be shipped and have not met the test split yet."""
    chosen = {row["trial"]: dict(row) for row in best(records.read_trials(run).to_pylist()).values()}
    return [row for row in chosen.values() if not row["predictions_test"]]


def unseal(settings: Settings, progress: Progress) -> None:
    """Opens the test split for the chosen trials, once, and notes it in the records and in run.json."""
    rows = sealed(settings.run)
    if not rows:
        return
    remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(tested)
    asked = [(row, remote.remote(settings, row["recipe"])) for row in rows]
    opened = []
    for row, answer in asked:
        try:
            path, metrics = ray.get(answer)
        except Exception as error:  # one failure must not cost the others their scores
            progress.say(f"no test scores for trial {row['trial']}: {str(error).strip().splitlines()[-1]}")
            continue
        scores = {f"m.test.{name}": value for name, value in metrics.items()}
        records.append_trial(settings.run, {**row, "predictions_test": path, **scores})
        opened.append(row["trial"])
    info = records.read_run(settings.run)
    opening = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "trials": opened}
    records.write_run(settings.run, {**info, "openings": [*info["openings"], opening]})


def tested(settings: Settings, recipe: str) -> tuple[str, dict[str, float]]:
    """Runs where the trials ran; see `rayltr.trial.for_test`."""
    return import_module("rayltr.trial").for_test(settings, recipe)  # torch stays out of the driver


def connect(settings: Settings) -> str:
    """Starts Ray on this machine, or joins the cluster at an address; the address of its dashboard, if it has one."""
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.address:
        try:
            context = ray.init(address=settings.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise Shortage(f"no Ray cluster answers at {settings.address}: {error}") from error
    else:
        context = ray.init(address="local", include_dashboard=settings.dashboard, resources={DRIVER: 1000}, **quiet)
    logging.getLogger("ray").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))  # Tune saves and returns on SIGINT
    return context.dashboard_url or ""


def fitted(settings: Settings) -> Settings:
    """The settings with as many trials at once as fit.  Raises `Shortage`, with the numbers, when none does."""
    have = ray.cluster_resources()
    gpus = settings.gpus if settings.gpus >= 0 else float(have.get("GPU", 0) > 0)
    own = OWN_CPU if settings.workers > 1 and DRIVER not in have else 0
    need = {"CPU": settings.cpus * settings.workers + own, "GPU": gpus * settings.workers}
    for name, amount in need.items():
        if amount > have.get(name, 0):
            per = f"{settings.workers} workers x " if settings.workers > 1 else ""
            raise Shortage(
                f"a trial needs {amount:g} {name} ({per}{settings.cpus if name == 'CPU' else gpus:g}), "
                f"but the cluster has {have.get(name, 0):g}"
            )
    one = {"CPU": settings.cpus, "GPU": gpus}
    places = sum(room(node["Resources"], one) for node in ray.nodes() if node["Alive"])
    fits = min(places // settings.workers, int(have["CPU"] / need["CPU"] + 1e-9))
    if fits < 1:
        raise Shortage(f"no machine of the cluster has {settings.cpus} CPUs and {gpus:g} GPUs for a process")
    if settings.concurrent > fits:
        raise Shortage(f"{settings.concurrent} trials at once do not fit: the cluster has room for {fits}")
    return Settings(**{**vars(settings), "gpus": gpus, "concurrent": settings.concurrent or fits})


def room(have: Mapping[str, float], one: Mapping[str, float]) -> int:
    """How many processes that need `one` a machine holds; fractions of a GPU add up to it in spite of rounding."""
    return min(int(have.get(name, 0) / amount + 1e-9) for name, amount in one.items() if amount)


def tuner(settings: Settings, searcher: StudySearch, left: int, recorder: Recorder) -> tune.Tuner:
    one = settings.workers == 1
    need: Any = {"CPU": settings.cpus, "GPU": settings.gpus}
    if not one:  # the trial itself only waits for its workers, and must not take a CPU that they need
        need = tune.PlacementGroupFactory([{DRIVER: 1} if DRIVER in ray.cluster_resources() else {"CPU": OWN_CPU}])
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, settings=settings), need),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=left,
            max_concurrent_trials=min(settings.concurrent, left),
            reuse_actors=one,
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=settings.run,
            verbose=0,
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
