"""The published table of the Bag of Tricks beside our numbers, on CIFAR-LT: one device, the bare loop, no Ray.

Rows share stages; an interrupted call goes on where it stopped; further calls (also at once) add presets and seeds.
"""

import argparse
import fcntl
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rayltr import catalogue, command, records, studies
from rayltr.data.parquets import parquet_files
from rayltr.interface import Diverged, Resources
from rayltr.spec import Fn, Stage, chain, end, fn, line, start
from rayltr.store import Store
from rayltr.trial import Trial, identified

STUDY = studies.find("bag_of_tricks")
CLASSES, RATIOS = {"cifar100": 100, "cifar10": 10}, ("100", "50")
SLACK = {1: 1.0, 2: 1.0, 3: 0.6}  # points by which a mean of so many seeds (or more) may exceed the published error
EVERY_S = 5.0  # seconds between two lines of progress
SCORES = {"error": "accuracy", "balanced": "balanced", "many": "many", "medium": "medium", "few": "few"}

REMARKS = f"""
- ours: last epoch, plain arg-max of the first head, mean ± s.d.; the test set is balanced: also the balanced error.
- published: as published, best epoch on the test set; *on another draw*: on other images than the rows without it.
- within: up to published + {SLACK[3]} (1 or 2 seeds: + {SLACK[1]}); not judged: unpublished,
  changed ({{changes}}) or on another draw.
- many, medium, few: > 100, 20 to 100 and < 20 training images, or thirds by frequency where one would be empty.
- images: source {{source}}, as many of every class as published, {{draw}}.
- epochs, seconds: the training of the whole chain; stages that rows share count in each of them.
"""


@dataclass(frozen=True)
class Bench:
    """What all runs in one folder share; `settings`, columns of its tables, is what must stay the same there."""

    out: Path
    plan: studies.Plan
    change: Mapping[str, Any]  # of parameters of the presets
    settings: Mapping[str, str]  # table (column of the published one), source, images (digest), precision, changes

    def stage(self, preset: str, seed: int) -> Stage:
        adjusted = STUDY.presets.get(f"{preset}_{self.settings['table']}", STUDY.presets[preset])
        try:
            return replace(self.plan, seed=seed).stage(STUDY, {"arm": studies.STUDY, **adjusted, **self.change})
        except ValueError as error:
            raise ValueError(f"{preset}: {error}") from error


def compare(bench: Bench, presets: Sequence[str], seeds: Sequence[int], resources: Resources) -> int:
    """Runs what is not there yet and writes the tables after each; 1 if one failed or lies outside its band, else 0."""
    presets = sorted(presets, key=lambda preset: end(chain(bench.stage(preset, 0))[0]))  # longer ones then go on
    stages = {(preset, seed): bench.stage(preset, seed) for seed in seeds for preset in presets}
    names = {job: identified(stage, lambda source: bench.settings["images"]) for job, stage in stages.items()}
    for run in runs_in(bench.out):
        if other := [f"{name} ({run[name]})" for name, ours in bench.settings.items() if run[name] != ours]:
            raise command.Refused(f"{bench.out} holds runs with other {', '.join(other)}: choose another --out")
    store, progress = Store(bench.out / "store"), Progress()
    for job, stage in stages.items():
        done = {(run["preset"], run["seed"]) for run in runs_in(bench.out) if run["state"] == "complete"}
        if job in done:
            continue
        progress.what = f"{job[0]} seed {job[1]}"
        progress.left = epochs_left([names[other] for other in stages if other not in done], store)
        row = measured(stage, store, resources, progress)
        tabulate(bench, [{"preset": job[0], "seed": job[1], **row, **bench.settings}])
        print(f"{progress.what}: {row['reason'] or 'test error {:.2f} %'.format(row['error'])}", flush=True)
    return int(any(row["failed"] or row["verdict"] in ("outside", "failed") for row in tabulate(bench, [])))


def measured(stage: Stage, store: Store, resources: Resources, report: "Progress") -> dict[str, Any]:
    """Trains a chain and opens the test split once: errors in %, and what it took.  A failure is a result, too."""
    device = torch.cuda.get_device_name(place) if (place := resources.place()).type == "cuda" else place.type
    row = dict.fromkeys((*SCORES, "epochs", "seconds"), nan) | {"device": device, "date": time.strftime("%Y-%m-%d")}
    try:
        trial = Trial(stage, store, resources=resources, report=report)
        scores = trial.test()[1]
        if isnan(scores["accuracy"]):
            raise Diverged("the logits of the trained model are not finite")
    except Exception as error:  # whatever it is, the other runs go on
        traceback.print_exc()
        return {**row, "state": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}
    names = [trial.names[own] for own in chain(trial.stage)]
    row |= {name: 100 * (1 - scores[score]) for name, score in SCORES.items()}
    row["epochs"] = float(sum(own.epochs for own in names))
    row["seconds"] = sum(record["wall_s"] for own in names for record in store.history(own))
    return {**row, "state": "complete", "reason": ""}


