"""Whether probabilities can be believed: reliability, calibration errors by group, and whether a temperature helps.

Everything starts from logits z that are corrected already, so that softmax(z) claims to be the posterior under the
target prior, and from images that are weighted so that their classes have that prior.  Calibration conditions on what
the classifier says; hence errors are given by the *predicted* group.  By the true group there is only the signed gap
of confidence and accuracy: it shows who is flattered, but a perfectly calibrated classifier has such gaps too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import erf, log_softmax

from rayltr import metrics
from rayltr.metrics import Floats, Indices

BINS = 15
ENOUGH = 200
"""Images that must be predicted into every group before each gets a temperature of its own."""

FOLDS = 5
PRIORS = ("balanced", "train")


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against accuracy in bins of equally many images, by rising confidence.

    confidence, accuracy, share: float64 [B], weighted means and the share of the weight (sum 1) in each bin;
    images: int [B].  B is `bins`, or less where there are fewer images.  ece: sum of share * |confidence - accuracy|;
    debiased: what is left of it without the part that noise alone adds.  Without images: B is 0, both errors are nan.
    """

    confidence: Floats
    accuracy: Floats
    share: Floats
    images: Indices
    ece: float
    debiased: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far a classifier can be believed; nan for what has no images, everything if a logit is not finite.

    overall, predicted: reliability of all images, and of those predicted into each group.  classwise: float64 [C],
    see `classwise`; classwise_groups: its mean over the measured classes of each group.  gap: confidence minus
    accuracy by true group (positive: over-confident).  nll: nats.  unmeasured: number of classes without images.
    """

    overall: Reliability
    predicted: dict[str, Reliability]
    classwise: Floats
    classwise_groups: dict[str, float]
    gap: dict[str, float]
    nll: float
    unmeasured: int


@dataclass(frozen=True, eq=False)
class Option:
    """A way to divide the logits.  nll and ece are cross-fitted: no image was judged by a fit that had seen it.

    temperatures: fitted on all images, {} for none, {"all": T} or one by predicted group.  applied: float64 [N], the
    cross-fitted temperature of each image: `measured(z / applied[:, None], ...)` shows the state afterwards.
    """

    temperatures: dict[str, float]
    applied: Floats
    nll: float
    ece: float


@dataclass(frozen=True, eq=False)
class Worth:
    """options: "none" and, where they could be fitted, "one" and "groups"; choice: the name of the recommended one.

    reason: why an option is missing, or empty.
    """

    options: dict[str, Option]
    choice: str
    reason: str = ""


def target_prior(counts: ArrayLike, prior: str | ArrayLike = "balanced") -> Floats:
    """The prior [C], sum 1: "balanced", "train" (shares of training images, an empty class counts as 1), or a vector.

    Raises ValueError for another name, and for a vector that is not C finite numbers >= 0 with a positive sum.
    """
    n = np.asarray(counts, np.float64)
    if isinstance(prior, str):
        if prior not in PRIORS:
            raise ValueError(f"unknown target prior {prior!r}: {', '.join(PRIORS)}, or a number per class")
        prior = np.ones(len(n)) if prior == "balanced" else np.maximum(n, 1)
    share = np.asarray(prior, np.float64)
    if share.shape != n.shape or not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise ValueError(f"a target prior has {len(n)} numbers, one per class, none negative and not all 0")
    return share / share.sum()


def weights(target: ArrayLike, counts: ArrayLike, prior: str | ArrayLike = "balanced") -> Floats:
    """The weight of each image, float64 [N], sum 1: the prior of its class over the number of its images.

    Classes without images are left out of the sum; all nan if the prior expects only such.  Errors: `target_prior`.
    """
    share, target = target_prior(counts, prior), np.asarray(target, np.int64)
    weight = share[target] / np.bincount(target, minlength=len(share))[target]
    with np.errstate(invalid="ignore"):
        return weight / weight.sum()


def measured(
    z: ArrayLike,
    target: ArrayLike,
    counts: ArrayLike,
    groups: Mapping[str, ArrayLike],
    prior: str | ArrayLike = "balanced",
    bins: int = BINS,
) -> Calibration:
    """The calibration of corrected logits [N, C], whose softmax is meant for the target prior.

    groups: class indices by name, as from `metrics.groups`.  Errors: `target_prior`.
    """
    logits, own, classes = np.asarray(z), np.asarray(target, np.int64), np.size(counts)
    weight = weights(own, counts, prior)
    unmeasured = classes - len(np.unique(own))
    kept = np.isfinite(logits).all() & (weight > 0)
    own, weight, log_p = own[kept], weight[kept], log_softmax(logits[kept].astype(np.float64), axis=1)
    pred, confidence = log_p.argmax(1), np.exp(log_p.max(1))
    hits = pred == own
    said, true = _members(pred, groups, classes), _members(own, groups, classes)
    per_class = classwise(np.exp(log_p), own, weight, bins)
    return Calibration(
        overall=reliability(confidence, hits, weight, bins),
        predicted={name: reliability(confidence[of], hits[of], weight[of], bins) for name, of in said.items()},
        classwise=per_class,
        classwise_groups=metrics.group_means(per_class, groups),
        gap={name: _mean((confidence - hits)[of], weight[of]) for name, of in true.items()},
        nll=_mean(-log_p[np.arange(len(own)), own], weight),
        unmeasured=unmeasured,
    )


def reliability(confidence: ArrayLike, hits: ArrayLike, weight: ArrayLike, bins: int = BINS) -> Reliability:
    """Confidence in [0, 1] against hits (bool), both [N], in bins of equally many images; images of no weight are out.

    With equal weights `ece` is that of `metrics.ece`.  The plain error of a perfect classifier is not 0, because the
    accuracy of a bin is noisy; `debiased` takes off the mean that such noise would add to the gaps found, and is at
    least 0.  It is the correction for the absolute error in the library of Kumar, Liang & Ma (2019, "Verified
    uncertainty calibration"), with the mean of the normal noise in closed form instead of drawn.
    """
    c, h, w = (np.asarray(values, np.float64) for values in (confidence, hits, weight))
    order = np.argsort(c, kind="stable")
    parts = [part for part in np.array_split(order[w[order] > 0], bins) if len(part)]
    mass, squares = (np.array([(w[part] ** power).sum() for part in parts]) for power in (1, 2))
    sure, right = (np.array([w[part] @ values[part] for part in parts]) / mass for values in (c, h))
    share, images = mass / mass.sum(), np.array([len(part) for part in parts], np.int64)
    if not parts:
        return Reliability(sure, right, share, images, np.nan, np.nan)
    gap = np.abs(sure - right)
    noise = np.sqrt(np.clip(right * (1 - right), 0, None) * squares) / mass
    plain = share @ gap
    debiased = max(0.0, 2 * plain - share @ _folded(gap, noise))
    return Reliability(sure, right, share, images, float(plain), float(debiased))


def classwise(p: ArrayLike, target: ArrayLike, weight: ArrayLike, bins: int = BINS) -> Floats:
    """Calibration error of the probability of every class, float64 [C]; nan for a class without images.

    p: probabilities [N, C]; weight [N], sum 1.  For each class the images are put into bins of equally many by its
    probability, whether it is predicted or not: Nixon et al. 2019, "Measuring calibration in deep learning" (adaptive
    calibration error); with equally wide bins it is the class-wise ECE of Kull et al. 2019.
    """
    columns, own, w = np.ascontiguousarray(np.asarray(p, np.float64).T), np.asarray(target), np.asarray(weight)
    found = np.full(len(columns), np.nan)
    for c in np.unique(own):
        order = np.argsort(columns[c], kind="stable")
        gap = (w * (columns[c] - (own == c)))[order]
        found[c] = sum(abs(part.sum()) for part in np.array_split(gap, bins))
    return found


def worthwhile(
    z: ArrayLike,
    target: ArrayLike,
    counts: ArrayLike,
    groups: Mapping[str, ArrayLike],
    prior: str | ArrayLike = "balanced",
    seed: int = 0,
) -> Worth:
    """Whether to divide corrected logits [N, C] by a temperature, or by one for each predicted group.

    z: corrected by tau alone, `metrics.adjust(logits, counts, tau * temperature)`: the predictions are then those of
    the fitted tau and temperature, and no temperature changes them.  Each option is fitted by the weighted NLL (Guo
    et al. 2017) and chosen only if cross-fitted NLL *and* ECE are both less than those of the simpler one: by the
    true group a long-tailed classifier errs in both directions, and the NLL alone may prefer a temperature that makes
    the ECE worse.  Groups have their own only where each has at least 200 images.  Errors: `target_prior`.
    """
    logits, own, classes = np.asarray(z), np.asarray(target, np.int64), np.size(counts)
    weight = weights(own, counts, prior)
    if not (np.isfinite(logits).all() and len(own) >= FOLDS and np.isfinite(weight).all()):
        nothing = Option({}, np.ones(len(own)), np.nan, np.nan)
        return Worth({"none": nothing}, "none", f"a logit is not finite, or fewer than {FOLDS} images count")
    fold = folds(own, FOLDS, seed)
    said = {name: of for name, of in _members(logits.argmax(1), groups, classes).items() if np.size(groups[name])}
    few = {name: int(of.sum()) for name, of in said.items() if of.sum() < ENOUGH}
    parts = {"none": {}, "one": {"all": np.ones(len(own), bool)}, **({} if few else {"groups": said})}
    options = {name: _option(logits, own, weight, fold, part) for name, part in parts.items()}
    choice = "none"
    for name, option in options.items():
        if option.nll < options[choice].nll and option.ece < options[choice].ece:
            choice = name
    short = ", ".join(f"{n} as {name}" for name, n in few.items())
    reason = f"no temperature by group: that takes {ENOUGH} images predicted as each, but {short}" if few else ""
    return Worth(options, choice, reason)


def temperature(z: ArrayLike, target: ArrayLike, weight: ArrayLike) -> float:
    """The T between 1 / HOTTEST and HOTTEST of the least weighted NLL of softmax(z / T); it is convex in 1 / T."""
    reach = np.log(metrics.HOTTEST)
    # single precision is several times faster and enough to place T within a thousandth
    low = np.asarray(z, np.float32)
    low = low - low.max(1, keepdims=True)
    own, w = low[np.arange(len(low)), np.asarray(target)].astype(np.float64), np.asarray(weight, np.float64)

    def nll(log_t: float) -> float:
        heat = np.exp(log_t)
        return float(w @ (np.log(np.exp(low / np.float32(heat)).sum(1, dtype=np.float64)) - own / heat))

    found = minimize_scalar(nll, bounds=(-reach, reach), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def folds(target: ArrayLike, count: int, seed: int = 0) -> Indices:
    """The fold 0 ... count - 1 of each image [N]: random, of equal size, every class spread as evenly as can be."""
    own = np.asarray(target)
    shuffled = np.random.default_rng(seed).permutation(len(own))
    order = shuffled[np.argsort(own[shuffled], kind="stable")]
    fold = np.empty(len(own), np.int64)
    fold[order] = np.arange(len(own)) % count
    return fold


def _option(
    z: NDArray, target: Indices, weight: Floats, fold: Indices, parts: Mapping[str, NDArray[np.bool_]]
) -> Option:
    """Temperatures for the images of each part, cross-fitted and on all."""
    applied = np.ones(len(target))
    for k, part in product(np.unique(fold), parts.values()):
        seen = part & (fold != k)
        applied[part & (fold == k)] = temperature(z[seen], target[seen], weight[seen])
    log_p = log_softmax(z.astype(np.float64) / applied[:, None], axis=1)
    nll = _mean(-log_p[np.arange(len(target)), target], weight)
    error = reliability(np.exp(log_p.max(1)), log_p.argmax(1) == target, weight).ece
    fitted = {name: temperature(z[part], target[part], weight[part]) for name, part in parts.items()}
    return Option(fitted, applied, nll, error)


def _folded(mean: Floats, sd: Floats) -> Floats:
    """The mean of |x| where x is normal."""
    ratio = mean / np.maximum(sd, 1e-12)
    return sd * np.sqrt(2 / np.pi) * np.exp(-(ratio**2) / 2) + mean * erf(ratio / np.sqrt(2))


def _members(of: NDArray[np.integer], groups: Mapping[str, ArrayLike], classes: int) -> dict[str, NDArray[np.bool_]]:
    """Which images [N] have a class of each group."""
    return {name: np.isin(np.arange(classes), own)[of] for name, own in groups.items()}


def _mean(values: Floats, weight: Floats) -> float:
    return float(weight @ values / weight.sum()) if len(values) else np.nan
