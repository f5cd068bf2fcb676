"""How many epochs the search saves against random search at full length, played on recorded trainings.

`python -m benchmarks.search record` trains every point of `benchmarks/recorded_space.py` on long-tailed digits, at
full length and on the shorter rungs, and keeps what was found in `tests/data/recorded_search.parquet`.
`python -m benchmarks.search` plays searches on that table: agenda, proposals, samplers and fidelities are the real
ones, only the training is looked up.  The exit code is 1 when the default search needs more than a third of the epochs
of random search, in the mean over the seeds, for the objective or for the head x tail area.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, count
from math import ceil
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.pareto import hypervolume
from benchmarks.recorded_space import points
from rayltr import metrics, records, sampling, studies
from rayltr.agenda import Agenda, Job
from rayltr.interface import Resources
from rayltr.proposals import Proposals
from rayltr.spec import RandomTrial
from rayltr.store import Store
from rayltr.studies import CONTROL, EVERY, FIDELITIES, STUDY, Plan, Study, rungs
from rayltr.trial import run

HERE = Path(__file__).parent
TABLE = HERE.parent / "tests" / "data" / "recorded_search.parquet"
PLAN = Plan(str(HERE / "recorded_space.py"), epochs=54, precision="fp32", seed=0)
RECORDED = "halving"
"""The fidelity with the most rungs: the lengths of all others are among its own."""
OBJECTIVE = ("balanced_nll",)
LIMIT = 1 / 3
SEEDS_APART = 100_000
TIED = 1e-9
"""Areas are sums, so equal ones differ in the last digits."""

SEARCHES = {
    "tpe, schedules": ("tpe", "schedules"),
    "tpe, halving": ("tpe", "halving"),
    "tpe, none": ("tpe", "none"),
    "random, schedules": ("random", "schedules"),
    "quasi, schedules": ("quasi", "schedules"),
    "random, none": ("random", "none"),
}
"""Sampler and fidelity of every search that is played; the first is the default of long searches."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a training reached on validation.

    objective: class-balanced NLL in nats at the fitted tau and temperature.  error: balanced error there, in [0, 1].
    curve: accuracy on many and few [K, 2] at the fitted temperature and every tau of `metrics.TAUS`.
    """

    objective: float
    error: float
    curve: NDArray[np.float64]


Table = Mapping[tuple[str, int], Found]
"""By `key` of the parameters and epochs."""


def key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def everything(study: Study) -> list[dict[str, Any]]:
    """The points of both arms."""
    return [*points(study.space, {"arm": STUDY}), *points(study.control, {"arm": CONTROL})]


def record(path: Path, store: Store) -> None:
    """Trains what the store does not hold yet, and writes the table."""
    study, rows, trained, began = studies.find(PLAN.study), list[dict[str, Any]](), 0, time.monotonic()
    whole = everything(study)
    for position, params in enumerate(whole, 1):
        for plan in rungs(PLAN, RECORDED):
            result = run(plan.stage(study, params), store, resources=Resources(threads=1))
            trained += result.trained
            rows.append({"params": key(params), "epochs": plan.epochs, **measured(result.predictions, result.metrics)})
        left = (time.monotonic() - began) / position * (len(whole) - position) / 60
        print(f"{position} of {len(whole)} points, {trained} epochs trained, about {left:.0f} min left", flush=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    records.save(path, sink.getvalue().to_pybytes())


def measured(predictions: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """The columns of the table that one training gives."""
    seen = records.read_predictions(predictions)
    logits, groups = next(iter(seen.logits.values())), metrics.groups(seen.counts)[0]
    curve = metrics.sweep(logits, seen.target, seen.counts, groups, scores["temperature"])
    return {
        "objective": scores["fitted_nll"],
        "balanced_error": 1 - scores["fitted_balanced"],
        **{name: curve[name].tolist() for name in ("many", "few")},
    }


def read(path: Path = TABLE) -> dict[tuple[str, int], Found]:
    rows = pq.ParquetFile(path).read().to_pylist()
    return {
        (row["params"], row["epochs"]): Found(
            row["objective"], row["balanced_error"], np.stack([row["many"], row["few"]], 1)
        )
        for row in rows
    }


@dataclass(frozen=True, eq=False)
class Step:
    """A job that has ended.

    asked: epochs of all jobs that had begun by then, this one included; trained: of these, what was not stored.
    whole: whether it was trained at full length.
    """

    asked: int
    trained: int
    whole: bool
    found: Found


def play(
    table: Table, plan: Plan, sampler: str, fidelity: str, trials: int, seed: int, concurrent: int = 1
) -> Iterator[Step]:
    """A whole search on a table, as `rayltr search` would run it with its arms, its design and its promotions."""
    plans = rungs(plan, fidelity)
    drawn = sampling.sampler(sampler, seed, sampling.designed(trials))
    with TemporaryDirectory() as folder:
        proposals = Proposals(folder, plans, OBJECTIVE, trials, drawn)

        def end(job: Job) -> Found:
            found = table[key(job.params), plans[job.rung].epochs or 0]
            if not job.rung:
                proposals.tell(job.asked, [found.objective])
            return found

        yield from steps(proposals.agenda(fidelity, 0), end, len(plans), concurrent)


def steps(agenda: Agenda, end: Callable[[Job], Found], length: int, concurrent: int) -> Iterator[Step]:
    """Runs an agenda on a clock of trained epochs; `end` gives what a job found, `length` is the number of rungs."""
    asked = trained = clock = 0
    stored, order = dict[str, int](), count()
    events: list[tuple[int, int, int, Job]] = []
    while True:
        while len(agenda.running) < concurrent and (job := agenda.next()):
            asked += sum(epochs for _, _, epochs in job.stages)
            trained += sum(new := fresh(job, stored))
            for position, done in enumerate(accumulate(new), 1):
                heappush(events, (clock + done, next(order), position, job))
        if not events:
            return
        clock, _, position, job = heappop(events)
        if position < len(job.stages):
            agenda.moved(job.trial, position)
            continue
        found = end(job)
        agenda.ended(job, (found.objective,))
        yield Step(asked, trained, job.rung == length - 1, found)


def fresh(job: Job, stored: dict[str, int]) -> list[int]:
    """The epochs of each stage of a job that no job before has trained; `stored` notes the epoch reached by line."""
    new = []
    for line, address, epochs in job.stages:
        end = int(address.rpartition("@")[2])
        new.append(max(end - max(stored.get(line, 0), end - epochs), 0))
        stored[line] = max(stored.get(line, 0), end)
    return new


def objective(found: Sequence[Found]) -> float:
    """How good the best of them is; more is better."""
    return -min(one.objective for one in found)


def area(found: Sequence[Found]) -> float:
    """The area of many x few, from (0, 0), that they cover together over all tau."""
    return hypervolume(np.concatenate([one.curve for one in found]))


MEASURES = {"objective": objective, "area": area}


def random_search(table: Table, plan: Plan, trials: int, seed: int) -> list[Step]:
    """Full-length trainings of points drawn from the study's space alone: no control arm, no design."""
    study = studies.find(plan.study)

    def drawn(number: int) -> Job:
        trial = RandomTrial(seed * SEEDS_APART + number)
        study.space(trial)
        params = {"arm": STUDY, **trial.asked}
        return Job(number, 0, params, number, plan.stage(study, params))

    jobs = map(drawn, range(trials))
    agenda = Agenda(lambda: next(jobs, None))
    return [*steps(agenda, lambda job: table[key(job.params), plan.epochs or 0], 1, 1)]


