"""Presets of any studies on the same images, with several seeds, in one table.

`python -m benchmarks.compared bcl:paper bcl:compensation --data cifar100 --ratio 100 --paper-split`: every head of a
trained chain (with --stages: of every stage of it) is scored on the test set as it predicts; `at tau` is its balanced
accuracy at the tau that validation chose.  Trained stages are kept under --out and shared, so a call that was
interrupted goes on where it stopped.  One device, the bare loop, no Ray.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rayltr import command, studies
from rayltr.interface import Resources
from rayltr.spec import FixedTrial, Stage, chain
from rayltr.store import Store
from rayltr.trial import Trial

SCORES = {"balanced": "balanced", "many": "many", "medium": "medium", "few": "few", "at tau": "fitted_balanced"}
EVERY_S = 20.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Recipe:
    """A preset of a study, as it was named."""

    study: studies.Study
    preset: str

    @property
    def name(self) -> str:
        return f"{self.study.name}:{self.preset}"

    def stage(self, options: argparse.Namespace, seed: int) -> Stage:
        options.seed = seed
        if self.preset in self.study.chains:
            stage = self.study.chains[self.preset]
            return command.plan_of(options, self.study.name, stage).changed(stage)
        params = {"arm": studies.STUDY, **self.study.presets[self.preset], **options.change}
        return command.plan_of(options, self.study.name, self.study(FixedTrial(params))).stage(self.study, params)


def parser() -> argparse.ArgumentParser:
    made = command.Parser(prog="python -m benchmarks.compared", description=__doc__.split("\n")[0])
    made.add_argument("recipes", nargs="+", metavar="STUDY:PRESET")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    made.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="e.g. lr=0.05")
    made.add_argument("--stages", action="store_true", help="score every stage of a chain, not only its end")
    made.add_argument("--out", default="runs/compared", metavar="FOLDER", help="default: %(default)s")
    made.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    command.data_options(made)
    return made


def recipe(text: str) -> Recipe:
    """Raises ValueError for a study or a preset that does not exist."""
    name, _, preset = text.partition(":")
    study = studies.find(name)
    known = {*study.presets, *study.chains}
    if preset not in known:
        raise ValueError(f"{text}: no such preset; {name} has {', '.join(sorted(known))}")
    return Recipe(study, preset)


def value(text: str) -> bool | float | str:
    """A parameter's value as it is typed: True, False, a number, or else a name."""
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def scored(stage: Stage, store: Store, resources: Resources, what: str) -> dict[str, dict[str, float]]:
    """The test scores of every head after training; the first head has the name ""."""
    said = 0.0

    def report(record: Mapping[str, Any]) -> None:
        nonlocal said
        if time.monotonic() - said > EVERY_S:
            said = time.monotonic()
            print(f"  {what}, stage {record['stage'] + 1}, epoch {record['epoch']}/{record['of_epochs']}: "
                  f"{record['images_per_s']:.0f} images/s", file=sys.stderr, flush=True)  # fmt: skip

    _, found = Trial(stage, store, resources=resources, report=report).test()
    heads: dict[str, dict[str, float]] = {}
    for name, score in found.items():
        head, _, plain = name.rpartition(".")
        heads.setdefault(head, {})[plain] = score
    return heads


def all_scores(options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(row of the table, seed, scores), seed by seed, so that an interrupted call has whole seeds."""
    store = Store(Path(options.out).absolute() / "store")
    resources = Resources(device=options.device, threads=options.threads)
    for seed in options.seeds:
        for own in map(recipe, options.recipes):
            whole = own.stage(options, seed)
            stages = chain(whole) if options.stages else [whole]
            for number, stage in enumerate(stages, 1):
                name = f"{own.name}, stage {number}" if options.stages else own.name
                for head, scores in scored(stage, store, resources, f"{name}, seed {seed}").items():
                    yield f"{name}{', ' if head else ''}{head}", seed, scores


def table(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Means and standard deviations in per cent, and the difference of each row to the first, seed by seed."""
    first = next(iter(found.values()))
    lines = [
        f"| recipe | seeds | {' | '.join(SCORES)} | balanced, to the first row |",
        "|---" * (len(SCORES) + 3) + "|",
    ]
    for name, by_seed in found.items():
        cells = [told([100 * scores[key] for scores in by_seed.values()]) for key in SCORES.values()]
        paired = [100 * (by_seed[seed]["balanced"] - first[seed]["balanced"]) for seed in by_seed if seed in first]
        apart = "" if by_seed is first else told(paired, "+.1f")
        lines.append(f"| {name} | {', '.join(map(str, by_seed))} | {' | '.join(cells)} | {apart} |")
    return "\n".join(lines)


def told(values: Sequence[float], form: str = ".1f") -> str:
    return format(fmean(values), form) + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.name, options.storage = None, ""
    command.checked(options)
    options.change = {name: value(text) for name, _, text in (word.partition("=") for word in options.set)}
    first = recipe(options.recipes[0]).stage(options, options.seeds[0])
    print(command.described(first.source, command.opened(first.source)), flush=True)
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for name, seed, scores in all_scores(options):
        found.setdefault(name, {})[seed] = scores
        (Path(options.out) / "table.md").write_text(table(found) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
