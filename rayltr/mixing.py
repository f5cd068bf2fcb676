"""Mixing the images of a batch.

`(images [B, 3, H, W], target [B], counts [C], generator, *, ...) -> images, other target [B], weight [B]`: a `Mixed`.

Image b is mixed with a partner from the same batch, whose target is `other[b]`; the loss of the mixed image is
`weight[b] * l(target[b]) + (1 - weight[b]) * l(other[b])` for whichever per-sample loss l.  One proportion and, where
partners are not neighbours, one permutation are drawn per batch, on the generator's device and without waiting for
it.  `weight` is [B], in at least float32.

A mixing may merge neighbours: it then returns fewer images, B/k, and the first of each k neighbours gives the target.
Other target and weight are [B/k] then, and the loss is taken with `target[::k]`.
"""

import torch
from torch import Generator, Tensor


class Mixed(tuple[Tensor, Tensor, Tensor]):
    """What a mixing returns: a tuple of three (images, other target, weight) that knows the partners too.

    `partner`: int64 [B] on the images' device, the position in the batch of each image's partner, so that
    `other = target[partner]`; None where neighbours are merged.
    """

    partner: Tensor | None

    def __new__(cls, three: tuple[Tensor, Tensor, Tensor], partner: Tensor | None = None) -> "Mixed":
        mixed = super().__new__(cls, three)
        mixed.partner = partner
        return mixed


def mixup(images: Tensor, target: Tensor, counts: Tensor, generator: Generator, *, alpha: float = 1.0) -> Mixed:
    """lambda x + (1 - lambda) x', lambda ~ Beta(alpha, alpha), weighed by lambda (Zhang et al., 2018)."""
    share, partner = _drawn(images, alpha, generator)
    return Mixed((blend(images, partner, share), target[partner], _weight(images, share)), partner)


def cutmix(images: Tensor, target: Tensor, counts: Tensor, generator: Generator, *, alpha: float = 1.0) -> Mixed:
    """A box of the partner is pasted in, weighed by the area that remains (Yun et al., 2019, algorithm A1).

    The box covers 1 - lambda of the image, lambda ~ Beta(alpha, alpha), around a uniform centre, clipped at the
    border; its sides are rounded down to even numbers.  The weight is the exact share of pixels that stay.
    """
    side = (1 - _beta(alpha, generator)).sqrt()
    partner = _partners(images, generator)
    rows, columns = (_span(length, side, generator) for length in images.shape[2:])
    box = (rows[:, None] & columns).to(images.device)
    stays = _weight(images, 1 - box.double().mean())
    return Mixed((torch.where(box, images[partner], images), target[partner], stays), partner)


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
    share, partner = _drawn(images, alpha, generator)
    other = target[partner]
    counts = counts.to(target.device)
    weight = remix_weight(counts[target], counts[other], share, kappa, tau)
    if reduce == "batch":
        weight = weight.mean().expand(len(images))
    return Mixed((blend(images, partner, share), other, _weight(images, weight)), partner)


def remix_weight(count: Tensor, partner_count: Tensor, share: Tensor, kappa: float, tau: float) -> Tensor:
    """Remix's rule: the weight of the first of two images, for their classes' counts and the images' share of it."""
    to_partner = (count >= kappa * partner_count) & (share < tau)
    to_first = (kappa * count <= partner_count) & (1 - share < tau)
    return torch.where(to_partner, 0.0, torch.where(to_first, 1.0, share))


def manifold(
    images: Tensor,
    target: Tensor,
    counts: Tensor,
    generator: Generator,
    *,
    alpha: float = 1.0,
    layer: str = "pool",
) -> Mixed:
    """Mixup of what a layer of the network gives out (Verma et al., 2019), always the same layer.

    The images are returned as they are: the network applies `blend` with `partner` and `weight` at `layer`, one of
    its own names; "pool" is after the global average pooling, "fc" the logits.  Draws exactly what `mixup` draws.
    """
    share, partner = _drawn(images, alpha, generator)
    return Mixed((images, target[partner], _weight(images, share)), partner)


