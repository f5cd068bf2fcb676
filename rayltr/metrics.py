"""The arithmetic of long-tailed evaluation, shared by validation and report: class groups, tau, calibration.

Scores are fractions in [0, 1].  Whatever was not measured (a class without images, an empty group, logits that are
not finite) is nan, never 0.  Two things can be corrected after training, without touching a weight: the temperature T
and the prior.  The corrected logits are

    z / T - tau * log prior        (tau acts after the temperature)

which is post-hoc logit adjustment (Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 9) of a
temperature-scaled classifier (Guo et al. 2017).  tau = 0, T = 1 are the classifier's own predictions.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

GROUPS = ("many", "medium", "few")
TAUS: Floats = np.arange(-5, 26) / 10
"""The grid on which tau is swept and fitted: -0.5, -0.4, ... 2.5."""

HOTTEST = 100.0
"""Temperatures are fitted between 1 / HOTTEST (cosine heads give logits within [-1, 1]) and HOTTEST."""

RANGES = {10: (3, 7), 100: (36, 71), 1000: (390, 835), 8142: (842, 4543)}
"""By the number of classes, where medium and few begin in the rule "deit_lt"."""

SUMMARY = (
    *("accuracy", "balanced", *GROUPS, "worst_decile", "nll", "balanced_nll", "ece"),
    *("tau", "temperature", "fitted_nll", "fitted_accuracy", "fitted_balanced", *(f"fitted_{name}" for name in GROUPS)),
    *("fitted_worst_decile", "fitted_ece", *(f"fitted_{name}_nll" for name in GROUPS), "area", "fewest_images"),
)
"""The keys of `summary`."""


def groups(counts: ArrayLike, rule: str = "auto") -> tuple[dict[str, Indices], str]:
    """The classes of each group (ascending indices), and the rule that was used.

    rule "shots": many > 100 training images, 20 <= medium <= 100, few < 20 (Kang et al. 2020; OLTR counts 20 as few
    and 100 as many).  "quantile": thirds of the classes by frequency; two classes are one many and one few.
    "deit_lt": ranges of the classes by frequency, as DeiT-LT (CVPR 2024) has them for 10, 100 (36, 35 and 29 classes),
    1000 and 8142 classes.  "auto": shots, unless that leaves a group empty.
    Raises ValueError for another rule, and where the rule has no ranges.
    """
    n = np.asarray(counts)
    if rule not in ("auto", "shots", "quantile", "deit_lt"):
        raise ValueError(f"unknown group rule {rule!r}: known: auto, shots, quantile, deit_lt")
    if rule == "deit_lt" and len(n) not in RANGES:
        raise ValueError(f"the group rule deit_lt is for {', '.join(map(str, RANGES))} classes, not {len(n)}")
    member = np.where(n > 100, 0, np.where(n >= 20, 1, 2))
    if rule == "auto":
        rule = "shots" if len(np.unique(member)) == len(GROUPS) else "quantile"
    rank = np.argsort(np.argsort(-n, kind="stable"), kind="stable")
    if rule == "quantile":
        member = (3 * (2 * rank + 1)) // (2 * max(len(n), 1))
    elif rule == "deit_lt":
        member = np.searchsorted(RANGES[len(n)], rank, side="right")
    return {name: np.flatnonzero(member == position) for position, name in enumerate(GROUPS)}, rule


def class_accuracy(pred: ArrayLike, target: ArrayLike, classes: int) -> Floats:
    """Share of each class's images that are predicted right, float64 [C]; nan for a class without images."""
    target = np.asarray(target)
    images = np.bincount(target, minlength=classes)
    right = np.bincount(target[np.asarray(pred) == target], minlength=classes)
    return np.where(images > 0, right / np.maximum(images, 1), np.nan)


def group_means(per_class: ArrayLike, groups: Mapping[str, ArrayLike]) -> dict[str, float]:
    """The mean over the measured classes of each group; nan where none is measured."""
    values = np.asarray(per_class)
    return {name: _mean(values[np.asarray(members, np.int64)]) for name, members in groups.items()}


