"""AutoAugment and RandAugment: every image of a batch draws its own operations and strengths."""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from rayltr.views.crops import cropped, erasing, statistics
from rayltr.views.crops import cutout as hole
from rayltr.views.draws import integers, normal, uniform
from rayltr.views.operations import Step, named, performed

ENHANCERS = ("Brightness", "Color", "Contrast", "Sharpness")
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *ENHANCERS)
POLICIES = ("cifar10", "imagenet", "svhn")
SPACES = ("torchvision", "timm", "timm_increasing")
BINS = 31
"""Strengths of RandAugment in torchvision: m is 0 to 30."""


def autoaugment(
    images: Tensor,
    generator: Generator,
    *,
    policy: str = "cifar10",
    crop: str = "none",
    flip: float = 0.5,
    cutout: float = 0.0,
    fill: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """One of the 25 sub-policies of a policy, of two operations each (Cubuk et al., AutoAugment, 2019).

    policy: "cifar10", "imagenet" or "svhn", with the operations and strengths of torchvision.transforms.AutoAugment.
    crop: what comes before: "none", "padded" (`flip_crop`) or "resized" (`resized_crop`), mirrored with probability
    `flip`.  cutout: the side of a black square that comes after, as a share of the height; 0 is none.
    fill: levels from 0 to 255 of what shears, shifts and turns leave empty; several published ports use (128, 128,
    128).  The usual view of CIFAR is `crop="padded", cutout=0.5`.

    Raises ValueError for an unknown policy or crop.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r} of autoaugment: known: {', '.join(POLICIES)}")
    images = cropped(images, generator, crop, flip)
    images = performed(images, _sub_policies(images, generator, policy, fill))
    return hole(images, generator, size=round(cutout * images.shape[2])) if cutout else images


def randaugment(
    images: Tensor,
    generator: Generator,
    *,
    n: int = 2,
    m: float = 9.0,
    deviation: float = 0.0,
    space: str = "torchvision",
    crop: str = "none",
    flip: float = 0.5,
    fill: tuple[int, int, int] = (0, 0, 0),
    interpolation: str = "nearest",
    size: int | None = None,
    erase: float | None = None,
    erase_own: bool | None = None,
) -> Tensor:
    """`n` operations of strength `m`, each drawn uniformly, with replacement (Cubuk et al., RandAugment, 2020).

    space: "torchvision" is torchvision.transforms.RandAugment, with 14 operations and a whole m from 0 to 30; "timm"
    is timm's, with 15, m from 0 to 10 plus a normal `deviation`, each done with probability 0.5; in
    "timm_increasing" (`inc1`) a greater m is a greater change for all of them.
    crop: what comes before: "none", "padded" (`flip_crop`) or "resized" (`resized_crop`), mirrored with probability
    `flip`.  fill: levels from 0 to 255 of what shears, shifts and turns leave empty; timm takes the mean of the data,
    (124, 116, 104) for ImageNet.  interpolation: "nearest", "bilinear" or "bicubic"; bicubic is a resized crop's too.
    size: the side of a resized crop, None keeps it.  erase: the probability of a box of noise at the end (`erasing`);
    with `erase_own` it has the mean and deviation of these images, as for networks that are normalised by the data.

    Raises ValueError for an unknown space, crop or interpolation and for an m outside the space.
    """
    smooth = "bicubic" if interpolation == "bicubic" else "bilinear"
    own: Any = statistics(images) if erase_own else {}
    images = cropped(images, generator, crop, flip, interpolation=smooth, size=size)
    steps = rand_steps(images, generator, n, m, deviation, space, fill, interpolation)
    images = performed(images, steps)
    return images if erase is None else erasing(images, generator, p=erase, **own)


def rand_steps(
    images: Tensor,
    generator: Generator,
    n: int,
    m: float,
    deviation: float,
    space: str,
    fill: tuple[int, int, int],
    interpolation: str,
) -> list[Step]:
    """The steps of `randaugment`, drawn for the images [B,3,H,W]."""
    _check(m, space)
    shape, size = (n, len(images)), (images.shape[2], images.shape[3])
    sign = 2 * integers(0, 1, shape, generator).double() - 1
    if space == "torchvision":
        values = _strengths(BINS, *size)
        amounts = {name: _amount(name, float(v[int(m)]), sign) for name, v in values.items() if name != "Invert"}
        skipped = torch.zeros_like(sign, dtype=torch.bool)
    else:
        level = normal(m, deviation, shape, generator).clamp(0, 10)
        amounts = {"Identity": 0 * sign, **_timm_amounts(level, sign, *size, space == "timm_increasing")}
        skipped = uniform(shape, generator) >= 0.5
    first = 0 if space == "torchvision" else 1  # timm has no operation that does nothing
    which = integers(first, len(amounts) - 1, shape, generator).masked_fill(skipped, 0)
    amount = torch.stack([*amounts.values()]).gather(0, which[None])[0]
    operations = named(amounts, fill, interpolation)
    return [(operations, which[step], amount[step]) for step in range(n)]


def _check(m: float, space: str) -> None:
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r} of randaugment: known: {', '.join(SPACES)}")
    if space == "torchvision" and m not in range(BINS):
        raise ValueError(f"the m of randaugment is a whole number from 0 to {BINS - 1}, not {m}")
    if space != "torchvision" and not 0 <= m <= 10:
        raise ValueError(f"the m of randaugment in the space {space} is 0 to 10, not {m}")


def _sub_policies(images: Tensor, generator: Generator, policy: str, fill: tuple[int, int, int]) -> list[Step]:
    batch, device = len(images), generator.device
    names, which, chance, amount = _tables(policy, images.shape[2], images.shape[3])
    chosen = integers(0, which.shape[1] - 1, (batch,), generator)
    drawn, sign = uniform((2, batch), generator), integers(0, 1, (2, batch), generator)
    which, chance, amount = (table.to(device) for table in (which, chance, amount))
    operations = named(names, fill)
    return [
        (operations, which[i, chosen].masked_fill(drawn[i] > chance[i, chosen], 0), amount[i, chosen, sign[i]])
        for i in range(2)
    ]


@cache
def _tables(policy: str, height: int, width: int) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
    """Names of operations; for the two steps of each sub-policy the operation [2,25], its probability and its amounts
    [2,25,2], for either sign."""
    values = _strengths(10, height, width)
    names = tuple(values)
    transforms = importlib.import_module("torchvision.transforms")  # late: slow to import, and only some runs need it
    found = transforms.AutoAugment(transforms.AutoAugmentPolicy(policy)).policies
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    steps = [[pair[i] for pair in found] for i in range(2)]
    which = torch.tensor([[names.index(name) for name, _, _ in step] for step in steps])
    chance = torch.tensor([[p for _, p, _ in step] for step in steps], dtype=torch.float64)
    amounts = [[_amount(name, float(values[name][bin or 0]), signs) for name, _, bin in step] for step in steps]
    return names, which, chance, torch.stack([torch.stack(step) for step in amounts])


def _strengths(bins: int, height: int, width: int) -> dict[str, Tensor]:
    """torchvision's operations and their strengths, from weak to strong, in its single precision."""
    nothing, enhance = torch.zeros(bins), torch.linspace(0.0, 0.9, bins)
    return {
        "Identity": nothing,
        "ShearX": torch.linspace(0.0, 0.3, bins),
        "ShearY": torch.linspace(0.0, 0.3, bins),
        "TranslateX": torch.linspace(0.0, 150.0 / 331.0 * width, bins).trunc(),
        "TranslateY": torch.linspace(0.0, 150.0 / 331.0 * height, bins).trunc(),
        "Rotate": torch.linspace(0.0, 30.0, bins),
        **dict.fromkeys(ENHANCERS, enhance),
        "Posterize": 8 - (torch.arange(bins) / ((bins - 1) / 4)).round(),
        "Solarize": torch.linspace(255.0, 0.0, bins),
        "AutoContrast": nothing,
        "Equalize": nothing,
        "Invert": nothing,
    }


def _amount(name: str, strength: float, sign: Tensor) -> Tensor:
    """What an operation gets for a strength with either sign."""
    amount = strength * sign if name in SIGNED else torch.full_like(sign, strength)
    return 1 + amount if name in ENHANCERS else amount


def _timm_amounts(level: Tensor, sign: Tensor, height: int, width: int, increasing: bool) -> dict[str, Tensor]:
    """timm's 15 operations and what they get for levels from 0 to 10, any shape, and signs of that shape."""
    share = level / 10
    enhance = (1 + sign * 0.9 * share).clamp(min=0.1) if increasing else 1.8 * share + 0.1
    bits, threshold = (4 * share).floor(), (256 * share).floor()
    return {
        **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), share),
        "Rotate": 30 * share * sign,
        "Posterize": 4 - bits if increasing else bits,
        "Solarize": 256 - threshold if increasing else threshold,
        "SolarizeAdd": (110 * share).floor(),
        **dict.fromkeys(ENHANCERS, enhance),
        "ShearX": 0.3 * share * sign,
        "ShearY": 0.3 * share * sign,
        "TranslateX": 0.45 * width * share * sign,
        "TranslateY": 0.45 * height * share * sign,
    }
