"""Networks of one structure, each with weights of its own, computed as one: for those that leave a GPU idle.

torch.vmap makes grouped convolutions of theirs, so that one launch serves them all.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LOWERED = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, F.linear, F.scaled_dot_product_attention),
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm),
}
"""What autocast computes in low precision."""


class Network:
    """What networks of one structure compute in training mode, as a function of K times their weights at once."""

    def __init__(self, own: nn.Module):
        self.template = copy.deepcopy(own).to("meta").train()
        self.found: dict[torch.Size, bool] = {}

    def __call__(self, weights: dict[str, Tensor], statistics: dict[str, Tensor], images: Tensor) -> Tensor:
        """Features [K, B, ...] of images [B, K, 3, H, W], with tensors [K, ...]; statistics are updated in place."""

        def one(weights: dict[str, Tensor], statistics: dict[str, Tensor], images: Tensor) -> Tensor:
            return functional_call(self.template, (weights, statistics), (images,))

        with Mended():
            return torch.vmap(one, (0, 0, 1))(weights, statistics, images)

    def possible(self, images: Tensor) -> bool:
        """Whether such images [B, 3, H, W] can be computed at once.

        A network that draws random numbers cannot, nor one with an operation that vmap does not know.
        """
        if images.shape not in self.found:
            self.found[images.shape] = self._tried(images.new_empty(len(images), 2, *images.shape[1:], device="meta"))
        return self.found[images.shape]

    @torch.no_grad()
    def _tried(self, images: Tensor) -> bool:
        weights, statistics = ({name: p.new_empty(2, *p.shape) for name, p in own} for own in tensors(self.template))
        try:
            return self(weights, statistics, images) is not None
        except Exception:  # a network can do anything, and each has its own way to say that it cannot do this
            return False


class Mended(TorchFunctionMode):
    """What vmap would compute otherwise than a single network does, in bf16 that is.

    It takes operations apart before autocast sees them, and its batch norm rounds before it scales.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        if func is F.batch_norm:
            return norm(*args, **(kwargs or {}))
        if func in LOWERED:
            args = [lowered(value) if isinstance(value, Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))


def lowered(value: Tensor) -> Tensor:
    enabled, dtype = autocast(value.device.type)
    return value.to(dtype) if enabled else value


def norm(x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, *how: Any, **named: Any) -> Tensor:
    return Norm.apply(lambda *given: F.batch_norm(*given, *how, **named), x, mean, var, weight, bias)


class Norm(torch.autograd.Function):
    """The batch norm of several networks, which is one of all their channels."""

    @staticmethod
    def forward(compute: Callable[..., Tensor], *given: Any) -> Tensor:
        raise NotImplementedError("a network by itself needs no help")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed: torch knows the gradient of what `vmap` does."""

    @staticmethod
    def vmap(info: Any, dims: tuple, compute: Callable[..., Tensor], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        wide = x.movedim(dims[1], 1)
        pairs = zip(rest, dims[2:], strict=True)
        vectors = [None if own is None else own.movedim(dim, 0).flatten() for own, dim in pairs]
        return compute(wide.flatten(1, 2), *vectors).unflatten(1, wide.shape[1:3]), 1


class Stack:
    """The weights and statistics of several networks as tensors [K, ...]; from now on theirs are views of them."""

    def __init__(self, network: Network, owners: Sequence[nn.Module]):
        self.network, self.owners = network, [*owners]
        weights, statistics = zip(*(map(dict, tensors(own)) for own in owners), strict=True)
        self.parts = {name: [own[name] for own in weights] for name in weights[0]}
        self.weights = {name: joined(own).requires_grad_(own[0].requires_grad) for name, own in self.parts.items()}
        self.statistics = {name: joined([own[name] for own in statistics]) for name in statistics[0]}

    def deal(self) -> None:
        """Adds to the gradient of every network its part of ours."""
        for name, whole in self.weights.items():
            if whole.grad is None:
                continue
            for part, own in zip(self.parts[name], whole.grad.unbind(), strict=True):
                part.grad = own if part.grad is None else part.grad + own
            whole.grad = None


class Pass:
    """Features of several networks, cut into leaves that go on by themselves until their gradients are there.

    images: one [B, 3, H, W] per network, and each leaf [B, ...].  precision: see `autocast`.
    """

    def __init__(self, stack: Stack, images: Sequence[Tensor], precision: tuple[bool, torch.dtype]):
        self.stack, (enabled, dtype) = stack, precision
        # a cache of casts would outlive the step, because who computes is not always who trains
        with torch.enable_grad(), torch.autocast(images[0].device.type, dtype, enabled, cache_enabled=False):
            self.features = stack.network(stack.weights, stack.statistics, side_by_side(images))
        self.leaves = [part.detach().requires_grad_() for part in self.features]

    def backward(self) -> None:
        """Brings the gradients of the leaves back to the networks; a leaf without one counts as zero."""
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        kind = self.features.device.type
        with torch.autocast(kind, enabled=False):  # whoever asked last may be in a forward of his own
            self.features.backward(torch.stack(found))
        self.stack.deal()


def tensors(module: nn.Module) -> tuple[Iterator[tuple[str, Tensor]], Iterator[tuple[str, Tensor]]]:
    """Weights and statistics by name."""
    return module.named_parameters(), module.named_buffers()


def structure(module: nn.Module) -> tuple[Hashable, ...]:
    """What two networks that were built alike must share to be computed at once."""
    named = [pair for own in tensors(module) for pair in own]
    return str(module), *((name, p.shape, p.dtype, p.device, p.stride(), p.requires_grad) for name, p in named)


def joined(parts: Sequence[Any]) -> Tensor:
    """Tensors of one shape as [K, ...], each in the layout that it has; from now on they are views of it."""
    first = parts[0].detach()
    strides = first.numel(), *torch.empty_like(first).stride()
    whole = torch.empty_strided((len(parts), *first.shape), strides, dtype=first.dtype, device=first.device)
    for own, part in zip(whole.unbind(), parts, strict=True):
        own.copy_(part.detach())
        part.data = own
    return whole


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """K times images [B, 3, H, W] as [B, K, 3, H, W], laid out as a grouped convolution in channels last wants them."""
    return torch.stack([each.permute(0, 2, 3, 1) for each in images], 3).permute(0, 3, 4, 1, 2)


def autocast(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on here, and to what."""
    if not torch.amp.is_autocast_available(device):
        return False, torch.bfloat16
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
