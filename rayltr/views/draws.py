"""Random numbers for every image of a batch, from the generator that a view is given and on its device."""

import torch
from torch import Generator, Tensor


def uniform(shape: tuple[int, ...], generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform between `low` and `high`; float64."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def integers(low: int, high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Whole numbers from `low` to `high`, both included; int64."""
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


def normal(mean: float, deviation: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Normal numbers; float64."""
    return mean + deviation * torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
