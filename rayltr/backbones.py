"""Networks without classifier: `(*, ...) -> nn.Module`, images [B, 3, H, W] -> features [B, dim].

Every backbone has the attribute `dim` and, where it is convolutional, `feature_map(images) -> [B, dim, h, w]`.
`layers()` names the places inside where activations can be mixed; `split` cuts a network in two, so that several
experts can share the first part (see `branched`).
"""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.transformers import TwoTokens


class Pooled(nn.Module):
    """A convolutional network `trunk` and the average over the places of its feature map."""

    def __init__(self, trunk: nn.Module, dim: int):
        super().__init__()
        self.trunk, self.dim = trunk, dim

    def feature_map(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images).mean((2, 3))

    def layers(self) -> dict[str, nn.Module]:
        """The residual stages: layer1, layer2, ..."""
        return stages(self.trunk)

    def split(self, own: int) -> tuple[nn.Module, "Pooled"]:
        """What comes before the last `own` residual stages, and those; raises ValueError if there are fewer."""
        parts = list(self.trunk.named_children())
        cuts = [place for place, (_, part) in enumerate(parts) if isinstance(part, nn.Sequential)]
        if not 1 <= own <= len(cuts):
            raise ValueError(f"of this backbone an expert can own 1 to {len(cuts)} residual stages, not {own}")
        first, last = (nn.Sequential(OrderedDict(half)) for half in (parts[: cuts[-own]], parts[cuts[-own] :]))
        return first, Pooled(last, self.dim)


def stages(trunk: nn.Module) -> dict[str, nn.Module]:
    """The residual stages of a network whose children follow each other, by name: layer1, layer2, ..."""
    found = (part for part in trunk.children() if isinstance(part, nn.Sequential))
    return {f"layer{number}": part for number, part in enumerate(found, 1)}


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (He et al., 2016, option A).

    Where the size changes, the shortcut takes every `stride`-th pixel and surrounds its channels by zeros.
    """

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.stride, self.missing = stride, out - inside
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, -(-self.missing // 2)))
        return F.relu(x + y)


def _cifar_resnet(blocks: int, width: int, reduced: bool | None) -> Pooled:
    """Three stages of `blocks` blocks with `width`, 2 `width` and 4 `width` channels; Kaiming-normal convolutions."""
    if reduced and width % 4:
        raise ValueError(f"the width of a reduced network is a multiple of 4, not {width}")
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inside = width
    for stage, wide in enumerate((width, 2 * width, 4 * width)):
        out = wide * 3 // 4 if reduced and stage else wide
        first = Block(inside, out, 2 if stage else 1)
        layers.append(nn.Sequential(first, *(Block(out, out, 1) for _ in range(blocks - 1))))
        inside = out
    for module in nn.Sequential(*layers).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return Pooled(nn.Sequential(*layers), inside)


def resnet20(*, width: int = 16, reduced: bool | None = None) -> nn.Module:
    """The CIFAR ResNet of 20 layers (He et al., 2016, section 4.2), 4 `width` features.

    With `reduced` the last two stages have 3/4 of their channels, as the experts of RIDE and SADE do.  Raises
    ValueError if `width` is then no multiple of 4.
    """
    return _cifar_resnet(3, width, reduced)


def resnet32(*, width: int = 16, reduced: bool | None = None) -> nn.Module:
    """The CIFAR ResNet of 32 layers (He et al., 2016, section 4.2), 4 `width` features; `reduced`: see `resnet20`."""
    return _cifar_resnet(5, width, reduced)


class Timm(nn.Module):
    """A model of timm without its classifier."""

    def __init__(self, body: Any, dim: int):
        super().__init__()
        self.body, self.dim = body, dim

    def feature_map(self, images: Tensor) -> Tensor:
        return self.body.forward_features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def layers(self) -> dict[str, nn.Module]:
        """What timm offers as places to take features from."""
        names = [info["module"] for info in getattr(self.body, "feature_info", [])]
        return {name: self.body.get_submodule(name) for name in names}

    def split(self, own: int) -> tuple[nn.Module, Pooled]:
        """As `Pooled.split`.  Raises ValueError for what is no ResNet, or has dropout, too."""
        resnet = importlib.import_module("timm.models.resnet").ResNet
        if not isinstance(self.body, resnet) or self.body.drop_rate:
            raise ValueError("of timm's models only ResNets without dropout can be shared among experts")
        parts = OrderedDict((name, part) for name, part in self.body.named_children() if name not in TIMM_END)
        return Pooled(nn.Sequential(parts), self.dim).split(own)


TIMM_END = ("global_pool", "fc")
"""The children of a ResNet of timm that come after its feature map."""


def timm(*, model: str, pretrained: bool = False, drop: float = 0.0) -> nn.Module:
    """A model of timm by name; `drop` is its dropout rate.

    Raises ValueError for a name timm does not know and when pretrained weights cannot be had.
    """
    library = importlib.import_module("timm")  # late: slow to import, and only some runs need it
    if not library.is_model(model):
        raise _unknown(model, "timm", library.list_models())

    def create() -> Any:
        return library.create_model(model, pretrained=pretrained, num_classes=0, drop_rate=drop)

    body = _created(create, model, pretrained)
    # what `forward` gives; some models widen their `num_features` before the classifier
    return Timm(body, body.head_hidden_size)


def torchvision(*, model: str, pretrained: bool = False, reduced: bool | None = None) -> nn.Module:
    """A resnet, resnext or wide_resnet of torchvision by name; its weights are torchvision's default ones.

    With `reduced` the last two stages have 3/4 of their channels, as the experts of RIDE and SADE do.
    Raises ValueError for another name, when pretrained weights cannot be had, and for both keywords together.
    """
    if pretrained and reduced:
        raise ValueError("there are no pretrained weights for a reduced network; leave out pretrained or reduced")
    models = importlib.import_module("torchvision").models  # late: slow to import, and only some runs need it
    known = [name for name in models.list_models(models) if name.startswith(("resnet", "resnext", "wide_resnet"))]
    if model not in known:
        raise _unknown(model, "torchvision", known)
    body = _created(lambda: models.get_model(model, weights="DEFAULT" if pretrained else None), model, pretrained)
    dim = body.fc.in_features
    if reduced:
        _reduce(body)
        dim = body.inplanes
    *trunk, _pool, _classifier = body.named_children()
    return Pooled(nn.Sequential(OrderedDict(trunk)), dim)


def _reduce(body: Any) -> None:
    """Rebuilds the last two stages of a ResNet of torchvision with 192 and 384 instead of 256 and 512 planes."""
    body.inplanes //= 4
    for name, planes in (("layer3", 192), ("layer4", 384)):
        old = getattr(body, name)
        made = body._make_layer(type(old[0]), planes, len(old), stride=2)
        for module in made.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        setattr(body, name, made)


def deit(
    *,
    size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
    drop_path: float = 0.1,
    crop: float = 1.0,
    imagenet: bool = False,
) -> nn.Module:
    """A vision transformer with a class and a distillation token (Touvron et al., DeiT, 2021), from random weights.

    size: the side of its images; others are resized to size / `crop` and cut in the middle.  width: of the tokens
    (DeiT-Ti, S, B: 192, 384, 768 with 3, 6, 12 heads).  drop_path: of the last block, rising from 0 (stochastic
    depth).  imagenet: normalise by ImageNet's statistics.  Raises ValueError if heads do not divide the width, or the
    patch the size.
    """
    if size % patch:
        raise ValueError(f"patches of {patch} pixels do not divide images of {size}")
    made = importlib.import_module("timm.models.deit").VisionTransformerDistilled  # late: slow to import
    sides = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    body = _created(lambda: made(**sides, num_classes=0, drop_path_rate=drop_path), "deit", False)
    return TwoTokens(body, crop, imagenet)


BACKBONES = {f.__name__: f for f in (resnet20, resnet32, timm, torchvision, deit)}


class Normalised(nn.Module):
    """A backbone for images in [0, 1]: subtracts `mean` and divides by `std`, or its own `statistics`, first."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.body, self.dim = body, body.dim
        mean, std = getattr(body, "statistics", None) or (mean, std)
        self.register_buffer("mean", torch.as_tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.as_tensor(std).view(1, 3, 1, 1))

    def normalised(self, images: Tensor) -> Tensor:
        images = self.body.sized(images) if hasattr(self.body, "sized") else images
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.normalised(images))

    def feature_map(self, images: Tensor) -> Tensor:
        return self.body.feature_map(self.normalised(images))

    def layers(self) -> dict[str, nn.Module]:
        return self.body.layers() if hasattr(self.body, "layers") else {}


