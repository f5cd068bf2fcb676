"""Images for the tests of views, and how two ways of drawing them are compared."""

import numpy as np
import torch
from PIL import Image
from scipy.stats import chi2


def batch(size=32, height=16, width=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (0.05 + 0.9 * torch.rand(size, 3, height, width, generator=g, dtype=torch.float64)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def levels(height, width, seed=0):
    """Six images of whole levels: noise, low contrast, one colour, a constant channel, a ramp, few levels."""
    found = torch.randint(0, 256, (6, 3, height, width), generator=generator(seed)).float()
    found[1] = (found[1] * 0.3 + 40).floor()
    found[2] = found[2, :, :1, :1]
    found[3, 1] = 7
    found[4] = torch.linspace(0, 255, height * width).floor().view(height, width)
    found[5] = (found[5] / 64).floor() * 64
    return found


def landscape(side=16):
    """One image of whole levels with large and small structures, which every operation changes."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    waves = torch.stack([0.2 + 0.5 * x + 0.1 * (9 * y).sin(), 0.3 + 0.4 * y * x, 0.7 - 0.4 * y + 0.1 * (7 * x).cos()])
    noise = 0.05 * torch.randn(3, side, side, generator=generator(1))
    return ((waves + noise).clamp(0.02, 0.98) * 255).round()


def to_pil(found):
    return Image.fromarray(found.permute(1, 2, 0).to(torch.uint8).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def kolmogorov_smirnov(a, b):
    """The statistic of two samples, each [N]; below 1.95 sqrt(2 / N) with probability 0.999."""
    at = torch.cat([a, b]).unique()
    share = [torch.searchsorted(x.sort().values, at, right=True) / len(x) for x in (a, b)]
    return (share[0] - share[1]).abs().max()


def features(images):
    """Numbers that tell how levels [N,3,H,W] were changed: [N,6]."""
    images = images.double()
    means, spread = images.mean((2, 3)), images.std((1, 2, 3))
    edges = [images.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (2, 3)]
    return torch.stack([*means.T, spread, *edges], 1).round(decimals=6)  # equal images shall be equal


def assert_alike(ours, theirs):
    """Two samples of images of the same size have the same distribution, as far as `features` tell."""
    for one, other in zip(features(ours).T, features(theirs).T, strict=True):
        assert kolmogorov_smirnov(one, other) < 1.95 * (2 / len(one)) ** 0.5


def assert_equally_often(ours, theirs):
    """Two samples of images of the same size have the same results with the same frequencies (p > 0.001)."""
    _, which = torch.cat([ours, theirs]).flatten(1).to(torch.uint8).unique(dim=0, return_inverse=True)
    one, other = (part.bincount(minlength=int(which.max()) + 1).double() for part in which.chunk(2))
    rare = one + other < 10
    one, other = (torch.cat([count[~rare], count[rare].sum()[None]]) for count in (one, other))
    assert rare.sum() < len(rare)
    both = one + other
    statistic = ((one - other).square() / both.clamp(min=1)).sum()
    assert statistic <= chi2.ppf(0.999, max(int((both > 0).sum()) - 1, 1))


def assert_uniform(which, outcomes):
    """Whole numbers from 0 to outcomes - 1 are equally frequent (p > 0.001)."""
    counts = which.flatten().bincount(minlength=outcomes).double()
    assert len(counts) == outcomes
    expected = counts.sum() / outcomes
    assert (counts - expected).square().sum() / expected < chi2.ppf(0.999, outcomes - 1)
