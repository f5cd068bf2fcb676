"""Contrastive losses per anchor: `(anchors [A, D], bank [K, D], target [A], labels [K], place [A], ...) -> [A]`.

Anchors and bank rows have unit length; `labels` are the classes of the bank rows, and `place` is where in the bank each
anchor stands itself (it is no pair with itself).  Under several workers the bank holds the rows of all of them (see
`rayltr.parallel.gather_rows`) and the anchors are a worker's own: the one way to share that gives the gradient of one
process.  Everything is computed in float32 or wider, sums of exponentials as log-sum-exp, so that small temperatures
are safe.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VARIANTS = ("L1", "L2", "L3")


class Projector(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: features [B, dim] -> vectors of unit length [B, out].

    fixed: the batch is the same rows at every step (the weights of a classifier), so that no statistics are tracked.
    """

    def __init__(self, dim: int, hidden: int, out: int, *, fixed: bool = False):
        norm = nn.BatchNorm1d(hidden, track_running_stats=not fixed)
        super().__init__(nn.Linear(dim, hidden), norm, nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(super().forward(features).to(torch.promote_types(features.dtype, torch.float32)))


def similarities(anchors: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """The inner products over the temperature [A, K], in float32 or wider whatever autocast says."""
    wide = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        return anchors.to(wide) @ bank.to(wide).T / temperature


def pairs(target: Tensor, labels: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Who is a positive of whom, and who is an anchor itself: bool [A, K] each."""
    itself = torch.arange(len(labels), device=labels.device) == place[:, None]
    return (labels == target[:, None]) & ~itself, itself


def _attraction(s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The mean similarity to the positives, and whether there are any: [A] each."""
    many = positive.sum(1)
    return (s * positive).sum(1) / many.clamp(min=1), many > 0


def supervised(
    anchors: Tensor, bank: Tensor, target: Tensor, labels: Tensor, place: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """The supervised contrastive loss (Khosla et al., SupCon, 2020, eq. 2: the mean is outside the logarithm).

    An anchor without a positive contributes 0.  The published code multiplies by temperature / 0.07; here a weight
    of the method does that.
    """
    s = similarities(anchors, bank, temperature)
    positive, itself = pairs(target, labels, place)
    near, some = _attraction(s, positive)
    return torch.where(some, s.masked_fill(itself, -torch.inf).logsumexp(1) - near, 0.0)


def balanced(
    anchors: Tensor,
    bank: Tensor,
    target: Tensor,
    labels: Tensor,
    place: Tensor,
    prototypes: Tensor | None,
    *,
    temperature: float = 0.1,
    variant: str = "L1",
) -> Tensor:
    """The balanced contrastive loss (Zhu et al., BCL, 2022): every class weighs the same in the denominator.

    prototypes: one row of unit length per class [C, D]; they join the bank, also as positives (the class complement);
    None leaves the bank alone.  variant "L1", the published one, averages the exponentials of a class, "L2" averages
    its similarities, and "L3" has the prototypes alone in the denominator and as the positive; L2 and L3 are
    reconstructed from the paper's text.  Raises ValueError for another variant, and for L3 without prototypes.
    """
    if variant not in VARIANTS or (variant == "L3" and prototypes is None):
        raise ValueError(f"variant is one of {', '.join(VARIANTS)} (L3 with the complement), not {variant!r}")
    if prototypes is not None:
        if variant == "L3":
            return F.cross_entropy(similarities(anchors, prototypes, temperature), target, reduction="none")
        bank = torch.cat([bank, prototypes.to(bank)])
        labels = torch.cat([labels, torch.arange(len(prototypes), device=labels.device)])
    s, (positive, itself) = similarities(anchors, bank, temperature), pairs(target, labels, place)
    near, some = _attraction(s, positive)
    rows = torch.bincount(labels).to(s)
    of_class = _mean_of_exponentials if variant == "L1" else _exponential_of_means
    return torch.where(some, of_class(s, labels, rows, positive, itself) - near, 0.0)


def _mean_of_exponentials(s: Tensor, labels: Tensor, rows: Tensor, positive: Tensor, itself: Tensor) -> Tensor:
    """log sum over classes of the mean over a class's rows of exp(s); the anchor is no row of its own class."""
    share = (rows[labels] - positive.to(s)).clamp(min=1).log()
    return (s - share).masked_fill(itself, -torch.inf).logsumexp(1)


def _exponential_of_means(s: Tensor, labels: Tensor, rows: Tensor, positive: Tensor, itself: Tensor) -> Tensor:
    """log sum over classes of exp(the mean over a class's rows of s); classes without rows take no part."""
    sums = s.new_zeros(len(s), len(rows)).index_add(1, labels, s.masked_fill(itself, 0.0))
    own = s.new_zeros(len(s), len(rows)).index_add(1, labels, itself.to(s))
    others = rows - own
    return torch.where(others > 0, sums / others.clamp(min=1), -torch.inf).logsumexp(1)


def parametric(
    anchors: Tensor,
    bank: Tensor,
    target: Tensor,
    labels: Tensor,
    place: Tensor,
    logits: Tensor,
    *,
    temperature: float = 0.05,
    alpha: float = 0.01,
    beta: float = 1.0,
    gamma: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    """The parametric contrastive loss (Cui et al., PaCo, 2021, eq. 6): classes and samples share one denominator.

    logits: of the parametric centres [A, C], with the log prior added and divided by their own temperature.
    alpha: weight of each positive sample; beta: of the class itself; gamma: of samples in the denominator;
    smoothing: share of beta that is spread evenly over the other classes.
    """
    s = similarities(anchors, bank, temperature)
    u = logits.to(s)
    positive, itself = pairs(target, labels, place)
    whole = torch.cat([u, (s + s.new_tensor(gamma).log()).masked_fill(itself, -torch.inf)], 1).logsumexp(1)
    own = u.gather(1, target[:, None])[:, 0]
    own = (1 - smoothing) * own + smoothing / max(u.shape[1] - 1, 1) * (u.sum(1) - own)
    many = positive.sum(1).to(s)
    near = alpha * (s * positive).sum(1) + beta * own
    return whole - near / (beta + alpha * many)
