"""The search itself: the agenda says what to run, Ray Tune runs it, the records keep it, Optuna is told.

What survives a crash is ours, not Tune's: the Optuna journal (what was proposed), the records (what was found) and the
store (what was trained).  A resumed search is a new Tune run over what is left to do.  So is one that was interrupted:
told once, it waits until the running trials have stored the epoch that they are in; told twice, it ends at once.
"""

import atexit
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from rayltr import claims, finalists, records, sampling
from rayltr.actor import run_trial
from rayltr.agenda import Job
from rayltr.boards import Boards
from rayltr.choice import repeated
from rayltr.command import INTERRUPTED, PROBE
from rayltr.ledger import Ledger, Settings, death
from rayltr.machines import DRIVER, OWN_CPU, Shortage, answers, connect, fitted, gone, hasten, release, share_of_gpu
from rayltr.progress import Progress
from rayltr.proposals import Proposals, ended, mend
from rayltr.studies import find, jobs, rungs
from rayltr.unsealing import sealed, unseal

__all__ = ["Settings", "Shortage", "search"]

LOOK_S = 0.3
"""Seconds between two looks whether Ray is still there, once a search is to end."""


class Agent(Searcher):
    """The ledger as Tune sees a search algorithm."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def suggest(self, trial_id: str) -> Any:
        job = self.ledger.begin(trial_id)
        if job is None:
            return Searcher.FINISHED if self.ledger.over() else None
        beside = [config(other) for other in self.ledger.beside(trial_id)]
        return {**config(job), "beside": beside} if beside else config(job)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if not error:  # else the listener is called next, and told why
            self.ledger.end(trial_id)
        if group := self.ledger.reserved.pop(trial_id, ""):
            release(group)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: see the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its records")


def config(job: Job) -> dict[str, Any]:
    return {"trial": job.trial, "rung": job.rung, "seed": job.seed, "params": job.params, "broken": job.broken}


class Leaving(tune.Stopper):
    """The ledger as Tune sees what may end a whole search."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.ledger.left()


class Listener(tune.Callback):
    """The ledger as Tune sees a callback."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self.ledger.heard(trial.trial_id, result)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        node, said = self.ledger.nodes.get(trial.trial_id), ""
        with suppress(OSError, TypeError):  # a full disk has no room for the file, either
            said = Path(trial.error_file).read_text(errors="replace")
        self.ledger.end(trial.trial_id, death(said), lost=node is not None and gone(node))


def search(settings: Settings, progress: Progress) -> bool:
    """Runs what is left of a search, then opens the test split once for what it would ship.

    Returns whether it came to its end or was interrupted; records and store hold what was found.  Raises `Shortage`
    when the machines cannot hold a single trial.
    """
    try:
        return searched(settings, progress)
    except KeyboardInterrupt:
        atexit.register(at_once)  # what is registered last is called first
        return False


def at_once() -> None:
    """Ends without Ray's farewell, which takes seconds, or minutes where Ray is gone; its processes end with this."""
    sys.stdout.flush()
    os._exit(INTERRUPTED)


def searched(settings: Settings, progress: Progress) -> bool:
    """`search`, which may be interrupted."""
    seed, space, info = settings.plan.seed or 0, find(settings.plan.study), records.read_run(settings.run)
    starts = sampling.starts(space, settings.trials, settings.start)
    # where trials are added to a run, it keeps the design that it began with
    designed = info.get("designed") or sampling.designed(settings.trials, len(starts))
    laid_out = {"random": 0, "quasi": settings.trials}.get(settings.sampler, designed)
    records.write_run(settings.run, {**info, "designed": laid_out})
    mend(Path(settings.run) / "optuna.journal")
    proposals = Proposals(
        settings.run,
        rungs(settings.plan, settings.fidelity),
        settings.objectives,
        settings.trials,
        sampling.sampler(settings.sampler, seed, designed),
        starts,
    )
    if settings.warm:
        progress.say(sampling.warm(proposals.study, space, settings.warm, settings.objectives, same(settings.run)))
    agenda = proposals.agenda(settings.fidelity, settings.ahead)
    later = partial(finalists.left, proposals, seed, settings.finalists, settings.ablate)
    if agenda.finished() and not later() and not sealed(settings.run):
        return True
    settings = placed(settings, progress)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    over = sum(not repeated(row) and row["number"] < settings.trials for row in ended(settings.run))
    left = max(jobs(settings.trials, settings.fidelity) - over, 1)
    first = Ledger(settings, proposals, agenda, progress, Boards(settings.run))
    if not trained(settings, first, left):
        return False
    more = later()
    if settings.ablate and records.read_run(settings.run)["ablation"] == []:
        plain = finalists.finalists(ended(settings.run), 1)  # none where no trial has a result
        why = "the best trial is plain, of the control arm" if plain else "no trial was completed with a result"
        progress.say(f"nothing to ablate: {why}")
    final = Ledger(settings, proposals, finalists.agenda(more), progress, Boards(settings.run))
    if more and (first.leaving or not trained(settings, final, len(more))):
        return False
    unseal(settings, progress)
    shutil.rmtree(Path(settings.run) / "ray", ignore_errors=True)
    return True


