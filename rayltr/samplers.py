"""Which training images an epoch shows: `(counts [C], target [N], t, generator, *, ...) -> indices int64 [M]`.

A sampler draws a whole epoch at once from the generator it is given (on the CPU) and knows nothing of workers.
`counts` are the training images per class and decide how often a class is drawn; `target` are the classes of the
images that can be drawn.  `t` in (0, 1] is the share of the horizon that is complete when this epoch ends.  A class
without images is never drawn.  N is the number of images, K the number of classes that have some; how many indices M
an epoch has is up to the sampler.
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


def progressive(counts: Tensor, target: Tensor, t: float, generator: Generator, *, start: float = 0.0) -> Tensor:
    """N draws with replacement that go from the natural to the balanced classes (Kang et al., 2020, eq. 2).

    The way begins at the share `start` of the horizon: a stage that re-samples from 4/5 of the horizon on goes the
    whole way with start = 0.8, but only its last fifth with start = 0.  Raises ValueError unless 0 <= start < 1.
    """
    return _drawn(progressive_probabilities(counts, t, start=start), target, generator)


def reverse(counts: Tensor, target: Tensor, t: float, generator: Generator) -> Tensor:
    """2N indices in pairs: every image once, shuffled, each followed by a reversed draw (Zhou et al., BBN, 2020).

    The reversed draws are with replacement, class c with probability n_c^-1 / sum n^-1, then an image uniformly
    inside.  Ordinary images are at even positions, reversed ones at odd: a batch of 128 is 64 + 64.
    """
    ordinary = power(counts, target, t, generator)
    companions = _drawn(reverse_probabilities(counts, t), target, generator)
    return torch.stack([ordinary, companions], 1).flatten()


def repeated(counts: Tensor, target: Tensor, t: float, generator: Generator, *, repeats: int = 3) -> Tensor:
    """Shuffled images, each `repeats` times in a row, of which the first N come: the repeated augmentation of DeiT.

    N is rounded down to a multiple of 256 where there are so many, as in timm.  With three repeats an epoch shows a
    third of the images, three times each, with views of their own.  Raises ValueError for repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats of the sampler repeated is at least 1, not {repeats}")
    size = len(target) // 256 * 256 or len(target)
    return torch.randperm(len(target), generator=generator).repeat_interleave(repeats)[:size]


def oversample(counts: Tensor, target: Tensor, t: float, generator: Generator) -> Tensor:
    """K n_max indices, shuffled: every class as often as the largest is large (Buda et al., 2018).

    Each image of a class of n comes floor(n_max / n) times, and a random n_max mod n of them once more.  The classes
    are as large as the images that can be drawn make them.
    """
    size = torch.bincount(target)
    extra = _ranks(target, generator) < (size.max() % size.clamp(min=1))[target]
    copies = size.max() // size[target] + extra
    return _shuffled(torch.arange(len(target)).repeat_interleave(copies), generator)


def undersample(counts: Tensor, target: Tensor, t: float, generator: Generator) -> Tensor:
    """K n_min indices, shuffled: as many of every class as the smallest has, without replacement (Buda et al., 2018).

    They are chosen anew in each epoch.  The classes are as large as the images that can be drawn make them; n_min is
    the size of the smallest that has images.
    """
    size = torch.bincount(target)
    chosen = _ranks(target, generator) < size[size > 0].min()
    return _shuffled(chosen.nonzero().squeeze(1), generator)


