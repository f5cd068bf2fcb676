"""Augmentations of a whole batch: `(images [B, 3, H, W] float in [0, 1], generator, *, ...) -> images`.

Every image gets its own parameters, drawn on the generator's device in a few calls; nothing loops over images.
Views come before the normalisation, so what they leave empty is black (0).  Shape, dtype and range are kept, and
images that are channels last stay so.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

TRIES = 10
"""How often `resized_crop` draws a box before it falls back to the centre, as in torchvision."""


def identity(images: Tensor, generator: Generator) -> Tensor:
    """The images themselves."""
    return images


def flip_crop(images: Tensor, generator: Generator, *, padding: int | None = None, flip: float = 0.5) -> Tensor:
    """Pads with `padding` black pixels, crops back at a random place, mirrors left-right with probability `flip`.

    `padding` None is an eighth of the height: 4 for 32 x 32 images (He et al., 2016, section 4.2).
    """
    batch, height, width = len(images), *images.shape[2:]
    pad = height // 8 if padding is None else padding
    down, right = _integers(-pad, pad, (2, batch, 1), generator).to(images.device)
    mirrored = _uniform((batch, 1), generator).to(images.device) < flip
    rows = torch.arange(height, device=images.device) + down
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored, columns.flip(0), columns) + right
    return _pixels(images, rows, columns)


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
) -> Tensor:
    """A box of random area and shape, resized bilinearly to `size` x `size`; None keeps the images' size.

    The box is torchvision's RandomResizedCrop: its share of the area is uniform in `scale`, its width over height
    log-uniform in `ratio`, its place uniform.  No antialiasing: meant for boxes not much larger than the result.
    """
    height, width = images.shape[2:]
    top, left, tall, wide = _boxes(len(images), height, width, scale, ratio, generator)
    pixels = images.to(torch.promote_types(images.dtype, torch.float32))  # half precision cannot tell places apart
    rows = _positions(top, tall, height if size is None else size).to(pixels)
    columns = _positions(left, wide, width if size is None else size).to(pixels)
    # pixel centres to grid_sample's [-1, 1] over the whole image
    y, x = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    boxes = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return boxes.to(images.dtype, memory_format=torch.channels_last)


VIEWS = {f.__name__: f for f in (identity, flip_crop, cutout, resized_crop)}


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def _integers(low: int, high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


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


def _stretch(length: int, side: int, batch: int, generator: Generator) -> Tensor:
    """Which of `length` positions lie within `side` positions around a uniform centre, bool [batch, length]."""
    start = _integers(0, length - 1, (batch, 1), generator) - side // 2
    position = torch.arange(length, device=generator.device)
    return (position >= start) & (position < start + side)


def _boxes(
    batch: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator
) -> Tensor:
    """Top, left, height and width of a box for each image: [4, batch], whole numbers in float64."""
    area, shape = _uniform((2, batch, TRIES), generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape)
    limits = torch.tensor([[height], [width]], device=generator.device)
    sides = torch.stack([(area / shape).sqrt(), (area * shape).sqrt()]).round()
    fits = ((sides > 0) & (sides <= limits[:, :, None])).all(0)
    sides = sides[:, torch.arange(batch, device=sides.device), fits.int().argmax(1)]
    corner = (_uniform((2, batch), generator) * (limits - sides + 1)).floor()
    # no try fits: the largest box in the middle whose shape is allowed
    middle_shape = min(max(width / height, ratio[0]), ratio[1])
    middle = [[min(height, round(width / middle_shape))], [min(width, round(height * middle_shape))]]
    middle_sides = torch.tensor(middle, device=sides.device)
    found = fits.any(1)
    corner = torch.where(found, corner, (limits - middle_sides) // 2)
    return torch.cat([corner, torch.where(found, sides, middle_sides)])


def _positions(start: Tensor, extent: Tensor, samples: int) -> Tensor:
    """Where the centres of `samples` output pixels fall in an extent of pixels, kept inside it, [B, samples]."""
    centre = (torch.arange(samples, device=start.device, dtype=torch.float64) + 0.5) / samples
    inside = (centre * extent[:, None] - 0.5).clamp(min=0).minimum(extent[:, None] - 1.0)
    return start[:, None] + inside