def placed(settings: Settings, progress: Progress) -> Settings:
    """Starts or joins Ray, and settles how many trials run at once, with which share of a GPU."""
    if dashboard := connect(settings.address, settings.dashboard):
        progress.say(f"Ray dashboard: http://{dashboard} (if it asks for a token: ray get-auth-token)")
    if settings.gpus == PROBE:
        settings = replace(settings, gpus=measured(settings, progress))
    growing = settings.concurrent if settings.address else 0
    gpus, concurrent, now = fitted(settings.cpus, settings.gpus, settings.workers, settings.concurrent, growing)
    if not now:
        need = f"{settings.workers} x {settings.cpus} CPUs and {gpus:g} GPUs"
        progress.say(f"no machine of the cluster holds a trial yet, which needs {need}; waiting for it to grow (if it "
                     "cannot: Ctrl-C)")  # fmt: skip
    if settings.workers > 1:
        hasten()
    return replace(settings, gpus=gpus, concurrent=concurrent)


def trained(settings: Settings, ledger: Ledger, left: int) -> bool:
    """Runs an agenda; whether it came to its end.  left: how many trials are to be announced."""
    progress = ledger.progress
    if ledger.agenda.finished():
        return True
    progress.begin(left, min(left, settings.concurrent * settings.stack))
    claims.go_on(settings.run)
    signal.signal(signal.SIGINT, lambda *_: leave(ledger, progress))
    try:
        tuner(settings, ledger).fit()
    finally:
        signal.signal(signal.SIGINT, (lambda *_: at_once()) if ledger.leaving else signal.default_int_handler)
        progress.close()
        ledger.boards.close()
        claims.go_on(settings.run)
    if ledger.error:
        if not isinstance(ledger.error, OSError):
            raise ledger.error
        progress.say(f"the run cannot be written: {ledger.error}")
    return not ledger.error and not ledger.open and ledger.agenda.finished()


def measured(settings: Settings, progress: Progress) -> float:
    """The share of a GPU that a trial needs: all that it can have where a look at its memory fails; -1 without GPUs."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    if not machines or settings.workers > 1:
        return -1.0
    fitted(settings.cpus, 1.0, settings.workers, 0)  # else the look would wait for ever
    try:
        peak, total = ray.get(ray.remote(num_cpus=settings.cpus, num_gpus=1)(probed).remote(settings))
    except Exception as error:  # it is the trials that must say what is wrong with a recipe
        progress.say(f"the memory of a trial cannot be measured: {str(error).strip().splitlines()[-1]}")
        return 1.0
    cpus = min(int(have.get("CPU", 0) / have["GPU"]) // settings.cpus for have in machines)
    share = share_of_gpu(peak * settings.stack, total, max(cpus, 1))
    used = f"{peak / 2**30:.1f} of {total / 2**30:.0f} GiB"
    progress.say(f"a trial takes up to {used} of a GPU: {round(1 / share)} trials share one")
    return share


def probed(settings: Settings) -> tuple[int, int]:
    """Runs where a GPU is; see `rayltr.rehearsal.peak`."""
    return import_module("rayltr.rehearsal").peak(settings)  # torch stays out of the driver


def leave(ledger: Ledger, progress: Progress) -> None:
    """What the first interrupt does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ledger.leave()
    progress.say("stopping: running trials finish and store their epoch (again: stop at once)")
    Thread(target=deserted, args=(progress, ray.get_runtime_context().gcs_address), daemon=True).start()


def deserted(progress: Progress, address: str) -> None:
    """Ends the search when Ray is gone: a signal to all processes (of a batch system, say) ends Ray's, too.

    Nothing runs any more then, and Ray itself would look for them for a minute.
    """
    host, _, port = address.rpartition(":")
    while answers(host, int(port)):
        if progress.over.wait(LOOK_S):
            return
    if not progress.over.is_set():
        progress.close()
        progress.say(progress.farewell)
        at_once()


def same(run: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a run's results, by its run.json, can stand beside those of this one: same data, same lengths."""
    what = ("source", "epochs", "fidelity", "batch", "backbone", "precision")
    mine = records.read_run(run)["settled"]
    return lambda info: all(info.get("settled", {}).get(name) == mine.get(name) for name in what)


def tuner(settings: Settings, ledger: Ledger) -> tune.Tuner:
    need: Any = {"CPU": settings.cpus, "GPU": settings.gpus}
    if settings.workers > 1:  # the trial itself only waits for its workers, and must not take a CPU that they need
        need = tune.PlacementGroupFactory([{DRIVER: 1} if DRIVER in ray.cluster_resources() else {"CPU": OWN_CPU}])
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, settings=settings), need),
        tune_config=tune.TuneConfig(
            search_alg=Agent(ledger),
            num_samples=-1,  # the agenda knows when it is over
            max_concurrent_trials=settings.concurrent,
            reuse_actors=True,
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=settings.run,
            verbose=0,
            callbacks=[Listener(ledger)],
            stop=Leaving(ledger),
            failure_config=tune.FailureConfig(max_failures=0),  # a trial that dies is repeated by the agenda
        ),
    )
