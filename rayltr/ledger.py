"""From a job to its record: what a search does when a trial begins, reports, ends or dies."""

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rayltr import claims, records
from rayltr.agenda import Agenda, Job
from rayltr.boards import Boards
from rayltr.progress import Progress
from rayltr.proposals import Proposals, reached
from rayltr.spec import chain, dump
from rayltr.studies import FIDELITIES, Plan, find, rungs

LOSSES = 3
"""So many machines may be lost under a trial before it comes under suspicion."""
UNJUDGED = ("memory", "interrupted", "lost")
"""How a trial ends that says nothing of its recipe yet."""


@dataclass(frozen=True)
class Settings:
    """A whole search: what (plan to fidelity) and where (the rest).  Plain values, so that it pickles.

    trials: proposals in all.  start: presets that are proposed first.  warm: folders of other runs to learn from.
    ahead: proposals drawn in advance to begin with what is trained already.  finalists: recipes that are trained again
    with other seeds at the end.  ablate: whether the best recipe is trained with each of its choices set back.
    cpus, gpus: per worker process.  concurrent: trials at once, 0 for as many as fit; each of them may be up to `stack`
    trials that are trained as one.  compile: whether networks are compiled before they are trained.
    """

    run: str
    plan: Plan
    trials: int
    objectives: tuple[str, ...]
    sampler: str
    fidelity: str = "none"
    start: tuple[str, ...] | None = None
    warm: tuple[str, ...] = ()
    ahead: int = 0
    finalists: int = 0
    ablate: bool = False
    workers: int = 1
    stack: int = 1
    compile: bool = False
    cpus: int = 1
    gpus: float = 0.0
    concurrent: int = 0
    address: str | None = None
    dashboard: bool = True
    snapshot_s: float = 10.0

    def at(self, rung: int, seed: int = 0) -> "Settings":
        """The settings of the trials of a rung, with a seed that much beyond the search's."""
        plan = rungs(self.plan, self.fidelity)[rung]
        return replace(self, plan=replace(plan, seed=(plan.seed or 0) + seed))


