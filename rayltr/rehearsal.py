"""One step of every stage of a chain: what cannot be trained is found before the first epoch, and what memory it takes.

A few real images and the loop itself, so nothing that a training would meet is described twice.  Where memory is
measured they are all there, because some methods hold a row for every image.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rayltr.catalogue import complete
from rayltr.compiled import Compiled
from rayltr.data import Data, Split, load
from rayltr.interface import ALONE, Diverged, Resources, State
from rayltr.spec import RandomTrial, Stage, chain, mapped, parents
from rayltr.studies import CONTROL, STUDY, find
from rayltr.train import train

__all__ = ["Diverged", "Resources", "peak", "rehearse"]

IMAGES = 500
"""So many are predicted at once; see `rayltr.train.predict`."""
PROBED = 4
"""Random points of a study whose memory is measured; the largest counts."""


def rehearse(stage: Stage, resources: Resources, *, whole: bool = False) -> None:
    """Trains every stage of a chain for one step and predicts; nothing is kept.

    whole: methods are made for all training images, and see one batch of them; else for a batch.  Raises what the
    training would raise at its first step: ValueError for values that cannot be.
    """
    sources: dict[Any, Data] = {}
    states: dict[Stage, State] = {}
    for own in chain(mapped(complete(stage), lambda own: own.but(epochs=min(own.epochs, 1)))):
        if own.source not in sources:
            sources[own.source] = load(own.source)
        given = {role: states[parent] for role, parent in parents(own).items()}
        data = sources[own.source]
        few = replace(data, val=spread(data.val, IMAGES)) if whole else sample(data, own.batch)
        states[own], _ = train(own, given, data=few, resources=resources, most=1)


def sample(data: Data, batch: int) -> Data:
    """A data set of one batch, of images from all over the training set; classes without an image are empty ones."""
    part = spread(data.train, batch)
    counts = np.bincount(part.target, minlength=len(data.counts))
    return replace(data, train=part, val=spread(data.val, IMAGES), counts=counts)


def spread(split: Split, size: int) -> Split:
    chosen = np.unique(np.linspace(0, len(split) - 1, min(size, len(split))).round().astype(np.int64))
    return replace(split, rows=split.rows[chosen], target=split.target[chosen])


def peak(settings: Any) -> tuple[int, int]:
    """(the most bytes that a trial of a search takes of a GPU, bytes that the GPU has), measured on the GPU here."""
    study, most, device = find(settings.plan.study), 0, Resources().place()
    resources = Resources(threads=settings.cpus, lane=Compiled() if settings.compile else ALONE)
    free, total = torch.cuda.mem_get_info()  # what is not free is what every process takes for itself
    for point in points(study):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        with suppress(Diverged):
            rehearse(settings.plan.stage(study, point), resources, whole=True)
        most = max(most, torch.cuda.max_memory_reserved(device))
    return most + total - free, total


def points(study: Any) -> list[dict[str, Any]]:
    """Points of a study: of its control arm, and some of its own drawn at random."""
    drawn = []
    for seed in range(PROBED + 1):
        trial, arm = RandomTrial(seed), STUDY if seed else CONTROL
        study.point(arm, trial)
        drawn.append({"arm": arm, **trial.asked})
    return drawn
