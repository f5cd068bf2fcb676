"""`python -m rayltr.search STUDY`: find out which recipes suit a long-tailed data set.

This file parses, checks and prints; nothing heavy is imported before everything asked for is known to be possible.
"""

import argparse
import json
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rayltr import command, objectives, records, studies
from rayltr.ablation import ablatable
from rayltr.catalogue import names, nearest
from rayltr.choice import SEEDS, finalists
from rayltr.command import FAILED, INTERRUPTED, PROBE, Refused
from rayltr.data.images import cpus
from rayltr.progress import Progress
from rayltr.spec import RandomTrial
from rayltr.studies import Plan, Study
from rayltr.summary import finished

EPOCHS = 20
"""Length of a chain unless --epochs says otherwise: a look at the data, not the paper's 200 to 400."""
MANY, LONG = 18, 45
"""From so many trials of so many epochs on, short schedules decide which recipes are trained in full."""
FIDELITY = (
    "schedules: every recipe trains on a complete schedule of a ninth of --epochs, the best ninth in full; "
    "halving: two such steps, of a third each; curves: beginnings of full schedules, where the study allows it; none: "
    f"all in full (default: schedules from {MANY} trials of {LONG} epochs on)"
)
AHEAD = 4
"""How many proposals are drawn in advance with --prefer-stored."""


def parser() -> argparse.ArgumentParser:
    made = command.Parser(
        prog="rayltr search",
        description="Search the recipes of a study on your data; the best are exported with `rayltr export`.",
        epilog=f"exit codes: 0 done, 2 bad arguments, 3 refused before anything started, {FAILED} some trials failed, "
        f"{INTERRUPTED} interrupted (go on with --resume)",
    )
    made.add_argument("study", nargs="?", help=f"{', '.join(studies.names())}, or the path of your own .py file")
    made.add_argument("--list", action="store_true", help="list studies, presets and every name a study may use")
    command.data_options(made)
    group = made.add_argument_group("search")
    group.add_argument("--trials", type=int, default=20, metavar="N", help="trials in all (default 20)")
    group.add_argument("--objective", "--objectives", default="balanced_nll", metavar="NAME[,NAME]",
                       help=f"one or more of {', '.join(objectives.OBJECTIVES)} (default balanced_nll)")  # fmt: skip
    group.add_argument("--sampler", choices=("tpe", "nsga2", "nsga3", "gp", "quasi", "random"), default="tpe",
                       help="what proposes after a balanced design (of 30 %% or more; default tpe)")  # fmt: skip
    group.add_argument("--fidelity", choices=("auto", *studies.FIDELITIES), default="auto", help=FIDELITY)
    group.add_argument("--finalists", type=int, default=0, metavar="K",
                       help=f"train the best K (and the best control) with {SEEDS} more seeds (default 0)")  # fmt: skip
    group.add_argument("--ablate", action="store_true",
                       help="train the best recipe with each of its choices set back, one at a time")  # fmt: skip
    group.add_argument("--start", metavar="PRESET,...", help="presets to try first (default: the first of the study)")
    group.add_argument(
        "--warm-start", nargs="+", default=[], metavar="RUN", help="learn from the records of other runs"
    )
    group.add_argument("--prefer-stored", action="store_true", help="of several proposals, begin with what shares most")
    group = made.add_argument_group("where it runs")
    group.add_argument("--storage", default="runs", metavar="PATH", help="folder of the runs (default ./runs)")
    group.add_argument("--name", metavar="RUN", help="name of the run (default: from the study, data and arguments)")
    group.add_argument("--resume", action="store_true", help="go on with a run that was interrupted, or add trials")
    group.add_argument("--concurrent", type=int, default=0, metavar="N", help="trials at once (default: what fits)")
    group.add_argument("--cpus-per-trial", type=int, default=1, metavar="N", help="and as many threads (default 1)")
    group.add_argument("--gpus-per-trial", type=gpus, metavar="G|auto",
                       help="may be a fraction, auto: as measured (default 1 where there are GPUs)")  # fmt: skip
    group.add_argument("--workers", type=int, default=1, metavar="W", help="processes per trial, by Ray Train")
    group.add_argument("--stack", type=int, default=1, metavar="K",
                       help="train up to K trials as one, for small networks on a GPU (default 1)")  # fmt: skip
    group.add_argument("--compile", action="store_true",
                       help="compile networks before they are trained, for trials of many minutes")  # fmt: skip
    group.add_argument("--address", metavar="auto|HOST:PORT", help="an existing Ray cluster (default: this machine)")
    group.add_argument("--no-dashboard", action="store_true", help="start without Ray's dashboard")
    group.add_argument("--snapshot-seconds", type=float, default=10.0, metavar="S", help="what a crash may cost")
    return made


