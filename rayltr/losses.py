"""Per-sample losses for long-tailed targets, and class weights.

A loss is a pure function `(logits [B, C], target [B] int64, counts [C], *, ...) -> [B]`: no state, no reduction, no
class weight.  `influence_balanced` takes the features [B, D] that the logits were made of as its fourth argument, and
`seql` draws random numbers unless it is given them.  Logits and features in half precision are computed in float32;
float64 stays float64.  A class weight is a pure function `(counts [C], *, ...) -> [C]`.  `counts` are the training
images per class, whatever their dtype; a class without images counts as having one, so that nothing becomes infinite
or NaN.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _images(counts: Tensor, like: Tensor) -> Tensor:
    return counts.to(like).clamp(min=1)


def cross_entropy(logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Softmax cross-entropy; `counts` play no part."""
    return F.cross_entropy(_wide(logits), target, reduction="none")


def balanced_softmax(logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy of `logits + log n` (Ren et al., Balanced Meta-Softmax, 2020).  Predict with the plain logits."""
    z = _wide(logits)
    return F.cross_entropy(z + _images(counts, z).log(), target, reduction="none")


def logit_adjusted(logits: Tensor, target: Tensor, counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """Cross-entropy of `logits + tau log prior` (Menon et al., 2021, eq. 10).  Predict with the plain logits.

    tau = 0 is plain cross-entropy, tau = 1 the balanced softmax.
    """
    z = _wide(logits)
    n = _images(counts, z)
    return F.cross_entropy(z + tau * (n / n.sum()).log(), target, reduction="none")


def focal(logits: Tensor, target: Tensor, counts: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss summed over all classes (Lin et al., 2017, eq. 4, without alpha).

    gamma >= 0; gamma = 0 is the binary cross-entropy summed over the classes.
    """
    z = _wide(logits)
    own = F.one_hot(target, z.shape[1]).bool()
    margin = torch.where(own, z, -z)
    # (1 - p)^gamma as an exponential: the gradient of a power at 0 is infinite for gamma < 1
    hardness = torch.exp(gamma * F.logsigmoid(-margin))
    return -(hardness * F.logsigmoid(margin)).sum(1)


def ldam(logits: Tensor, target: Tensor, counts: Tensor, *, max_margin: float = 0.5, scale: float = 30.0) -> Tensor:
    """Cross-entropy of `scale * logits` after a margin is taken from the target's logit (Cao et al., LDAM, 2019).

    The margin is proportional to n^(-1/4) and equals `max_margin` for the rarest class.  Made for cosines, that is
    for the head `cosine` with scale 1: the scale is applied here, once.
    """
    z = _wide(logits)
    margin = _images(counts, z) ** -0.25
    margin = max_margin * margin / margin.max()
    shifted = z.scatter_add(1, target[:, None], -margin[target][:, None])
    return F.cross_entropy(scale * shifted, target, reduction="none")


def cdt(logits: Tensor, target: Tensor, counts: Tensor, *, gamma: float = 0.2) -> Tensor:
    """Cross-entropy of `logits / a` with class-dependent temperatures a = (n_max / n)^gamma (Ye et al., CDT, 2020).

    gamma >= 0; gamma = 0 is plain cross-entropy.  Predict with the plain logits.
    """
    z = _wide(logits)
    n = _images(counts, z)
    return F.cross_entropy(z / (n.max() / n) ** gamma, target, reduction="none")


def seql(
    logits: Tensor,
    target: Tensor,
    counts: Tensor,
    *,
    gamma: float = 0.9,
    threshold: float = 0.005,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy that spares rare classes most gradients as negatives (Tan et al., Equalization Loss, 2020, SEQL).

    Where beta = 1, a class with less than the share `threshold` of all images is left out of the softmax's
    denominator, unless it is the target.  `mask` [B, C] is beta, bool or 0 and 1; None draws it on the logits' device
    from torch's default generator, 1 with probability gamma (0..1), independently for each sample and class.
    """
    z = _wide(logits)
    n = _images(counts, z)
    drawn = torch.rand(z.shape, device=z.device) < gamma if mask is None else mask.bool()
    spared = drawn & (n / n.sum() < threshold) & ~F.one_hot(target, z.shape[1]).bool()
    return F.cross_entropy(z.masked_fill(spared, -math.inf), target, reduction="none")


def label_smoothing(logits: Tensor, target: Tensor, counts: Tensor, *, epsilon: float = 0.1) -> Tensor:
    """Cross-entropy with the target (1 - epsilon) one-hot + epsilon/C (Szegedy et al., 2016); `counts` play no part.

    epsilon in 0..1; epsilon = 0 is plain cross-entropy.
    """
    return F.cross_entropy(_wide(logits), target, reduction="none", label_smoothing=epsilon)


def label_aware_smoothing(
    logits: Tensor,
    target: Tensor,
    counts: Tensor,
    *,
    head: float = 0.4,
    tail: float = 0.1,
    shape: str = "concave",
) -> Tensor:
    """Label smoothing that is stronger for frequent classes (Zhong et al., MiSLAS, 2021).

    The epsilon of a sample is its target's in `smoothing`, which see for the keywords.
    """
    z = _wide(logits)
    epsilon = smoothing(_images(counts, z), head, tail, shape)[target]
    uniform = -z.log_softmax(1).mean(1)
    return torch.lerp(F.cross_entropy(z, target, reduction="none"), uniform, epsilon)


def smoothing(counts: Tensor, head: float, tail: float, shape: str) -> Tensor:
    """The epsilon [C] of each class, from `tail` (0..1) for the rarest to `head` (0..1) for the most frequent.

    It rises with u = (n - n_min) / (n_max - n_min) as sin(pi u/2) ("concave"), u ("linear") or 1 - cos(pi u/2)
    ("convex"); classes that are all equal get `tail`.  Raises ValueError for another shape.
    """
    n = _wide(counts).clamp(min=1)
    u = (n - n.min()) / (n.max() - n.min()).clamp(min=1)  # equal counts: 0/1, not 0/0
    angle = u * math.pi / 2
    shapes = {"concave": angle.sin(), "linear": u, "convex": 1 - angle.cos()}
    if shape not in shapes:
        raise ValueError(f"shape of label_aware_smoothing is one of {', '.join(shapes)}, not {shape!r}")
    return tail + (head - tail) * shapes[shape]


def influence_balanced(
    logits: Tensor, target: Tensor, counts: Tensor, features: Tensor, *, alpha: float = 1000.0
) -> Tensor:
    """Cross-entropy over a sample's influence, weighed by 1/n with mean 1 (Park et al., Influence-Balanced Loss, 2021).

    The influence is (|features|_1 |softmax - one-hot|_1 + 0.001) / alpha; gradients flow through it to the logits and
    to the features [B, D], those before the last linear layer.  Made for fine-tuning after plain cross-entropy.
    """
    z = _wide(logits)
    loss = F.cross_entropy(z, target, reduction="none")
    # 2 (1 - p) from the loss: it keeps its digits when p is close to 1
    influence = features.to(z).abs().sum(1) * -2 * torch.expm1(-loss)
    weight = 1 / _images(counts, z)
    weight = weight / weight.mean()
    return weight[target] * loss * alpha / (influence + 1e-3)


LOSSES = {
    f.__name__: f
    for f in (
        cross_entropy,
        balanced_softmax,
        logit_adjusted,
        focal,
        ldam,
        cdt,
        seql,
        label_smoothing,
        label_aware_smoothing,
        influence_balanced,
    )
}
UNWEIGHTED: dict[str, str] = {
    "balanced_softmax": "it corrects the logits for the class frequencies already",
    "logit_adjusted": "it corrects the logits for the class frequencies already",
    "cdt": "its temperatures make up for the class frequencies already",
    "seql": "it protects the rare classes already",
    "label_smoothing": "no weighted form of it is published",
    "label_aware_smoothing": "no weighted form of it is published",
    "influence_balanced": "it weighs the classes itself",
}
"""Losses that take no class weight -> why, as the end of the sentence "the loss X takes no class weight: ...".

Class weights, and their deferral, are published for the other losses: cross_entropy, focal and ldam.
"""


def inverse_frequency(counts: Tensor, *, gamma: float = 1.0) -> Tensor:
    """(n_min / n)^gamma: 1 for the rarest class, less for the others; gamma = 0 weighs all classes equally."""
    n = _wide(counts).clamp(min=1)
    return (n.min() / n) ** gamma


def effective_number(counts: Tensor, *, beta: float = 0.999) -> Tensor:
    """(1 - beta) / (1 - beta^n), scaled to the sum C (Cui et al., Class-Balanced Loss, 2019).

    beta = 0 weighs all classes equally, beta towards 1 approaches 1/n.  Raises ValueError unless 0 <= beta < 1.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta of effective_number is at least 0 and below 1, not {beta}")
    n = _wide(counts).clamp(min=1)
    # expm1: 1 - beta^n loses all its digits when beta is close to 1
    weight = -1 / torch.expm1(n * (math.log(beta) if beta else -math.inf))
    return weight * len(weight) / weight.sum()


CLASS_WEIGHTS = {f.__name__: f for f in (inverse_frequency, effective_number)}