@dataclass
class Ledger:
    """Follows every trial of a search from its beginning to its record.

    A trial whose process died, or that ran out of memory, is run once more when nothing else runs; one that the
    machine interrupted (a full disk) is run once more too and, if that fails, left `open` for a resumed search.  One
    that lost its machine simply goes on elsewhere.

    jobs: what runs under each of Tune's identifiers; several only where trials are trained as one.
    nodes: the machines of the running trials, by Tune's identifiers; a trial that has not begun has none yet.
    reserved: what Ray holds for the workers of trials that have several.
    leaving: the search was told to stop, and its trials are storing what they have.  error: why no more can be
    written, a full disk perhaps, which ends the search, but in order: what was found is kept.
    """

    settings: Settings
    proposals: Proposals
    agenda: Agenda
    progress: Progress
    boards: Boards
    jobs: dict[str, list[Job]] = field(default_factory=dict)
    finals: dict[str, dict[str, Any]] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    reserved: dict[str, str] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)
    leaving: bool = False
    error: Exception | None = None
    open: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher and callbacks, but a search is resumed from its records."""
        return {}

    def begin(self, trial_id: str) -> Job | None:
        """The job to run under an identifier of Tune's, or None when it has to wait or nothing is left."""
        job = self.next()
        if job is not None:
            self.jobs[trial_id] = [job]
        return job

    def beside(self, trial_id: str) -> list[Job]:
        """More jobs for the process of the one that just began, to be trained as one with it."""
        jobs = self.jobs[trial_id]
        while jobs[0].stage and len(jobs) < self.settings.stack and (job := self.next(jobs[0])):
            jobs.append(job)
        return jobs[1:]

    def next(self, like: Job | None = None) -> Job | None:
        try:
            return None if self.leaving else self.agenda.next(like)
        except OSError as error:
            self.broken(error)
            return None

    def heard(self, trial_id: str, result: dict[str, Any]) -> None:
        """A report of a running trial."""
        self.nodes[trial_id] = result["node"]
        if result["final"]:
            jobs = self.jobs.get(trial_id, [])
            if len(jobs) < 2:
                self.finals[trial_id] = result
                return
            job = next(job for job in jobs if job.trial == result["trial"])
            jobs.remove(job)  # its process goes on with others
            return self.concluded(job, result)
        if "reserved" in result:
            self.reserved[trial_id] = result["reserved"]
            if "restarted" in result:
                self.progress.say(f"  {result['trial']} lost a worker; its workers go on from the last snapshot")
            return
        self.agenda.moved(result["trial"], result.get("stage", 0))
        self.progress.moved(result)
        self.boards.epoch(result)

    def leave(self) -> None:
        """Begins nothing more, and lets the running trials store what they have."""
        self.leaving = True
        claims.stop(self.settings.run)

    def left(self) -> bool:
        """Whether the search was told to stop and nothing is lost if that is done now."""
        return self.leaving and not self.jobs.keys() & self.nodes.keys()

    def over(self) -> bool:
        """Whether nothing runs, and nothing is left to do or will be begun."""
        return self.agenda.finished() or self.leaving and not self.jobs

    def end(self, trial_id: str, died: dict[str, Any] | None = None, lost: bool = False) -> None:
        """A trial has ended, or its process has `died` (see `death`), perhaps because the machine was `lost`."""
        jobs = self.jobs.pop(trial_id, [])
        self.nodes.pop(trial_id, None)
        final = self.finals.pop(trial_id, death(""))
        for job in jobs:
            self.concluded(job, {"started": time.time(), **(died or final)}, lost)

    def concluded(self, job: Job, result: dict[str, Any], lost: bool = False) -> None:
        try:
            self.settled(job, result, lost)
        except Exception as error:  # Tune would swallow it, and wait for this job for ever
            self.agenda.dropped(job)
            self.broken(error)

    def settled(self, job: Job, result: dict[str, Any], lost: bool) -> None:
        """Repeats a trial, leaves it open, or records it."""
        if self.leaving and result["state"] in UNJUDGED:
            self.open = True
            return self.agenda.dropped(job)
        lost = lost or result["state"] == "lost"
        self.losses[job.trial] += lost
        if lost and self.losses[job.trial] <= LOSSES:
            self.progress.say(f"  {job.trial} is run again: its machine was lost")
            return self.agenda.repeat(job, alone=job.again)
        if result["state"] in UNJUDGED and not job.again:
            self.progress.say(f"  {job.trial} is run again, alone: {result['error']}")
            self.agenda.repeat(job)
            return
        state = "failed" if result["state"] in ("memory", "lost") else result["state"]
        row = trial_row(self.settings, job, {**result, "state": state})
        records.append_epochs(self.settings.run, [{"trial": job.trial, **epoch} for epoch in result.get("epochs", [])])
        records.append_trial(self.settings.run, row)
        self.progress.ended(row)
        self.boards.ended(row)
        if state == "interrupted":
            self.open = True
            return self.agenda.dropped(job)
        found = reached(row, self.settings.objectives)
        self.agenda.ended(job, self.proposals.judged(found), self.proposals.merit(row))
        if not job.rung and not job.seed:
            self.proposals.tell(job.asked, found)

    def broken(self, error: Exception) -> None:
        """Ends the search, as an interrupt would, when no more can be written."""
        self.error = self.error or error
        if not self.leaving:
            os.kill(os.getpid(), signal.SIGINT)


def death(said: str) -> dict[str, Any]:
    """The result of a trial whose process is gone, from what Ray says of it: killed, or an error before the trial."""
    errors = re.findall(r"^\w[\w.]*Error\b.*", said, re.MULTILINE)  # the last one is what it ended by
    error = errors[-1] if errors else "the process of the trial died (killed, or out of memory)"
    return {"state": "memory", "error": error, "traceback": f"{said}\n{error}".strip()}


def trial_row(settings: Settings, job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {f"m.val.{name}": value for name, value in result.get("metrics", {}).items()}
    asked = sum(own.epochs for own in chain(job.stage)) if job.stage else 0
    row = {
        "study": find(settings.plan.study).name,
        "trial": job.trial,
        "number": job.number,
        "state": result["state"],
        "address": result.get("address"),
        "seed": (settings.plan.seed or 0) + job.seed,
        "classes": result.get("classes"),
        "epochs_asked": asked,
        "epochs_trained": result.get("trained", 0),
        "epochs_resumed": result.get("resumed", 0),
        "share": 1.0
        if job.rung == len(FIDELITIES[settings.fidelity])
        else asked / (settings.plan.epochs or asked or 1),
        "again": job.again,
        "wall_s": result.get("wall_s"),
        "predictions_val": result.get("predictions"),
        "error": result.get("traceback") or result.get("error"),
        "recipe": json.dumps(dump(job.stage)) if job.stage else None,
        "started": datetime.fromtimestamp(result["started"], UTC),
        "ended": datetime.now(UTC),
        **{f"p.{name}": value for name, value in job.params.items()},
        **metrics,
    }
    found = reached(row, settings.objectives)
    return {**row, "objective": found[0] if found else None}
