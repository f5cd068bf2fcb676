"""Operations on levels, image by image of different strength, pixel for pixel those of Pillow.

An operation takes levels, float32 [n,3,H,W] that hold whole numbers from 0 to 255, and one amount for each image,
float64 [n], and gives levels again: Pillow rounds after every operation, and so do these.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import ceil

import torch
from torch import Tensor

from rayltr.views.hue import turned_hue
from rayltr.views.resampling import moved, resampled, rotation, smoothing

Operation = Callable[[Tensor, Tensor], Tensor]
Step = tuple[Sequence[Operation | None], Tensor, Tensor]
"""Operations, the number of that which each image gets, int64 [B], and its amount, float64 [B]; None: no change."""


def performed(images: Tensor, steps: Iterable[Step]) -> Tensor:
    """Images [B,3,H,W] in [0, 1] after some steps; channels last, of the same dtype, each pixel a level / 255.

    Every operation runs once in a step, on all images that get it: they are brought together and stay so until the
    next step.
    """
    levels = images.to(torch.float32, memory_format=torch.contiguous_format).mul(255).round_()
    place = torch.arange(len(images), device=images.device)
    for operations, which, amount in steps:
        which, amount = (drawn.to(images.device).index_select(0, place) for drawn in (which, amount))
        order = which.argsort()
        sizes = (which == torch.arange(len(operations), device=which.device)[:, None]).sum(1).tolist()
        levels, amount, place = (x.index_select(0, order) for x in (levels, amount, place))
        for operation, part, given in zip(operations, levels.split(sizes), amount.split(sizes), strict=True):
            if operation is not None and len(part):
                part.copy_(operation(part, given))
    found = levels.index_select(0, place.argsort()).div_(255).contiguous(memory_format=torch.channels_last)
    return found.to(images.dtype)


def luminance(levels: Tensor) -> Tensor:
    """The grey levels [n,H,W] of ITU-R 601 in Pillow's fixed point, which float32 holds without rounding."""
    red, green, blue = levels.unbind(1)
    grey = (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471)
    return grey.add_(32768).div_(65536).floor_()


def blended(levels: Tensor, plain: Tensor, factor: Tensor) -> Tensor:
    """From `plain` (factor 0) to the levels (factor 1) and beyond; cut to whole levels, not rounded."""
    return (levels - plain).mul_(factor.float()[:, None, None, None]).add_(plain).clamp_(0, 255).floor_()


def brighter(levels: Tensor, factor: Tensor) -> Tensor:
    """Blended with black."""
    return blended(levels, levels.new_zeros(()), factor)


def contrasted(levels: Tensor, factor: Tensor) -> Tensor:
    """Blended with the mean of the grey levels."""
    mean = luminance(levels).mean((1, 2), dtype=torch.float64)
    return blended(levels, (mean + 0.5).floor().to(levels)[:, None, None, None], factor)


def coloured(levels: Tensor, factor: Tensor) -> Tensor:
    """Blended with the grey levels."""
    return blended(levels, luminance(levels)[:, None], factor)


def sharpened(levels: Tensor, factor: Tensor) -> Tensor:
    """Blended with a mean of 3 x 3 pixels in which the middle counts five times; the border stays."""
    width, flat = levels.shape[3], levels.flatten(2)
    inner = flat[..., width + 1 : -width - 1]
    # on whole rows, as long stretches of memory are quick; what is added across their ends is the border's
    across = flat[..., :-2] + flat[..., 1:-1] + flat[..., 2:]
    whole = across[..., : -2 * width] + across[..., width:-width] + across[..., 2 * width :]
    plain = levels.clone()
    plain.flatten(2)[..., width + 1 : -width - 1] = whole.add_(inner, alpha=4).div_(13).add_(0.5).floor_()
    plain[..., 0], plain[..., -1] = levels[..., 0], levels[..., -1]
    return blended(levels, plain, factor)


def greyed(levels: Tensor, amount: Tensor) -> Tensor:
    """The grey levels in all channels."""
    return luminance(levels)[:, None].expand_as(levels)


def blurred(levels: Tensor, sigma: Tensor, *, widest: float) -> Tensor:
    """Smoothed with a Gaussian of `sigma` pixels, cut off after three times the `widest` there can be."""
    rows, columns = (smoothing(sigma.to(levels), length, ceil(3 * widest)) for length in levels.shape[2:])
    return resampled(levels, rows, columns).round_()


