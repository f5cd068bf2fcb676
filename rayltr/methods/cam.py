"""Re-sampling by class activation maps: drawn images are transformed where the parent stage sees the object.

The "CAM-based sampling" of Zhang et al. (Bag of Tricks for Long-Tailed Visual Recognition, 2021).  The authors write
transformed images to disk before the stage; here they are made anew for every batch, from one small map per training
image.  x counts columns and y rows, both from 0, and a whole number is the centre of a pixel.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rayltr.interface import Parts
from rayltr.methods import supervised
from rayltr.parallel import all_sum

TRANSFORMS = {
    "rotate_scale": (1, 1, 0, 0),
    "rotate": (1, 0, 0, 0),
    "scale": (0, 1, 0, 0),
    "translate": (0, 0, 1, 0),
    "flip": (0, 0, 0, 1),
}
"""What each transform does: turn, scale, shift, mirror."""

BOXES = ("object", "corner")
ORIGINALS = ("published", "none")
COVERED = 1e-3
"""The share of a pixel from which it counts as covered; what rounding leaves is far smaller."""


class Method(supervised.Method):
    """`supervised` on images that are altered by the class activation map of their class in the frozen teacher.

    Weights and terms are those of `supervised`, whose keywords are the first four; a stage may resume such a stage.

    threshold: the foreground is where the map reaches this multiple of its mean (the authors' code 0.75, paper 1).
    transforms: one of them, uniformly, for each image; the paper's four are flip, translate, rotate and scale.
    box: rotations and shifts go by the box around the foreground ("object"), or as in the authors' code by the first
    two of its columns and rows ("corner").
    originals: a drawn image stays as it is as often as in the authors' stored sets ("published", see
    `original_shares`) or never ("none", the paper's text).  limit: the authors' threshold for large data, 100.

    Raises ValueError for a keyword's unknown value, and when training begins for a missing or unsuitable teacher.
    """

    taught = True
    stay: Tensor
    effects: Tensor
    maps: Tensor

    def __init__(
        self,
        parts: Parts,
        *,
        reduction: str = "weighted_mean",
        frozen: bool = False,
        drift: bool = False,
        fresh_head: bool = False,
        threshold: float = 0.75,
        transforms: tuple[str, ...] = ("rotate_scale", "translate", "flip"),
        box: str = "object",
        originals: str = "published",
        limit: int | None = None,
    ):
        super().__init__(parts, reduction=reduction, frozen=frozen, drift=drift, fresh_head=fresh_head)
        if not transforms:
            raise ValueError(f"cam needs at least one of the transforms {', '.join(TRANSFORMS)}")
        for name in transforms:
            _known("transform", name, TRANSFORMS)
        _known("box", box, BOXES)
        _known("choice of originals", originals, ORIGINALS)
        if limit is not None and limit < 1:
            raise ValueError(f"the limit of generated images is at least 1, not {limit}")
        self.threshold, self.box = threshold, box
        self.teacher = (parts.teacher,)  # inside a tuple: its weights are none of this method's
        shares = original_shares(parts.counts, limit)
        self.register_buffer("stay", shares if originals == "published" else 0 * shares, persistent=False)
        self.register_buffer("effects", torch.tensor([TRANSFORMS[name] for name in transforms]), persistent=False)

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], size: int) -> None:
        """Computes the maps of all `size` training images, uint8 [N,h,w]; `batches` are those of this worker.

        batches: rows int64 [B], raw images [B,3,H,W] in [0, 1], target int64 [B].
        """
        found = [(rows, _maps(self.teacher[0], images, target)) for rows, images, target in batches]
        rows, maps = (torch.cat(part) for part in zip(*found, strict=True))
        # no buffer: DistributedDataParallel sends those around before every batch
        self.maps = all_sum(maps.new_zeros(size, *maps.shape[1:]).index_copy(0, rows, maps))

    def alter(self, images: Tensor, target: Tensor, rows: Tensor, generator: Generator) -> Tensor:
        """The images [B,3,H,W] of a batch, in [0, 1], transformed at their foregrounds; channels last."""
        draws = torch.rand((6, len(images)), generator=generator, device=generator.device, dtype=torch.float64)
        chance, *others = draws.to(images.device)
        mask = foreground(self.maps.index_select(0, rows), images.shape[2:], self.threshold)
        affine = affines(others, self.effects, boxes(mask, self.box), images.shape[2:])
        # an image without foreground is left alone
        return composed(images, mask & (chance >= self.stay[target])[:, None, None], affine)


def _known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: known: {', '.join(known)}")


def _maps(teacher: nn.Module | None, images: Tensor, target: Tensor) -> Tensor:
    """The maps of images for their classes.  Raises ValueError if the teacher has none."""
    if teacher is None:
        raise ValueError("cam needs a teacher: the stage whose class activation maps it uses; give teacher=...")
    backbone: Any = getattr(teacher, "backbone", None)
    head: Any = getattr(teacher, "head", None)
    if not hasattr(getattr(backbone, "body", backbone), "feature_map"):
        raise ValueError("cam needs a teacher whose backbone has a feature_map, that is, a convolutional one")
    if not hasattr(head, "weight"):
        raise ValueError("cam needs a teacher whose head has a weight [classes, features], such as linear")
    features = backbone.feature_map(images)
    weight = head.weight[target]
    if features.ndim != 4 or features.shape[1] != weight.shape[1]:
        raise ValueError(f"cam needs a teacher with feature maps [B, D, h, w], not {list(features.shape)}")
    # a scale that the head has learnt may have any sign
    return activation(features, weight * head.scale[target, None] if hasattr(head, "scale") else weight)


def original_shares(counts: Tensor, limit: int | None = None) -> Tensor:
    """How much of each class is originals, n / (n + g), in the authors' stored set; float64 [C].

    They add g = n_max + n_min - n transformed images to a class of n; with a `limit` none to classes of at least as
    many images and at most `limit` to the others.  A class without images counts as one image.
    """
    n = counts.clamp(min=1).double()
    made = n.max() + n.min() - n
    if limit is not None:
        made = torch.where(n >= limit, 0.0, made.clamp(max=limit))
    return n / (n + made)


def activation(features: Tensor, weight: Tensor) -> Tensor:
    """Class activation maps sum_d W_d A_d of features [B,D,h,w] and weights [B,D], stretched to uint8 [B,h,w].

    The smallest value of a map becomes 0, the largest 255, the others are rounded down; a constant map is all 0.
    (Zhou et al., Learning Deep Features for Discriminative Localization, 2016, eq. 2.)
    """
    # no einsum, which autocast would take to half precision; a product stays in that of the weights
    found = (features * weight[:, :, None, None]).sum(1)
    found = found - found.amin((1, 2), keepdim=True)
    largest = found.amax((1, 2), keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
    return (found / largest * 255).to(torch.uint8)


def foreground(maps: Tensor, size: tuple[int, ...], threshold: float) -> Tensor:
    """Where maps uint8 [B,h,w], resized bilinearly to `size`, reach `threshold` times their mean; bool [B,H,W]."""
    resized = F.interpolate(maps[:, None].float(), size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return resized >= threshold * resized.mean((1, 2), keepdim=True)


def boxes(mask: Tensor, kind: str = "object") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_min, x_max, y_min, y_max, each int64 [B], of masks bool [B,H,W]; 0 where a mask is empty.

    "object" is the smallest box around the mask; "corner" ends at its second non-empty column and row, or the only one.
    """
    return (*_extent(mask.any(1), kind), *_extent(mask.any(2), kind))


def _extent(filled: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """First and last (or second) position of the true ones, int64 [B], along bool [B,L]."""
    seen = filled.cumsum(1)
    total = seen[:, -1:]
    last = total if kind == "object" else total.clamp(max=2)
    return (seen >= total.clamp(max=1)).int().argmax(1), (seen >= last).int().argmax(1)


def affines(draws: list[Tensor], effects: Tensor, box: tuple[Tensor, ...], size: tuple[int, ...]) -> Tensor:
    """Where the pixels of transformed images come from: (x, y) = A (x', y', 1), float64 [B,2,3].

    draws: uniform numbers in [0, 1), each [B], for the choice among the transforms (`effects` [T,4], rows of
    `TRANSFORMS`), the angle (-45 to 44 degrees, counter-clockwise), the scale (80 to 119 percent) and the shifts to the
    right and down (as far as the box stays inside the image); all whole numbers, uniform.  Rotation and scale are
    about the centre of the `box`, mirroring is left-right about that of the image of `size` (H, W).
    """
    kind, turn, grow, right, down = draws
    x_min, x_max, y_min, y_max = box
    height, width = size
    turned, scaled, shifted, mirrored = effects[(kind * len(effects)).long()].T
    angle = turned * _whole(-45, 44, turn)
    scale = torch.where(scaled > 0, _whole(80, 119, grow) / 100, 1.0)
    dx = shifted * _whole(-x_min, width - 1 - x_max, right)
    dy = shifted * _whole(-y_min, height - 1 - y_max, down)
    back = rotation((x_min + x_max) / 2, (y_min + y_max) / 2, -angle, 1 / scale)
    back[:, 0, 0] *= 1 - 2 * mirrored
    back[:, :, 2] += torch.stack([mirrored * (width - 1) - dx, -dy], 1)
    return back


def _whole(low: Tensor | int, high: Tensor | int, draw: Tensor) -> Tensor:
    """Whole numbers from `low` to `high`, both included, from uniform numbers in [0, 1)."""
    return low + (draw * (high - low + 1)).floor()


def rotation(x: Tensor, y: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Turns by `angle` degrees, counter-clockwise to the eye, and scales about the point (x, y); [B,2,3].

    OpenCV's getRotationMatrix2D.  The inverse is that of the negative angle and 1 / scale.
    """
    a, b = scale * torch.cos(torch.deg2rad(angle)), scale * torch.sin(torch.deg2rad(angle))
    rows = [a, b, (1 - a) * x - b * y, -b, a, b * x + (1 - a) * y]
    return torch.stack(rows, 1).view(-1, 2, 3)


def composed(images: Tensor, mask: Tensor, affine: Tensor) -> Tensor:
    """Shows the transformed images [B,3,H,W] where the mask bool [B,H,W] or the transformed mask is.

    affine [B,2,3] says where each pixel comes from (see `affines`).  Pixels are bilinear, outside is black; where a
    transformed image has no pixel at all, and everywhere else, the image stays.  The result is channels last.
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    own = mask[:, None].to(wide)
    stack = torch.cat([wide, own, torch.ones_like(own)], 1)
    moved = F.grid_sample(stack, _grid(affine.to(wide), *images.shape[2:]), align_corners=False)
    covers, valid = (moved[:, 3:] > COVERED).split(1, 1)
    shown = torch.where((mask[:, None] | covers) & valid, moved[:, :3].clamp(0, 1), wide)
    return shown.to(images.dtype).contiguous(memory_format=torch.channels_last)


def _grid(affine: Tensor, height: int, width: int) -> Tensor:
    """Where all pixels come from, in grid_sample's coordinates: -1 to 1 from edge to edge; [B,H,W,2]."""
    x, y = (torch.arange(length, device=affine.device, dtype=affine.dtype) for length in (width, height))
    from_x, from_y = affine.permute(1, 2, 0)[..., None, None]
    places = (row[0] * x + row[1] * y[:, None] + row[2] for row in (from_x, from_y))
    return torch.stack([(2 * place + 1) / side - 1 for place, side in zip(places, (width, height), strict=True)], -1)
