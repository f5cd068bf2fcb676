"""Numbers and tensors shared by the workers of one training run; with one worker everything is the identity.

The gradients are those of the sum of all workers' losses, which is what DistributedDataParallel's average expects
of a loss that is a mean over the local batch.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=30)
"""So long a worker waits for the others; the first one may have much to do alone."""


@contextmanager
def joined(kind: str, number: int, workers: int, host: str, told: Callable[[Any], Any]) -> Iterator[None]:
    """Makes this process one of the workers of a training run while it lasts.

    kind: `gloo`, or `nccl` with a GPU for each.  number: of this one, from 0.  host: its address; the workers find
    each other at the first one's, where nothing else is listened on.  told: gives to every worker what the first one
    gives to it.
    """
    family = socket.getaddrinfo(host, None)[0][0]
    server = None if number else socket.create_server((host, 0), family=family)
    first, port = told(server.getsockname()[:2] if server else None)
    own: dict[str, Any] = {"wait_for_workers": False, "master_listen_fd": server.detach()} if server else {}
    store = distributed.TCPStore(first, port, workers, is_master=not number, timeout=TIMEOUT, **own)
    distributed.init_process_group(kind, store=store, rank=number, world_size=workers, timeout=TIMEOUT)
    yield
    distributed.destroy_process_group()  # not after an error: it may wait for those who still compute


def rank() -> int:
    """This worker's number, 0 without torch.distributed."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world() -> int:
    """The number of workers, 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllSum.apply(gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.length = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllSum.apply(gradient).narrow(0, rank() * ctx.length, ctx.length)


def all_sum(x: Tensor) -> Tensor:
    """The sum of `x` over the workers, with gradient; the same shape everywhere."""
    return _AllSum.apply(x) if world() > 1 else x


def mean(x: Tensor) -> Tensor:
    """The mean of `x` [B, ...] over the images of all workers, who may have different numbers of them.

    It is a worker's part of that mean times the number of workers: their average is the mean, and so is its gradient.
    """
    return x.sum(0) * world() / all_sum(x.new_tensor(len(x)))


def gather(x: Tensor) -> Tensor:
    """`x` [n, ...] of all workers one below the other, [W n, ...], with gradient; the same shape on every worker."""
    return _Gather.apply(x) if world() > 1 else x


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` [n, ...] of all workers one below the other, with gradient, and where this worker's rows begin.

    The workers may have different numbers of rows.
    """
    if world() == 1:
        return x, 0
    sizes = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = gather(torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])]))
    rows = torch.cat([part[:size] for part, size in zip(padded.chunk(len(sizes)), sizes, strict=True)])
    return rows, sum(sizes[: rank()])


def share(rows: int, number: int, workers: int) -> tuple[int, int]:
    """Where worker `number` begins in so many rows, and how many are its own: neighbours, as evenly as can be."""
    each, over = divmod(rows, workers)
    return each * number + min(number, over), each + (number < over)


def sizes_of(x: Tensor) -> list[int]:
    """How many rows each worker has."""
    return gather(torch.tensor([len(x)], device=x.device)).tolist()


def everyones(x: Tensor, sizes: list[int]) -> Tensor:
    """`x` [n, ...] of all workers one below the other [G, ...], without gradient; sizes: how many rows each has."""
    return x if world() == 1 else _exchanged(torch.cat([x] * world()), [len(x)] * world(), sizes)


def returned(x: Tensor, sizes: list[int]) -> Tensor:
    """The sum over the workers of those rows of `x` [G, ...] that came from this one, without gradient."""
    if world() == 1:
        return x
    own = sizes[rank()]
    return _exchanged(x, sizes, [own] * world()).view(world(), own, *x.shape[1:]).sum(0)


def _exchanged(x: Tensor, given: list[int], taken: list[int]) -> Tensor:
    """Gives each worker its rows of `x`, and takes what the others have for this one."""
    found = x.new_empty(sum(taken), *x.shape[1:])
    distributed.all_to_all_single(found, x.contiguous(), taken, given)
    return found


def all_max(x: Tensor) -> Tensor:
    """The largest `x` of the workers, place by place, without gradient; the same shape everywhere."""
    most = x.clone()
    if world() > 1:
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return most


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the images of all workers, however many each of them has; on any device.

    Values, gradients and running statistics are those of one process with the whole batch.  A `drop` and an `act`
    that the module has (timm's BatchNormAct2d) follow.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of places is fine."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalised(x) if self.training else super().forward(x)
        for after in ("drop", "act"):
            y = getattr(self, after)(y) if hasattr(self, after) else y
        return y

    def _normalised(self, x: Tensor) -> Tensor:
        places = [0, *range(2, x.dim())]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, places, correction=0)
        size = mean.new_full((1,), x.numel() // x.shape[1])
        # one exchange: each worker's size, means and variances as a row
        rows = gather(torch.cat([size, mean, variance])[None])
        total = rows[:, 0].sum()
        share = rows[:, :1] / total
        means, variances = rows[:, 1:].chunk(2, 1)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        self._track(mean, variance * total / (total - 1))
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = (wide - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


def synchronised(module: nn.Module) -> nn.Module:
    """Makes every BatchNorm1d and BatchNorm2d inside normalise over all workers; the names of the state stay.

    The module is changed in place and returned; with one worker nothing changes.
    """
    if world() > 1:
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                # another class for the same object: its parameters, buffers and hooks stay who they are
                part.__class__ = SynchronisedBatchNorm  # type: ignore[assignment]
    return module


def together(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the workers; with one worker, the module itself.

    Weights and buffers are sent around here, and buffers never again: statistics that see the images of all workers
    and queues that take them are computed alike by each of them.  Buffers of another kind become each worker's own,
    and the first worker's are stored.
    """
    if world() == 1:
        return module
    model = DistributedDataParallel(module)
    model.broadcast_buffers = False  # as a keyword it would leave out the first time, too
    return model


def agreed(value: Any) -> Any:
    """The first worker's value, on every worker."""
    if world() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def all_told(value: Any) -> list[Any]:
    """The values of all workers, on every worker."""
    found = [value] * world()
    if world() > 1:
        distributed.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Waits until every worker is here."""
    if world() > 1:
        distributed.barrier()