class Branched(nn.Module):
    """Several networks beside each other, the experts, each `dim` features wide: images -> [B, experts, dim].

    own: how many of the last residual stages each of them has for itself; what comes before is the first network's.
    None: they share nothing.  Raises ValueError for networks that cannot be cut there.
    """

    def __init__(self, bodies: Sequence[Any], own: int | None):
        super().__init__()
        self.dim = bodies[0].dim
        if own is None:
            self.stem, self.ends = nn.Identity(), nn.ModuleList(bodies)
            return
        if not hasattr(bodies[0], "split"):
            raise ValueError("this backbone cannot be shared among experts: it has no method split(own)")
        halves = [body.split(own) for body in bodies]
        self.stem, self.ends = halves[0][0], nn.ModuleList(end for _, end in halves)

    def forward(self, images: Tensor) -> Tensor:
        shared = self.stem(images)
        return torch.stack([end(shared) for end in self.ends], 1)

    def layers(self) -> dict[str, nn.Module]:
        """The residual stages that are shared."""
        return stages(self.stem)


def branched(backbones: Sequence[Any], own: int | None) -> Normalised:
    """Backbones for images in [0, 1] as one, with features [B, experts, dim]; for `own` see `Branched`."""
    first = backbones[0]
    return Normalised(Branched([each.body for each in backbones], own), first.mean, first.std)


def _unknown(model: str, library: str, known: list[str]) -> ValueError:
    near = [*(name for name in known if model in name), *get_close_matches(model, known, 5)][:5] or known[:5]
    return ValueError(f"{library} has no model {model!r} that can be used here; near are {', '.join(near)}")


def _created(create: Callable[[], Any], model: str, pretrained: bool) -> Any:
    try:
        return create()
    except Exception as error:  # each hub has its own kinds of failure
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        weights = "with pretrained weights " if pretrained else ""
        raise ValueError(f"{model!r} cannot be made {weights}here: {reason}") from error
