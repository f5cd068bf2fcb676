"""`python -m rayltr.export RUN`: the best configuration and weights of a run as files."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rayltr import command, records, studies
from rayltr.choice import BEST, best, score
from rayltr.recipe import own_files, recorded


def parser() -> argparse.ArgumentParser:
    made = command.Parser(prog="rayltr export", description="Write a trained trial as a model to ship.")
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    group = made.add_mutually_exclusive_group()
    group.add_argument("--trial", metavar="ID", help="the trial to export")
    group.add_argument("--best", choices=(*BEST, "control"), default="balanced", help="default: balanced")
    made.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    made.add_argument("--onnx", action="store_true", help="model.onnx too (needs the extra rayltr[onnx])")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    run, out = Path(options.run).absolute(), Path(options.out)
    info = records.read_run(run)
    row = recorded(run, options.trial) if options.trial else chosen(run, options.best)
    if row["state"] != "complete":
        raise ValueError(f"trial {row['trial']} is {row['state']} and cannot be exported")
    if occupied(out):
        raise command.Refused(f"{out} exists and is no earlier export; choose another --out")
    for file in own_files(run):
        studies.find(str(file))  # its functions may be part of the recipe
    shipping = import_module("rayltr.shipping")  # torch, only now that there is something to export
    found = shipping.finished(run, row, tuple(info["data"]["size"]))
    try:
        shipping.written(out, found, row, manifest(info, row))
        (out / "README.md").write_text(card(info, row, found.facts.classes))
        for file in own_files(run) if '"code": ' in row["recipe"] else ():
            (out / "study.py").write_bytes(file.read_bytes())
        extra = [shipping.onnx(out, found.model, found.facts.size)] if options.onnx else []
    except OSError as error:
        raise command.Refused(f"{out} cannot be written: {error}") from error
    print(f"trial {row['trial']} -> {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    print(f"next: python -m rayltr.predict {out} IMAGE|FOLDER" + (" (or use model.onnx)" if extra else ""))
    return 0


def occupied(out: Path) -> bool:
    """Whether something other than an earlier export is at a path."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        return "rayltr" not in json.loads((out / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return True


def chosen(run: Path, name: str) -> Mapping[str, Any]:
    found = best(records.read_trials(run).to_pylist())
    if name not in found:
        raise ValueError(f"{run} has no complete trial for --best {name}; it has {', '.join(found) or 'none at all'}")
    return found[name]


def manifest(info: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Where the model comes from."""
    data = {key: info["data"][key] for key in ("digest", "counts", "protocol", "hashes", "images")}
    fixed = {key: row[key] for key in ("study", "trial", "address", "seed", "epochs_asked", "epochs_trained")}
    return {**{key: info[key] for key in ("command", "versions", "openings")}, **fixed, "data": data}


def card(info: Mapping[str, Any], row: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The model card."""
    counts, groups = info["data"]["counts"], ("balanced", "many", "medium", "few")

    def cell(name: str) -> str:
        value = row.get(f"m.{name}")
        return "n/a" if value is None or value != value else f"{100 * value:.1f}"

    table = [f"| {name} | {cell(f'val.fitted_{name}')} | {cell(f'test.fitted_{name}')} |" for name in groups]
    params = "\n".join(f"- {key[2:]}: {value}" for key, value in row.items() if key[:2] == "p." and value is not None)
    opened = len(info["openings"])
    return f"""# {info["study"]}, trial {row["trial"]}

An image classifier for {len(classes)} classes, trained on {sum(counts)} images with a long-tailed class frequency
({max(counts)} to {min(counts)} images per class). Input: RGB, {info["data"]["size"][0]} x {info["data"]["size"][1]}
pixels, values in [0, 1].

| accuracy, % | validation | test |
|---|---|---|
{chr(10).join(table)}

Measured at tau = {score(row, "tau"):.1f} and temperature {score(row, "temperature"):.2f}, fitted on validation and
folded into the classifier: the logits are already corrected for the class prior. The trial was chosen on validation;
one seed ({row["seed"]}). The test split had been opened {opened} time(s) when this was written.

## Recipe

{params or "see config.json"}

The whole recipe is the field `recipe` of `config.json`; `python -m rayltr.train config.json` trains it again.

## Limits

Accuracies hold for images like those of the training set. Classes with few training images are estimated from few
validation images. Probabilities mean a class-balanced use, not the training frequencies; their temperature is
fitted on the validation images alone.
"""


if __name__ == "__main__":
    sys.exit(command.run(main))
