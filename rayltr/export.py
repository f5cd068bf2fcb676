"""`python -m rayltr.export RUN`: the best configuration and weights of a run, or its best ensemble, as files."""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from analysis import ensembles
from analysis.experts import experts
from rayltr import command, model_card, records
from rayltr.choice import BEST, best, criterion, repeated
from rayltr.recipe import load_own, own_files, recorded

MADE = ("config.json", "ensemble.json", "model.safetensors", "model.onnx", "study.py")
"""Files that not every export has, so that an earlier one may have left them."""


def parser() -> argparse.ArgumentParser:
    made = command.Parser(
        prog="rayltr export", description="Write a trained trial, or an ensemble, as a model to ship."
    )
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    group = made.add_mutually_exclusive_group()
    group.add_argument("--trial", metavar="ID", help="the trial to export")
    group.add_argument("--best", choices=(*BEST, "control"), default="balanced", help="default: balanced")
    group.add_argument("--ensemble", action="store_true", help="the trials that are best together")
    made.add_argument("--group-bias", action="store_true", help="one trial: a bias per class group, where that helps")
    made.add_argument("--adapted", action="store_true", help="one trial: the weights of its experts of rayltr adapt")
    made.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    made.add_argument("--onnx", action="store_true", help="model.onnx too (needs the extra rayltr[onnx])")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.ensemble and options.group_bias:
        raise ValueError("--group-bias is for one trial; an ensemble is weighted by group where that helps")
    if options.adapted and (options.ensemble or options.group_bias):
        raise ValueError("--adapted is for one trial, without --group-bias, which was fitted for its plain prediction")
    run, out = Path(options.run).absolute(), Path(options.out)
    info = records.read_run(run)
    if occupied(out):
        raise command.Refused(f"{out} exists and is no earlier export; choose another --out")
    load_own(run)
    make = together if options.ensemble else alone
    try:
        said = make(run, info, out, options)
    except OSError as error:
        raise command.Refused(f"{out} cannot be written: {error}") from error
    print(f"{said} -> {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    print(f"next: python -m rayltr.predict {out} IMAGE|FOLDER" + (" (or use model.onnx)" if options.onnx else ""))
    return 0


def alone(run: Path, info: Mapping[str, Any], out: Path, options: argparse.Namespace) -> str:
    """Exports one trial; returns what it is."""
    row = recorded(run, options.trial) if options.trial else chosen(run, options.best)
    if row["state"] != "complete":
        raise ValueError(f"trial {row['trial']} is {row['state']} and cannot be exported")
    bias = group_bias(run, row["trial"]) if options.group_bias else 0.0
    folding, shipping = torch_side()
    note = folding.weighed(run, row) if options.adapted else {}
    found = folding.finished(run, row, tuple(info["data"]["size"]), bias=bias, weights=note.get("weights"))
    cleared(out)
    shipping.weighed(out, found)
    measured = {key[2:]: value for key, value in row.items() if key.startswith("m.") and value is not None}
    price = shipping.price(found.model, found.facts.size)
    about = {**manifest(info, [row]), "price": price, **({"adapted": note} if note else {})}
    shipping.described(out, found.facts.classes, {"trial": row["trial"], **measured}, about)
    rows = records.read_trials(run).to_pylist()
    trials = [other for other in rows if other["state"] == "complete" and not repeated(other)]
    how = model_card.chosen(len(trials), options.trial, options.best, criterion(rows))
    if np.any(bias):
        how += " A bias for each class group was added to the logits after these numbers were measured."
    if note:
        how += f" Its experts were weighed for unlabelled images ({note['images']}) after these numbers were measured."
    (out / "README.md").write_text(model_card.of_trial(info, row, f"{how} {model_card.seeds(row, rows)}", price))
    own_code(run, row, out)
    if options.onnx:
        shipping.onnx(out, found.model, found.facts.size)
    return f"trial {row['trial']}"


def together(run: Path, info: Mapping[str, Any], out: Path, options: argparse.Namespace) -> str:
    """Exports the best ensemble; returns what it is."""
    study = ensembles.study(run)
    if study.mixture is None:
        raise ValueError(f"{run} has no ensemble to export: {study.reason}")
    note = noted(study)
    by_trial = {row["trial"]: row for row in records.read_trials(run).to_pylist()}
    rows = {entry["folder"]: by_trial[entry["trial"]] for entry in note["members"]}
    folding, shipping = torch_side()
    size = tuple(info["data"]["size"])
    found = [
        folding.finished(run, row, size, entry["head"])
        for row, entry in zip(rows.values(), note["members"], strict=True)
    ]
    cleared(out)
    model = import_module("rayltr.ensemble").written(out, found, note)
    price = shipping.price(model, size)
    about = {**manifest(info, [*rows.values()]), "price": price}
    shipping.described(out, found[0].facts.classes, note["validation"], about)
    (out / "README.md").write_text(model_card.of_ensemble(info, note, [*rows.values()], price))
    for folder, row in rows.items():
        own_code(run, row, out / folder)
    if options.onnx:
        shipping.onnx(out, model, size)
    if study.recommended == "single":
        print(f"note: {model_card.doubt(note)}; the single model: python -m rayltr.export {options.run} "
              f"--trial {study.best.trial} --out DIR")  # type: ignore[union-attr]  # fmt: skip
    return f"ensemble of {', '.join(entry['trial'] for entry in note['members'])}"


def torch_side() -> tuple[Any, Any]:
    """The modules that import torch, which takes long: only when there is something to export."""
    return import_module("rayltr.folding"), import_module("rayltr.shipping")


def noted(study: ensembles.Ensembles) -> dict[str, Any]:
    """An ensemble.json: members and how they are weighted, and the validation scores that predictions reproduce."""
    mixture, score = study.mixture, study.ensemble
    assert mixture is not None and score is not None and study.single is not None
    groups = study.groups if mixture.rung == "groups" else {}
    members = [
        {
            "folder": f"members/{expert.name.replace(' ', '-')}",
            **{name: getattr(expert, name) for name in ("trial", "head", "tau", "temperature")},
            "weight": mixture.told(weights, groups),
        }
        for expert, weights in zip(study.members, mixture.weights, strict=True)
    ]
    return {
        "mode": mixture.mode,
        "rung": mixture.rung,
        "members": members,
        "groups": {name: [int(c) for c in classes] for name, classes in groups.items()},
        "bias": mixture.told(mixture.bias, groups),
        "validation": score.whole,
        "single": {
            "trial": study.single.members[0],
            **{name: study.single.whole[name] for name in ("balanced", "nll")},
        },
        "gain": {"nll": vars(score.gain_nll), "balanced": vars(score.gain_balanced)},
        "recommended": study.recommended,
    }


def group_bias(run: Path, trial: str) -> Any:
    """A bias per class [C] that is the same within a group; 0.0 where its cross-fitted gain is not above 0."""
    panel = experts(run, only=trial)
    if not panel.experts:
        raise ValueError(f"trial {trial} has no validation predictions to fit --group-bias on")
    mixture, gain = ensembles.group_bias(panel)
    helps = mixture.rung == "groups"
    print(f"group bias: {'applied' if helps else 'left out'}, its cross-fitted gain is {gain.value:.4f} nats "
          f"(95 %: {gain.low:.4f} to {gain.high:.4f})")  # fmt: skip
    return mixture.bias if helps else 0.0


def occupied(out: Path) -> bool:
    """Whether something other than an earlier export is at a path."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    note = out / "ensemble.json" if (out / "ensemble.json").exists() else out / "config.json"
    try:
        return "rayltr" not in json.loads(note.read_text())
    except (OSError, ValueError, TypeError):
        return True


def cleared(out: Path) -> None:
    """Makes the folder; of an earlier export there, nothing stays that the next one might not replace."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "ensemble.json").exists():
        shutil.rmtree(out / "members", ignore_errors=True)
    for name in MADE:
        (out / name).unlink(missing_ok=True)


def own_code(run: Path, row: Mapping[str, Any], folder: Path) -> None:
    """Copies the user's study file, where a recipe uses functions of it."""
    for file in own_files(run) if '"code": ' in row["recipe"] else ():
        (folder / "study.py").write_bytes(file.read_bytes())


def chosen(run: Path, name: str) -> Mapping[str, Any]:
    found = best(records.read_trials(run).to_pylist())
    if name not in found:
        raise ValueError(f"{run} has no complete trial for --best {name}; it has {', '.join(found) or 'none at all'}")
    return found[name]


def manifest(info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the models come from."""
    data = {key: info["data"][key] for key in ("digest", "counts", "protocol", "hashes", "images")}
    fixed = ("study", "trial", "address", "seed", "epochs_asked", "epochs_trained")
    trials = [{key: row[key] for key in fixed} for row in rows]
    told = {key: info[key] for key in ("command", "versions", "openings")}
    return {**told, **(trials[0] if len(rows) == 1 else {"members": trials}), "data": data}


if __name__ == "__main__":
    sys.exit(command.run(main))
