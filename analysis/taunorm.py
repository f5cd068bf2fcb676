"""Tau-norm: what a linear classifier predicts with its weights divided by a power of their lengths.

The logits are (w . f) / |w|^t, without the bias (Kang et al. 2020, "Decoupling representation and classifier for
long-tailed recognition", eq. 4).  That is (z - b) / |w|^t of the classifier's logits z, so stored logits and the
weights are enough, without features.  But logits are stored below the largest of their row, which is nothing to a
softmax and a lot to a division by lengths.  Where there are more classes than features the weights give it back: logits
are the image of few features, and no others give the same differences.
"""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as tensors_of
from scipy.optimize import minimize_scalar

from analysis.greedy import weighted
from analysis.load import Run, Trial
from analysis.reading import Floats
from rayltr import files, metrics, records

POWERS: Floats = np.arange(0, 16) / 10
"""The powers t that are looked at: 0, 0.1, ... 1.5."""

HEAD = "model.head."
AMPLIFIED = 1.0
"""A rounding error of the stored logits may come back this much larger, at most, in what they were stored below."""
APART = 0.01
"""Stored logits are those of the head if they differ by less than this share of their size (bf16: 0.004)."""


@dataclass(frozen=True, eq=False)
class Normed:
    """Scores [K] at every power of POWERS, names as in `metrics.scores`; the temperature [K] of the lowest NLL [K]."""

    trial: str
    scores: dict[str, Floats]
    temperature: Floats
    nll: Floats

    @property
    def at(self) -> int:
        """The position of the lowest NLL."""
        return int(self.nll.argmin())


def normed(run: Run, trial: Trial) -> Normed:
    """Tau-norm of a measured trial.

    Raises ValueError, in one line, where its classifier is not a single linear one, the weights are gone or damaged,
    or the stored logits do not tell enough.
    """
    assert run.items is not None
    weight, bias = classifier(trial)
    free = whole(run.logits(trial).astype(np.float64) - bias, weight)
    length = np.linalg.norm(weight, axis=1)
    length[length == 0] = 1  # a class with zero weight keeps it
    target, rows = run.items.target, []
    for power in POWERS:
        z = (free / length**power).astype(np.float32)
        rows.append((metrics.scores(z, target, run.counts, run.groups), *_fitted(z, target)))
    scores = {name: np.array([row[0][name] for row in rows]) for name in rows[0][0]}
    return Normed(trial.id, scores, np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))


def classifier(trial: Trial) -> tuple[Floats, Floats]:
    """Weight [C, D] and bias [C] of a trial's head, from the store of its run.

    Raises ValueError if they are not there, damaged, or not those of a linear head.
    """
    line, _, epoch = (trial.row["address"] or "").partition("@")
    path = records.within(trial.folder, f"store/{line}/{epoch:>06}")
    try:
        body, note = files.read(f"{path}.safetensors"), json.loads(files.read(f"{path}.json"))
    except (OSError, ValueError):
        raise ValueError("its weights are not stored (any more)") from None
    if files.checksum(body) != note["checksum"]:
        raise ValueError("its stored weights are damaged")
    tensors = {name: value for name, value in tensors_of(body).items() if name.startswith(HEAD)}
    if set(tensors) != {f"{HEAD}weight", f"{HEAD}bias"} or tensors[f"{HEAD}weight"].ndim != 2:
        raise ValueError("its classifier is not one linear layer with a bias")
    return tensors[f"{HEAD}weight"].astype(np.float64), tensors[f"{HEAD}bias"].astype(np.float64)


def whole(shifted: Floats, weight: Floats) -> Floats:
    """The products w . f [N, C] that are known up to a constant per row.

    Raises ValueError where they are no products of this weight, and where the constant cannot be told: without more
    classes than features, or hardly any.
    """
    classes, features = weight.shape
    mixed = np.hstack([weight, np.ones((classes, 1))])
    back = np.linalg.pinv(mixed)
    if classes <= features + 1 or np.linalg.norm(back[-1]) > AMPLIFIED:
        raise ValueError(f"it needs more classes than features ({classes} and {features}), because logits are stored "
                         "up to a constant per image")  # fmt: skip
    found = shifted @ back.T
    if np.linalg.norm(found @ mixed.T - shifted) > APART * np.linalg.norm(shifted):
        raise ValueError("its logits are not those of its linear classifier alone")
    return shifted - found[:, -1:]


def _fitted(z: NDArray[np.float32], target: NDArray[np.int64]) -> tuple[float, float]:
    """The temperature of the lowest class-balanced NLL of logits [N, C], and that NLL."""
    z = z - z.max(1, keepdims=True)
    own, weight, reach = z[np.arange(len(z)), target], weighted(target), np.log(metrics.HOTTEST)

    def loss(log_t: float) -> float:
        share = np.float32(np.exp(-log_t))
        return float(weight @ (np.log(np.exp(z * share).sum(1)) - own * share))

    found = minimize_scalar(loss, bounds=(-reach, reach), method="bounded", options={"xatol": 1e-2})
    return float(np.exp(found.x)), float(found.fun)
