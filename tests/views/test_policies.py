"""AutoAugment and RandAugment against the per-image forms: the same results, equally often."""

import random

import pytest
import torch
from timm.data import auto_augment as timm
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment

from rayltr.views import VIEWS
from rayltr.views.policies import ENHANCERS, SIGNED, _tables, _timm_amounts, rand_steps
from tests.views.images import (
    assert_alike,
    assert_equally_often,
    assert_uniform,
    batch,
    from_pil,
    generator,
    landscape,
    to_pil,
)

SIZE = 2000


def ours(view, size=SIZE, side=16, **keywords):
    """Levels of many results for the same image."""
    images = (landscape(side) / 255).expand(size, -1, -1, -1)
    return (VIEWS[view](images, generator(), **keywords) * 255).round()


def theirs(transform, size=SIZE, side=16):
    image = to_pil(landscape(side))
    random.seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return torch.stack([from_pil(transform(image)) for _ in range(size)])


@pytest.mark.parametrize("policy", ["cifar10", "imagenet", "svhn"])
def test_autoaugment_has_the_results_of_torchvision_equally_often(policy):
    assert_equally_often(ours("autoaugment", policy=policy), theirs(AutoAugment(AutoAugmentPolicy(policy))))


@pytest.mark.parametrize("policy", ["cifar10", "imagenet", "svhn"])
def test_the_tables_of_autoaugment_are_those_of_torchvision(policy):
    names, which, chance, amount = _tables(policy, 32, 40)
    transform = AutoAugment(AutoAugmentPolicy(policy))
    space = transform._augmentation_space(10, (32, 40))
    for number, pair in enumerate(transform.policies):
        for step, (name, p, bin) in enumerate(pair):
            assert names[which[step, number]] == name and chance[step, number] == p
            strength = float(space[name][0][bin]) if bin is not None else 0.0
            strength = int(strength) if name.startswith("Translate") else strength
            expected = [sign * strength if name in SIGNED else strength for sign in (-1, 1)]
            assert amount[step, number].tolist() == [1 + x if name in ENHANCERS else x for x in expected]


@pytest.mark.parametrize("n, m", [(1, 9), (2, 9), (2, 30), (3, 0)])
def test_randaugment_has_the_results_of_torchvision_equally_often(n, m):
    assert_equally_often(ours("randaugment", n=n, m=m), theirs(RandAugment(n, m)))


@pytest.mark.parametrize("config, space", [("rand-m8-mstd0.5-inc1", "timm_increasing"), ("rand-m8-mstd0.5", "timm")])
def test_randaugment_has_the_distribution_of_timm(config, space):
    fill = (124, 116, 104)
    transform = timm.rand_augment_transform(config, {"img_mean": fill, "interpolation": timm.Image.BICUBIC})
    keywords = {"m": 8, "deviation": 0.5, "space": space, "fill": fill, "interpolation": "bicubic"}
    assert_alike(ours("randaugment", **keywords), theirs(transform))


@pytest.mark.parametrize("increasing", [False, True])
def test_the_strengths_of_timm(increasing):
    level = torch.linspace(0, 10, 41, dtype=torch.float64)
    found = [_timm_amounts(level, sign * torch.ones_like(level), 20, 30, increasing) for sign in (-1, 1)]
    sides = {"TranslateX": 30, "TranslateY": 20}
    operations = timm._RAND_INCREASING_TRANSFORMS if increasing else timm._RAND_TRANSFORMS
    assert {name.removesuffix("Increasing").removesuffix("Rel") for name in operations} == set(found[0])
    for name in operations:
        short, strength = name.removesuffix("Increasing").removesuffix("Rel"), timm.LEVEL_TO_ARG[name]
        if strength is None:
            continue
        for i, value in enumerate(level.tolist()):
            (expected,) = strength(value, {})
            possible = [float(amounts[short][i]) for amounts in found]
            assert any(expected * sides.get(short, 1) == pytest.approx(x, abs=1e-12) for x in possible), (name, value)


@pytest.mark.parametrize("space, operations", [("torchvision", 14), ("timm", 15)])
def test_randaugment_draws_operations_uniformly(space, operations):
    steps = rand_steps(batch(5000, 8, 8), generator(), 2, 9, 0.5, space, (0, 0, 0), "nearest")
    which = torch.stack([step[1] for step in steps])
    if space == "torchvision":
        assert_uniform(which, operations)
        assert_uniform(which[0] * operations + which[1], operations**2)
    else:
        done = which[which > 0]
        assert abs(len(done) - 5000) < 3.3 * (10_000 * 0.25) ** 0.5
        assert_uniform(done - 1, operations)


def test_the_strength_of_timm_is_normal_within_its_range():
    steps = rand_steps(batch(5000, 8, 8), generator(), 1, 9, 0.5, "timm_increasing", (0, 0, 0), "nearest")
    names = ["Identity", *_timm_amounts(torch.zeros(()), torch.zeros(()), 8, 8, True)]
    level = steps[0][2][steps[0][1] == names.index("Rotate")].abs() / 3
    assert len(level) > 120 and level.max() <= 10
    assert abs(level.mean() - 9) < 3.3 * 0.5 / len(level) ** 0.5 + 0.02  # cut off at 10: 0.004 less
    assert 0.4 < level.std() < 0.6


