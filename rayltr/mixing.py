"""Mixing the images of a batch.

`(images [B, 3, H, W], target [B], counts [C], generator, *, ...) -> images, other target [B], weight [B]`.

Image b is mixed with a partner from the same batch, whose target is `other[b]`; the loss of the mixed image is
`weight[b] * l(target[b]) + (1 - weight[b]) * l(other[b])` for whichever per-sample loss l.  One proportion and one
permutation are drawn per batch, on the generator's device and without waiting for it.  `weight` is [B], in at least
float32.
"""

import torch
from torch import Generator, Tensor

Mixed = tuple[Tensor, Tensor, Tensor]


def mixup(images: Tensor, target: Tensor, counts: Tensor, generator: Generator, *, alpha: float = 1.0) -> Mixed:
    """lambda x + (1 - lambda) x', lambda ~ Beta(alpha, alpha), weighed by lambda (Zhang et al., 2018)."""
    share = _beta(alpha, generator).to(images.device)
    partner = _partners(images, generator)
    return _blend(images, partner, share), target[partner], _weight(images, share)


def cutmix(images: Tensor, target: Tensor, counts: Tensor, generator: Generator, *, alpha: float = 1.0) -> Mixed:
    """A box of the partner is pasted in, weighed by the area that remains (Yun et al., 2019, algorithm A1).

    The box covers 1 - lambda of the image, lambda ~ Beta(alpha, alpha), around a uniform centre, clipped at the
    border; its sides are rounded down to even numbers.  The weight is the exact share of pixels that stay.
    """
    side = (1 - _beta(alpha, generator)).sqrt()
    partner = _partners(images, generator)
    rows, columns = (_span(length, side, generator) for length in images.shape[2:])
    box = (rows[:, None] & columns).to(images.device)
    return torch.where(box, images[partner], images), target[partner], _weight(images, 1 - box.double().mean())


def remix(
    images: Tensor,
    target: Tensor,
    counts: Tensor,
    generator: Generator,
    *,
    alpha: float = 1.0,
    kappa: float = 3.0,
    tau: float = 0.5,
    reduce: str = "sample",
) -> Mixed:
    """Mixup whose weight prefers the rarer class of a pair (Chou et al., Remix, 2020, eq. 8).

    With n images in the target's class and n' in the partner's: weight 0 where n >= kappa n' and lambda < tau,
    weight 1 where kappa n <= n' and 1 - lambda < tau, else lambda.  `reduce="sample"` decides for each image;
    `reduce="batch"` gives every image the mean of these weights, as the Bag of Tricks code does.
    """
    if reduce not in ("sample", "batch"):
        raise ValueError(f"reduce of remix is 'sample' or 'batch', not {reduce!r}")
    share = _beta(alpha, generator).to(images.device)
    partner = _partners(images, generator)
    other = target[partner]
    counts = counts.to(target.device)
    weight = remix_weight(counts[target], counts[other], share, kappa, tau)
    if reduce == "batch":
        weight = weight.mean().expand(len(images))
    return _blend(images, partner, share), other, _weight(images, weight)


def remix_weight(count: Tensor, partner_count: Tensor, share: Tensor, kappa: float, tau: float) -> Tensor:
    """Remix's rule: the weight of the first of two images, for their classes' counts and the images' share of it."""
    to_partner = (count >= kappa * partner_count) & (share < tau)
    to_first = (kappa * count <= partner_count) & (1 - share < tau)
    return torch.where(to_partner, 0.0, torch.where(to_first, 1.0, share))


MIXINGS = {f.__name__: f for f in (mixup, cutmix, remix)}


def _beta(alpha: float, generator: Generator) -> Tensor:
    if alpha <= 0:
        raise ValueError(f"alpha of a mixing is above 0, not {alpha}")
    shape = torch.full((2,), alpha, dtype=torch.float64, device=generator.device)
    # what torch.distributions.Beta draws from, which takes no generator
    first, second = torch._standard_gamma(shape, generator=generator)
    return first / (first + second)


def _partners(images: Tensor, generator: Generator) -> Tensor:
    return torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)


def _blend(images: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(images[partner], images, share.to(images.dtype))


def _span(length: int, fraction: Tensor, generator: Generator) -> Tensor:
    """Which of `length` positions lie within a stretch of that fraction around a uniform centre, bool [length]."""
    half = (length * fraction).long() // 2
    centre = torch.randint(length, (), generator=generator, device=generator.device)
    position = torch.arange(length, device=generator.device)
    return (position >= centre - half) & (position < centre + half)


def _weight(images: Tensor, share: Tensor) -> Tensor:
    return share.to(torch.promote_types(images.dtype, torch.float32)).expand(len(images))
