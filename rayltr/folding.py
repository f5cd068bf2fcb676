"""Trained trials as models to ship, with the adjustment that validation chose folded into one linear classifier.

The export's forward takes RGB images in [0, 1] as float [B,3,H,W] and gives logits [B,C] that are already corrected:
z / T - tau * log prior, with the tau and temperature T that validation chose.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr import build
from rayltr.backbones import Normalised
from rayltr.experts import Heads
from rayltr.interface import Facts
from rayltr.metrics import fit
from rayltr.records import Predictions, read_note, read_predictions
from rayltr.spec import Stage, end, parse
from rayltr.store import Store


class Shipped(nn.Module):
    """A backbone and one linear classifier, which sees features of unit length with `normalise` (cosine heads)."""

    def __init__(self, backbone: Normalised, classes: int, normalise: bool):
        super().__init__()
        self.backbone, self.normalise = backbone, normalise
        self.classifier = nn.Linear(backbone.dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.classifier(F.normalize(features) if self.normalise else features)


@dataclass(frozen=True)
class Adjustment:
    """tau and temperature, the training counts [C] that the prior is taken from, and a bias [C] that is added."""

    tau: float
    temperature: float
    counts: np.ndarray
    bias: np.ndarray | float = 0.0

    def shift(self) -> Tensor:
        """-tau * log prior + bias, float64 [C]; an empty class counts as one image."""
        counts = torch.as_tensor(self.counts, dtype=torch.float64).clamp(min=1)
        return torch.as_tensor(self.bias, dtype=torch.float64) - self.tau * (counts / counts.sum()).log()


class Headed(nn.Module):
    """A head of a method as it was trained, or with `weights` several by their names, and the adjustment behind it."""

    shift: Tensor

    def __init__(
        self, method: nn.Module, head: str, adjustment: Adjustment, weights: Mapping[str, float] | None = None
    ):
        super().__init__()
        self.method, self.head, self.temperature = method, head, adjustment.temperature
        self.weights = weights or {head: 1.0}
        self.register_buffer("shift", adjustment.shift().float())

    def forward(self, images: Tensor) -> Tensor:
        heads = self.method.predict(images)  # type: ignore[operator]
        weighed = torch.stack([weight * heads[head] for head, weight in self.weights.items()]).sum(0)
        return weighed / self.temperature + self.shift


@torch.no_grad()
def folded(method: nn.Module, adjustment: Adjustment) -> Shipped:
    """The method's main prediction with the adjustment folded in.

    Raises ValueError when its head is not linear in its features, of any or of unit length.
    """
    if isinstance(method.head, Heads):
        raise ValueError("this method has a classifier for each of its experts, not one")
    backbone, head = method.backbone.double().eval(), method.head.double().eval()  # type: ignore[union-attr, operator]
    one = torch.eye(backbone.dim, dtype=torch.float64)  # type: ignore[arg-type]
    normalise = bool(torch.allclose(head(2 * one), head(one)))
    bias = head(0 * one[:1])[0]
    made = Shipped(backbone, len(bias), normalise).double()  # type: ignore[arg-type]
    made.classifier.weight.copy_((head(one) - bias).T / adjustment.temperature)
    made.classifier.bias.copy_(bias / adjustment.temperature + adjustment.shift())
    probe = torch.randn(8, backbone.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # type: ignore
    expected = head(probe) / adjustment.temperature + adjustment.shift()
    if not torch.allclose(made.classifier(F.normalize(probe) if normalise else probe), expected):
        raise ValueError("this head cannot be exported: it is not linear in its features")
    return made.float()


@dataclass(frozen=True)
class Finished:
    """A trained trial ready to be written: its model, what it was made of and what was measured."""

    model: Shipped | Headed
    stage: Stage
    facts: Facts
    adjustment: Adjustment


def finished(
    run: Path,
    row: Mapping[str, Any],
    size: tuple[int, int],
    head: str | None = None,
    bias: np.ndarray | float = 0.0,
    weights: Mapping[str, float] | None = None,
) -> Finished:
    """The model of a row of the trials table, from the run's store; neither data nor Ray are needed.

    head: which one; None is the main one.  bias: added to the corrected logits, [C].  weights: of the experts, by name,
    instead of the main head, whose tau and temperature they have.  Raises ValueError when the weights of the network
    are not in the store any more.
    """
    method, facts, val = trained(run, row, size)
    main = next(iter(val.logits))
    tau, temperature, _ = fit(val.logits[head or main], val.target, val.counts)
    adjustment = Adjustment(tau, temperature, val.counts, bias)
    if weights:
        model: Shipped | Headed = Headed(method, main, adjustment, weights).eval().float()
    else:
        model = shipped(method, head or main, adjustment, size, fold=head in (None, main))
    return Finished(model, parse(json.loads(row["recipe"])), facts, adjustment)


def trained(run: Path, row: Mapping[str, Any], size: tuple[int, int]) -> tuple[nn.Module, Facts, Predictions]:
    """The method of a row of the trials table with its trained weights, and its stored validation predictions."""
    place = run / row["predictions_val"]
    note = place.with_name(place.name.replace(".val.parquet", ".json"))
    if not note.exists():
        raise ValueError(f"the weights of trial {row['trial']} are not in {run} any more; train it again with "
                         f"`python -m rayltr.train {run} --trial {row['trial']}`")  # fmt: skip
    stage = parse(json.loads(note.read_text())["stage"])
    state = Store(run / "store").longest(stage)
    if state is None or state.epoch != end(stage):  # what a shorter training left is another model
        raise ValueError(f"the weights of trial {row['trial']} in {run} are damaged; train it again with "
                         f"`python -m rayltr.train {run} --trial {row['trial']}`")  # fmt: skip
    val = read_predictions(place)
    mean, std = (tuple(state.model[f"backbone.{name}"].flatten().tolist()) for name in ("mean", "std"))
    facts = Facts(tuple(val.classes), val.counts, mean, std, size)
    method = build.method(stage.but(backbone=stage.backbone.but(pretrained=None)), facts)
    build.adopt(method, state, again=True)
    return method, facts, val


def weighed(run: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """What `rayltr.adapt` found for a trial.  Raises ValueError if it has not, or for another training of that name."""
    note = read_note(run, "adapted", row["trial"])
    if note and note.get("address") == row["address"]:
        return note
    raise ValueError(f"{run} has no weights of experts for trial {row['trial']}: python -m rayltr.adapt {run} "
                     f"--trial {row['trial']} learns them")  # fmt: skip


@torch.no_grad()
def shipped(
    method: nn.Module, head: str, adjustment: Adjustment, size: tuple[int, int], fold: bool
) -> Shipped | Headed:
    """A head as a backbone and one linear classifier where it is the main one and that says the same; else whole."""
    whole = Headed(method, head, adjustment).eval()
    if fold:
        with contextlib.suppress(AttributeError, ValueError):
            made = folded(method, adjustment).eval()
            probe = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
            if torch.allclose(made(probe), whole.float()(probe), rtol=1e-3, atol=1e-3):
                return made
    return whole.float()