def reach(log: Iterable[Step], goals: Mapping[str, float]) -> tuple[dict[str, Step], Step]:
    """The step at which full-length trainings had reached each goal (absent: never), and the last one looked at."""
    met, whole, step = dict[str, Step](), list[Found](), None
    for step in log:
        whole += [step.found] if step.whole else []
        if step.whole:
            now = {name: step for name, goal in goals.items() if MEASURES[name](whole) >= goal - TIED}
            met = {**now, **met}
        if len(met) == len(goals):
            break
    assert step is not None
    return met, step


def cost(plan: Plan, trials: int, fidelity: str) -> int:
    """Epochs asked by a whole search; its arms promote each for itself."""
    lengths = [own.epochs or 0 for own in rungs(plan, fidelity)]
    arms, total = [ceil(trials / EVERY), trials - ceil(trials / EVERY)], 0
    for length, block in zip(lengths, (*FIDELITIES[fidelity], 1), strict=True):
        total += length * sum(arms)
        arms = [ceil(count / block) for count in arms]
    return total


def filling(plan: Plan, fidelity: str, epochs: int) -> int:
    """How many proposals a search needs to cost at least so many epochs."""
    return next(trials for trials in count(1) if cost(plan, trials, fidelity) >= epochs)


def shares(
    table: Table, plan: Plan, search: tuple[str, str], baselines: Sequence[Sequence[Step]], concurrent: int
) -> dict[str, list[tuple[float, float, bool]]]:
    """For each measure and each random search: epochs asked and trained as shares of its own, and whether it was met.

    A search is as large as the random search; what it does not meet counts as all of its epochs.
    """
    found: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in MEASURES}
    for seed, baseline in enumerate(baselines):
        last = baseline[-1]
        goals = {name: measure([step.found for step in baseline]) for name, measure in MEASURES.items()}
        log = play(table, plan, *search, filling(plan, search[1], last.asked), seed, concurrent)
        met, end = reach(log, goals)
        for name in MEASURES:
            step = met.get(name, end)
            found[name].append((step.asked / last.asked, step.trained / last.trained, name in met))
    return found


