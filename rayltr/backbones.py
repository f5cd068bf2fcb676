"""Networks without classifier: `(*, ...) -> nn.Module`, images [B, 3, H, W] -> features [B, dim].

Every backbone has the attribute `dim` and, where it is convolutional, `feature_map(images) -> [B, dim, h, w]`.
`layers()` names the places inside where activations can be mixed.
"""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        stages = (part for part in self.trunk.children() if isinstance(part, nn.Sequential))
        return {f"layer{number}": part for number, part in enumerate(stages, 1)}


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (He et al., 2016, option A).

    Where the size changes, the shortcut takes every `stride`-th pixel and surrounds its channels by zeros.
    """

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.stride, self.missing = stride, (out - inside) // 2
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(x + y)


def _cifar_resnet(blocks: int, width: int) -> Pooled:
    """Three stages of `blocks` blocks with `width`, 2 `width` and 4 `width` channels; Kaiming-normal convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(3):
        out = width * 2**stage
        first = Block(out // 2, out, 2) if stage else Block(out, out, 1)
        layers.append(nn.Sequential(first, *(Block(out, out, 1) for _ in range(blocks - 1))))
    for module in nn.Sequential(*layers).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return Pooled(nn.Sequential(*layers), 4 * width)


def resnet20(*, width: int = 16) -> nn.Module:
    """The CIFAR ResNet of 20 layers (He et al., 2016, section 4.2), 4 `width` features."""
    return _cifar_resnet(3, width)


def resnet32(*, width: int = 16) -> nn.Module:
    """The CIFAR ResNet of 32 layers (He et al., 2016, section 4.2), 4 `width` features."""
    return _cifar_resnet(5, width)


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


def torchvision(*, model: str, pretrained: bool = False) -> nn.Module:
    """A resnet, resnext or wide_resnet of torchvision by name; its weights are torchvision's default ones.

    Raises ValueError for another name and when pretrained weights cannot be had.
    """
    models = importlib.import_module("torchvision").models  # late: slow to import, and only some runs need it
    known = [name for name in models.list_models(models) if name.startswith(("resnet", "resnext", "wide_resnet"))]
    if model not in known:
        raise _unknown(model, "torchvision", known)
    body = _created(lambda: models.get_model(model, weights="DEFAULT" if pretrained else None), model, pretrained)
    *trunk, _pool, (_, classifier) = body.named_children()
    return Pooled(nn.Sequential(OrderedDict(trunk)), classifier.in_features)


BACKBONES = {f.__name__: f for f in (resnet20, resnet32, timm, torchvision)}


class Normalised(nn.Module):
    """A backbone for images in [0, 1]: subtracts `mean` and divides by `std` per channel first."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.body, self.dim = body, body.dim
        self.register_buffer("mean", torch.as_tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.as_tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body((images - self.mean) / self.std)

    def feature_map(self, images: Tensor) -> Tensor:
        return self.body.feature_map((images - self.mean) / self.std)

    def layers(self) -> dict[str, nn.Module]:
        return self.body.layers() if hasattr(self.body, "layers") else {}


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
