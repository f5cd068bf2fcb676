"""What Ray costs a search: `python -m benchmarks.overhead`.

A search of trivial trials, one at a time, beside the same recipes run one after the other in one process.  Counted is
what comes after the start: the seconds from the end of the first trial to the end of the last one, for each of the
others.  Then trials of a chain on two workers, one at a time: the seconds from a proposal (in the search's journal) to
the first call of its loss, for the first trial, which waits for processes that the others find, and for the slowest of
the others; and the processes that trained its stages.  The exit code is 1 when the search needs 0.15 s a trial more,
when a first step comes after 15 s, or when a chain took more than one Ray Train run.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayltr import records
from rayltr.interface import Resources
from rayltr.proposals import journal
from rayltr.spec import parse
from rayltr.store import Store
from rayltr.trial import run

PER_TRIAL_S, FIRST_STEP_S = 0.15, 15.0
WORKERS, CHAINS = 2, 3

TRIVIAL = """
from rayltr.spec import Stage, fn


def space(trial):
    lr = trial.suggest_float("lr", 0.001, 0.01)
    return Stage(source=fn("synthetic", classes=3, per_class=8, size=8), epochs=1, optimiser=fn("sgd", lr=lr))


control = space
"""

CHAIN = """
import os
import time
from pathlib import Path

from rayltr.spec import Stage, fn

NOTES = Path({notes!r})


def noted(logits, target, counts, *, stage=1):
    note = NOTES / f"{{os.getpid()}}-{{stage:.0f}}"
    if not note.exists():
        note.write_text(repr(time.time()))
    return -logits.log_softmax(1).gather(1, target[:, None])[:, 0]


def space(trial):
    first = Stage(source=fn("synthetic", classes=3, per_class=8, size=8), epochs=1, loss=fn(noted, stage=1),
                  optimiser=fn("sgd", lr=trial.suggest_float("lr", 0.001, 0.01)))
    second = first.but(init=first, loss=fn(noted, stage=2))
    return second.but(init=second, loss=fn(noted, stage=3))


control = space
"""
STAGES = 3


@dataclass(frozen=True)
class Chain:
    """A trial on several workers: seconds to its first step, and by stage the processes that trained it."""

    first_step_s: float
    processes: dict[str, set[str]]

    @property
    def one_run(self) -> bool:
        """Whether the same processes, one per worker, trained every stage."""
        sets = list(self.processes.values())
        return len(sets) == STAGES and all(len(own) == WORKERS and own == sets[0] for own in sets)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__.split("\n")[0])
    made.add_argument("--trials", type=int, default=30, help="trivial trials (default: 30)")
    return made


def searched(folder: Path, study: str, *words: str) -> Path:
    """The run of a search over a user's study file.  Raises `CalledProcessError` where a trial failed."""
    file = folder / "own_study.py"
    file.write_text(study)
    places = [str(file), f"--storage={folder}", "--name=run", "--no-dashboard", "--concurrent=1"]
    subprocess.run([sys.executable, "-m", "rayltr.search", *places, *words], check=True)
    return folder / "run"


def after_first(ends: Sequence[float]) -> float:
    """Seconds per trial after the first one, from the times at which trials ended."""
    return (max(ends) - min(ends)) / (len(ends) - 1)


def directly(rows: Sequence[dict[str, Any]], folder: Path) -> list[float]:
    """When each recipe ended that was run by the loop itself, with one store as in the search."""
    store, ends = Store(folder), []
    for row in rows:
        run(parse(json.loads(row["recipe"])), store, resources=Resources(threads=1))
        ends.append(time.time())
    return ends


def chained(folder: Path) -> list[Chain]:
    """Runs trials of a chain on workers, one at a time.  Steps before a proposal, of a rehearsal say, do not count."""
    notes = folder / "notes"
    notes.mkdir()
    words = (f"--trials={CHAINS}", f"--epochs={STAGES}", f"--workers={WORKERS}", "--fidelity=none")
    place = searched(folder, CHAIN.format(notes=str(notes)), *words)
    trials = journal(str(place), ("balanced_nll",)).trials
    begun = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start]
    times = {note.name: float(note.read_text()) for note in notes.iterdir()}
    return [steps(times, *between) for between in zip(begun, [*begun[1:], inf], strict=True)]


def steps(notes: dict[str, float], proposed: float, following: float = inf) -> Chain:
    """From the times of the first call of the loss by `process-stage`, and those of the proposal and the next one."""
    later = {name: at for name, at in notes.items() if proposed < at < following}
    processes: dict[str, set[str]] = {}
    for name in later:
        process, stage = name.split("-")
        processes.setdefault(stage, set()).add(process)
    return Chain(min(later.values()) - proposed, processes)


def judged(by_search: float, direct: float, chains: Sequence[Chain]) -> int:
    """Prints both sides; 1 when a limit is broken, else 0."""
    more, (first, *others) = by_search - direct, chains
    slowest, whole = max(chain.first_step_s for chain in others), all(chain.one_run for chain in chains)
    print(f"{'seconds per trivial trial, after the first':50}{by_search:8.3f} by the search{direct:8.3f} directly")
    print(f"{'Ray and the search cost':50}{more:8.3f} s{PER_TRIAL_S:8.3f} allowed{by_search / direct:8.2f} times")
    print(f"{'from a proposal to its first step on 2 workers':50}{slowest:8.3f} s{FIRST_STEP_S:8.3f} allowed")
    print(f"{'the same of the first trial of a search':50}{first.first_step_s:8.3f} s{FIRST_STEP_S:8.3f} allowed")
    print(f"{f'a chain of {STAGES} stages':50}{'one Train run' if whole else 'more than one Train run'}")
    late = max(slowest, first.first_step_s) > FIRST_STEP_S
    return int(more > PER_TRIAL_S or late or not whole)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with TemporaryDirectory(prefix="overhead") as place:
        trivial, chain = Path(place) / "trivial", Path(place) / "chain"
        for folder in (trivial, chain):
            folder.mkdir()
        found = searched(trivial, TRIVIAL, f"--trials={options.trials}", "--epochs=1", "--backbone=resnet20")
        rows = records.read_trials(found).to_pylist()
        by_search = after_first([row["ended"].timestamp() for row in rows])
        direct = after_first(directly(rows, Path(place) / "direct"))
        return judged(by_search, direct, chained(chain))


if __name__ == "__main__":
    sys.exit(main())
