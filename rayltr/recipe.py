"""`python -m rayltr.train STUDY|CONFIG.json|RUN`: one recipe, no search, no Ray.

The run folder it leaves is that of a search with one trial: reports, exports and predictions work on it alike.
"""

import argparse
import json
import re
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from rayltr import command, records, studies
from rayltr.catalogue import nearest
from rayltr.command import FAILED, Refused
from rayltr.progress import by_head, outcome, stood
from rayltr.spec import FixedTrial, Stage, chain, digest, dump, parse
from rayltr.studies import STUDY, Study

SHOWN = 8
"""So many presets are named in a message."""


def parser() -> argparse.ArgumentParser:
    made = command.Parser(prog="rayltr train", description="Train one recipe: no search, no Ray.")
    made.add_argument("recipe", nargs="?", help=f"a study ({', '.join(studies.names())}, or a .py file), a config.json "
                      "as exports hold it, or the folder of a run (with --trial)")  # fmt: skip
    made.add_argument("--preset", metavar="NAME", help="a named point of the study (see --list; default: paper)")
    made.add_argument("--trial", metavar="ID", help="the trial of a run to train again")
    made.add_argument("--list", action="store_true", help="list studies and presets with their published errors")
    command.data_options(made)
    group = made.add_argument_group("where it runs")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: as torch chooses; for a trial "
        "of a run, as many as there, because sums depend on it)",
    )
    group.add_argument("--compile", action="store_true", help="compile the networks before they are trained")
    group.add_argument("--storage", default="runs", metavar="PATH", help="folder of the runs (default ./runs)")
    group.add_argument("--name", metavar="RUN", help="name of the run (default: from recipe and address)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.checked(parser().parse_args(arguments))
    if options.list:
        print(listing([options.recipe] if options.recipe else studies.names()))
        return 0
    if options.recipe is None:
        raise ValueError(f"which recipe? a study ({', '.join(studies.names())}), a config.json or a run with --trial")
    name, stage, params = asked(options)
    again = Path(options.recipe) if options.trial else None
    data = command.opened(stage.source)
    command.usable(options.device)
    run = Path(options.storage).absolute() / (options.name or f"{name}-{digest(stage)[:8]}")
    settled = {"recipe": dump(stage), "data": data.digest}
    if again and run.resolve() == again.resolve():
        raise ValueError(f"{run} holds the trial already; --name or --storage gives the new training a run of its own")
    if not (run / "run.json").exists():
        more = {"command": command.typed("rayltr.train", [], arguments), "settled": settled}
        command.begin(run, name, data, options, more)
        for file in own_files(Path(options.recipe)):
            records.save(run / file.name, file.read_bytes())
        rehearsed(run, stage, options)
    elif records.read_run(run).get("settled") != json.loads(json.dumps(settled)):
        raise Refused(f"{run} is a run of another recipe or of other data; choose another --name")
    print(command.described(stage.source, data))
    for warning in data.manifest["warnings"]:
        print(f"note: {warning}")
    print(f"{len(chain(stage))} stage(s), {command.length(stage)} epochs; everything goes to {run}", flush=True)
    with command.locked(run):
        trained(run, name, stage, params, options)
    if again:
        print(replayed(again, options.trial, run))
    return 0


def asked(options: argparse.Namespace) -> tuple[str, Stage, dict[str, Any]]:
    """(name, completed chain, parameters of the study) that the command line asks for."""
    path, params = Path(options.recipe), {}
    is_run = (path / "run.json").exists()
    if options.trial and not is_run:
        raise ValueError(f"--trial {options.trial} is of which run? {path} is not the folder of a run")
    if path.suffix != ".json" and not is_run:
        place = str(path.absolute()) if path.suffix == ".py" else options.recipe
        study = studies.find(place)
        chosen = preset(study, options.preset)
        name = f"{study.name}-{chosen}"
        if chosen in study.chains:
            stage = study.chains[chosen]
            return name, command.plan_of(options, place, stage).changed(stage), {}
        params = {"arm": STUDY, **study.presets[chosen]}
        plan = command.plan_of(options, place, study(FixedTrial(params)))
        return name, plan.stage(study, params), params
    load_own(path)
    if is_run:
        row = recorded(path, options.trial)
        if options.threads is None:  # sums depend on their number, so a trial is trained again with as many
            options.threads = threads(records.read_run(path))
        name, stage = f"{path.resolve().name}-{row['trial']}", parse(json.loads(row["recipe"]))
        params = {key[2:]: value for key, value in row.items() if key.startswith("p.") and value is not None}
    else:
        name, stage = path.stem, recipe_in(path)
    return name, command.plan_of(options, "", stage).changed(stage), params


def own_files(recipe: Path) -> list[Path]:
    """The files that may define functions of a recipe: a study itself, or what a run or an export keeps of it."""
    if recipe.suffix == ".py":
        return [recipe]
    if recipe.suffix == ".json":
        return sorted(recipe.parent.glob("study.py"))
    return sorted(recipe.glob("*.py")) if (recipe / "run.json").exists() else []


def load_own(recipe: Path) -> None:
    """Makes functions of the user's own known, which may be part of a recipe."""
    for file in own_files(recipe):
        studies.find(str(file))


def recipe_in(path: Path) -> Stage:
    """The chain in a config.json.  Raises ValueError for a file that holds none."""
    try:
        content = json.loads(path.read_text())
        stage = parse(content.get("recipe", content))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"there is no recipe in {path}: {type(error).__name__}: {error}") from error
    return studies.sound(stage, str(path))


