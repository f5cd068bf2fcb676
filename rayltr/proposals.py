"""The recipes of a search: what Optuna is asked and told, kept in the run's journal, as jobs of the agenda."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from rayltr import records
from rayltr.agenda import Agenda, Job, Values
from rayltr.choice import repeated, rung_of
from rayltr.files import MACHINE, save
from rayltr.objectives import BALANCED, OBJECTIVES, direction, values
from rayltr.sampling import RESULT, number
from rayltr.spec import parse
from rayltr.studies import CONTROL, EVERY, FIDELITIES, STUDY, Plan, find

ENTRY = b'{"op_code":'
"""How every entry of Optuna's journal begins."""


class Proposals:
    """The proposals of a run, each a point of the study's space under a number of its own.

    plans: one for each rung, the last at full length.  starts: points of the study to propose first.  What a crash
    left open, or took from the records, is proposed again, before anything else, under its number and with what was
    drawn for it.
    """

    def __init__(
        self,
        run: str,
        plans: Sequence[Plan],
        objectives: Sequence[str],
        trials: int,
        sampler: optuna.samplers.BaseSampler,
        starts: Sequence[Mapping[str, Any]] = (),
    ):
        self.run, self.plans, self.objectives, self.trials = run, plans, tuple(objectives), trials
        self.space = find(plans[-1].study)
        self.study = journal(run, self.objectives)
        self.study.sampler = sampler
        rows = {row["number"]: row for row in ended(run) if not rung_of(row) and not repeated(row)}
        self._reopen(rows)
        over = {own: one for own, one in self.own().items() if own < trials and one.state.is_finished()}
        self.lost = [(own, one) for own, one in over.items() if own not in rows]
        begun = "numbers" in self.study.user_attrs  # said when all are laid down, so a crash in between shows
        known = len(self.own())
        for position, point in enumerate(laid_out(trials, () if begun else starts)):
            if position >= known:
                self.study.enqueue_trial(point)
        self.study.set_user_attr("numbers", max(trials, known))

    def own(self) -> dict[int, FrozenTrial]:
        """The proposals by their numbers; what was learnt from other runs has none."""
        return dict(enumerate(one for one in self.study.get_trials(deepcopy=False) if RESULT not in one.user_attrs))

    def drawn(self) -> dict[int, dict[str, Any]]:
        """The parameters of every proposal as Optuna has them: the records hold no None, and mixed kinds as text."""
        return {number: one.params for number, one in self.own().items()}

    def params(self, row: Mapping[str, Any], drawn: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        """The parameters of a row of the trials table; `drawn`, where it has them, keeps their kinds."""
        recorded = {key[2:]: value for key, value in row.items() if key.startswith("p.") and value is not None}
        return drawn.get(row["number"]) or recorded

    def _reopen(self, told: Mapping[int, Mapping[str, Any]]) -> None:
        """Tells the study what the records know already, and lets it ask again what they do not."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            row = told.get(number(self.study, trial))
            if row is None:
                self.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            else:
                self.tell(trial.number, reached(row, self.objectives))

    def agenda(self, fidelity: str, ahead: int) -> Agenda:
        """The agenda of what is left to do."""
        made = Agenda(self.propose, self.promoted, FIDELITIES[fidelity], ahead)
        made.asked_all = not self.waiting()
        drawn = self.drawn()
        for row in (row for row in ended(self.run) if not repeated(row)):
            params = self.params(row, drawn)
            stage = parse(json.loads(row["recipe"])) if row["recipe"] else None
            job, found = Job(row["number"], rung_of(row), params, stage=stage), reached(row, self.objectives)
            made.ended(job, self.judged(found), self.merit(row))
        return made

    def waiting(self) -> bool:
        """Whether there are proposals to be made; a run may have more than are asked for now."""
        queued = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))  # Optuna takes the first one
        return bool(self.lost or queued and number(self.study, queued[0]) < self.trials)

    def propose(self) -> Job | None:
        """The next proposal, or None when all have been made.  Raises OSError when the journal cannot be written."""
        if not self.waiting():
            return None
        if self.lost:
            own, known = self.lost.pop(0)
            return self.job(own, 0, known.params, known.number)
        trial = self.study.ask()
        broken = None
        try:
            self.space(trial)
        except ValueError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in MACHINE:  # met while drawing: no verdict on the recipe
                raise cause from None
            broken = str(error)
        return self.job(number(self.study, trial), 0, trial.params, trial.number, broken)

    def promoted(self, job: Job) -> Job:
        return self.job(job.number, job.rung + 1, job.params, job.asked)

    def job(self, own: int, rung: int, params: dict[str, Any], asked: int, broken: str | None = None) -> Job:
        """A job with its chain; a point that is no valid chain becomes a broken one."""
        try:
            stage = None if broken else self.plans[rung].stage(self.space, params)
        except ValueError as error:
            stage, broken = None, str(error)
        return Job(own, rung, params, asked, stage, broken)

    def tell(self, asked: int, found: Sequence[float] | None) -> None:
        """Tells Optuna what a proposal reached on the lowest rung: its objectives, or that it failed; once."""
        if found is None:
            self.study.tell(asked, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self.study.tell(asked, list(found), skip_if_finished=True)

    def merit(self, row: Mapping[str, Any]) -> float | None:
        """By what else a row of the trials table may be promoted: the area of many x few, where balance is wanted."""
        value = row.get("m.val.area") if self.objectives[0] in BALANCED and len(self.objectives) == 1 else None
        return value if value is not None and math.isfinite(value) else None

    def judged(self, found: Sequence[float] | None) -> Values | None:
        """Objectives as the agenda compares them: less is better."""
        if found is None:
            return None
        signs = [1 if direction(name) == "min" else -1 for name in self.objectives]
        return tuple(sign * value for sign, value in zip(signs, found, strict=True))


def journal(run: str, objectives: Sequence[str]) -> optuna.Study:
    """The Optuna study in the journal of a run."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # TPE's `group`, which we want
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(Path(run) / "optuna.journal"))),
        study_name="rayltr",
        directions=["minimize" if direction(name) == "min" else "maximize" for name in objectives],
        load_if_exists=True,
    )


