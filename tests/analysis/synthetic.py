"""Studies whose truth is known: what the statistics of the report are held against.

Item i of class c has a difficulty that all trials share; trial m predicts it right if

    skill[m, c] + sqrt(shared) * difficulty[i] + sqrt(1 - shared) * own[m, i] > 0

with standard normal difficulty and own, so that its true accuracy on class c is Phi(skill[m, c]).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from rayltr import metrics

LEVELS: dict[str, tuple] = {"loss": ("ce", "focal", "ldam", "bsce"), "drw": (False, True), "mixup": ("none", "input")}
"""The factors of the trials.  `mixup.alpha` is active with input mixup only, `drw.switch` with drw only."""

SHARES = {"loss": 0.71, "drw": 0.06, "mixup": 0.06}
PAIR = ("loss", "drw"), 0.17
"""The true shares of the variance over the full grid of the factors."""


@dataclass(frozen=True, eq=False)
class Sample:
    """hits [M, N] on target [N]; truth [M, C], the accuracies on endless data; groups as in `metrics.groups`."""

    hits: np.ndarray
    target: np.ndarray
    truth: np.ndarray
    groups: dict[str, np.ndarray]

    def true(self, name: str) -> np.ndarray:
        """The true score [M] by the name of a group, or `balanced`."""
        return self.truth.mean(1) if name == "balanced" else self.truth[:, self.groups[name]].mean(1)


def sample(
    seed: int,
    *,
    trials: int = 100,
    classes: int = 100,
    each: int = 20,
    spread: float = 0.045,
    tilt: float = 0.12,
    shared: float = 0.6,
    slides: Sequence[float] = (0.0,),
    seeds: int = 1,
    wobble: float = 0.0,
) -> Sample:
    """Trials of a study on `each` images per class of a long tail, three groups of classes.

    spread, tilt: standard deviations of the trials' skill at everything, and at rare as against frequent classes,
    in probits (0.045 is about 1.3 points of balanced accuracy).  slides: every trial at these amounts of skill moved
    from frequent to rare classes, as tau does; its rows follow each other and share their luck.  seeds: every trial
    trained so often, with rows that follow each other, luck of their own and a skill that differs by `wobble`, a
    standard deviation in probits; `truth` is the trial's, over all seeds.
    """
    random = np.random.default_rng(seed)
    rare = np.linspace(-1, 1, classes)
    base = 0.3 - 0.7 * rare + random.normal(0, 0.5, classes)
    skill = base + random.normal(0, spread, (trials, 1)) + random.normal(0, tilt, (trials, 1)) * rare
    skill = np.repeat(skill + random.normal(0, 0.1, (trials, classes)), seeds, 0)
    target = np.repeat(np.arange(classes), each)
    luck = np.sqrt(shared) * random.normal(size=len(target))
    luck = luck + np.sqrt(1 - shared) * random.normal(size=(len(skill), len(target)))
    moved = np.asarray(slides, float)
    bent = moved[:, None] * rare - 0.5 * moved[:, None] ** 2  # the further, the more the whole suffers
    skills = skill[:, None] + bent
    luck = luck + random.normal(0, wobble, (len(skill), 1))
    hits = (skills[:, :, target] + luck[:, None] > 0).reshape(-1, len(target))
    truth = norm.cdf(skills / np.sqrt(1 + wobble**2))
    return Sample(hits, target, truth.reshape(-1, classes), thirds(classes))


def thirds(classes: int) -> dict[str, np.ndarray]:
    """Three groups of consecutive classes, many first."""
    return dict(zip(metrics.GROUPS, np.array_split(np.arange(classes), 3), strict=True))


def scores_on_grid() -> np.ndarray:
    """The true mean score [loss, drw, mixup], with main effects and the one interaction of SHARES and PAIR."""
    loss = np.array([-1.5, -0.5, 0.5, 1.5])[:, None, None]
    drw = np.array([-1.0, 1.0])[None, :, None]
    mixup = np.array([-1.0, 1.0])[None, None, :]
    both = np.array([1.0, -1.0, -1.0, 1.0])[:, None, None] * drw
    parts = ((loss, SHARES["loss"]), (drw, SHARES["drw"]), (mixup, SHARES["mixup"]), (both, PAIR[1]))
    return 0.4 + 0.02 * sum(np.sqrt(share) * part / part.std() for part, share in parts)


@dataclass(frozen=True, eq=False)
class Factors:
    """The parameters of some trials, their scores [T], and which of them were laid out as a balanced design [T]."""

    params: list[dict[str, Any]]
    values: np.ndarray
    designed: np.ndarray


def factors(seed: int, *, trials: int = 150, designed: float = 1.0, noise: float = 0.004) -> Factors:
    """Trials with the factors of LEVELS: the first share `designed` drawn at random, the rest seeking high scores."""
    random = np.random.default_rng(seed)
    grid = scores_on_grid()
    first = int(np.ceil(designed * trials))
    params, values = [], []
    for number in range(trials):
        cell = _cell(random, grid.shape, values, params, number < first)
        chosen = {name: LEVELS[name][i] for name, i in zip(LEVELS, cell, strict=True)}
        value = grid[cell] + random.normal(0, noise)
        if chosen["mixup"] == "input":
            chosen["mixup.alpha"] = float(random.uniform(0.1, 1.0))
            value += 0.01 * (chosen["mixup.alpha"] - 0.55)
        if chosen["drw"]:
            chosen["drw.switch"] = [0.6, 0.7, 0.8][random.integers(3)]
            value += 0.04 * (chosen["drw.switch"] - 0.7)
        params.append(chosen)
        values.append(value)
    return Factors(params, np.array(values), np.arange(trials) < first)


def _cell(random: np.random.Generator, shape: tuple, values: list, params: list, free: bool) -> tuple:
    """A cell of the grid: at random, or like TPE, factor by factor as in one of the best tenth of the trials so far."""
    if free:
        return tuple(int(random.integers(n)) for n in shape)
    best = np.argsort(values)[::-1][: max(len(values) // 10, 2)]
    cell = []
    for (name, levels), n in zip(LEVELS.items(), shape, strict=True):
        seen = levels.index(params[random.choice(best)][name])
        cell.append(seen if random.random() < 0.7 else int(random.integers(n)))
    return tuple(cell)