def posterized(levels: Tensor, bits: Tensor) -> Tensor:
    """Only the highest `bits` of 8 are kept; without any the image is black."""
    step = (2 ** (8 - bits)).to(levels)[:, None, None, None]
    return (levels / step).floor_().mul_(step)


def solarized(levels: Tensor, threshold: Tensor) -> Tensor:
    """Inverted from the threshold on."""
    return levels + _from(threshold, levels) * (255 - 2 * levels)


def solarize_added(levels: Tensor, added: Tensor) -> Tensor:
    """What is darker than 128 becomes lighter."""
    dark = 1 - _from(torch.full_like(added, 128), levels)
    return dark.mul_(added.to(levels)[:, None, None, None]).add_(levels).clamp_(max=255)


def _from(threshold: Tensor, levels: Tensor) -> Tensor:
    """1 where levels reach the threshold [n], 0 elsewhere: on a CPU much faster than comparing and choosing."""
    return (levels - (threshold.ceil() - 1).to(levels)[:, None, None, None]).clamp_(0, 1)


def inverted(levels: Tensor, amount: Tensor) -> Tensor:
    """The negative."""
    return 255 - levels


def autocontrasted(levels: Tensor, amount: Tensor) -> Tensor:
    """Stretched in each channel so that its darkest pixel is 0 and its lightest 255."""
    low, high = levels.amin((2, 3), keepdim=True).double(), levels.amax((2, 3), keepdim=True).double()
    # a channel of one level stays; and 255 / x would multiply by the rounded 1 / x
    scale = torch.where(high > low, torch.full_like(low, 255) / (high - low), 1)
    offset = torch.where(high > low, -low * scale, 0)
    return (levels * scale).add_(offset).clamp_(0, 255).floor_().to(levels)


def equalized(levels: Tensor, amount: Tensor) -> Tensor:
    """As many pixels of each level as of any other, as far as that can be, in each channel."""
    values = levels.flatten(2).long()
    counts = levels.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(levels).flatten(2))
    lightest = counts.gather(2, levels.amax((2, 3)).long()[:, :, None])
    step = ((values.shape[2] - lightest.double()) / 255).floor()
    below = counts.cumsum(2, dtype=torch.float64) - counts
    table = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=levels.device))
    return table.to(levels).gather(2, values).view_as(levels)


def _matrix(amount: Tensor, *rows: float | Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(row).to(amount).expand_as(amount) for row in rows], 1).view(-1, 2, 3)


MATRICES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "ShearX": lambda amount, height, width: _matrix(amount, 1, amount, 0, 0, 1, 0),
    "ShearY": lambda amount, height, width: _matrix(amount, 1, 0, 0, amount, 1, 0),
    "TranslateX": lambda amount, height, width: _matrix(amount, 1, 0, -amount, 0, 1, 0),
    "TranslateY": lambda amount, height, width: _matrix(amount, 1, 0, 0, 0, 1, -amount),
    "Rotate": rotation,
}
"""Where pixels come from: of shears by a slope, of shifts by pixels, of turns by degrees."""

OPERATIONS: dict[str, Operation] = {
    "Brightness": brighter,
    "Contrast": contrasted,
    "Color": coloured,
    "Sharpness": sharpened,
    "Hue": turned_hue,
    "Grayscale": greyed,
    "Posterize": posterized,
    "Solarize": solarized,
    "SolarizeAdd": solarize_added,
    "Invert": inverted,
    "AutoContrast": autocontrasted,
    "Equalize": equalized,
}


def _move(levels: Tensor, amount: Tensor, *, name: str, fill: tuple[int, ...], interpolation: str) -> Tensor:
    matrix = MATRICES[name](amount, *levels.shape[2:])
    return moved(levels, matrix, levels.new_tensor(fill), interpolation)


def named(
    names: Iterable[str], fill: tuple[int, ...] = (0, 0, 0), interpolation: str = "nearest"
) -> list[Operation | None]:
    """The operations of these names, "Identity" among them; `fill` is what geometric ones leave empty."""
    return [
        partial(_move, name=name, fill=fill, interpolation=interpolation) if name in MATRICES else OPERATIONS.get(name)
        for name in names
    ]