def class_aware(
    counts: Tensor, target: Tensor, t: float, generator: Generator, *, each: int = 2, walks: int = 1
) -> Tensor:
    """N indices: the classes in a shuffled cycle, `each` neighbours of every one in turn (Kang et al., 2020).

    The images of a class come in a shuffled cycle, too, so that none is repeated before all were shown.  Both cycles
    are shuffled anew whenever they begin.  `each` is the published programs' num_samples_cls (SSD 2, Decoupling 4).
    With several `walks`, the workers of those programs, a permutation of the images is dealt out to them in turn, its
    first images again where it does not suffice; each walk knows only the classes it was dealt, and the walks
    alternate: W ceil(N / W) indices.  Raises ValueError for numbers below 1.
    """
    if min(each, walks) < 1:
        raise ValueError(f"each and walks of class_aware are at least 1, not {each} and {walks}")
    order = torch.randperm(len(target), generator=generator)
    length = -(-len(order) // walks)
    order = order.repeat(-(-length * walks // len(order)))[: length * walks]
    hands = order.view(length, walks).unbind(1)
    return torch.stack([hand[_walk(target[hand], each, generator)] for hand in hands], 1).flatten()


def _walk(target: Tensor, each: int, generator: Generator) -> Tensor:
    """As many positions in `target` [N] as it has: cycles over classes, and inside each class over its images."""
    _, classes = target.unique(return_inverse=True)
    size = torch.bincount(classes)
    tour = _cycles(torch.arange(len(size)), -(-len(classes) // each), generator)
    drawn = tour.repeat_interleave(each)[: len(classes)]
    often = torch.bincount(drawn, minlength=len(size))
    members = classes.argsort(stable=True).split(size.tolist())
    decks = [_cycles(own, n, generator) for own, n in zip(members, often.tolist(), strict=True)]
    found = torch.empty_like(drawn)
    found[drawn.argsort(stable=True)] = torch.cat(decks)
    return found


def _cycles(values: Tensor, length: int, generator: Generator) -> Tensor:
    """The first `length` of the values over and over, shuffled anew each time."""
    rounds = [_shuffled(values, generator) for _ in range(-(-length // len(values)))]
    return torch.cat([values[:0], *rounds])[:length]


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


def _ranks(target: Tensor, generator: Generator) -> Tensor:
    """The place of each image in a random order of its class's images, from 0, int64 [N]."""
    shuffled = torch.randperm(len(target), generator=generator)
    order = shuffled[target[shuffled].argsort(stable=True)]
    size = torch.bincount(target)
    first = size.cumsum(0) - size
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order)) - first[target[order]]
    return ranks


def _shuffled(indices: Tensor, generator: Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)]


SAMPLERS = {f.__name__: f for f in (power, progressive, reverse, oversample, undersample, repeated, class_aware)}


def power_probabilities(counts: Tensor, t: float, *, q: float = 1.0) -> Tensor:
    """n^q / sum n^q over the classes that have images, float64 [C]."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    weight = torch.where(n > 0, n**q, 0.0)
    return weight / weight.sum()


def progressive_probabilities(counts: Tensor, t: float, *, start: float = 0.0) -> Tensor:
    """(1 - u) n/N + u/K for u = (t - start) / (1 - start), at least 0 and at most 1, float64 [C].

    Raises ValueError unless 0 <= start < 1.
    """
    if not 0 <= start < 1:
        raise ValueError(f"start of progressive is at least 0 and below 1, not {start}")
    u = min(max((t - start) / (1 - start), 0.0), 1.0)
    return (1 - u) * power_probabilities(counts, t) + u * balanced_probabilities(counts, t)


def reverse_probabilities(counts: Tensor, t: float) -> Tensor:
    """n^-1 / sum n^-1 over the classes that have images: the reversed half of the pairs, float64 [C]."""
    return power_probabilities(counts, t, q=-1.0)


def balanced_probabilities(counts: Tensor, t: float) -> Tensor:
    """1/K for the classes that have images, float64 [C]."""
    return power_probabilities(counts, t, q=0.0)


def repeated_probabilities(counts: Tensor, t: float, *, repeats: int = 3) -> Tensor:
    """n / N, however often an image is repeated, float64 [C]."""
    return power_probabilities(counts, t)


def class_aware_probabilities(counts: Tensor, t: float, *, each: int = 2, walks: int = 1) -> Tensor:
    """1/K for the classes that have images, float64 [C]; a walk that was not dealt a class passes it over."""
    return balanced_probabilities(counts, t)


_PROBABILITIES = {
    "power": power_probabilities,
    "progressive": progressive_probabilities,
    "reverse": reverse_probabilities,
    "oversample": balanced_probabilities,
    "undersample": balanced_probabilities,
    "repeated": repeated_probabilities,
    "class_aware": class_aware_probabilities,
}


def class_probabilities(name: str, counts: Tensor, t: float, **keywords: Any) -> Tensor:
    """The probability of each class at one draw of the sampler `name`, float64 [C], sum 1.

    Of `reverse` these are the probabilities of the reversed half, n_c^-1 / sum n^-1; its other half shows every image
    once.  Raises ValueError for a sampler that does not exist.
    """
    if name not in _PROBABILITIES:
        raise ValueError(f"no sampler is called {name!r}; there are {', '.join(_PROBABILITIES)}")
    return _PROBABILITIES[name](counts, t, **keywords)
