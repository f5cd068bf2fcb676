"""What Optuna sees of a search: the space, the journal of all that was asked, and what it is told."""

import math
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from rayltr import records
from rayltr.objectives import OBJECTIVES, direction, values
from rayltr.studies import CONTROL, STUDY, Plan, find

SAMPLERS = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
}


class Space:
    """What Optuna is asked for: a point of either arm, checked before it is run.  Picklable by its path."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __call__(self, trial: Any) -> dict[str, Any]:
        """The constants of the trial: its number and, for a point that is no valid chain, what is `broken` there."""
        try:
            self.plan.changed(find(self.plan.study)(trial))
        except ValueError as error:
            return {"number": trial.number, "broken": str(error)}
        return {"number": trial.number}


class StudySearch(OptunaSearch):
    """OptunaSearch that tells the study the truth: failed and unfinished trials are no results, epochs no values."""

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Values on the way are not told: a truncated schedule says little about a deferred recipe."""

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        asked = self._ot_trials.get(trial_id)
        if asked is None or trial_id in self._completed_trials:
            return
        names = self.metric if isinstance(self.metric, list) else [self.metric]
        found = [(result or {}).get(name) for name in names]
        good = bool(result and result.get("final")) and all(
            isinstance(value, (int, float)) and math.isfinite(value) for value in found
        )
        super().on_trial_complete(trial_id, result if good else None, error=not good)
        if result and result.get("state") == "interrupted":
            self._ot_study.enqueue_trial(asked.params)  # type: ignore[attr-defined]


def ended(run: str) -> list[dict[str, Any]]:
    return [row for row in records.read_trials(run).to_pylist() if row["state"] in ("complete", "failed", "pruned")]


def asked_study(run: str, objectives: tuple[str, ...], trials: int) -> optuna.Study:
    """The Optuna study of a run: its journal, in which the trials that a crash left open are asked again.

    Which arm each trial has is laid down from the start (see `arms`); the sampler fills the rest.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # TPE's `group`, which we want
    storage = JournalStorage(JournalFileBackend(str(Path(run) / "optuna.journal")))
    study = optuna.create_study(
        storage=storage,
        study_name="rayltr",
        directions=["minimize" if direction(name) == "min" else "maximize" for name in objectives],
        load_if_exists=True,
    )
    known = {row["number"]: row for row in ended(run)}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        told = known.get(trial.number)
        if told and told["state"] == "complete":
            metrics = {name: told[f"m.val.{name}"] for name in OBJECTIVES.values() if f"m.val.{name}" in told}
            study.tell(trial.number, list(values(metrics, objectives).values()))
            continue
        if told:
            study.tell(trial.number, state=TrialState.FAIL)
        else:  # asked again under its number, with what was drawn for it, before any other
            storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    for arm in arms(trials)[study.user_attrs.get("arms", 0) :]:
        study.enqueue_trial({"arm": arm})
    study.set_user_attr("arms", max(trials, study.user_attrs.get("arms", 0)))
    return study


def arms(trials: int) -> list[str]:
    """The arm of each trial, as enqueued: the first and then every fifth is the control's."""
    return [CONTROL if number % 5 == 0 else STUDY for number in range(trials)]
