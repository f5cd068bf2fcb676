"""`python -m rayltr.prune RUN`: makes the folder of a finished run small.

Weights stay for the trials that a run would ship, alone or as an ensemble, those on its head/tail front and the best
by its objective: the end of their last stage, and of the teacher that it needs to predict.  Records, predictions of
all trials and reports stay, so that everything but the export of the other trials works as before.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs

from analysis import ensembles
from analysis.load import Trial, load
from analysis.pareto import front
from rayltr import claims, command, records
from rayltr.choice import best
from rayltr.objectives import direction
from rayltr.spec import end, line, parse

WEIGHTS = re.compile(r"(\d{6}(\.snapshot)?)(\.rows\d+)?\.(json|safetensors)")
STALE = re.compile(r".*\.[0-9a-f]{32}\.(part|tmp|stale)|\.probe-[0-9a-f]{32}")
"""What a crash leaves of a file that was being written, see `rayltr.records.put` and `rayltr.claims`."""


def parser() -> argparse.ArgumentParser:
    made = command.Parser(
        prog="rayltr prune", description="Make a run small: keep the weights of its best trials only."
    )
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument("--keep", type=int, default=5, metavar="N", help="besides the trials to ship and those on the "
                      "front, keep the N best by the objective (default 5)")  # fmt: skip
    made.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    made.add_argument("--unfinished", action="store_true", help="even if trials of the search are still to be run")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.keep < 0:
        raise ValueError(f"--keep must be at least 0, not {options.keep}")
    run = Path(options.run).absolute()
    info = records.read_run(run)
    with command.locked(run):
        unused(run)
        if not options.unfinished:
            finished(run, info)
        rows = {row["trial"]: row for row in records.read_trials(run).to_pylist()}
        why = reasons(run, rows, options.keep)
        needed = {trial: weights(run, rows[trial]) for trial in why}
        doomed = superfluous(run, {base for bases in needed.values() for base in bases})
        print(kept(why, needed))
        if not doomed:
            print("nothing to remove")
            return 0
        size, what = megabytes(doomed), described(doomed, {last(run, row) for row in rows.values()})
        if not options.dry_run:
            remove(doomed)
    print(f"{'to be removed' if options.dry_run else 'removed'}: {size:.1f} MB ({what})")
    print(
        f"another trial's weights: python -m rayltr.train {options.run} --trial ID trains it again, as a run of its own"
    )
    return 0


def unused(run: Path) -> None:
    """Raises `Refused` while some process, perhaps on another machine, trains a stage of the run."""
    for path in (run / "store").glob("*/claim"):
        held = claims.read(fs.LocalFileSystem(), str(path))
        if held and claims.alive(held):
            raise command.Refused(f"{run} is in use: process {held.get('pid')} on {held.get('host')} trains in it")


def finished(run: Path, info: Mapping[str, Any]) -> None:
    """Raises `Refused` for a search that has not come to its end: what is left of it may begin with what is stored."""
    rows = records.read_trials(run).to_pylist()
    done, asked = len({row["number"] for row in rows if row["state"] != "interrupted"}), info["arguments"].get("trials")
    if done < (asked or 1) or (run / "ray").exists():  # Tune's folder goes when a search has come to its end
        raise command.Refused(
            f"{run} is not finished: its other trials could begin with stages that are stored; go on with --resume "
            "first, or prune it all the same with --unfinished"
        )


def reasons(run: Path, rows: Mapping[str, Mapping[str, Any]], keep: int) -> dict[str, list[str]]:
    """The trials that keep their weights, by id, and why."""
    found = load(run)
    aim = found.info["settled"].get("objectives", ["balanced_nll"])[0]
    why = [(row["trial"], name) for name, row in best(rows.values()).items()]
    why += [(trial, "ensemble") for trial in together(run)]
    why += [(trial, "front") for trial in on_front(found.finished)]
    why += [(trial, f"top {keep} by {aim}") for trial in leading(found.finished, direction(aim))[:keep]]
    return {trial: [reason for other, reason in why if other == trial] for trial, _ in sorted(why)}


def together(run: Path) -> list[str]:
    """The members of the ensemble that `rayltr export --ensemble` would write, if there is one."""
    return sorted({member.trial for member in ensembles.study(run).members})


def on_front(trials: Iterable[Trial]) -> list[str]:
    """The trials that the head/tail front over all trials and tau consists of."""
    curves = {trial.id: points for trial in trials if np.isfinite(points := trial.points()[:, 1:]).all()}
    names = [name for name, points in curves.items() for _ in points]
    return sorted({names[i] for i in front(np.concatenate([*curves.values()]))}) if curves else []


def leading(trials: Iterable[Trial], aim: str) -> list[str]:
    """The trials by their objective, best first; `aim` is min or max."""
    sign = 1 if aim == "min" else -1
    values = {trial.id: sign * trial.row["objective"] for trial in trials if trial.row["objective"] is not None}
    return sorted((name for name, value in values.items() if math.isfinite(value)), key=lambda name: values[name])


def last(run: Path, row: Mapping[str, Any]) -> str:
    """Where the files of a trial's last stage lie, up to their suffix."""
    return f"{run}/{row['predictions_val'] or ''}".removesuffix(".val.parquet")


