"""`python -m rayltr.export RUN`: the best configuration and weights of a run as files."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rayltr import command, records
from rayltr.choice import BEST, best, score
from rayltr.recipe import recorded


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="rayltr export", description="Write a trained trial as a model to ship.")
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "config.json").exists():
        raise command.Refused(f"{out} exists and is no earlier export; choose another --out")
    shipping = import_module("rayltr.shipping")  # torch, only now that there is something to export
    found = shipping.finished(run, row, tuple(info["data"]["size"]))
    try:
        shipping.written(out, found, row, manifest(info, row))
        (out / "README.md").write_text(card(info, row, found.facts.classes))
        extra = [shipping.onnx(out, found.model, found.facts.size)] if options.onnx else []
    except OSError as error:
        raise command.Refused(f"{out} cannot be written: {error}") from error
    print(f"trial {row['trial']} -> {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    print(f"next: python -m rayltr.predict {out} IMAGE|FOLDER" + (" (or use model.onnx)" if extra else ""))
    return 0


def chosen(run: Path, name: str) -> Mapping[str, Any]:
    found = best(records.read_trials(run).to_pylist())
    if name not in found:
        raise ValueError(f"{run} has no complete trial to choose from")
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
validation images. Probabilities are calibrated for a class-balanced use, not for the training frequencies.
"""


if __name__ == "__main__":
    sys.exit(command.run(main))
