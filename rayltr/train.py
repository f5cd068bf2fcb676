"""The loop: a stage and its parents in, trained weights and logits out.

Every choice enters as a value, so one loop serves every method; a branch on a name in this file is a bug.
`python -m rayltr.train` runs one recipe without any search (see `rayltr.recipe`).
"""

import sys
from importlib import import_module

if __name__ == "__main__":  # the command answers --help before torch is imported
    command = import_module("rayltr.command")
    sys.exit(command.run(import_module("rayltr.recipe").main))

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayltr import build
from rayltr.ahead import Reader
from rayltr.catalogue import complete
from rayltr.data import Data, Split, load
from rayltr.fused import fused
from rayltr.interface import ALONE, Batch, Diverged, Facts, Lane, Resources, State
from rayltr.parallel import all_sum, rank, synchronised, together, world
from rayltr.spec import Stage, end, start


def train(
    stage: Stage,
    parents: Mapping[str, State] | None = None,
    *,
    data: Data | None = None,
    begun: State | None = None,
    resources: Resources | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    on_snapshot: Callable[[Callable[[], State]], None] = lambda make: None,
    splits: Iterable[str] = ("val",),
    most: int | None = None,
) -> tuple[State, dict[str, dict[str, np.ndarray]]]:
    """Trains a stage to its end and predicts.

    parents: finished states by role (resume, init, teacher).  begun: a snapshot of this very stage to go on from.
    on_snapshot is called after every epoch but the last, with a function that makes the state if it is to be kept.
    most: a rehearsal has no more steps in an epoch than that, and prepares with no more batches.
    Returns the final state and, for each split asked for, float32 logits [N,C] by head.  Raises `Diverged` when the
    loss is no finite number, and ValueError when a stage or a hand-over of weights cannot be.
    """
    stage, parents, resources = complete(stage), dict(parents or {}), resources or Resources()
    data, device = data or load(stage.source), resources.place()
    resources.settle()
    module, optimiser = assembled(stage, facts(data), parents, begun, device)
    state = begun or parents.get("resume") or State({}, {}, start(stage))
    history = list(begun.history) if begun else []
    run = epochs(stage, data, module, optimiser, state.epoch, device, most, resources.lane)
    with resources.lane.training(module, stage.backbone):
        for record in run:
            history.append(record)
            if record["epoch"] < end(stage):
                on_snapshot(partial(snapshot, module, optimiser, record["epoch"], history))
            on_epoch(record)
    logits = {split: predict(module, getattr(data, split), device, stage.precision) for split in splits}
    return snapshot(module, optimiser, end(stage), history), logits


def facts(data: Data) -> Facts:
    return Facts(data.classes, data.counts, data.mean, data.std, data.size)