def mixup_or_cutmix(
    images: Tensor,
    target: Tensor,
    counts: Tensor,
    generator: Generator,
    *,
    alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch: float = 0.5,
) -> Mixed:
    """Mixup, or with probability `switch` CutMix, of each image with the one at its place from the batch's end.

    The form of timm, which DeiT trains with (Touvron et al., 2021): lambda ~ Beta(alpha, alpha) for mixup,
    Beta(cutmix_alpha, cutmix_alpha) for the box, which is that of `cutmix`; one kind and one lambda per batch.
    Raises ValueError for a switch that is no probability.
    """
    if not 0 <= switch <= 1:
        raise ValueError(f"switch of mixup_or_cutmix is a probability, not {switch}")
    kind = torch.rand((), generator=generator, device=generator.device) < switch
    share, side = _beta(alpha, generator), (1 - _beta(cutmix_alpha, generator)).sqrt()
    rows, columns = (_span(length, side, generator) for length in images.shape[2:])
    # how much of each pixel stays: the box is one, too
    stays = torch.where(kind, 1 - (rows[:, None] & columns).double(), share).to(images.device)
    partner = torch.arange(len(images) - 1, -1, -1, device=images.device)
    mixed = torch.lerp(images[partner], images, stays.to(images.dtype))
    return Mixed((mixed, target[partner], _weight(images, stays.mean())), partner)


def bbn_mix(images: Tensor, target: Tensor, counts: Tensor, generator: Generator, *, alpha: float = 1.0) -> Mixed:
    """Mixup of each image with the one that follows it, for the sampler `reverse` (Zhang et al., 2021).

    Merges neighbours, k = 2: B/2 images lambda x_even + (1 - lambda) x_odd, lambda ~ Beta(alpha, alpha) once for the
    batch, weighed by lambda; the other target is that of the odd ones.  Raises ValueError for an odd batch.
    """
    if len(images) % 2:
        raise ValueError(f"bbn_mix pairs neighbouring images and needs an even batch, not {len(images)}")
    share = _beta(alpha, generator).to(images.device)
    mixed = torch.lerp(images[1::2], images[::2], share.to(images.dtype))
    return Mixed((mixed, target[1::2], _weight(mixed, share)))


MIXINGS = {f.__name__: f for f in (mixup, cutmix, remix, manifold, mixup_or_cutmix, bbn_mix)}


def blend(x: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """share x + (1 - share) x[partner]: every sample of x [B, ...] with its partner's, in the dtype of x.

    partner: int64 [B], positions in x.  share: [B] or a scalar tensor, in [0, 1].
    """
    if share.dim():
        share = share.reshape(-1, *[1] * (x.dim() - 1))
    return torch.lerp(x[partner], x, share.to(x.dtype))


def _drawn(images: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """The proportion and the partners of a batch, on the images' device."""
    share = _beta(alpha, generator).to(images.device)
    return share, _partners(images, generator)


def _beta(alpha: float, generator: Generator) -> Tensor:
    if alpha <= 0:
        raise ValueError(f"alpha of a mixing is above 0, not {alpha}")
    shape = torch.full((2,), alpha, dtype=torch.float64, device=generator.device)
    # what torch.distributions.Beta draws from, which takes no generator
    first, second = torch._standard_gamma(shape, generator=generator)
    return first / (first + second)


def _partners(images: Tensor, generator: Generator) -> Tensor:
    return torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)


def _span(length: int, fraction: Tensor, generator: Generator) -> Tensor:
    """Which of `length` positions lie within a stretch of that fraction around a uniform centre, bool [length]."""
    half = (length * fraction).long() // 2
    centre = torch.randint(length, (), generator=generator, device=generator.device)
    position = torch.arange(length, device=generator.device)
    return (position >= centre - half) & (position < centre + half)


def _weight(images: Tensor, share: Tensor) -> Tensor:
    return share.to(torch.promote_types(images.dtype, torch.float32)).expand(len(images))
