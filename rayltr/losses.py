"""Per-sample losses for long-tailed targets, and class weights.

A loss is a pure function `(logits [B, C], target [B] int64, counts [C], *, ...) -> [B]`: no state, no reduction, no
class weight.  Logits in half precision are computed in float32; float64 stays float64.  A class weight is a pure
function `(counts [C], *, ...) -> [C]`.  `counts` are the training images per class, whatever their dtype; a class
without images counts as having one, so that nothing becomes infinite or NaN.
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


LOSSES = {f.__name__: f for f in (cross_entropy, balanced_softmax, logit_adjusted, focal, ldam)}


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
