"""Pillow's way through hue, saturation and value and back, with its roundings."""

import torch
from torch import Tensor


def turned_hue(levels: Tensor, amount: Tensor) -> Tensor:
    """The hue turned by `amount` of the circle, in steps of 1/256, as torchvision's adjust_hue does on images.

    levels: float32 [n,3,H,W], whole numbers from 0 to 255; amount: float64 [n], -0.5 to 0.5.
    """
    high, low = levels.amax(1), levels.amin(1)
    spread = high - low
    hue = _hue(levels, high, spread) + (amount * 255).trunc().to(levels)[:, None, None]
    saturation = (255 * spread).div_(high.clamp(min=1)).floor_()
    return _rgb(hue - 256 * (hue / 256).floor(), saturation, high)


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
