"""`python -m rayltr.inspect RUN`: what the two tokens of a student have learnt, and how its teacher sees its images."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayltr import build, command, recipe, records, transformers
from rayltr.data import Data, Split
from rayltr.interface import Batch, Resources
from rayltr.metrics import groups
from rayltr.spec import Stage, end, parse
from rayltr.store import Store
from rayltr.train import assembled, facts, mixed, pixels
from rayltr.trial import Trial

CHUNK = 100
"""So many images pass the network at once: the attention of all heads is kept."""
SHOWN = 2
"""The first blocks, whose attention is looked at."""
PLAIN, STRONG, MIXED = "as they are", "augmented", "augmented and mixed"
TEACHER = "augmented for the teacher"
"""How images are seen."""


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
    row = recipe.row_of(run, options.trial)
    stage = parse(json.loads(row["recipe"]))
    device = Resources(device=options.device).place()
    stage, module, data = restored(run, stage, device)
    if not hasattr(module, "both"):
        raise ValueError(f"trial {row['trial']} is of the method {stage.method.name}; only students with two tokens, "
                         "of the method tokens, can be inspected")  # fmt: skip
    found = measured(stage, module, data, options.images, device)
    print("\n".join(told(found)))
    records.write_note(run, "inspected", row["trial"], {"address": row["address"], **found})
    print(f"the report of {run} shows this, too: python -m analysis {options.run}")
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
def measured(stage: Stage, module: Any, data: Data, images: int, device: torch.device) -> dict[str, Any]:
    """The measures as plain data: `images`, how many; `views` by name, of training images; `attention`; `rank`."""
    split, body = data.train, module.backbone.body
    chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:images])
    seen = [*views(stage, split, chosen, torch.as_tensor(data.counts), device)]
    return {
        "images": len(chosen),
        "views": {name: viewed(module, [part[name] for part in seen], name != TEACHER) for name in seen[0]},
        "attention": looked([module.backbone.normalised(part[PLAIN][0]) for part in seen], body),
        "rank": ranked(module, data, images, device),
    }


def viewed(module: Any, seen: list[tuple[Tensor, Tensor]], student: bool) -> dict[str, float]:
    """What the teacher makes of images with targets, and how far apart the student's tokens are, if it sees them."""
    logits = torch.cat([module.as_trained * module.taught_by(images) for images, _ in seen])
    accuracy, entropy = transformers.judged(logits, torch.cat([target for _, target in seen]))
    found = {"teacher_accuracy": accuracy.item(), "teacher_entropy": entropy.item()}
    if student:
        tokens = torch.cat([module.both(images)[2] for images, _ in seen])
        found["token_distance"] = transformers.token_distance(tokens).item()
    return found


def looked(images: list[Tensor], network: transformers.TwoTokens) -> dict[str, Any]:
    """How far the heads of the first blocks look, ascending, and how far they would if they looked everywhere alike."""
    grid, patch = network.body.patch_embed.grid_size, network.body.patch_embed.patch_size[0]
    shown = range(min(SHOWN, len(network.body.blocks)))
    sums, tokens = [torch.zeros(()) for _ in shown], 1
    for part in images:
        maps = transformers.attention(network, part)
        tokens = maps[0].shape[-1]
        for number in shown:
            far = transformers.attention_distance(maps[number], grid, patch).cpu()
            sums[number] = sums[number] + len(part) * far
    whole = sum(map(len, images))
    anywhere = transformers.attention_distance(torch.ones(1, 1, tokens, tokens), grid, patch)
    return {"blocks": [sorted((total / whole).tolist()) for total in sums], "uniform": anywhere.item()}


def ranked(module: Any, data: Data, images: int, device: torch.device) -> dict[str, Any]:
    """The rank of the distillation token on images of few classes; `unseen`: how many of them are of validation."""
    backbone, (seen, unseen) = module.backbone, rare(data, images)
    parts = [*chunks(data.train, seen, device), *chunks(data.val, unseen, device)]
    found = torch.cat([transformers.blocks(backbone.body, backbone.normalised(part))[:, :, 1] for part in parts], 1)
    ranks = [transformers.feature_rank(own) for own in found]
    return {"blocks": ranks, "images": found.shape[1], "unseen": len(unseen), "width": found.shape[2]}


def rare(data: Data, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training images of few classes, and rows of validation where these are not enough."""
    few, random = groups(data.counts)[0]["few"], np.random.default_rng(0)
    known = [np.flatnonzero(np.isin(split.target, few) | (len(few) == 0)) for split in (data.train, data.val)]
    seen, unseen = (random.permutation(rows) for rows in known)
    return np.sort(seen[:images]), np.sort(unseen[: max(0, images - len(seen))])


def told(found: Mapping[str, Any]) -> list[str]:
    """The measures as lines."""
    lines = ["training images              teacher: accuracy %   entropy (nats)   distance of the tokens (1 - cosine)"]
    for name, own in found["views"].items():
        distance = f"{own['token_distance']:.3f}" if "token_distance" in own else "-"
        lines.append(f"  {name:26} {100 * own['teacher_accuracy']:19.1f} {own['teacher_entropy']:16.3f} {distance:>24}")
    for number, heads in enumerate(found["attention"]["blocks"], 1):
        shown = " ".join(f"{value:.1f}" for value in heads)
        lines.append(f"attention distance of the heads of block {number} (pixels): {shown}")
    rank = found["rank"]
    images, most = rank["images"], f", so at most {rank['images'] - 1}" if rank["images"] <= rank["width"] else ""
    unseen = f" ({rank['unseen']} of validation)" if rank["unseen"] else ""
    shown = " ".join(map(str, rank["blocks"]))
    return [*lines, f"rank of the distillation token after each block, {images} images of few classes{unseen}{most}: "
            f"{shown}"]  # fmt: skip


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
        found = {PLAIN: (images, target), STRONG: (strong, target)}
        if own:
            found[TEACHER] = (own(images, generator), target)
        if before:
            mix = build.function("mixing", before)(strong, target, counts, generator)
            batch = mixed(Batch([strong], target, target), mix)  # which rows of the split they are matters to nobody
            found[MIXED] = (batch.views[0], batch.main)
        yield found


if __name__ == "__main__":
    sys.exit(command.run(main))