def test_a_strength_with_which_pillow_fails_gives_black():
    images = torch.full((3000, 3, 4, 4), 0.8)
    out = VIEWS["randaugment"](images, generator(), n=1, m=10, space="timm_increasing", fill=(204, 204, 204))
    assert (out == 0).flatten(1).all(1).any() and out.isfinite().all()


def test_autoaugment_is_a_crop_the_policy_and_a_hole():
    images = batch(64)
    for crop, view, more in [("padded", "flip_crop", {}), ("resized", "resized_crop", {"flip": 0.5})]:
        g = generator()
        expected = VIEWS["autoaugment"](VIEWS[view](images, g, **more), g, policy="imagenet", fill=(9, 8, 7))
        expected = VIEWS["cutout"](expected, g, size=4)
        keywords = {"policy": "imagenet", "fill": (9, 8, 7), "crop": crop, "cutout": 0.25}
        assert torch.equal(VIEWS["autoaugment"](images, generator(), **keywords), expected)


def test_randaugment_follows_a_crop():
    images = batch(64)
    for interpolation, kernel in [("nearest", "bilinear"), ("bilinear", "bilinear"), ("bicubic", "bicubic")]:
        g = generator()
        cropped = VIEWS["resized_crop"](images, g, flip=0.0, interpolation=kernel)
        expected = VIEWS["randaugment"](cropped, g, interpolation=interpolation)
        found = VIEWS["randaugment"](images, generator(), crop="resized", flip=0.0, interpolation=interpolation)
        assert torch.equal(found, expected)


def test_randaugment_may_resize_and_erase():
    images, g = batch(64), generator()
    found = VIEWS["resized_crop"](images, g, size=24, flip=0.5, interpolation="bicubic")
    found = VIEWS["randaugment"](found, g, interpolation="bicubic", **STRONG)
    expected = VIEWS["erasing"](found, g, p=0.5)
    keywords = {"crop": "resized", "size": 24, "interpolation": "bicubic", "erase": 0.5}
    assert torch.equal(VIEWS["randaugment"](images, generator(), **STRONG, **keywords), expected)
    assert expected.shape == (64, 3, 24, 24)


def test_the_noise_may_be_that_of_the_images_themselves():
    """Standard normal once the images are normalised by their own mean and deviation."""
    images = batch(64) * 0.3 + torch.tensor([0.1, 0.3, 0.6]).view(3, 1, 1)
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0)
    keywords = {**STRONG, "crop": "padded", "erase": 0.5}
    g = generator()
    found = VIEWS["randaugment"](VIEWS["flip_crop"](images, g), g, **STRONG)
    expected = VIEWS["erasing"](found, g, p=0.5, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    torch.testing.assert_close(VIEWS["randaugment"](images, generator(), erase_own=True, **keywords), expected)
    assert not torch.allclose(VIEWS["randaugment"](images, generator(), **keywords), expected)


STRONG = {"m": 9, "deviation": 0.5, "space": "timm_increasing", "fill": (124, 116, 104)}
DEIT = {**STRONG, "interpolation": "bicubic", "erase": 0.25}
"""rand-m9-mstd0.5-inc1 and random erasing."""


@pytest.mark.parametrize("side, crop, size", [
    (8, "padded", None),
    (8, "resized", 16),
    pytest.param(32, "padded", None, marks=pytest.mark.slow),
    pytest.param(32, "resized", None, marks=pytest.mark.slow),
])  # fmt: skip
def test_twenty_thousand_strong_views_in_a_row(side, crop, size):
    """The strengths reach those with which the form for single images fails."""
    g = generator()
    for seed in range(20):
        out = VIEWS["randaugment"](batch(1000, side, side, seed), g, crop=crop, size=size, **DEIT)
        assert out.shape[2:] == (size or side, size or side) and out.isfinite().all()


@pytest.mark.parametrize(
    ("view", "keywords", "message"),
    [
        ("autoaugment", {"policy": "cifar"}, "unknown policy 'cifar' of autoaugment: known: cifar10, imagenet, svhn"),
        ("autoaugment", {"crop": "pad"}, "unknown crop 'pad': known: none, padded, resized"),
        ("randaugment", {"space": "tv"}, "unknown space 'tv' of randaugment: known: torchvision, timm"),
        ("randaugment", {"m": 31}, "whole number from 0 to 30, not 31"),
        ("randaugment", {"m": 2.5}, "whole number from 0 to 30, not 2.5"),
        ("randaugment", {"m": 11, "space": "timm"}, "in the space timm is 0 to 10, not 11"),
        ("randaugment", {"interpolation": "cubic"}, "unknown interpolation 'cubic'"),
    ],
)
def test_what_is_misspelt_is_named(view, keywords, message):
    with pytest.raises(ValueError, match=message):
        VIEWS[view](batch(64), generator(), **keywords)
