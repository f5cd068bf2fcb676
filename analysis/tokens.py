"""Students with two tokens: what each token knows, how training went, and what `rayltr.inspect` saw in them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis import estimates, fidelity, resample
from analysis.estimates import Estimate
from analysis.evidence import SCORES, Evidence
from analysis.load import Trial
from rayltr import records
from rayltr.metrics import GROUPS

Floats = NDArray[np.float64]
Groups = Mapping[str, ArrayLike]

HEADS = ("cls", "dist")
"""The logits of the class token and of the distillation token alone."""
DISTANCE, ACCURACY, ENTROPY = "token_distance", "teacher_accuracy", "teacher_entropy"
"""What a student measures of itself in every epoch."""


def students(evidence: Evidence) -> list[Trial]:
    """The measured trials that have both tokens, the best on balance first."""
    found = zip(evidence.points["balanced"], evidence.trials, strict=True)
    both = [pair for pair in found if pair[1].packed is not None and set(HEADS) <= set(pair[1].heads)]
    return [trial for _, trial in sorted(both, key=lambda pair: -pair[0])]


@dataclass(frozen=True, eq=False)
class Judged:
    """The heads of a student, as they predict, without any correction.

    now: their scores [1, H] over all classes (balanced) and by group; drawn: the same in every draw, [B, H].
    """

    heads: list[str]
    now: dict[str, Floats]
    drawn: dict[str, Floats]

    def accuracies(self) -> dict[str, dict[str, Estimate]]:
        """The accuracy of every head: over all classes and by group."""
        return {
            head: {name: estimates.estimate(float(self.now[name][0, i]), self.drawn[name][:, i]) for name in SCORES}
            for i, head in enumerate(self.heads)
        }

    def apart(self) -> dict[str, Estimate]:
        """By group, how much better the distillation token is than the class token, image by image."""
        one, other = self.heads.index("dist"), self.heads.index("cls")
        return {name: estimates.difference(self.drawn[name], one, other, self.now[name][0]) for name in GROUPS}


def hits(evidence: Evidence, trial: Trial) -> dict[str, NDArray[np.bool_]]:
    """Whether each head predicts each validation image right, [N] by head."""
    stored = records.read_predictions(records.within(trial.folder, trial.row["predictions_val"]))
    return {head: pred == evidence.target for head, pred in stored.pred.items()}


def judged(evidence: Evidence, found: Mapping[str, NDArray[np.bool_]], groups: Groups) -> Judged:
    """The heads of `hits` by groups of classes."""
    stacked = np.stack([*found.values()])
    now = resample.grouped(stacked, evidence.target, groups)
    return Judged([*found], now, resample.grouped(stacked, evidence.target, groups, evidence.draws))


def epochs(trials: Iterable[Trial]) -> dict[str, dict[str, list[Floats]]]:
    """What students measured while they were trained: by trial and name, (epoch, value) [K, 2] of each stage.

    Epochs are those of the student, over all its stages.
    """
    by_folder: dict[str, dict[str, Trial]] = {}
    for trial in trials:
        by_folder.setdefault(trial.folder, {})[trial.row["trial"]] = trial
    found: dict[str, dict[str, list[Floats]]] = {}
    for folder, own in by_folder.items():
        begun: dict[str, int] = {}
        for curve in fidelity.curves(records.read_epochs(folder)):
            if curve.split == "measured" and curve.trial in own:
                first = begun.setdefault(curve.trial, curve.begun)
                at = curve.begun - first + 1 + np.arange(len(curve.value))
                stages = found.setdefault(own[curve.trial].id, {}).setdefault(curve.metric, [])
                stages.append(np.stack([at, curve.value], 1))
    return found


def inspected(trial: Trial) -> dict[str, Any] | None:
    """What `rayltr.inspect` measured of a trial; None if it has not, or only of another training of that name."""
    found = records.read_note(trial.folder, "inspected", trial.row["trial"])
    return found if found and found.get("address") == trial.row["address"] else None
