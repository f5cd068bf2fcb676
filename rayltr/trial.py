"""Runs a trial: every stage of its chain from the store, or trained and stored; then its predictions and metrics."""

import errno
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayltr.build import weights
from rayltr.catalogue import complete
from rayltr.claims import end_with_parent, told_to_stop
from rayltr.compiled import Compiled
from rayltr.data import Data, Split, load
from rayltr.evaluate import evaluate, tested
from rayltr.interface import ALONE, Lane, Resources, State
from rayltr.parallel import agreed, all_told, barrier, rank, world
from rayltr.records import read_predictions, write_predictions
from rayltr.spec import Fn, Stage, chain, digest, end, fn, mapped, parents, parse
from rayltr.store import Store
from rayltr.studies import find
from rayltr.train import assembled, facts, predict, train

WAIT_S = 0.5
"""Seconds between two looks at a stage that another trial is making."""


@dataclass
class Result:
    """What a trial found and what it cost.

    metrics: validation metrics by name, `cost_s`, the seconds that training the whole chain takes, and `weights`, how
    many the model keeps.  asked: epochs of the chain; trained: those trained here; resumed: those that interrupted
    attempts at this trial had trained.
    predictions: path of the validation predictions.  epochs: rows for the epoch records.
    """

    address: str
    classes: int
    metrics: dict[str, float]
    asked: int
    trained: int
    resumed: int
    wall_s: float
    predictions: str
    epochs: list[dict[str, Any]] = field(default_factory=list)


def identified(stage: Stage, content: Callable[[Fn], str]) -> Stage:
    """The completed chain as it is named in the store: sources are replaced by the digest of their content."""
    return mapped(complete(stage), lambda own: own.but(source=fn("content", digest=content(own.source))))


class Trial:
    """One chain, one store.  Under several workers each of them runs the same trial; only the first one writes.

    name: by which the store remembers who trained an epoch.  leave: whether to stop after the epoch that is being
    trained: its end is stored then, and `InterruptedError` is raised.
    """

    def __init__(
        self,
        stage: Stage,
        store: Store,
        *,
        resources: Resources | None = None,
        report: Callable[[dict[str, Any]], None] = lambda record: None,
        name: str = "",
        leave: Callable[[], bool] = lambda: False,
    ):
        self.stage, self.store, self.name = complete(stage), store, name
        self.resources, self.report, self.leave = resources or Resources(), report, leave
        self.sources: dict[Fn, Data] = {}
        self.trained, self.names, self.leaving, self.saved = 0, {}, False, time.monotonic()
        for own in chain(self.stage):
            self.names[own] = identified(own, lambda source: self.data(source).digest)

    def data(self, source: Fn) -> Data:
        if source not in self.sources:
            self.sources[source] = load(source)
        return self.sources[source]

    def obtain(self, stage: Stage) -> State:
        """The state at the end of a stage: stored, or trained from the longest stored prefix and stored."""
        if (state := self._stored(stage)) and state.epoch == end(stage):
            return state
        while True:  # the first worker holds the claim for all; the others must not wait inside a collective for long
            claim = self.store.claim(self.names[stage]) if rank() == 0 else None
            if agreed(claim is not None):
                break
            self._ask()
            self.resources.lane.rest(WAIT_S)
        try:
            return self._make(stage)
        finally:
            if claim:
                claim.release()

    def _stored(self, stage: Stage) -> State | None:
        """The longest stored prefix, the same for every worker: the first one reads it, and each its own rows."""
        state = agreed(self.store.longest(self.names[stage]) if rank() == 0 else None)
        return self.store.fetched(state, rank(), world()) if state and state.shards else state

    def _make(self, stage: Stage) -> State:
        begun = self._stored(stage)
        if begun and begun.epoch == end(stage):
            return begun
        given = {
            role: self.obtain(parent) for role, parent in parents(stage).items() if begun is None or role == "teacher"
        }
        self._ask()
        self.saved = time.monotonic()
        state, _ = train(
            stage,
            given,
            data=self.data(stage.source),
            begun=begun,
            resources=self.resources,
            on_epoch=lambda record: self._epoch(stage, record),
            on_snapshot=lambda make: self._snapshot(stage, make),
            splits=(),
        )
        self._put(stage, state)
        return state

    def _epoch(self, stage: Stage, record: dict[str, Any]) -> None:
        self.trained += 1
        position = chain(self.stage).index(stage)
        self.report({**record, "stage": position, "of_epochs": end(stage), "trained": self.trained})
        if self.leaving:
            raise InterruptedError(f"told to stop; stored after epoch {record['epoch']}")

    def _ask(self) -> None:
        """Raises InterruptedError when the trial is to stop."""
        if agreed(self.leave()):
            raise InterruptedError("told to stop")

    def _snapshot(self, stage: Stage, make: Callable[[], State]) -> None:
        """Stores a state on the way, if one is due or will be the last."""
        self.leaving = agreed(self.leave())
        if self.leaving or agreed(time.monotonic() - self.saved > self.resources.snapshot_s):
            self._put(stage, make(), partial=True)
            self.saved = time.monotonic()

    def _put(self, stage: Stage, state: State, *, partial: bool = False) -> None:
        for record in state.history:
            record.setdefault("trial", self.name)
        shards = all_told(self.store.put_rows(self.names[stage], state, rank(), partial=partial))
        if rank() == 0:
            self.store.put(self.names[stage], state, partial=partial, shards=[shard for shard in shards if shard])
        barrier()

    def predictions(self, split: str, part: Split | None = None) -> str:
        """The path of the stored predictions of the trial on a split; made when they are missing or damaged."""
        name, data = self.names[self.stage], self.data(self.stage.source)
        path = self.store.predictions(name, split)
        if agreed(readable(path) if rank() == 0 else None):
            return path
        state = self.obtain(self.stage)
        given = {"teacher": self.obtain(self.stage.teacher)} if self.stage.teacher else {}
        if rank() == 0:
            part = part or getattr(data, split)
            logits = self.logits(state, given, part)
            write_predictions(
                path,
                row=np.arange(len(part), dtype=np.int32),
                target=part.target,
                logits=logits,
                counts=data.counts,
                classes=data.classes,
                split=split,
                digest=data.digest,
            )
        barrier()
        return path

    def logits(self, state: State, given: dict[str, State], part: Split) -> dict[str, np.ndarray]:
        device, stage = self.resources.place(), self.stage
        module, _ = assembled(stage, facts(self.data(stage.source)), given, state, device)
        return predict(module, part, device, stage.precision)

    def run(self) -> Result:
        """Everything of the trial, from what is stored or by training."""
        began, asked = time.monotonic(), sum(own.epochs for own in chain(self.stage))
        path = self.predictions("val")
        found = read_predictions(path)
        scores = evaluate(found.logits, found.target, np.asarray(found.counts))
        size = weights(self.stage, facts(self.data(self.stage.source)))
        return Result(
            address=digest(self.names[self.stage]),
            classes=len(found.counts),
            metrics={**scores, "cost_s": self.cost(), "weights": size},
            asked=asked,
            trained=self.trained,
            resumed=self.before() - self.trained,
            wall_s=time.monotonic() - began,
            predictions=path,
            epochs=self._rows(),
        )

    def cost(self) -> float:
        """The seconds that the epochs of the chain took, whoever trained them."""
        return sum(record["wall_s"] for own in chain(self.stage) for record in self.store.history(self.names[own]))

    def before(self) -> int:
        """The epochs of the chain that attempts at this trial have trained."""
        records = (record for own in chain(self.stage) for record in self.store.history(self.names[own]))
        return sum(record.get("trial") == self.name for record in records)

    def test(self) -> tuple[str, dict[str, float]]:
        """Opens the test split: the path of the predictions and their metrics, corrected as validation says."""
        data = self.data(self.stage.source)
        path = self.predictions("test", data.unseal())
        val, test = read_predictions(self.predictions("val")), read_predictions(path)
        return path, tested(val.logits, val.target, test.logits, test.target, data.counts)

    def _rows(self) -> list[dict[str, Any]]:
        """The training curve of every stage of the chain, as rows of the epoch records."""
        rows = []
        for position, own in enumerate(chain(self.stage)):
            for record in self.store.history(self.names[own]):
                where = {"stage": position, "epoch": record["epoch"], "wall_s": record["wall_s"]}
                for split, values in (("train", record["terms"]), ("measured", record.get("measured", {}))):
                    rows += [{**where, "split": split, "metric": name, "value": v} for name, v in values.items()]
        return rows


