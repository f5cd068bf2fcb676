"""`python -m rayltr.adapt RUN --trial ID`: weights of the experts of a trial for images whose classes nobody knows.

Two views of an image should be predicted alike: SADE (Zhang et al., NeurIPS 2022, section 4.2).  The network stays as
it is; targets serve the printed comparison only.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayltr import command, folding, recipe, records
from rayltr.choice import SCORES
from rayltr.command import Refused
from rayltr.data import Data, Split
from rayltr.data.images import Lazy
from rayltr.evaluate import both
from rayltr.experts import is_expert
from rayltr.interface import Resources
from rayltr.methods.sade import aggregated, combined, published_view
from rayltr.metrics import fit, groups
from rayltr.predict import decoded, found
from rayltr.records import Predictions
from rayltr.spec import Stage, parse
from rayltr.train import pixels, predict


def parser() -> argparse.ArgumentParser:
    made = command.Parser(
        prog="rayltr adapt", description="Weigh the experts of a trained trial for unlabelled images."
    )
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument("--trial", metavar="ID", help="the trial (default: the run's only one)")
    group = made.add_mutually_exclusive_group()
    group.add_argument("--images", metavar="FOLDER|FILE.parquet", help="learn from these (default: validation images)")
    group.add_argument("--test", action="store_true", help="learn from the test images: opens the split, and says so")
    made.add_argument("--epochs", type=int, default=5, metavar="E", help="times to go through the images (default: 5)")
    made.add_argument("--steps", type=int, default=400, metavar="N", help="batches of 128 at most (default: 400)")
    made.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    for name in ("epochs", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}")
    run = Path(options.run).absolute()
    row = recipe.row_of(run, options.trial)
    if row["state"] != "complete":
        raise ValueError(f"trial {row['trial']} is {row['state']} and has no experts to weigh")
    command.usable(options.device)
    device, stage = Resources(device=options.device).place(), parse(json.loads(row["recipe"]))
    method, facts, val = folding.trained(run, row, tuple(records.read_run(run)["data"]["size"]))
    experts = [head for head in val.logits if is_expert(head)]
    if not experts:
        raise ValueError(f"trial {row['trial']} is of the method {stage.method.name}, which has no experts to weigh: "
                         "ride, sade and ncl have some")  # fmt: skip
    if options.images:
        split = unlabelled(Path(options.images), facts.size)
    else:
        split = known(run, row, command.opened(stage.source), val, options.test)
    learnt = learn(method.to(device), split, device, mirrored(stage), options)
    logits = predict(method, split, device) if options.test else val.logits
    note = {
        "address": row["address"],
        "images": options.images or ("test" if options.test else "validation"),
        "number": len(split),
        "weights": dict(zip(experts, learnt.tolist(), strict=True)),
        "measured_on": "test" if options.test else "validation",
        **compared(logits, split.target if options.test else val.target, val, experts, learnt),
    }
    records.write_note(run, "adapted", row["trial"], note)
    print("\n".join(told(note)))
    print(f"next: python -m rayltr.export {options.run} --trial {row['trial']} --adapted --out DIR")
    return 0


def unlabelled(path: Path, size: tuple[int, int]) -> Split:
    """The images at a path, sized as in training.  The first of them are read to see whether they can be."""
    items = found(path)
    next(decoded(items, size, False, []))
    images = Lazy(items, size[0] if size[0] == size[1] else None, size)
    return Split(images, np.arange(len(items)), np.full(len(items), -1))


def known(run: Path, row: Mapping[str, Any], data: Data, val: Predictions, test: bool) -> Split:
    """The validation split of the run, or its test split, whose opening is counted before anything is seen.

    Raises `Refused` for data that are not those of the run any more.
    """
    if data.digest != val.digest:
        raise Refused(f"the data of {run} are not there any more, other images are; --images names what to learn from")
    if not test:
        return data.val
    with command.locked(run):
        command.count_opening(run, [row["trial"]])
    return data.unseal()


def mirrored(stage: Stage) -> float:
    """How often the training has mirrored its images: a digit is not its mirror image."""
    return stage.views[0].get("flip") or 0.0


def learn(method: nn.Module, split: Split, device: torch.device, flip: float, options: argparse.Namespace) -> Tensor:
    """The experts' weights [E] on the CPU; the same command learns the same.  Raises ValueError without images."""
    if not len(split):
        raise ValueError("there is no image to learn from")

    def take(rows: Tensor) -> Tensor:
        return pixels(split.take(rows.numpy()), device)

    view, generator = partial(published_view, flip=flip), torch.Generator(device).manual_seed(0)
    how = {"epochs": options.epochs, "steps": options.steps}
    return aggregated(method, len(split), take, view, generator, **how).cpu()


def compared(
    logits: Mapping[str, np.ndarray], target: np.ndarray, val: Predictions, experts: Sequence[str], weights: Tensor
) -> dict[str, Any]:
    """Accuracies `before`, of the method's own prediction, and `after`, of its weighed experts.

    Those named `fitted_` are at the tau and temperature that validation chose for its own prediction, both times: they
    stand for the use that the weights leave.
    """
    main, members = next(iter(logits)), groups(val.counts)[0]
    tau, temperature, _ = fit(val.logits[main], val.target, val.counts)
    stacked = torch.stack([torch.as_tensor(logits[head]) for head in experts], 1)
    after = combined(stacked, weights).numpy()
    result = {}
    for name, z in {"before": logits[main], "after": after}.items():
        result[name] = both(z, target, val.counts, members, tau, temperature)
    return result


def told(note: Mapping[str, Any]) -> list[str]:
    """What was learnt, as lines."""
    shown = ", ".join(f"{head} {weight:.2f}" for head, weight in note["weights"].items())
    lines = [
        f"weights: {shown} (of {note['number']} images: {note['images']})",
        f"{note['measured_on'] + ', %':27}" + "".join(f"{name:>10}" for name in SCORES),
    ]
    for prefix, how in (("", ""), ("fitted_", ", corrected")):
        for when, what in (("before", "as trained"), ("after", "weighed")):
            values = "".join(f"{100 * note[when][prefix + name]:10.1f}" for name in SCORES)
            lines.append(f"  {what + how:25}{values}")
    return lines


if __name__ == "__main__":
    sys.exit(command.run(main))