def mend(path: Path) -> None:
    """Takes from Optuna's journal what a crash or a full disk may have left: torn lines, and its lock.

    Optuna would wait for the lock, and read nothing behind a torn line.  What was written behind half a line, on the
    same one, stays; the records tell the study again what is missing.
    """
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [entry for found in lines if (entry := mended(found))]
        if whole != lines:
            save(path, b"".join(whole))
    Path(f"{path}.lock").unlink(missing_ok=True)


def mended(found: bytes) -> bytes:
    """The last whole entry in a line of the journal; nothing where there is none."""
    entry = found[max(found.rfind(ENTRY), 0) :]
    try:
        return entry if found.endswith(b"\n") and isinstance(json.loads(entry), dict) else b""
    except ValueError:
        return b""


def laid_out(trials: int, starts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is fixed of every proposal: its arm, and of the first ones of the study the point itself."""
    first = iter(starts)
    return [{"arm": CONTROL} if number % EVERY == 0 else {"arm": STUDY, **next(first, {})} for number in range(trials)]


def ended(run: str) -> list[dict[str, Any]]:
    """The rows of trials that are over; interrupted ones are not."""
    return [row for row in records.read_trials(run).to_pylist() if row["state"] in ("complete", "failed", "pruned")]


def reached(row: Mapping[str, Any], objectives: Sequence[str]) -> list[float] | None:
    """The objectives of a row of the trials table, or None if it failed or one of them is no number."""
    metrics = {name: row.get(f"m.val.{name}") for name in OBJECTIVES.values()}
    return measured(metrics, objectives) if row["state"] == "complete" else None


def measured(metrics: Mapping[str, Any], objectives: Sequence[str]) -> list[float] | None:
    """The objectives among the metrics of a trial, or None if one of them is no finite number."""
    found = list(values(metrics, tuple(objectives)).values())
    return found if all(isinstance(value, (int, float)) and math.isfinite(value) for value in found) else None