def assembled(
    stage: Stage, known: Facts, parents: Mapping[str, State], begun: State | None, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The method and its optimiser, as they stand at the beginning of the epochs to train."""
    teacher = None
    if stage.teacher is not None:
        teacher = build.teacher(stage.teacher, known, parents["teacher"])
        teacher = teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    module = build.method(stage, known, teacher).to(device)
    before = begun or parents.get("resume")
    if before is not None:
        module.load_state_dict({**before.model, **before.rows})
    elif "init" in parents:
        build.adopt(module, parents["init"])
    module = synchronised(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = build.optimiser(stage, module)
    if before is not None:
        restore(optimiser, before.optimiser)
    return module, optimiser


def epochs(
    stage: Stage,
    data: Data,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    first: int,
    device: torch.device,
    most: int | None = None,
    lane: Lane = ALONE,
) -> Iterator[dict[str, Any]]:
    """THE loop: trains the epochs from the clock `first` to the stage's end, yielding one record after each."""
    views = [build.function("views", view) for view in stage.views]
    alter = getattr(module, "alter", None)
    sampler = build.function("sampler", stage.sampler)
    mixing = build.function("mixing", stage.mixing) if stage.mixing else None
    schedule = build.function("schedule", stage.schedule)
    horizon = stage.horizon or end(stage)
    counts, targets = torch.as_tensor(data.counts), torch.as_tensor(data.train.target)
    model, read = together(module) if first < end(stage) else module, Reader(data.train, device, lane.members)
    if hasattr(optimiser, "guard"):
        optimiser.guard(model)
    if first < end(stage) or not stage.epochs:
        prepared(module, stage, read, most)
    for epoch in range(first, end(stage)):
        began, done = lane.clock(), 0
        sums: dict[str, Tensor | float] = {}
        # Everything random of an epoch comes from (seed, epoch): where a run was cut or resumed changes no number.
        host, here = generators(stage.seed, epoch, device)
        indices = sampler(counts, targets, (epoch + 1) / horizon, host)
        steps = len(range(max(1, len(indices) // stage.batch))[:most])
        module.train()
        if hasattr(module, "between"):
            module.between(epoch)  # type: ignore[operator]
        for step, rows, images in batches(read, indices, stage.batch, steps):
            done += len(rows)
            target, rows = moved(targets[rows], device), moved(rows, device)
            if alter:
                images = alter(images, target, rows, here)
            batch = Batch([view(images, here) for view in views], target, rows)
            if mixing:
                batch = mixed(batch, mixing(batch.views[0], target, counts, here))
            factor = schedule((epoch * steps + step + 1) / (horizon * steps))
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * factor
            terms: dict[str, Tensor] = {}

            def closure(batch: Batch = batch, terms: dict[str, Tensor] = terms) -> Tensor:
                optimiser.zero_grad()
                with arithmetic(stage.precision, device):
                    found = model(batch)
                loss = torch.stack([*found.values()]).sum()
                lane.backward(loss)
                for name, value in (found | getattr(module, "measured", {})).items():
                    terms.setdefault(name, value.detach())  # of SAM's two passes, the first is at the weights
                return loss

            optimiser.step(closure)  # type: ignore[arg-type]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
        means = {name: float(all_sum(torch.as_tensor(total))) / (steps * world()) for name, total in sums.items()}
        beside = {name: means.pop(name) for name in getattr(module, "measured", {})}
        yield checked(epoch + 1, means, done, lane.clock() - began) | ({"measured": beside} if beside else {})


def mixed(batch: Batch, mix: tuple[Tensor, Tensor, Tensor]) -> Batch:
    """The batch after mixing.  Where k neighbours became one image, the first of them gives target, row and views."""
    images, other, weight = mix
    k = len(batch.target) // len(images)
    views = [images, *(view[::k] for view in batch.views[1:])]
    return Batch(views, batch.target[::k], batch.rows[::k], other, weight, getattr(mix, "partner", None))


def prepared(module: nn.Module, stage: Stage, read: Reader, most: int | None = None) -> None:
    """Shows the training images to a method that has `prepare`, each worker a share of them or what it wants.

    They are raw, or what the first view makes of them if the method is `augmented`.
    """
    if hasattr(module, "prepare"):
        split, device = read.split, read.device
        wanted = getattr(module, "wanted", lambda size, batch: torch.arange(rank(), size, world()).split(batch))
        parts = wanted(len(split), stage.batch)[:most]
        loaded = zip(parts, read([rows.numpy() for rows in parts]), strict=True)
        target = torch.as_tensor(split.target).to(device)
        seen = ((moved(rows, device), pixels(images, device), target[rows]) for rows, images in loaded)
        if getattr(module, "augmented", False):
            view, here = build.function("views", stage.views[0]), generators(stage.seed, 0, device)[1]
            seen = ((rows, view(images, here), classes) for rows, images, classes in seen)
        with torch.no_grad(), arithmetic(stage.precision, device):
            module.prepare(seen, len(split))  # type: ignore[operator]


def generators(seed: int, epoch: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """Two generators for one epoch: for the indices (the same on every worker) and for views and mixing (its own)."""
    words = np.random.SeedSequence((seed, epoch)).generate_state(2 + rank(), np.uint64)
    shared, own = (int(word) >> 1 for word in (words[0], words[1 + rank()]))
    torch.manual_seed(own)  # for what draws inside forward, such as dropout
    return torch.Generator().manual_seed(shared), torch.Generator(device).manual_seed(own)


def batches(read: Reader, indices: Tensor, size: int, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, rows [B], float images [B,3,H,W] in [0, 1]) for this worker; an incomplete last batch is left out."""
    parts = [portion(indices[step * size : (step + 1) * size]) for step in range(steps)]
    for step, images in enumerate(read([rows.numpy() for rows in parts])):
        yield step, parts[step], pixels(images, read.device)


def portion(rows: Tensor) -> Tensor:
    """This worker's stretch of a batch; neighbours that belong together (sampler `reverse`) stay together."""
    pairs = (len(rows) + 1) // 2
    first, last = (2 * (pairs * number // world()) for number in (rank(), rank() + 1))
    return rows[first:last]


def pixels(images: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 [B,H,W,3] as float [B,3,H,W] in [0, 1], channels last; they cross to the device as uint8."""
    return moved(torch.as_tensor(images), device).permute(0, 3, 1, 2).to(torch.float32).div_(255)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device.  A GPU gets a pinned copy, which torch keeps until it has arrived, so that nobody waits for it."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def checked(epoch: int, terms: dict[str, float], images: int, seconds: float) -> dict[str, Any]:
    """The record of an epoch.  Raises `Diverged` when a term is no finite number."""
    for name, value in terms.items():
        if not math.isfinite(value):
            raise Diverged(f"the term {name!r} became {value} in epoch {epoch}; a lower learning rate may help")
    return {"epoch": epoch, "terms": terms, "wall_s": seconds, "images_per_s": images * world() / max(seconds, 1e-9)}


@torch.inference_mode()
def predict(
    module: nn.Module, split: Split, device: torch.device, precision: str = "fp32", size: int = 500
) -> dict[str, np.ndarray]:
    """Float32 logits [N,C] by head for a whole split, in eval mode."""
    module.eval()
    parts = []
    rows = [np.arange(first, min(first + size, len(split))) for first in range(0, len(split), size)]
    # BatchNorm stays by itself in fp32, so that no bit of those predictions depends on how they are made
    with fused(*module.children()) if precision == "bf16" else nullcontext():
        for images in Reader(split, device)(rows):
            with arithmetic(precision, device):
                found = module.predict(pixels(images, device))  # type: ignore[operator]
            parts.append({head: z.float().cpu() for head, z in found.items()})
    return {head: torch.cat([part[head] for part in parts]).numpy() for head in parts[0]} if parts else {}


def snapshot(module: nn.Module, optimiser: torch.optim.Optimizer, epoch: int, history: list[dict]) -> State:
    """A copy on the CPU of all that the run needs to go on."""
    model = {name: copied(value) for name, value in module.state_dict().items()}
    rows = {name: model.pop(name) for name in getattr(module, "sharded", ())}
    kept = tuple(module.keep()) if hasattr(module, "keep") else tuple(model)  # type: ignore[operator]
    moments = {
        f"{position}.{name}": copied(torch.as_tensor(value))
        for position, entries in optimiser.state_dict()["state"].items()
        for name, value in entries.items()
        if value is not None
    }
    return State(model, moments, epoch, kept, list(history), rows)


def copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def restore(optimiser: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Loads the moments of a saved optimiser; hyper-parameters stay those of the stage that goes on."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        position, name = key.split(".", 1)
        state.setdefault(int(position), {})[name] = value.clone()
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
