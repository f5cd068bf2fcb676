"""`python -m rayltr.inspect RUN`: what the two tokens of a student have learnt, and how its teacher sees its images."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayltr import build, command, records, transformers
from rayltr.data import Data, Split
from rayltr.interface import Resources
from rayltr.metrics import groups
from rayltr.recipe import own_files, recorded
from rayltr.spec import Stage, end, parse
from rayltr.store import Store
from rayltr.studies import find
from rayltr.train import assembled, facts, pixels
from rayltr.trial import Trial

CHUNK = 100
"""So many images pass the network at once: the attention of all heads is kept."""
SHOWN = 2
"""The first blocks, whose attention is looked at."""


def parser() -> argparse.ArgumentParser:
    made = command.Parser(prog="rayltr inspect", description="What the two tokens of a trained student have learnt.")
    made.add_argument("run", metavar="RUN", help="the folder of a run")
    made.add_argument("--trial", metavar="ID", help="the trial (default: the run's only one)")
    made.add_argument("--images", type=int, default=1000, metavar="N", help="at most so many (default: 1000)")
    made.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    command.usable(options.device)
    run = Path(options.run).absolute()
    for file in own_files(run):
        find(str(file))  # its functions may be part of the recipe
    rows = records.read_trials(run).to_pylist()
    row = recorded(run, options.trial or (rows[0]["trial"] if len(rows) == 1 else None))
    stage = parse(json.loads(row["recipe"]))
    device = Resources(device=options.device).place()
    stage, module, data = restored(run, stage, device)
    if not hasattr(module, "both"):
        raise ValueError(f"trial {row['trial']} is of the method {stage.method.name}; only students with two tokens, "
                         "of the method tokens, can be inspected")  # fmt: skip
    print("\n".join(told(stage, module, data, options.images, device)))
    return 0


def restored(run: Path, stage: Stage, device: torch.device) -> tuple[Stage, Any, Data]:
    """The completed stage, its method and the data.  Raises ValueError when the weights are not stored any more."""
    trial = Trial(stage, Store(run / "store"))
    stage = trial.stage
    data, asked = trial.data(stage.source), {"": stage, **({"teacher": stage.teacher} if stage.teacher else {})}
    states = {role: trial.store.longest(trial.names[own]) for role, own in asked.items()}
    if any(state is None or state.epoch != end(asked[role]) for role, state in states.items()):
        raise ValueError(f"{run} does not hold the weights of the trial and of its teacher any more; train it again")
    given = {role: state for role, state in states.items() if role and state}
    module: nn.Module = assembled(stage, facts(data), given, states[""], device)[0]
    return stage, module.eval(), data


@torch.no_grad()
def told(stage: Stage, module: Any, data: Data, images: int, device: torch.device) -> list[str]:
    """The measures as lines."""
    counts, split = torch.as_tensor(data.counts), data.train
    chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:images])
    seen = [*views(stage, split, chosen, counts, device)]
    lines = taught(stage, module, seen)
    backbone = module.backbone
    tokens = torch.cat([backbone.body.tokens(backbone.normalised(part["augmented"][0])) for part in seen])
    lines.append(f"distance of the two tokens (1 - cosine): {transformers.token_distance(tokens).item():.3f}")
    lines += looked([backbone.normalised(part["as they are"][0]) for part in seen], backbone.body)
    few = np.isin(split.target, groups(data.counts)[0]["few"])
    rows = np.flatnonzero(few if few.any() else ~few)[:images]
    found = torch.cat(
        [transformers.blocks(backbone.body, backbone.normalised(part)) for part in chunks(split, rows, device)], 1
    )
    ranks = " ".join(str(transformers.feature_rank(own[:, 1])) for own in found)
    return [*lines, f"rank of the distillation token after each block, {len(rows)} images of few classes: {ranks}"]


def taught(stage: Stage, module: Any, seen: list[dict[str, tuple[Tensor, Tensor]]]) -> list[str]:
    """What the teacher makes of the images; cosines are multiplied as in its own loss."""
    scale = (stage.teacher.loss.get("scale", 1.0) if stage.teacher else 1.0) / module.scale
    lines = ["the teacher on training images      accuracy %   entropy (nats)"]
    for name in seen[0]:
        logits = torch.cat([scale * module.taught_by(part[name][0]) for part in seen])
        accuracy, entropy = transformers.judged(logits, torch.cat([part[name][1] for part in seen]))
        lines.append(f"  {name:32} {100 * accuracy.item():10.1f} {entropy.item():16.3f}")
    return lines


def looked(images: list[Tensor], network: transformers.TwoTokens) -> list[str]:
    """How far the heads of the first blocks look."""
    grid, patch = network.body.patch_embed.grid_size, network.body.patch_embed.patch_size[0]
    shown = range(min(SHOWN, len(network.body.blocks)))
    sums = [torch.zeros(()) for _ in shown]
    for part in images:
        maps = transformers.attention(network, part)
        for number in shown:
            far = transformers.attention_distance(maps[number], grid, patch).cpu()
            sums[number] = sums[number] + len(part) * far
    whole = sum(map(len, images))
    heads = [" ".join(f"{value:.1f}" for value in sorted((total / whole).tolist())) for total in sums]
    return [f"attention distance of the heads of block {number + 1} (pixels): {heads[number]}" for number in shown]


def chunks(split: Split, rows: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    for first in range(0, len(rows), CHUNK):
        yield pixels(split.take(rows[first : first + CHUNK]), device)


def views(
    stage: Stage, split: Split, rows: np.ndarray, counts: Tensor, device: torch.device
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Images and main targets of every chunk, as they are and as the student was shown them."""
    generator = torch.Generator(device).manual_seed(0)
    view, before = build.function("views", stage.views[0]), stage.mixing or (stage.resume and stage.resume.mixing)
    own = build.function("views", stage.views[-1]) if len(stage.views) > 1 else None  # what the teacher has instead
    targets = torch.as_tensor(split.target[rows]).to(device).split(CHUNK)
    for images, target in zip(chunks(split, rows, device), targets, strict=True):
        strong = view(images, generator)
        found = {"as they are": (images, target), "augmented": (strong, target)}
        if own:
            found["augmented for the teacher"] = (own(images, generator), target)
        if before:
            mixed, other, weight = build.function("mixing", before)(strong, target, counts, generator)
            found["augmented and mixed"] = (mixed, torch.where(weight >= 0.5, target, other))
        yield found


if __name__ == "__main__":
    sys.exit(command.run(main))