def recorded(run: Path, trial: str | None) -> Mapping[str, Any]:
    """The row of a trial in a run's records.  Raises ValueError for what is no run, or listing the trials it has."""
    records.read_run(run)
    rows = {row["trial"]: row for row in records.read_trials(run).to_pylist()}
    if trial:  # 7.1 is 0007.1, and 7+1 is 0007+1
        trial = re.sub(r"^\d+", lambda number: number[0].zfill(4), trial)
    if trial is None or trial not in rows:
        raise ValueError(f"which --trial? {run} has {', '.join(sorted(rows)) or 'no trials'}")
    if not rows[trial]["recipe"]:
        raise ValueError(f"trial {trial} has no recipe: {rows[trial]['error']}")
    return rows[trial]


def row_of(run: Path, trial: str | None) -> Mapping[str, Any]:
    """The row of a trial, or of the only one of a run, with the functions that its recipe may name."""
    load_own(run)
    names = records.read_trials(run).column("trial").to_pylist()
    return recorded(run, trial or (names[0] if len(names) == 1 else None))


def preset(study: Study, name: str | None) -> str:
    """The name of the preset that is meant: `paper`, or a study's only one, unless one is named."""
    if not study.named:
        raise ValueError(f"the study {study.name} has no presets to train: give its file PAPER = {{...}}, a value for "
                         "each of its parameters, or search it with rayltr.search")  # fmt: skip
    if name is None:
        name = "paper" if "paper" in study.named else study.named[0]
        if name != "paper" and len(study.named) > 1:
            some = ", ".join(study.named[:SHOWN])
            raise ValueError(f"which --preset? {study.name} has {len(study.named)}: {some} ... (see --list)")
    if name not in study.named:
        known = nearest(name, study.named)
        raise ValueError(f"--preset {name}: the study {study.name} has no such preset; {known}")
    return name


def rehearsed(run: Path, stage: Stage, options: argparse.Namespace) -> None:
    """Raises ValueError for a recipe that fails at its first step, and takes its new run away."""
    rehearsal = import_module("rayltr.rehearsal")  # torch, only now that everything is known to be possible
    try:
        rehearsal.rehearse(stage, rehearsal.Resources(device=options.device, threads=options.threads))
    except rehearsal.Diverged:  # a few images prove nothing
        return
    except Exception as error:
        shutil.rmtree(run)
        place = traceback.extract_tb(error.__traceback__)[-1]
        named = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        raise ValueError(f"the recipe cannot be trained: {error if type(error) is ValueError else named}") from error


