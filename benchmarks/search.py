"""How many epochs the search saves against random search at full length, played on recorded trainings.

`python -m benchmarks.search` plays searches on the table of `benchmarks.recording`: agenda, proposals, samplers and
fidelities are the real ones, only the training is looked up.  A search reaches what random search reaches in the end
when the mean over its seeds is as good.  Epochs are told as shares of those of random search, which trains every trial
by itself and in full: those that the search trains, and those that it would without sharing stages.  The exit code is
1 when the default search trains more than a third, for the objective or for the head x tail area.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, count
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from analysis.pareto import hypervolume
from benchmarks.recording import PLAN, TABLE, Found, Table, key, read
from rayltr import sampling, studies
from rayltr.agenda import Agenda, Job
from rayltr.proposals import Proposals
from rayltr.spec import RandomTrial
from rayltr.studies import EVERY, FIDELITIES, STUDY, Plan, rungs

OBJECTIVE = ("balanced_nll",)
LIMIT = 1 / 3
SEEDS_APART = 100_000
TIED = 1e-9
"""Areas are sums, so equal ones differ in the last digits."""
DRAWS, SPREAD = 1000, (0.1, 0.9)
"""Of the bootstrap over seeds: how many, and the quantiles that are told."""

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
        agenda.ended(job, (found.objective,), area([found]))
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


MEASURES: dict[str, Callable[[Sequence[Found]], float]] = {"objective": objective, "area": area}


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


@dataclass(frozen=True, eq=False)
class Course:
    """A search in its full-length trainings, each field [K]: epochs by then, and what they have reached together."""

    asked: NDArray[np.float64]
    trained: NDArray[np.float64]
    reached: dict[str, NDArray[np.float64]]


def course(log: Sequence[Step]) -> Course:
    whole = [step for step in log if step.whole]
    found = [step.found for step in whole]
    so_far = [found[: n + 1] for n in range(len(found))]
    asked, trained = (np.array([getattr(step, name) for step in whole], float) for name in ("asked", "trained"))
    return Course(asked, trained, {name: np.array([own(part) for part in so_far]) for name, own in MEASURES.items()})


def levels(courses: Sequence[Course], epochs: str, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numbers of epochs [T] ("asked" or "trained") and what every course has reached by then [S, T]."""
    spent = [getattr(own, epochs) for own in courses]
    grid = np.unique(np.concatenate(spent))
    at = [np.searchsorted(one, grid, "right") for one in spent]
    return grid, np.stack([np.array([-inf, *own.reached[name]])[i] for own, i in zip(courses, at, strict=True)])


def shares(courses: Sequence[Course], baselines: Sequence[Course], epochs: str, name: str) -> list[float]:
    """What share of the epochs of random search the mean needs to be as good, inf if it never is.

    And its quantiles over draws of the seeds, which the two have in common.
    """
    grid, reached = levels(courses, epochs, name)
    ends = np.array([own.reached[name][-1] for own in baselines])
    rng, found = np.random.default_rng(0), []
    for draw in range(DRAWS + 1):
        chosen = rng.integers(len(ends), size=len(ends)) if draw else np.arange(len(ends))
        there = np.flatnonzero(reached[chosen].mean(0) >= ends[chosen].mean() - TIED)
        found.append(grid[there[0]] / baselines[0].asked[-1] if len(there) else inf)
    return [found[0], *np.quantile(found[1:], SPREAD, method="nearest").tolist()]


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


def line(name: str, courses: Sequence[Course], baselines: Sequence[Course]) -> str:
    cells = []
    for measure in MEASURES:
        for epochs in ("trained", "asked"):
            found = shares(courses, baselines, epochs, measure)
            share, low, high = (f"{own:.2f}" if own < inf else "never" for own in found)
            cells.append(f"{share:>7}{f'[{low}, {high}]':>15}")
    return f"{name:20}" + "".join(cells)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.search", description=__doc__.split("\n")[0])
    made.add_argument("--table", type=Path, default=TABLE, help="the recorded table (default: tests/data/...)")
    made.add_argument("--trials", type=int, default=60, help="of each random search (default: %(default)s)")
    made.add_argument("--seeds", type=int, default=20, help="searches of each kind (default: %(default)s)")
    made.add_argument("--concurrent", type=int, default=1, help="trainings at once (default: %(default)s)")
    made.add_argument("--default", action="store_true", help="play the default search only")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    table, seeds = read(options.table), range(options.seeds)
    baselines = [course(random_search(table, PLAN, options.trials, seed)) for seed in seeds]
    whole = int(baselines[0].asked[-1])
    print(f"random search: {options.trials} trials of {PLAN.epochs} epochs = {whole} epochs; {options.seeds} seeds")
    print("epochs a search needs to reach its final objective (NLL) and head x tail area, as shares of that")
    print(f"{'':20}" + "".join(f"{f'{name}, {how}':>22}" for name in MEASURES for how in ("trained", "not shared")))
    first = None
    for name, (sampler, fidelity) in SEARCHES.items():
        trials = filling(PLAN, fidelity, whole)
        courses = [course([*play(table, PLAN, sampler, fidelity, trials, seed, options.concurrent)]) for seed in seeds]
        print(line(name, courses, baselines), flush=True)
        first = first or courses
        if options.default:
            break
    assert first is not None
    return int(any(shares(first, baselines, "trained", name)[0] > LIMIT for name in MEASURES))


if __name__ == "__main__":
    sys.exit(main())
