"""Views that change colours, and the view of contrastive learning that is made of them."""

from functools import partial

import torch
from torch import Generator, Tensor

from rayltr.views.crops import cropped
from rayltr.views.draws import uniform
from rayltr.views.operations import Operation, Step, blurred, named, performed
from rayltr.views.policies import rand_steps


def colour_jitter(
    images: Tensor,
    generator: Generator,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    p: float = 0.8,
) -> Tensor:
    """Brightness, contrast, saturation and hue change in random order; torchvision's ColorJitter.

    The factors of the first three are uniform between 1 - x (at least 0) and 1 + x; the hue turns by up to `hue` of
    the circle, 0 to 0.5.  `p`: the probability that an image changes at all.
    """
    return performed(images, _jitter(len(images), generator, (brightness, contrast, saturation, hue), p))


def grayscale(images: Tensor, generator: Generator, *, p: float = 0.2) -> Tensor:
    """Without colours, in three equal channels, with probability `p`; torchvision's RandomGrayscale."""
    return performed(images, _perhaps(len(images), generator, named(["Grayscale"]), p))


def blur(images: Tensor, generator: Generator, *, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> Tensor:
    """Smoothed with probability `p` by a Gaussian of a uniform number of pixels (Chen et al., SimCLR, 2020).

    torchvision's GaussianBlur with a kernel that reaches three times the largest sigma to either side.
    """
    return performed(images, _blur(len(images), generator, sigma, p))


def simaugment(
    images: Tensor,
    generator: Generator,
    *,
    crop: str = "resized",
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    jitter: float = 0.8,
    grayscale: float = 0.2,
    blur: float = 0.0,
    sigma: tuple[float, float] = (0.1, 2.0),
    n: int = 0,
    m: float = 10.0,
    fill: tuple[int, int, int] = (124, 116, 104),
) -> Tensor:
    """A crop, then `colour_jitter`, `grayscale` and `blur` with the probabilities `jitter`, `grayscale` and `blur`.

    The defaults are SimAugment as in balanced contrastive learning (Zhu et al., 2022); SimCLR and MoCo v2 have
    `scale=(0.2, 1.0), blur=0.5`.  crop: "resized" (`resized_crop` with `scale`), "padded" (`flip_crop`) or "none",
    mirrored with probability `flip`.  With `n`, so many operations of timm's RandAugment of strength `m` follow, with
    a deviation of 0.5 (see `randaugment`, also for `fill`): the views "randcls" (`jitter=1.0, hue=0.0, grayscale=0.0,
    n=2`) and "randclsstack" (`n=2`) of balanced and parametric contrastive learning.

    Raises ValueError for an unknown crop and for an m outside 0 to 10.
    """
    batch = len(images)
    images = cropped(images, generator, crop, flip, scale)
    steps = [
        *_jitter(batch, generator, (brightness, contrast, saturation, hue), jitter),
        *(_perhaps(batch, generator, named(["Grayscale"]), grayscale) if grayscale else ()),
        *(_blur(batch, generator, sigma, blur) if blur else ()),
        *(rand_steps(images, generator, n, m, 0.5, "timm", fill, "bicubic") if n else ()),
    ]
    return performed(images, steps)


def _jitter(batch: int, generator: Generator, strengths: tuple[float, ...], p: float) -> list[Step]:
    """As many steps as there are strengths other than 0; each image takes them in an order of its own."""
    names = ("Brightness", "Contrast", "Color", "Hue")
    used = [(name, strength) for name, strength in zip(names, strengths, strict=True) if strength]
    if not used:
        return []
    ranges = [(-s, s) if name == "Hue" else (max(0.0, 1 - s), 1 + s) for name, s in used]
    amounts = torch.stack([uniform((batch,), generator, low, high) for low, high in ranges])
    order = uniform((len(used), batch), generator).argsort(0)
    kept = uniform((batch,), generator) >= p
    operations = named(["Identity", *(name for name, _ in used)])
    return [(operations, (which + 1).masked_fill(kept, 0), amounts.gather(0, which[None])[0]) for which in order]


def _blur(batch: int, generator: Generator, sigma: tuple[float, float], p: float) -> list[Step]:
    return _perhaps(batch, generator, [partial(blurred, widest=sigma[1])], p, sigma)


def _perhaps(
    batch: int,
    generator: Generator,
    operations: list[Operation | None],
    p: float,
    amounts: tuple[float, float] = (0.0, 0.0),
) -> list[Step]:
    """One step in which each image has the one operation with probability `p`, and a uniform amount."""
    which = (uniform((batch,), generator) < p).long()
    return [([None, *operations], which, uniform((batch,), generator, *amounts))]