def worst_decile(per_class: ArrayLike) -> float:
    """The mean of the worst tenth of the measured classes (at least one class)."""
    measured = np.sort(_measured(np.asarray(per_class)))
    return _mean(measured[: max(1, len(measured) // 10)])


def adjust(logits: ArrayLike, counts: ArrayLike, tau: float) -> NDArray[Any]:
    """`z - tau * log prior` [N, C], where the prior is the share of training images and an empty class counts as 1."""
    z = _floating(logits)
    return z - (tau * _log_prior(counts)).astype(z.dtype)


def balanced_nll(logits: ArrayLike, target: ArrayLike, classes: int, temperature: float = 1.0) -> float:
    """Negative log-likelihood in nats at `logits / temperature`: mean per class, then over the measured classes."""
    return float(_balanced_nll(logits, target, temperature, np.zeros((1, classes)))[0])


def fit(logits: ArrayLike, target: ArrayLike, counts: ArrayLike) -> tuple[float, float, float]:
    """tau (on TAUS), temperature and class-balanced NLL of the best `softmax(z / T - tau * log prior)`.

    The NLL is jointly convex in 1 / T and tau, hence its minimum over T is convex in tau: bisecting the grid finds
    the best tau, and a bounded one-dimensional search the best T of each.  Where tau does not matter (equal counts)
    it is 0.  Three times nan if a logit is not finite or there are no images.
    """
    z = _centred(logits)
    if not (z.size and np.isfinite(z).all()):
        return np.nan, np.nan, np.nan
    shifts, reach = -TAUS[:, None] * _log_prior(counts), np.log(HOTTEST)

    @cache
    def best(i: int) -> tuple[float, float]:
        found = minimize_scalar(
            lambda log_t: float(_balanced_nll(z, target, np.exp(log_t), shifts[i : i + 1])[0]),
            bounds=(-reach, reach),
            method="bounded",
            options={"xatol": 1e-3},
        )
        return float(found.fun), float(np.exp(found.x))

    low, high = 0, len(TAUS) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if best(middle)[0] <= best(middle + 1)[0] else (middle + 1, high)
    zero = int(np.flatnonzero(TAUS == 0)[0])
    chosen = zero if best(zero)[0] <= best(low)[0] + 1e-6 else low
    nll, temperature = best(chosen)
    return float(TAUS[chosen]), temperature, nll


def group_nll(logits: ArrayLike, target: ArrayLike, groups: Mapping[str, ArrayLike]) -> dict[str, float]:
    """NLL in nats of each group: mean per class, then over its measured classes; nan where none is measured."""
    z, target = np.asarray(logits), np.asarray(target)
    classes = z.shape[1]
    images = np.bincount(target, minlength=classes)
    total = np.bincount(target, _nll(z, target, 1.0, np.zeros((1, classes)))[:, 0], classes)
    return group_means(np.where(images > 0, total / np.maximum(images, 1), np.nan), groups)


def ece(logits: ArrayLike, target: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over bins of equally many images."""
    z = _centred(logits)
    if not z.size:
        return np.nan
    confidence = 1 / np.exp(z).sum(1)
    gap = (z.argmax(1) == np.asarray(target)) - confidence
    gap = gap[np.argsort(confidence, kind="stable")]
    return float(sum(abs(part.sum()) for part in np.array_split(gap, bins)) / len(gap))


def predicted(logits: ArrayLike, counts: ArrayLike, tau: float = 0.0, temperature: float = 1.0) -> Indices:
    """The predicted class [N] at `z / T - tau * log prior`."""
    return adjust(_floating(logits) / temperature, counts, tau).argmax(1)


def scores(
    logits: ArrayLike,
    target: ArrayLike,
    counts: ArrayLike,
    groups: Mapping[str, ArrayLike],
    tau: float = 0.0,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Accuracy over images, over classes (`balanced`) and over each group at `z / T - tau * log prior`."""
    z, target = _floating(logits), np.asarray(target)
    if not np.isfinite(z).all():
        return dict.fromkeys(("accuracy", "balanced", *groups), np.nan)
    pred = predicted(z, counts, tau, temperature)
    per_class = class_accuracy(pred, target, z.shape[1])
    return {"accuracy": _mean(pred == target), "balanced": _mean(per_class), **group_means(per_class, groups)}


def summary(
    logits: ArrayLike, target: ArrayLike, counts: ArrayLike, groups: Mapping[str, ArrayLike]
) -> dict[str, float]:
    """Everything one number says about a classifier, raw and at the fitted tau and temperature: the keys of SUMMARY.

    `fitted_nll` is the class-balanced NLL at the fitted tau and temperature, the search's default objective, and
    `fitted_many_nll`, ... those of the groups.  `area` is what the classifier covers of many x few over all tau.
    `fewest_images` is of the split: the images of the class that has fewest, but any.
    """
    z, target = _floating(logits), np.asarray(target)
    if not (z.size and np.isfinite(z).all()):
        return dict.fromkeys(SUMMARY, np.nan)
    tau, temperature, nll = fit(z, target, counts)
    corrected = adjust(z / temperature, counts, tau)
    fitted = _described(corrected, target, counts, groups)
    swept = [scores(z, target, counts, groups, tau, temperature) for tau in TAUS]
    return {
        **_described(z, target, counts, groups),
        "nll": _mean(_nll(z, target, 1.0, np.zeros((1, z.shape[1])))),
        "balanced_nll": balanced_nll(z, target, z.shape[1]),
        **{"tau": tau, "temperature": temperature, "fitted_nll": nll},
        **{f"fitted_{name}": value for name, value in fitted.items()},
        **{f"fitted_{name}_nll": value for name, value in group_nll(corrected, target, groups).items()},
        "area": area([own["many"] for own in swept], [own["few"] for own in swept]),
        "fewest_images": float(np.unique(target, return_counts=True)[1].min()),
    }


def _described(
    z: NDArray[Any], target: Indices, counts: ArrayLike, groups: Mapping[str, ArrayLike]
) -> dict[str, float]:
    """What is said of raw and of corrected logits alike: the scores, the worst tenth of the classes, calibration."""
    tail = worst_decile(class_accuracy(z.argmax(1), target, z.shape[1]))
    return {**scores(z, target, counts, groups), "worst_decile": tail, "ece": ece(z, target)}


def sweep(
    logits: ArrayLike,
    target: ArrayLike,
    counts: ArrayLike,
    groups: Mapping[str, ArrayLike],
    temperature: float = 1.0,
    taus: ArrayLike = TAUS,
) -> dict[str, Floats]:
    """The scores and the class-balanced NLL (`nll`) at every tau, each an array as long as `taus`."""
    z, taus = _floating(logits), np.asarray(taus, np.float64)
    rows = [scores(z, target, counts, groups, tau, temperature) for tau in taus]
    nll = _balanced_nll(z, target, temperature, -taus[:, None] * _log_prior(counts))
    names = ("accuracy", "balanced", *groups)
    return {"tau": taus, **{name: np.array([row[name] for row in rows]) for name in names}, "nll": nll}


def area(many: ArrayLike, few: ArrayLike) -> float:
    """The area of all pairs that some pair of (many, few) [K] is nowhere worse than; nan where one is not measured."""
    x, y = np.asarray(many, np.float64), np.asarray(few, np.float64)
    order = np.argsort(x)
    height = np.maximum.accumulate(y[order][::-1])[::-1]
    return float((np.diff(x[order], prepend=0) * height).sum())


def _balanced_nll(logits: ArrayLike, target: ArrayLike, temperature: float, shifts: Floats) -> Floats:
    target = np.asarray(target)
    images = np.bincount(target, minlength=shifts.shape[1])
    if not len(target):
        return np.full(len(shifts), np.nan)
    weight = 1 / (images[target] * np.count_nonzero(images))
    return weight @ _nll(logits, target, temperature, shifts)


def _nll(logits: ArrayLike, target: ArrayLike, temperature: float, shifts: Floats) -> Floats:
    """NLL [N, K] of softmax(z / T + shift) for K shifts [K, C]: one exponential of [N, C] serves them all.

    Only z is centred on its maximum.  That is safe because a shift, some tens at most, cannot bring back a class that
    underflows hundreds below the maximum.
    """
    z, target = _centred(logits) / temperature, np.asarray(target)
    own = z[np.arange(len(z)), target]
    return np.log(np.exp(z) @ np.exp(shifts).T) - own[:, None] - shifts[:, target].T


def _log_prior(counts: ArrayLike) -> Floats:
    n = np.maximum(np.asarray(counts, np.float64), 1)
    return np.log(n / n.sum())


def _floating(logits: ArrayLike) -> NDArray[Any]:
    z = np.asarray(logits)
    return z.astype(np.result_type(z, np.float32), copy=False)


def _centred(logits: ArrayLike) -> Floats:
    z = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore"):
        return z - z.max(1, keepdims=True)


def _measured(values: NDArray[Any]) -> NDArray[Any]:
    return values[~np.isnan(values)]


def _mean(values: ArrayLike) -> float:
    measured = _measured(np.asarray(values, np.float64))
    return float(measured.mean()) if measured.size else np.nan