def trained(run: Path, name: str, stage: Stage, params: dict[str, Any], options: argparse.Namespace) -> None:
    """Trains the chain, opens the test split once, and leaves records and report."""
    trial = import_module("rayltr.trial")  # torch, only now that everything is known to be possible
    began = datetime.now(UTC)
    lane = trial.Compiled() if options.compile else trial.ALONE
    resources = trial.Resources(device=options.device, threads=options.threads, lane=lane)
    work = trial.Trial(stage, trial.Store(run / "store"), resources=resources, report=Lines())
    try:
        found = work.run()
    except OSError:
        raise
    except Exception as error:  # it diverged, its stages do not fit together, or the user's own code fails
        records.save(run / "error.txt", traceback.format_exc().encode())
        text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise Refused(f"the recipe cannot be trained: {text} (more in {run / 'error.txt'})", FAILED) from error
    path, scores = work.test()
    row = {
        "study": name,
        "trial": "0000",
        "number": 0,
        "state": "complete",
        "address": found.address,
        "seed": stage.seed,
        "classes": found.classes,
        "epochs_asked": found.asked,
        "epochs_trained": found.trained,
        "wall_s": found.wall_s,
        "objective": found.metrics["fitted_nll"],
        "predictions_val": trial.inside(found.predictions),
        "predictions_test": trial.inside(path),
        "recipe": json.dumps(dump(stage)),
        "started": began,
        "ended": datetime.now(UTC),
        **{f"p.{key}": value for key, value in params.items()},
        **{f"m.val.{key}": value for key, value in found.metrics.items()},
        **{f"m.test.{key}": value for key, value in scores.items()},
    }
    if len(found.epochs) >= records.read_epochs(run).num_rows:  # a run that was pruned has forgotten some of them
        records.append_epochs(run, [{"trial": "0000", **epoch} for epoch in found.epochs])
    if not records.read_trials(run).num_rows:
        command.count_opening(run, ["0000"], row["ended"])
    records.append_trial(run, row)
    print(f"validation: {outcome(row)}")
    print("\n".join(by_head("test", scores)))
    try:
        print(f"report: {import_module('analysis.report').write(run)}")
    except ModuleNotFoundError as missing:
        print(f"no report: {missing.name} is not installed")


def replayed(there: Path, trial: str, here: Path) -> str:
    """In one line, how the trial that the run `here` has trained again compares with its record in the run `there`."""
    before, after = recorded(there, trial), recorded(here, "0000")
    of = f"the record of trial {before['trial']} in {there}"
    done = "replayed" if after["epochs_trained"] else f"nothing to train, {here} holds the replay"
    if before["state"] != "complete":
        return f"{done}: nothing to compare with, because trial {before['trial']} of {there} is {before['state']}"
    if before["address"] != after["address"]:
        return f"{done}: not compared with {of}: the recipe, the data or the version of the numerics is another"
    old, new = measured(before), measured(after)
    both = [name for name in old if name in new]  # other versions may measure more
    gaps = {name: abs(old[name] - new[name]) for name in both if repr(old[name]) != repr(new[name])}
    if not gaps:
        return f"{done}: all {len(both)} validation metrics are identical to {of}"
    largest = ", ".join(f"{name} by {gaps[name]:.2g}" for name in sorted(gaps, key=lambda name: -gaps[name])[:3])
    return f"{done}: {len(gaps)} of {len(both)} validation metrics differ from {of} ({largest}); {causes(there, here)}"


def causes(there: Path, here: Path) -> str:
    """What may explain that two runs of one recipe differ: what else does, of all that the last bits depend on."""
    then, now = (circumstances(records.read_run(run)) for run in (there, here))
    other = [f"{name} {now[name]} (there {then[name]})" for name in now if now[name] != then[name]]
    return f"what may explain it: {', '.join([*other, 'another processor or GPU'])}"


def circumstances(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a run.json says of them."""
    found = {name: info["versions"].get(name) for name in ("rayltr", "torch", "torchvision", "timm", "numpy")}
    return {**found, "threads": threads(info) or "as torch chose", "workers": info["arguments"].get("workers", 1)}


def threads(info: Mapping[str, Any]) -> int | None:
    """The CPU threads of a trial of a run; None: as torch chose."""
    return info["arguments"].get("cpus_per_trial", info["arguments"].get("threads"))


def measured(row: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics of a row of the trials table, without those that are times."""
    found = {name[6:]: value for name, value in row.items() if name.startswith("m.val.") and value is not None}
    return {name: value for name, value in found.items() if not name.endswith("_s")}


class Lines:
    """Prints a line per epoch, at most twice a second."""

    def __init__(self) -> None:
        self.said = 0.0

    def __call__(self, record: Mapping[str, Any]) -> None:
        if time.monotonic() - self.said < 0.5 and record["epoch"] < record["of_epochs"]:
            return
        self.said = time.monotonic()
        print(f"  {stood(record)}", flush=True)


def listing(names: Sequence[str]) -> str:
    """Studies with their presets and the errors that the literature reports for them."""
    lines: list[str] = []
    for name in names:
        lines += [name, *(f"  {preset}" for preset in studies.listing(studies.find(name)))]
    return "\n".join(lines)
