"""Several models as one: their averaged prediction, the folder that holds them, and how it is opened.

`ensemble.json` says how the members are weighted, `members/<name>` holds each as a model folder of its own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayltr import shipping
from rayltr.folding import Finished

MODES = ("logit", "prob")


class Ensemble(nn.Module):
    """Log-probabilities [B,C] of models for one set of classes, from images in [0, 1].

    weights [M,C]: of every model for every class, columns sum to 1; bias [C].  mode "logit" averages the models'
    log-probabilities, which are then normalised, "prob" their probabilities.
    """

    weights: Tensor
    bias: Tensor

    def __init__(self, members: Sequence[nn.Module], weights: np.ndarray, bias: np.ndarray, mode: str):
        super().__init__()
        self.members, self.mode = nn.ModuleList(members), mode
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        logs = torch.stack([member(images).log_softmax(1) for member in self.members])
        if self.mode == "prob":
            return (self.weights[:, None] * logs.exp()).sum(0).clamp(min=1e-30).log()
        return ((self.weights[:, None] * logs).sum(0) + self.bias).log_softmax(1)


def spread(value: Any, groups: Mapping[str, Sequence[int]], classes: int) -> np.ndarray:
    """A weight or bias for every class [C]: of one number, one by group name, or one number per class."""
    if not isinstance(value, Mapping):
        return np.zeros(classes) + np.asarray(value, np.float64)
    found = np.full(classes, np.nan)
    for name, number in value.items():
        found[groups[name]] = number
    return found


def written(out: Path, members: Sequence[Finished], note: Mapping[str, Any]) -> Ensemble:
    """Writes `ensemble.json` and the folders of members that it names; returns the whole as one model."""
    for entry, found in zip(note["members"], members, strict=True):
        (out / entry["folder"]).mkdir(parents=True)
        shipping.weighed(out / entry["folder"], found)
    (out / "ensemble.json").write_text(json.dumps({"rayltr": shipping.SCHEMA, **note}, indent=1))
    return assembled([found.model for found in members], note, len(members[0].facts.classes))


def assembled(models: Sequence[nn.Module], note: Mapping[str, Any], classes: int) -> Ensemble:
    """The models weighted as an ensemble.json says.  Raises ValueError for one that says nothing sensible."""
    groups, bias = note.get("groups", {}), spread(note.get("bias", 0.0), note.get("groups", {}), classes)
    weights = np.stack([spread(member["weight"], groups, classes) for member in note["members"]])
    if note["mode"] not in MODES or len(models) != len(weights):
        raise ValueError(f"the mode is one of {', '.join(MODES)}, and every member has a weight")
    if not (np.isfinite(bias).all() and np.allclose(weights.sum(0), 1, atol=1e-6)):
        raise ValueError("the weights of every class sum to 1, and there is a bias for it")
    return Ensemble(models, weights, bias, note["mode"])


def opened(folder: Path, device: torch.device) -> tuple[Ensemble, dict[str, Any]]:
    """An exported ensemble in eval mode and the config of its first member, whose classes and image size are all's.

    Raises ValueError for a folder that is no export or is damaged.
    """
    try:
        note = json.loads((folder / "ensemble.json").read_text())
        if note.get("rayltr") != shipping.SCHEMA:
            raise ValueError(f"it is of an incompatible version ({note.get('rayltr')}, here {shipping.SCHEMA})")
        parts = [shipping.opened(folder / member["folder"], device) for member in note["members"]]
        labels = [config["label_names"] for _, config in parts]
        if any(names != labels[0] for names in labels):
            raise ValueError("its members have other classes")
        model = assembled([model for model, _ in parts], note, len(labels[0]))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{folder} is no exported ensemble, or damaged: {type(error).__name__}: {reason}") from error
    return model.to(device).eval(), parts[0][1]