def line(name: str, found: Mapping[str, Sequence[tuple[float, float, bool]]]) -> str:
    cells = []
    for rows in found.values():
        asked, trained = ([row[column] for row in rows] for column in (0, 1))
        spread = stdev(asked) / len(asked) ** 0.5
        cells.append(f"{fmean(asked):8.3f} ± {spread:.3f}{fmean(trained):9.3f}{sum(not row[2] for row in rows):7}")
    return f"{name:20}" + "   ".join(cells)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.search", description=__doc__.split("\n")[0])
    made.add_argument("action", nargs="?", choices=("compare", "record"), default="compare", help="default: compare")
    made.add_argument("--table", type=Path, default=TABLE, help="the recorded table (default: tests/data/...)")
    made.add_argument("--store", default="runs/recorded_search", help="record: trained stages (default: %(default)s)")
    made.add_argument("--trials", type=int, default=60, help="of each random search (default: %(default)s)")
    made.add_argument("--seeds", type=int, default=20, help="searches of each kind (default: %(default)s)")
    made.add_argument("--concurrent", type=int, default=1, help="trainings at once (default: %(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.action == "record":
        record(options.table, Store(options.store))
        return 0
    table = read(options.table)
    baselines = [random_search(table, PLAN, options.trials, seed) for seed in range(options.seeds)]
    last = [baseline[-1] for baseline in baselines]
    print(f"random search: {options.trials} trials of {PLAN.epochs} epochs = {last[0].asked} epochs asked, "
          f"{fmean(step.trained for step in last):.0f} trained; {options.seeds} seeds")  # fmt: skip
    print("epochs a search needs to reach its final objective (NLL) and head x tail area, as shares of that")
    print(f"{'':20}" + "   ".join(f"{name:>8} ± s.e.  trained  never" for name in MEASURES))
    needed = {}
    for name, search in SEARCHES.items():
        needed[name] = shares(table, PLAN, search, baselines, options.concurrent)
        print(line(name, needed[name]), flush=True)
    default = next(iter(needed.values()))
    return int(any(fmean(row[0] for row in rows) > LIMIT for rows in default.values()))


if __name__ == "__main__":
    sys.exit(main())
