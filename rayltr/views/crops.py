"""Views that move, crop or hide: only pixels of the image, or means of them, and black."""

import math

import torch
from torch import Generator, Tensor

from rayltr.views.draws import integers, uniform
from rayltr.views.resampling import FILTERS, moved, resampled, resizing, rotation

TRIES = 10
"""How often a box is drawn until one fits, as in torchvision and timm."""
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


def erasing(
    images: Tensor,
    generator: Generator,
    *,
    p: float = 0.25,
    scale: tuple[float, float] = (0.02, 0.3333333333333333),
    ratio: tuple[float, float] = (0.3, 3.3333333333333335),
    mean: tuple[float, float, float] | Tensor = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] | Tensor = (0.229, 0.224, 0.225),
) -> Tensor:
    """A box of noise with probability `p`: timm's random erasing in the mode "pixel" (Zhong et al., 2020).

    Its share of the area is uniform in `scale`, its width over height log-uniform in `ratio`.  The noise is standard
    normal once images are normalised by `mean` and `std`, those of ImageNet unless others are given; so it is the one
    thing in views that leaves the range from 0 to 1.  Raises ValueError for a p that is no probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p of erasing is a probability, not {p}")
    batch, height, width = len(images), *images.shape[2:]
    limits = torch.tensor([[height], [width]], device=generator.device)
    sides = _tries(batch, height, width, scale, ratio, generator)
    sides, fits = _first(sides, (sides < limits[:, :, None]).all(0))
    start = (uniform((2, batch), generator) * (limits - sides + 1)).floor()
    hit = (fits & (uniform((batch,), generator) < p)).nonzero().flatten()
    spans = zip((height, width), start[:, hit, None], sides[:, hit, None], strict=True)
    rows, columns = (_between(length, first, side) for length, first, side in spans)
    noise = torch.randn((len(hit), *images.shape[1:]), generator=generator, device=generator.device)
    mean, std = (torch.as_tensor(value).to(noise).view(3, 1, 1) for value in (mean, std))
    noise = noise * std + mean
    hole, hit = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device), hit.to(images.device)
    found = images.clone(memory_format=torch.channels_last)
    found[hit] = torch.where(hole, noise.to(images), images[hit])
    return found


def statistics(images: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation [3] of the pixels of images [B,3,H,W]."""
    std, mean = torch.std_mean(images, (0, 2, 3), correction=0)
    return {"mean": mean, "std": std}


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
    size: int | None = None,
) -> Tensor:
    """What comes before a policy: `crop` is "none", "padded" (`flip_crop`) or "resized" (`resized_crop` to `size`).

    Whatever the layout in memory, `performed` comes next.
    """
    if size is not None and crop != "resized":
        raise ValueError(f"only a resized crop has a size, and the crop is {crop!r}")
    if crop == "padded":
        return flip_crop(images, generator, flip=flip)
    if crop == "resized":
        return _resized(images, generator, size, scale, RATIO, flip, interpolation)
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
    limits = torch.tensor([[height], [width]], device=generator.device)
    sides = _tries(batch, height, width, scale, ratio, generator)
    sides, found = _first(sides, ((sides > 0) & (sides <= limits[:, :, None])).all(0))
    corner = (uniform((2, batch), generator) * (limits - sides + 1)).floor()
    # no try fits: the largest box in the middle whose shape is allowed
    middle_shape = min(max(width / height, ratio[0]), ratio[1])
    middle = [[min(height, round(width / middle_shape))], [min(width, round(height * middle_shape))]]
    middle_sides = torch.tensor(middle, device=sides.device)
    corner = torch.where(found, corner, (limits - middle_sides) // 2)
    return torch.cat([corner, torch.where(found, sides, middle_sides)])


def _tries(
    batch: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator
) -> Tensor:
    """Heights and widths of boxes, some for each image: [2, batch, TRIES], whole numbers in float64."""
    area, shape = uniform((2, batch, TRIES), generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape)
    return torch.stack([(area / shape).sqrt(), (area * shape).sqrt()]).round()


def _first(sides: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the boxes [2, batch, TRIES] of each image that fits [batch, TRIES], and whether there is one."""
    return sides[:, torch.arange(len(fits), device=sides.device), fits.int().argmax(1)], fits.any(1)


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
    return _between(length, start, side)


def _between(length: int, start: Tensor, side: Tensor | int) -> Tensor:
    position = torch.arange(length, device=start.device)
    return (position >= start) & (position < start + side)