def epochs_left(stages: Iterable[Stage], store: Store) -> int:
    """Epochs still to train for the chains (as the store names them): every line once, less what is stored of it."""
    longest = {line(own): own for own in sorted({own for stage in stages for own in chain(stage)}, key=end)}
    return sum(end(own) - max([start(own), *(epoch for epoch, _ in store.epochs(own))]) for own in longest.values())


class Progress:
    """Prints a line per epoch, at most every few seconds.  what: the run; left: epochs that all runs still need."""

    def __init__(self) -> None:
        self.what, self.left, self.done, self.began, self.said = "", 0, 0, time.monotonic(), 0.0

    def __call__(self, record: Mapping[str, Any]) -> None:
        self.left, self.done, now = max(self.left - 1, 0), self.done + 1, time.monotonic()
        if now - self.said < EVERY_S and record["epoch"] < record["of_epochs"]:
            return
        self.said, minutes = now, self.left * (now - self.began) / self.done / 60
        print(f"  {self.what}, stage {record['stage'] + 1}, epoch {record['epoch']}/{record['of_epochs']}: "
              f"loss {sum(record['terms'].values()):.3f}, {record['images_per_s']:.0f} images/s; "
              f"{self.left} epochs of all runs left, about {minutes:.0f} min", flush=True)  # fmt: skip


def runs_in(out: Path) -> list[dict[str, Any]]:
    return pq.ParquetFile(path).read().to_pylist() if (path := out / "runs.parquet").exists() else []


def tabulate(bench: Bench, new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds runs (in the place of earlier tries) and writes the tables, in the published order; returns the rows."""
    with (bench.out / "lock").open("a") as lock:  # several calls may fill the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [*{(run["preset"], run["seed"]): run for run in [*runs_in(bench.out), *new]}.values()]
        by_preset = {preset: [run for run in runs if run["preset"] == preset] for preset in STUDY.published}
        found = [result(bench, preset, own) for preset, own in by_preset.items() if own]
        for name, rows in {"runs": runs, "results": found}.items():
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            records.save(bench.out / f"{name}.parquet", sink.getvalue().to_pybytes())
        records.save(bench.out / "results.md", markdown(bench, found).encode())
    return found


def result(bench: Bench, preset: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the table: means over the complete runs of the preset; nan is what there is not."""
    known, done = STUDY.published[preset], [run for run in runs if run["state"] == "complete"]
    means = {name: fmean(run[name] for run in done) if done else nan for name in (*SCORES, "epochs", "seconds")}
    published = float(known.get(bench.settings["table"], nan))
    comparable = bench.settings["changes"] == "none" and "another draw" not in known.get("note", "")
    return {
        "preset": preset,
        "seeds": ", ".join(str(run["seed"]) for run in done),
        "failed": ", ".join(str(run["seed"]) for run in runs if run["state"] == "failed"),
        **means,
        "sd": stdev(run["error"] for run in done) if len(done) > 1 else nan,
        "published": published,
        "difference": means["error"] - published,
        "verdict": verdict(means["error"], len(done), published if comparable else nan),
        "device": ", ".join(sorted({run["device"] for run in runs})),
        "date": max(run["date"] for run in runs),
        "note": "; ".join(filter(None, [known.get("note"), *sorted({run["reason"] for run in runs})])),
        **bench.settings,
    }


def verdict(error: float, seeds: int, published: float) -> str:
    if not seeds or isnan(published):
        return "not judged" if seeds else "failed"
    return "within" if round(error - published, 6) <= SLACK[min(seeds, max(SLACK))] else "outside"


def markdown(bench: Bench, found: Sequence[Mapping[str, Any]]) -> str:
    """The table and what it means."""
    forms = {"error": ".2f", "published": ".2f", "difference": "+.2f", "many": ".2f", "medium": ".2f", "few": ".2f",
             "epochs": ".0f", "seconds": ".0f"}  # fmt: skip
    texts = ("verdict", "device", "date", "precision", "note")
    table = [["preset", "seeds", "ours", *list(forms)[1:], *texts], ["---"] * 2 + ["--:"] * 8 + ["---"] * 5]
    for row in found:
        shown = {name: "-" if isnan(row[name]) else format(row[name], form) for name, form in forms.items()}
        shown["error"] += "" if isnan(row["sd"]) else f" ± {row['sd']:.2f}"
        seeds = row["seeds"] + f" (failed: {row['failed']})" * bool(row["failed"])
        table.append([row["preset"], seeds, *shown.values(), *(row[name].replace("|", "/") for name in texts)])
    name, source = bench.settings["table"].replace("cifar", "CIFAR-"), bench.settings["source"]
    title = f"# Bag of Tricks on {name.replace('_', '-LT, ratio ')}: test error in %\n"
    draw = "in the published draw" if source in CLASSES else "but not in the published draw"
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([title, *lines, REMARKS.format(**bench.settings, draw=draw)])


def parser() -> argparse.ArgumentParser:
    made = command.Parser(prog="python -m benchmarks.bag_of_tricks_parity", description=__doc__)
    add = made.add_argument
    add("presets", nargs="*", metavar="PRESET", help="rows of the table (default: all with an error on these data)")
    add("--data", choices=CLASSES, default="cifar100", help="default: cifar100")
    add("--ratio", choices=(*RATIOS, "none"), default="100", help="default: 100; none: ROOT is a subset, with val")
    add("--root", metavar="FOLDER", help="Parquet files or CIFAR's Python batches (default: cached, else downloaded)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--epochs", type=int, metavar="E", help="length of a whole chain; then nothing is judged")
    add("--batch", type=int, metavar="B", help="images per step; then nothing is judged")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="e.g. lr=0.05; nothing is judged")
    add("--precision", choices=catalogue.PRECISIONS, default="fp32", help="default: fp32")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    add("--out", metavar="FOLDER", default="runs/parity", help="for tables and weights (default: runs/parity)")
    add("--list", action="store_true", help="list the presets with their published errors on these data")
    return made