def gpus(text: str) -> float | str:
    """The number of GPUs, or "auto"."""
    return text if text == "auto" else float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    options = command.checked(parser().parse_args(arguments))
    if options.list:
        print("\n".join(studies.listing(studies.find(options.study))) if options.study else catalogue_text())
        return 0
    aims = objectives.parse(options.objective)
    typed = {"fidelity": options.fidelity, "precision": options.precision}
    study, plan = asked(options)
    room(options)
    data = command.opened(plan.source)  # type: ignore[arg-type]
    if plan.batch is None and len(data.train) < 1280:
        plan = replace(plan, batch=command.fitting_batch(len(data.train)))
    chosen = {**command.plan_json(plan), "study": study.name, "source": data.digest}
    settled = {**chosen, "objectives": aims, "sampler": options.sampler, "fidelity": options.fidelity}
    run = folder(options, study, plan, command.fingerprint({**settled, **typed}, study.file.read_bytes().hex()))
    settled |= kept(run, typed)
    plan, options.fidelity = replace(plan, precision=settled["precision"]), settled["fidelity"]
    new = begin(run, options, study, settled, data, arguments)
    if plan.study != study.name:  # a file of the user's: what is edited meanwhile must not change a running search
        plan = replace(plan, study=str(run / f"{study.name}.py"))
    progress = Progress()
    more = [*(() if options.resume else ("--resume",)), *(() if options.name else ("--name", run.name))]
    again = command.typed("rayltr.search", more, arguments)
    progress.farewell = f"interrupted; what was trained is kept. Go on with:\n  {again}"
    progress.say(command.described(plan.source, data))  # type: ignore[arg-type]
    for warning in data.manifest["warnings"]:
        progress.say(f"note: {warning}")
    with command.locked(run):
        before = {row["trial"] for row in records.read_trials(run).to_pylist() if row["state"] != "interrupted"}
        if searched(run, new, options, plan, aims, progress):
            return FAILED if finished(run, progress, before) else 0
    progress.say(progress.farewell)
    return INTERRUPTED


def asked(options: argparse.Namespace) -> tuple[Study, Plan]:
    """The study and the plan of the command line.  Raises ValueError for what could not be run."""
    if options.study is None:
        raise ValueError(f"which study? {', '.join(studies.names())}, or the path of your own .py file")
    place = str(Path(options.study).absolute()) if options.study.endswith(".py") else options.study
    study = studies.find(place)
    plan = command.plan_of(options, place, study.point(studies.STUDY, RandomTrial(0)))
    precision = plan.precision or command.native_precision()
    plan = replace(plan, precision=precision, epochs=plan.epochs or EPOCHS, seed=plan.seed or 0)
    if options.fidelity == "auto":
        assert plan.epochs is not None
        options.fidelity = "schedules" if options.trials >= MANY and plan.epochs >= LONG else "none"
    if options.fidelity == "curves" and not study.curves:
        raise ValueError(f"the study {study.name} does not say that the beginnings of its schedules rank its recipes "
                         "fairly (CURVES = True); use --fidelity schedules")  # fmt: skip
    for name in presets(options) or ():
        if name not in study.presets:
            raise ValueError(
                f"--start {name}: the study {study.name} has no such preset; {nearest(name, study.presets)}"
            )
    for rung in studies.rungs(plan, options.fidelity):
        checked(study, rung)
    if options.ablate:
        ablatable(study, plan)
    for other in options.warm_start:
        records.read_run(other)
    if options.workers > 1 and options.gpus_per_trial not in (None, "auto") and 0 < options.gpus_per_trial < 1:
        raise ValueError("the workers of a trial need a whole GPU each: --gpus-per-trial 1, or one worker per trial")
    if options.stack > 1 and options.workers > 1:
        raise ValueError("--stack trains several trials in one process, --workers one trial in several; choose one")
    if options.stack > 1 and options.compile:
        raise ValueError("--stack trains networks of several trials as one, --compile those of one; choose one")
    return study, plan


def presets(options: argparse.Namespace) -> tuple[str, ...] | None:
    """The presets that --start names, or None where the study decides."""
    return None if options.start is None else tuple(filter(None, options.start.split(",")))


def checked(study: Study, plan: Plan) -> None:
    """Completes random points of both arms and every preset.  Raises ValueError for the first that cannot be."""
    ranges: dict[str, str] = {}
    for seed in range(studies.CHECKED):
        for arm in (studies.STUDY, studies.CONTROL):
            trial = RandomTrial(seed)
            plan.changed(study.point(arm, trial))
            for name, drawn in trial.ranges.items():
                if name in ("arm", "number", "broken") or "/" in name:
                    raise ValueError(f"the study {study.name} has a parameter {name!r}; choose a name without /")
                if ranges.setdefault(name, drawn) != drawn:
                    raise ValueError(f"the study {study.name} draws {name} from {ranges[name]} and from {drawn}; "
                                     "one name has one range")  # fmt: skip
    for params in study.presets.values():
        plan.stage(study, {"arm": studies.STUDY, **params})


def room(options: argparse.Namespace) -> None:
    """Raises `Refused` when this machine cannot hold the trials (a cluster is asked once it is joined)."""
    if options.address is not None:
        return reachable(options.address)
    have, trials = cpus(), max(options.concurrent, 1)
    need = trials * options.workers * options.cpus_per_trial
    if need > have:
        each = f"{options.workers} workers x {options.cpus_per_trial}"
        who = f"{trials} trials at once need" if trials > 1 else "a trial needs"
        raise Refused(f"{who} {need} CPUs ({each}), this machine has {have}")


