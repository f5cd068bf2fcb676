"""Which training images an epoch shows: `(counts [C], target [N], t, generator, *, ...) -> indices int64 [M]`.

A sampler draws a whole epoch at once from the generator it is given (on the CPU) and knows nothing of workers.
`counts` are the training images per class and decide how often a class is drawn; `target` are the classes of the
images that can be drawn.  `t` in (0, 1] is the share of the horizon that is complete when this epoch ends.  A class
without images is never drawn.
"""

from typing import Any

import torch
from torch import Generator, Tensor


def power(counts: Tensor, target: Tensor, t: float, generator: Generator, *, q: float = 1.0) -> Tensor:
    """N draws, class c with probability n_c^q / sum n^q, then an image uniformly inside (Kang et al., 2020, eq. 1).

    q = 1 shows every image exactly once, shuffled; any other q draws with replacement: q = 1/2 is square-root
    sampling, q = 0 class-balanced sampling.
    """
    if q == 1:
        return torch.randperm(len(target), generator=generator)
    return _drawn(power_probabilities(counts, t, q=q), target, generator)


def progressive(counts: Tensor, target: Tensor, t: float, generator: Generator) -> Tensor:
    """N draws with replacement that go from the natural to the balanced classes (Kang et al., 2020, eq. 2)."""
    return _drawn(progressive_probabilities(counts, t), target, generator)


def _drawn(probabilities: Tensor, target: Tensor, generator: Generator) -> Tensor:
    size = torch.bincount(target, minlength=len(probabilities))
    order = target.argsort(stable=True)
    first = size.cumsum(0) - size
    # only among classes that can be drawn: a draw at the very edge may otherwise fall on a probability of 0
    present = (probabilities * size).nonzero().squeeze(1)
    n = len(target)
    classes = present[torch.multinomial(probabilities[present], n, replacement=True, generator=generator)]
    within = (torch.rand(n, generator=generator, dtype=torch.float64) * size[classes]).long()
    return order[first[classes] + within]


SAMPLERS = {f.__name__: f for f in (power, progressive)}


def power_probabilities(counts: Tensor, t: float, *, q: float = 1.0) -> Tensor:
    """n^q / sum n^q over the classes that have images, float64 [C]."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    weight = torch.where(n > 0, n**q, 0.0)
    return weight / weight.sum()


def progressive_probabilities(counts: Tensor, t: float) -> Tensor:
    """(1 - t) n/N + t/K, where K is the number of classes that have images, float64 [C]."""
    return (1 - t) * power_probabilities(counts, t) + t * power_probabilities(counts, t, q=0.0)


_PROBABILITIES = {"power": power_probabilities, "progressive": progressive_probabilities}


def class_probabilities(name: str, counts: Tensor, t: float, **keywords: Any) -> Tensor:
    """The probability of each class at one draw of the sampler `name`, float64 [C], sum 1.

    Raises ValueError for a sampler that does not exist.
    """
    if name not in _PROBABILITIES:
        raise ValueError(f"no sampler is called {name!r}; there are {', '.join(_PROBABILITIES)}")
    return _PROBABILITIES[name](counts, t, **keywords)
