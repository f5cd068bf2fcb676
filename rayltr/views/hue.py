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
    sixths = _sixths(levels.device).index_select(0, _place(levels, high, spread).flatten()).view_as(high)
    sixths += (amount * 255).trunc().mul_(6).to(levels)[:, None, None]
    sixths.sub_((sixths / 1536).floor_(), alpha=1536)
    saturation = (255 * spread).div_(high.clamp(min=1)).floor_()
    return _rgb(sixths, saturation, high)


def _place(levels: Tensor, high: Tensor, spread: Tensor) -> Tensor:
    """Where `_sixths` has the hue of pixels: int32 [n,H,W], of levels [n,3,H,W].

    The largest channel, the spread, and how far the two others are apart say all.
    """
    red, green, blue = levels.unbind(1)
    # 0 for yes and 1 for no, without comparisons, which are slow on a CPU
    not_red, not_green = ((high - channel).clamp_(max=1) for channel in (red, green))
    apart = (green - blue).lerp_((blue - red).lerp_(red - green, not_green), not_red)
    largest = torch.addcmul(not_red, not_red, not_green)  # 0, 1, 2: red before green before blue
    return apart.add_(spread.add(largest, alpha=256), alpha=512).int()


@cache
def _sixths(device: torch.device) -> Tensor:
    """Six times the hue of every kind of pixel: float32 [3 * 256 * 512], by `_place`."""
    spread, apart = torch.arange(256.0)[:, None].expand(256, 512), torch.arange(512.0).expand(256, 512)
    apart = torch.where(apart < 256, apart, apart - 512)
    found = []
    for largest in range(3):
        channels = {largest: spread, (largest + 1) % 3: apart.clamp(min=0), (largest + 2) % 3: (-apart).clamp(min=0)}
        found.append(_hue(torch.stack([channels[c] for c in range(3)])[None], spread[None])[0])
    # pixels whose channels are apart by less than 0 have their place before that of their spread
    table = torch.stack(found).flatten(0, 1)
    return torch.cat([table[:, :256], table[:, 256:].roll(-1, 0)], 1).mul_(6).flatten().to(device)


def _hue(levels: Tensor, high: Tensor) -> Tensor:
    """The hue [n,H,W], 0 to 255, where the lowest level is 0.

    C changes between single and double precision here, and where it cuts that shows.
    """
    red, green, blue = ((high - levels[:, c]) / high.clamp(min=1) for c in range(3))
    greenish, bluish = 2 + red.double() - blue, 4 + green.double() - red
    sixths = torch.where(red == 0, (blue - green).double(), torch.where(green == 0, greenish, bluish))
    circle = sixths.float().double().div_(6).add_(1)
    return (circle - circle.floor()).float().double().mul_(255).floor_().float()


def _rgb(sixths: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Levels [n,3,H,W] of six times the hue, saturation and value, each [n,H,W]; exact, since all stays below 2^24."""
    away = sixths[:, None] + sixths.new_tensor([765, 255, -255])[:, None, None]
    away.sub_((away / 1530).round_(), alpha=1530).abs_()  # from where a channel is missing, around the circle
    share = away.sub_(255).clamp_(0, 255)
    weight = saturation * value
    rest = (65025 * value).sub_(weight, alpha=255).add_(32512)
    return torch.addcmul(rest[:, None], share, weight[:, None]).div_(65025).floor_()