def reachable(address: str) -> None:
    """Raises `Refused` when nothing listens at HOST:PORT; Ray would knock for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise Refused(f"no Ray cluster answers at {address}: {error}") from error


def folder(options: argparse.Namespace, study: Study, plan: Plan, asked: str) -> Path:
    """The run's folder.  Its default name says what was asked, so that the same command finds the same run."""
    assert plan.source is not None
    data = Path(str(plan.source.get("root", plan.source.name))).name
    return Path(options.storage).absolute() / (options.name or f"{study.name}-{data}-{asked}")


def kept(run: Path, typed: Mapping[str, str | None]) -> dict[str, Any]:
    """What the machine or the number of trials decided when a run began; it holds when the run goes on elsewhere."""
    if not (run / "run.json").exists():
        return {}
    before = records.read_run(run).get("settled", {})
    return {name: before[name] for name, value in typed.items() if value in (None, "auto") and name in before}


def begin(run: Path, options: Any, study: Study, settled: Mapping, data: Any, arguments: Sequence[str] | None) -> bool:
    """Makes the run's folder (and says so), or checks that an existing one is the same search.  Raises `Refused`."""
    settled = json.loads(json.dumps(settled))
    if (run / "run.json").exists():
        info = records.read_run(run)
        before = info.get("settled", {})
        other = [{"source": "data"}.get(name, name) for name in settled if settled[name] != before.get(name)]
        if other or (run / f"{study.name}.py").read_bytes() != study.file.read_bytes():
            what = f"; what differs: {', '.join(other or ['the file of the study'])}"
            raise Refused(f"{run} is a run with other arguments, data or study; choose another --name{what}")
        for table in records.set_aside(run) if options.resume else ():
            print(f"note: {table} is damaged; it is {Path(table).name}.damaged now, and the search goes on without it")
        ended, wanted = counted(run, options)
        if (ended < wanted or (run / "ray").exists()) and not options.resume:  # Ray's files go when a search has ended
            have = f"{run} has {ended} of {wanted} trials" if ended < wanted else f"{run} has not come to its end"
            raise Refused(f"{have}; go on with --resume, or choose another --name")
        return False
    if options.resume:
        raise Refused(f"there is no run {run} to resume")
    more = {"settled": settled, "command": command.typed("rayltr.search", [], arguments)}
    command.begin(run, study.name, data, options, more)
    records.save(run / f"{study.name}.py", study.file.read_bytes())
    return True


def counted(run: Path, options: argparse.Namespace) -> tuple[int, int]:
    """How many recipes of a run are over, and how many its command asks for; with finalists and the ablation."""
    rows = [row for row in records.read_trials(run).to_pylist() if row["state"] != "interrupted"]
    ended, over = len({row["number"] for row in rows}), {row["trial"] for row in rows}
    if ended < options.trials:
        return ended, options.trials
    again = {f"{row['trial']}+{seed + 1}" for row in finalists(rows, options.finalists) for seed in range(SEEDS)}
    again |= set(records.read_run(run).get("ablation", ["not begun"])) if options.ablate else set()
    return ended + len(again & over), ended + len(again)


def searched(run: Path, new: bool, options: Any, plan: Plan, aims: tuple[str, ...], progress: Progress) -> bool:
    """Runs the search; whether it came to its end.  A new run that the machines refuse leaves nothing behind."""
    tuning = import_module("rayltr.tuning")  # Ray and Optuna, only now that everything is known to be possible
    settings = tuning.Settings(
        run=str(run), plan=plan, trials=options.trials, objectives=aims, sampler=options.sampler,
        fidelity=options.fidelity, start=presets(options), warm=tuple(options.warm_start),
        ahead=AHEAD * options.prefer_stored, finalists=options.finalists, ablate=options.ablate,
        workers=options.workers, stack=options.stack, compile=options.compile, cpus=options.cpus_per_trial,
        gpus={None: -1.0, "auto": PROBE}.get(options.gpus_per_trial, options.gpus_per_trial),
        concurrent=options.concurrent, address=options.address, dashboard=not options.no_dashboard,
        snapshot_s=options.snapshot_seconds,
    )  # fmt: skip
    try:
        return tuning.search(settings, progress)
    except tuning.Shortage as refusal:
        if new and not (run / "store").exists():
            shutil.rmtree(run)
        raise Refused(str(refusal)) from refusal


def catalogue_text() -> str:
    """All that exists: studies with their presets, and every name on every axis."""
    lines = ["studies"]
    for name in studies.names():
        lines += [f"  {name}", *(f"    {preset}" for preset in studies.listing(studies.find(name)))]
    for axis in ("source", "method", "backbone", "head", "loss", "weight", "sampler", "views", "mixing", "optimiser",
                 "schedule"):  # fmt: skip
        lines.append(axis)
        lines += [f"  {name}({', '.join(signature.keywords)})" for name, signature in sorted(names(axis).items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(command.run(main))
