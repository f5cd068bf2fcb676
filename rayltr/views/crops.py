"""Views that move, crop or hide: only pixels of the image, or means of them, and black."""

import math

import torch
from torch import Generator, Tensor

from rayltr.views.draws import integers, uniform
from rayltr.views.resampling import FILTERS, moved, resampled, resizing, rotation

TRIES = 10
"""How often `resized_crop` draws a box before it falls back to the centre, as in torchvision."""
RATIO = (3 / 4, 4 / 3)
"""Width over height of the boxes in a composed view."""


def identity(images: Tensor, generator: Generator) -> Tensor:
    """The images themselves."""
    return images


def flip_crop(
    images: Tensor,
    generator: Generator,
    *,
    padding: int | None = None,
    flip: float = 0.5,
    rotation: float | None = None,
) -> Tensor:
    """Pads with `padding` black pixels, crops back at a random place, mirrors left-right with probability `flip`.

    `padding` None is an eighth of the height: 4 for 32 x 32 images (He et al., 2016, section 4.2).  With `rotation`
    the result is then turned by up to that many degrees, with the nearest pixels, as RIDE and SADE do (15).
    """
    batch, height, width = len(images), *images.shape[2:]
    pad = height // 8 if padding is None else padding
    down, right = integers(-pad, pad, (2, batch, 1), generator).to(images.device)
    mirrored = (uniform((batch, 1), generator) < flip).to(images.device)
    rows = torch.arange(height, device=images.device) + down
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored, columns.flip(0), columns) + right
    pixels = _pixels(images, rows, columns)
    return pixels if rotation is None else _turned(pixels, rotation, generator)


def cutout(images: Tensor, generator: Generator, *, size: int | None = None) -> Tensor:
    """Blackens a square of `size` pixels around a uniform centre, clipped at the border (DeVries and Taylor, 2017).

    `size` None is half the height: 16 for 32 x 32 images.
    """
    batch, height, width = len(images), *images.shape[2:]
    side = height // 2 if size is None else size
    rows, columns = (_stretch(length, side, batch, generator) for length in (height, width))
    hole = (rows[:, :, None] & columns[:, None, :]).to(images.device)
    return images * ~hole[:, None]


def resized_crop(
    images: Tensor,
    generator: Generator,
    *,
    size: int | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333333333333333),
    flip: float | None = None,
    interpolation: str | None = None,
) -> Tensor:
    """A box of random area and shape, resized to `size` x `size` with antialiasing; None keeps the images' size.

    The box is torchvision's RandomResizedCrop: its share of the area is uniform in `scale`, its width over height
    log-uniform in `ratio`, its place uniform.  `flip`: the probability of a mirror image, None for none.
    `interpolation`: "bilinear" (None is that too) or "bicubic".  Nothing is rounded to whole levels.
    """
    found = _resized(images, generator, size, scale, ratio, flip, interpolation or "bilinear")
    return found.contiguous(memory_format=torch.channels_last)


def cropped(
    images: Tensor,
    generator: Generator,
    crop: str,
    flip: float,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: str = "bilinear",
) -> Tensor:
    """What comes before a policy: `crop` is "none", "padded" (`flip_crop`) or "resized" (`resized_crop`).

    Whatever the layout in memory, `performed` comes next.
    """
    if crop == "padded":
        return flip_crop(images, generator, flip=flip)
    if crop == "resized":
        return _resized(images, generator, None, scale, RATIO, flip, interpolation)
    if crop != "none":
        raise ValueError(f"unknown crop {crop!r}: known: none, padded, resized")
    return images


def _resized(
    images: Tensor,
    generator: Generator,
    size: int | None,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float | None,
    interpolation: str,
) -> Tensor:
    if interpolation not in FILTERS:
        raise ValueError(f"unknown interpolation {interpolation!r} of resized_crop: known: {', '.join(FILTERS)}")
    height, width = images.shape[2:]
    kernel = FILTERS[interpolation]
    pixels = images.to(torch.promote_types(images.dtype, torch.float32))  # half precision cannot tell places apart
    top, left, tall, wide = boxes(len(images), height, width, scale, ratio, generator).to(pixels)
    rows = resizing(top, tall, height, height if size is None else size, kernel)
    columns = resizing(left, wide, width, width if size is None else size, kernel)
    if flip is not None:
        mirrored = (uniform((len(images), 1, 1), generator) < flip).to(images.device)
        columns = torch.where(mirrored, columns.flip(1), columns)
    return resampled(pixels, rows, columns).clamp_(0, 1).to(images.dtype)


def boxes(
    batch: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator
) -> Tensor:
    """Top, left, height and width of a box for each image: [4, batch], whole numbers in float64."""
    area, shape = uniform((2, batch, TRIES), generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape)
    limits = torch.tensor([[height], [width]], device=generator.device)
    sides = torch.stack([(area / shape).sqrt(), (area * shape).sqrt()]).round()
    fits = ((sides > 0) & (sides <= limits[:, :, None])).all(0)
    sides = sides[:, torch.arange(batch, device=sides.device), fits.int().argmax(1)]
    corner = (uniform((2, batch), generator) * (limits - sides + 1)).floor()
    # no try fits: the largest box in the middle whose shape is allowed
    middle_shape = min(max(width / height, ratio[0]), ratio[1])
    middle = [[min(height, round(width / middle_shape))], [min(width, round(height * middle_shape))]]
    middle_sides = torch.tensor(middle, device=sides.device)
    found = fits.any(1)
    corner = torch.where(found, corner, (limits - middle_sides) // 2)
    return torch.cat([corner, torch.where(found, sides, middle_sides)])


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Image b at `rows[b]` x `columns[b]`, channels last; black where a position lies outside the image."""
    batch, channels, height, width = images.shape
    y, x = rows[:, :, None], columns[:, None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    # one row per pixel and a black one at the end: selecting rows is much faster than indexing or padding
    pixels = torch.cat([images.permute(0, 2, 3, 1).reshape(-1, channels), images.new_zeros(1, channels)])
    first = torch.arange(batch, device=images.device)[:, None, None] * height * width
    chosen = torch.where(inside, first + y * width + x, len(pixels) - 1)
    return pixels.index_select(0, chosen.flatten()).view(*chosen.shape, channels).permute(0, 3, 1, 2)


def _turned(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    angle = uniform((len(images),), generator, -degrees, degrees).to(images.device)
    turned = moved(images, rotation(angle, *images.shape[2:]), images.new_zeros(images.shape[1]))
    return turned.contiguous(memory_format=torch.channels_last)


def _stretch(length: int, side: int, batch: int, generator: Generator) -> Tensor:
    """Which of `length` positions lie within `side` positions around a uniform centre, bool [batch, length]."""
    start = integers(0, length - 1, (batch, 1), generator) - side // 2
    position = torch.arange(length, device=generator.device)
    return (position >= start) & (position < start + side)