def readable(path: str) -> bool:
    try:
        read_predictions(path)
    except (ValueError, OSError):
        return False
    return True


def run(
    stage: Stage,
    store: Store,
    *,
    resources: Resources | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Result:
    """Runs a chain: from the store, or train and store.  `report` gets one record per trained epoch."""
    return Trial(stage, store, resources=resources, report=report).run()


def for_search(
    settings: Any, name: str, params: dict[str, Any], report: Callable[[dict[str, Any]], None], lane: Lane = ALONE
) -> dict[str, Any]:
    """A trial of a search as plain data: the `Result` with its paths relative to the run.  `settings`: the search's."""
    end_with_parent()
    store = opened(settings.run)
    found = Trial(
        settings.plan.stage(find(settings.plan.study), params),
        store,
        resources=Resources(
            threads=settings.cpus, snapshot_s=settings.snapshot_s, lane=Compiled() if settings.compile else lane
        ),
        report=report,
        name=name,
        leave=lambda: told_to_stop(settings.run),
    ).run()
    return {**vars(found), "predictions": inside(found.predictions)}


def for_test(settings: Any, recipe: str) -> tuple[str, dict[str, float]]:
    """Test predictions of a finished trial of a search: their path in the run, and `rayltr.evaluate.tested`.

    recipe: the chain as the records hold it.
    """
    store = opened(settings.run)
    find(settings.plan.study)  # its functions may be part of the recipe
    stage = parse(json.loads(recipe))
    trial = Trial(stage, store, resources=Resources(threads=settings.cpus))
    path, metrics = trial.test()
    return inside(path), metrics


def opened(run: str) -> Store:
    """The store of a run.  Raises OSError on a machine that does not see the run: it would make a store of its own."""
    if not Path(run, "run.json").exists():
        where = f"--storage {Path(run).parent} is not visible on {socket.gethostname()}"
        raise FileNotFoundError(errno.ENOENT, f"{where}: give a path that all machines share", f"{run}/run.json")
    return Store(f"{run}/store")


def inside(path: str) -> str:
    """The path of something in a run's store, relative to the run."""
    return path[path.rindex("/store/") + 1 :]
