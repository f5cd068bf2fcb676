"""Pixels at new places, for whole batches and with different places for every image, as Pillow computes them.

x counts columns and y rows; the centre of the first pixel is at 0.5.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BITS = 16
"""The binary places of a pixel with which Pillow looks for the nearest neighbour."""
TAPS = {"bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}
"""Which neighbours, from the pixel at or before a place, an interpolation mixes."""


def triangle(x: Tensor) -> Tensor:
    """The bilinear filter."""
    return (1 - x.abs()).clamp(min=0)


def cubic(x: Tensor) -> Tensor:
    """The bicubic filter of Keys (1981) with a = -0.5."""
    x = x.abs().clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": triangle, "bicubic": cubic}


def resizing(
    start: Tensor, extent: Tensor, length: int, samples: int, kernel: Callable[[Tensor], Tensor] = triangle
) -> Tensor:
    """How much of each of `length` pixels is in each of `samples`, which show the extent from `start`.

    start, extent: [B], whole pixels.  The result, [B,samples,length], has their dtype.  The kernel is as wide as a
    sample where that is wider than a pixel (antialiasing), and nothing outside of the extent is seen.
    """
    scale = (extent / samples)[:, None, None]
    number = torch.arange(samples, device=start.device, dtype=start.dtype)[:, None] + 0.5
    pixel = torch.arange(length, device=start.device, dtype=start.dtype) + 0.5
    first, extent = start[:, None, None], extent[:, None, None]
    weight = kernel((pixel - first - number * scale) / scale.clamp(min=1))
    weight = weight * ((pixel > first) & (pixel < first + extent))
    return weight / weight.sum(2, keepdim=True)


def smoothing(sigma: Tensor, length: int, radius: int) -> Tensor:
    """The weights [B,length,length] of a Gaussian with `sigma` [B] pixels, cut off after `radius` and mirrored."""
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.softmax(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2, dim=1)
    period = max(2 * length - 2, 1)
    place = (torch.arange(length, device=sigma.device) + offset[:, None]) % period
    place = torch.minimum(place, period - place) if length > 1 else place
    spread = (place[..., None] == torch.arange(length, device=sigma.device)).to(sigma.dtype)
    return (weight @ spread.flatten(1)).view(-1, length, length)


def resampled(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [B,C,H,W] with mixed rows and columns: weights [B,h,H] and [B,w,W] give [B,C,h,w]."""
    batch, channels, height, width = images.shape
    narrow = torch.bmm(images.reshape(batch, channels * height, width), columns.transpose(1, 2))
    narrow = narrow.view(batch, channels, height, columns.shape[1]).transpose(1, 2).flatten(2)
    return torch.bmm(rows, narrow).view(batch, rows.shape[1], channels, columns.shape[1]).transpose(1, 2)


def moved(images: Tensor, matrix: Tensor, fill: Tensor, interpolation: str = "nearest") -> Tensor:
    """Images [B,C,H,W] whose pixel (x, y) comes from matrix (x, y, 1), and is `fill` [C] where that lies outside.

    matrix: float64 [B,2,3].  The same pixels as Pillow's Image.transform; "bilinear" and "bicubic" (whose a is -1
    there) want levels, whole numbers from 0 to 255, and give such.
    """
    if interpolation == "nearest":
        return _nearest(images, matrix, fill)
    if interpolation in TAPS:
        return _interpolated(images, matrix, fill, TAPS[interpolation])
    raise ValueError(f"unknown interpolation {interpolation!r}: known: nearest, {', '.join(TAPS)}")


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """The matrix [B,2,3] of a counter-clockwise turn about the centre, rounded as Pillow does."""
    angle = -torch.deg2rad(degrees.double())
    cos, sin = (part.round(decimals=15) for part in (angle.cos(), angle.sin()))
    x, y = width / 2, height / 2
    rows = [cos, sin, -cos * x - sin * y + x, -sin, cos, sin * x - cos * y + y]
    return torch.stack(rows, 1).view(-1, 2, 3)


def _nearest(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    height, width = images.shape[2:]
    # a frame of `fill` takes what lies outside
    framed = fill[:, None, None].expand(*images.shape[:2], height + 2, width + 2).contiguous()
    framed[:, :, 1:-1, 1:-1] = images
    # at the centre of the first pixel, in this order of additions
    first = matrix[:, :, 2] + matrix[:, :, 0] * 0.5 + matrix[:, :, 1] * 0.5
    right, down, first = (
        (part * 2**BITS + 0.5).floor().long()[..., None, None] for part in (matrix[:, :, 0], matrix[:, :, 1], first)
    )
    x, y = (torch.arange(length, device=images.device) for length in (width, height))
    column, row = ((first + down * y[:, None] + right * x) >> BITS).unbind(1)
    return _picked(framed, column + 1, row + 1)


def _interpolated(images: Tensor, matrix: Tensor, fill: Tensor, taps: tuple[int, ...]) -> Tensor:
    height, width = images.shape[2:]
    x, y = (torch.arange(length, device=images.device) + 0.5 for length in (width, height))
    right, down, first = matrix[..., None, None].unbind(2)
    places = right * x + down * y[:, None] + first
    before = (places - 0.5).floor()
    over_x, over_y = (places - 0.5 - before)[:, :, None].unbind(1)
    left, top = before.long().unbind(1)
    exact = images.double()  # what is cut to whole levels must not be a hair below them
    rows = [_between([_picked(exact, left + i, top + j) for i in taps], over_x) for j in taps]
    levels = _between(rows, over_y).clamp(0, 255).floor()
    limit = torch.tensor([[[width]], [[height]]], device=images.device)
    inside = ((places >= 0) & (places < limit)).all(1, keepdim=True)
    return torch.where(inside, levels.to(images.dtype), fill[:, None, None])


def _picked(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The pixels at x and y, int64 [B,h,w], or at the nearest ones there are."""
    height, width = images.shape[2:]
    index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)[:, None]
    return images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1)).unflatten(2, x.shape[1:])


def _between(values: list[Tensor], over: Tensor) -> Tensor:
    if len(values) == 2:
        return values[0] + (values[1] - values[0]) * over
    a, b, c, d = values
    return b + over * (c - a + over * (2 * (a - b) + c - d + over * (b - a - c + d)))