def source_of(data: str, ratio: str, root: str | None) -> Fn:
    """The published training set of CIFAR-LT, from the Parquet files below `root` if it holds any."""
    place = Path(root).expanduser().absolute() if root else None
    tail: dict[str, Any] = {"validation": "official"} if ratio == "none" else {"ratio": float(ratio)}
    kind = "parquet" if place and parquet_files(place) else data
    return fn(kind, root=str(place) if place else None, paper_split=True, **tail)


def value_of(text: str) -> bool | float | str:
    """A parameter's value as it is typed: True, False, a number, or else a name."""
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def bench_of(options: argparse.Namespace) -> Bench:
    """Raises `Refused` for data that are not a published subset."""
    source = source_of(options.data, options.ratio, options.root)
    data = command.opened(source)
    print(command.described(source, data), flush=True)
    ratio = f"{data.counts.max() / data.counts.min():.0f}"
    if len(data.classes) != CLASSES[options.data] or ratio not in RATIOS:
        raise command.Refused(f"these images are not {options.data} with a ratio of {' or '.join(RATIOS)}")
    pairs = sorted(word.partition("=")[::2] for word in options.set)
    change = {name: value_of(text) for name, text in pairs}
    asked = {"epochs": options.epochs, "batch": options.batch, **change}
    changes = " ".join(f"{name}={value}" for name, value in asked.items() if value is not None) or "none"
    settings = {"table": f"{options.data}_{ratio}", "source": source.name, "images": data.digest}
    settings |= {"precision": options.precision, "changes": changes}
    plan = studies.Plan(STUDY.name, source, options.epochs, options.batch, None, options.precision)
    return Bench(Path(options.out).absolute(), plan, change, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.list:
        for name, row in STUDY.published.items():
            errors = [f"{row.get(f'{options.data}_{ratio}', '-'):>6} (ratio {ratio})" for ratio in RATIOS]
            print(f"{name:24} {' '.join(errors)}  {row.get('note', '')}".rstrip())
        return 0
    if unknown := [preset for preset in options.presets if preset not in STUDY.published]:
        raise ValueError(f"there is no preset {unknown[0]!r}: {catalogue.nearest(unknown[0], STUDY.published)}")
    command.usable(options.device)
    bench = bench_of(options)
    presets = options.presets or [name for name, row in STUDY.published.items() if bench.settings["table"] in row]
    return compare(bench, presets, options.seeds, Resources(device=options.device, threads=options.threads))


if __name__ == "__main__":
    sys.exit(command.run(main))