def weights(run: Path, row: Mapping[str, Any]) -> list[str]:
    """The same for all stages that a trial cannot predict without: the last one, and its teacher."""
    own = last(run, row)
    try:
        teacher = parse(json.loads(Path(f"{own}.json").read_text())["stage"]).teacher
    except (OSError, ValueError, KeyError, TypeError):  # its weights are gone or damaged
        return [own]
    return [own, *([f"{run}/store/{line(teacher)}/{end(teacher):06d}"] if teacher else [])]


def superfluous(run: Path, needed: Container[str]) -> list[Path]:
    """The files to remove: weights that are not needed, and what crashes have left.

    The notes that make weights count come first, so that nothing looks damaged if this is interrupted.
    """
    stored = [path for path in run.glob("store/*/*") if path.name == "claim" or WEIGHTS.fullmatch(path.name)]
    places = ("*", "records/*", "store/*", "store/*/*")
    stale = [path for place in places for path in run.glob(place) if STALE.fullmatch(path.name)]
    doomed = [path for path in stored if base(path) not in needed] + stale
    return sorted(doomed, key=lambda path: (path.suffix != ".json", path))


def base(path: Path) -> str:
    """A path without the suffixes of weights; those of one stage at one epoch have it in common."""
    found = WEIGHTS.fullmatch(path.name)
    return str(path.with_name(found[1]) if found else path)


def remove(files: Collection[Path]) -> None:
    """Removes files, and the folders that are empty then."""
    for path in files:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        if not any(folder.iterdir()):
            folder.rmdir()


def kept(why: Mapping[str, Sequence[str]], needed: Mapping[str, Sequence[str]]) -> str:
    """The trials that keep their weights and why, as text; also those that should, but lost them before."""
    files = {trial: [Path(f"{base}.safetensors") for base in bases] for trial, bases in needed.items()}
    there = [trial for trial in why if all(path.exists() for path in files[trial])]
    size = megabytes({path for trial in there for path in files[trial]})
    lines = [f"kept: weights of {len(there)} trials, {size:.1f} MB"]
    lines += [f"  {trial:7} {', '.join(why[trial])}" for trial in there]
    gone = [f"{trial} ({', '.join(why[trial])})" for trial in why if trial not in there]
    return "\n".join([*lines, *([f"gone before: {', '.join(gone)}"] if gone else [])])


def described(files: Iterable[Path], ends: Container[str]) -> str:
    """How many of which kind; `ends`: where the last stages of trials lie."""
    names = {base(path) for path in files}
    kinds = Counter(kind(name, ends) for name in names)
    return ", ".join(f"{what}: {number}" for what, number in sorted(kinds.items()))


def kind(name: str, ends: Container[str]) -> str:
    if name in ends:
        return "last stages"
    if name.endswith(".snapshot"):
        return "snapshots"
    return "earlier stages" if name[-6:].isdigit() else "files that a crash left"


def megabytes(files: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in files) / 1e6


if __name__ == "__main__":
    sys.exit(command.run(main))
