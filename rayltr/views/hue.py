"""Pillow's way through hue, saturation and value and back, with its roundings."""

from functools import cache

import torch
from torch import Tensor


def turned_hue(levels: Tensor, amount: Tensor) -> Tensor:
    """The hue turned by `amount` of the circle, in steps of 1/256, as torchvision's adjust_hue does on images.

    levels: float32 [n,3,H,W], whole numbers from 0 to 255; amount: float64 [n], -0.5 to 0.5.
    """
    high, low = levels.amax(1), levels.amin(1)
    spread = high - low
    hue = _hues(levels.device).index_select(0, _place(levels, high, low, spread).flatten()).view_as(high)
    hue += (amount * 255).trunc().to(levels)[:, None, None]
    saturation = (255 * spread).div_(high.clamp(min=1)).floor_()
    return _rgb(hue - 256 * (hue / 256).floor(), saturation, high)


def _place(levels: Tensor, high: Tensor, low: Tensor, spread: Tensor) -> Tensor:
    """Where `_hues` has the hue of pixels: int64 [n,H,W], of levels [n,3,H,W].

    The largest channel, which of the others is the smallest, spread and distance of the one between say all.
    """
    red, green, blue = levels.unbind(1)
    between = (high + high).add_(low).sub_(red).sub_(green).sub_(blue)
    # 0 for yes and 1 for no, without comparisons, which are slow on a CPU
    not_red, not_green = ((high - channel).clamp_(max=1) for channel in (red, green))
    lowest = [(channel - low).clamp_(max=1) for channel in (red, green, blue)]
    largest = not_red * (1 + not_green)  # 0, 1, 2: red before green before blue
    after = lowest[2].lerp_(lowest[0].lerp_(lowest[1], not_green), not_red)
    return largest.mul_(2).add_(1).sub_(after).mul_(256).add_(spread).mul_(256).add_(between).long()


@cache
def _hues(device: torch.device) -> Tensor:
    """The hue of every kind of pixel: float32 [6 * 256 * 256], by `_place`."""
    spread, between = torch.arange(256.0)[:, None].expand(256, 256), torch.arange(256.0).expand(256, 256)
    high = spread.maximum(between)
    found = []
    for largest in range(3):
        for smallest_after in (False, True):
            ends = [high - spread, high - between] if smallest_after else [high - between, high - spread]
            channels = {(largest + 2) % 3: ends[0], (largest + 1) % 3: ends[1], largest: high}
            found.append(_hue(torch.stack([channels[c] for c in range(3)])[None], high[None], spread[None])[0])
    return torch.stack(found).flatten().to(device)


def _hue(levels: Tensor, high: Tensor, spread: Tensor) -> Tensor:
    """The hue [n,H,W], 0 to 255.  C changes between single and double precision here, and where it cuts that shows."""
    red, green, blue = ((high - levels[:, c]) / spread.clamp(min=1) for c in range(3))
    greenish, bluish = 2 + red.double() - blue, 4 + green.double() - red
    sixths = torch.where(red == 0, (blue - green).double(), torch.where(green == 0, greenish, bluish))
    circle = sixths.float().double().div_(6).add_(1)
    return (circle - circle.floor()).float().double().mul_(255).floor_().float()


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Levels [n,3,H,W] of hue, saturation and value, each [n,H,W]; exact, since all stays below 2^24."""
    start = hue.new_tensor([1275, 765, 255])[:, None, None]
    place = (6 * hue)[:, None] + start
    place = place.sub_(1530 * (place / 1530).floor_())
    missing = torch.minimum(place, 1020 - place).clamp_(0, 255).mul_(saturation[:, None])
    return (65025 - missing).mul_(value[:, None]).add_(32512).div_(65025).floor_()
