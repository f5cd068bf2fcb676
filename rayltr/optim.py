"""Optimisers `(parameters, *, lr, ...) -> optimiser` and schedules `(t, *, ...) -> factor` of the learning rate.

Every optimiser is stepped with a closure that clears the gradients, computes the loss, calls backward on it and
returns it: SAM calls it twice, the others once.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def sgd(
    parameters: Parameters,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 2e-4,
) -> Optimizer:
    """Stochastic gradient descent; weight decay acts on everything it is given."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


def adamw(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    beta1: float = 0.9,
    beta2: float = 0.999,
    spare: bool | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    With `spare` the decay leaves out biases and norms, which have one dimension, and the tokens and positions of
    transformers, which have three.
    """
    given = _spared(parameters) if spare else parameters
    return torch.optim.AdamW(given, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)


def _spared(parameters: Parameters) -> list[dict[str, Any]]:
    whole: list[Any] = [*parameters]
    decayed, others = ([p for p in whole if (p.dim() in (2, 4)) is kept] for kept in (True, False))
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


class SAM(Optimizer):
    """Sharpness-aware minimisation around another optimiser (Foret et al., 2021; adaptive: Kwon et al., 2021).

    A step takes the gradient g at the weights w, moves to w + rho T^2 g / |T g| (T = |w| if adaptive, else 1; one
    norm over all parameters), takes the gradient there, returns to exactly w and lets the inner optimiser step with
    it.  Weight decay is the inner optimiser's and no part of g.

    Its param_groups, state and state_dict are the inner optimiser's: schedules act on both, and a run goes on from
    a checkpoint bit for bit.  `guard` tells it the module that the closure calls; the closure may add up the
    gradients of several batches.
    """

    def __init__(self, inner: Optimizer, *, rho: float = 0.05, adaptive: bool = False, sync: bool = False):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.rho, self.adaptive, self.sync = inner, rho, adaptive, sync
        self.guarded: nn.Module | None = None
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def guard(self, module: nn.Module) -> None:
        """Lets the second pass leave the module's BatchNorm statistics alone.

        Parts of it that have `passing(number)` are told which pass comes: 1, 2, and 0 when both are over.
        If the module has `no_sync` (DistributedDataParallel) the first pass runs under it: every worker climbs its
        own gradient, as published, unless `sync` asks for the gradient of the whole batch.  Its own is the gradient
        of its own loss, and what flows back through gathered features and synchronised BatchNorm is that of all
        workers' losses, by way of its own images.
        """
        self.guarded = module

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Calls the closure at the weights and above them; returns the first loss.

        Random numbers drawn by the closure are the same in both passes.  The weights are restored whatever happens in
        the second pass.  A gradient that is not finite is not climbed, and the step is that of the inner optimiser
        alone: it is not left out, so that a loss which is no number any more shows as it does without SAM.
        """
        evaluate = torch.enable_grad()(closure)
        try:
            self._tell(1)
            with self._first_pass():
                loss = evaluate()
            self._tell(2)
            with self._climbed(), _kept(_statistics(self.guarded)):
                self.zero_grad()
                evaluate()
        finally:
            self._tell(0)
        self.inner.step()
        return loss

    def _tell(self, number: int) -> None:
        for part in self.guarded.modules() if self.guarded is not None else ():
            if hasattr(part, "passing"):
                part.passing(number)  # type: ignore[operator]

    @contextmanager
    def _first_pass(self) -> Iterator[None]:
        """Puts the random state back afterwards, so that the second pass draws the same."""
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        alone = nullcontext if self.sync else getattr(self.guarded, "no_sync", nullcontext)
        with torch.random.fork_rng(list(devices)), alone():
            yield

    @contextmanager
    def _climbed(self) -> Iterator[None]:
        """Moves the weights uphill, and back to exactly where they were afterwards."""
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        uphill = [p.grad * p.abs() if self.adaptive else p.grad for p in weights]
        norm = nn.utils.get_total_norm(uphill)
        if self.adaptive:
            uphill = [g * p.abs() for g, p in zip(uphill, weights, strict=True)]
        with _kept(weights):
            if weights and norm.isfinite():
                torch._foreach_add_(weights, torch._foreach_mul(uphill, self.rho / (norm + 1e-12)))
            yield

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's: between two steps SAM itself has nothing to remember."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, of SAM or of the inner optimiser alone."""
        self.inner.load_state_dict(state_dict)
        self._share()


def _statistics(module: nn.Module | None) -> list[Tensor]:
    parts = module.modules() if module is not None else ()
    return [buffer for part in parts if isinstance(part, _BatchNorm) for buffer in part.buffers(recurse=False)]


@contextmanager
def _kept(tensors: list[Tensor]) -> Iterator[None]:
    """Gives the tensors back the values they had."""
    values = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def sam(
    parameters: Parameters,
    *,
    lr: float = 0.1,
    rho: float = 0.05,
    adaptive: bool = False,
    base: str = "sgd",
    momentum: float | None = None,
    nesterov: bool | None = None,
    weight_decay: float | None = None,
    sync: bool = False,
) -> Optimizer:
    """SAM around `base`, which is sgd or adamw; adaptive SAM wants a `rho` about ten times larger.

    A keyword left at None is the base's own default.  `sync` climbs the gradient of all workers together instead of
    each worker its own (see `SAM.guard`).  Raises ValueError for an unknown base and a keyword that the base does not
    have.
    """
    bases: dict[str, Callable[..., Optimizer]] = {"sgd": sgd, "adamw": adamw}
    if base not in bases:
        raise ValueError(f"the base of sam is one of {', '.join(bases)}, not {base!r}")
    asked = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if unknown := sorted(set(given) - set(inspect.signature(bases[base]).parameters)):
        raise ValueError(f"{base}, the base of sam, has no keyword {unknown[0]!r}")
    return SAM(bases[base](parameters, lr=lr, **given), rho=rho, adaptive=adaptive, sync=sync)


OPTIMISERS = {f.__name__: f for f in (sgd, adamw, sam)}


def _warm(t: float, warmup: float, start: float = 0.0) -> float:
    return start * (1 - t / warmup) + t / warmup


def constant(t: float, *, warmup: float = 0.0) -> float:
    """Linear from 0 to 1 over `warmup`, then 1.  `t` in (0, 1] is the share of the horizon done after the step."""
    return _warm(t, warmup) if t <= warmup else 1.0


def cosine(
    t: float,
    *,
    warmup: float = 0.0,
    final: float = 0.0,
    warmup_from: float | None = None,
    beneath: bool | None = None,
) -> float:
    """Linear to 1 over `warmup`, then half a cosine down to `final` at t = 1 (Loshchilov and Hutter, 2017).

    The warm-up begins at `warmup_from`, None is 0.  With `beneath` the cosine begins at t = 0, beneath the warm-up,
    as timm's does.
    """
    if t <= warmup:
        return _warm(t, warmup, warmup_from or 0.0)
    warmup = 0.0 if beneath else warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup))) / 2


def multistep(
    t: float,
    *,
    warmup: float = 0.0,
    milestones: tuple[float, ...] = (0.8, 0.9),
    gamma: float = 0.01,
    warmup_from: float = 0.0,
) -> float:
    """Linear from `warmup_from` to 1 over `warmup`, then times `gamma` for every milestone that t has passed.

    A milestone m acts on the steps that come after the share m of the horizon is complete (t > m).
    """
    if t <= warmup:
        return _warm(t, warmup, warmup_from)
    return gamma ** sum(t > milestone for milestone in milestones)


SCHEDULES = {f.__name__: f for f in (constant, cosine, multistep)}
