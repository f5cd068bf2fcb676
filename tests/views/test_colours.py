"""Jitter, grayscale, blur and SimAugment against torchvision."""

import pytest
import torch
from torchvision import transforms

from rayltr.views import VIEWS, colours
from tests.views.images import (
    assert_alike,
    assert_equally_often,
    assert_uniform,
    batch,
    from_pil,
    generator,
    kolmogorov_smirnov,
    landscape,
)
from tests.views.test_policies import ours, theirs

SIZE = 4000
JITTER = (0.4, 0.4, 0.4, 0.1)


@pytest.mark.parametrize("strengths", [JITTER, (0.4, 0.4, 0.4, 0.0), (1.5, 0.0, 0.0, 0.5)])
def test_jitter_has_the_distribution_of_torchvision(strengths):
    names = ("brightness", "contrast", "saturation", "hue")
    jitter = transforms.RandomApply([transforms.ColorJitter(*strengths)], 0.8)
    assert_alike(ours("colour_jitter", **dict(zip(names, strengths, strict=True))), theirs(jitter))


def test_jitter_draws_the_parameters_of_torchvision():
    steps = colours._jitter(SIZE, generator(), JITTER, 0.8)
    which = torch.stack([step[1] for step in steps])
    amounts = torch.stack([step[2] for step in steps])
    done = which[0] > 0
    assert torch.equal(which > 0, done.expand(4, -1))
    assert abs(int(done.sum()) - 0.8 * SIZE) < 3.3 * (SIZE * 0.16) ** 0.5
    which, amounts = which[:, done], amounts[:, done]
    assert torch.equal(which.sort(0).values, torch.arange(1, 5)[:, None].expand_as(which))
    _, order = which.unique(dim=1, return_inverse=True)
    assert_uniform(order, 24)
    for number, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)]):
        amount = amounts[which == number + 1]
        even = torch.linspace(low, high, len(amount), dtype=torch.float64)
        assert kolmogorov_smirnov(amount, even) < 1.95 / len(amount) ** 0.5 + 1 / len(amount)


def test_jitter_without_strength_changes_nothing():
    images = landscape()[None] / 255
    none = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    assert torch.equal(VIEWS["colour_jitter"](images, generator(), **none), images)
    assert torch.equal(VIEWS["colour_jitter"](images, generator(), p=0.0), images)


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_grayscale_has_the_results_of_torchvision_equally_often(p):
    assert_equally_often(ours("grayscale", p=p), theirs(transforms.RandomGrayscale(p)))


def test_blur_has_the_distribution_of_torchvision():
    blur = transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5)
    assert_alike(ours("blur"), theirs(blur))
    assert_alike(ours("blur", sigma=(0.5, 1.0), p=1.0), theirs(transforms.GaussianBlur(7, (0.5, 1.0))))


def test_simaugment_has_the_distribution_of_torchvision():
    steps = [
        transforms.RandomResizedCrop(16, scale=(0.2, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(*JITTER)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5),
    ]
    plain = {"crop": "resized", "scale": (0.2, 1.0)}
    assert_alike(ours("simaugment", **plain), theirs(transforms.Compose(steps[:4])))
    assert_alike(ours("simaugment", blur=0.5, **plain), theirs(transforms.Compose(steps)))


def test_a_padded_simaugment_has_the_distribution_of_torchvision():
    steps = [
        transforms.RandomCrop(16, padding=2),
        transforms.RandomApply([transforms.ColorJitter(*JITTER)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomHorizontalFlip(),
    ]
    assert_alike(ours("simaugment", crop="padded"), theirs(transforms.Compose(steps)))


def test_simaugment_is_its_parts_one_after_the_other():
    images, g = batch(64), generator()
    found = VIEWS["resized_crop"](images, g, scale=(0.2, 1.0), flip=0.5)
    found = VIEWS["colour_jitter"](found, g, hue=0.0, p=0.9)
    found = VIEWS["grayscale"](found, g, p=0.3)
    found = VIEWS["blur"](found, g, sigma=(0.5, 1.5), p=0.4)
    timm = {"space": "timm", "deviation": 0.5, "fill": (1, 2, 3), "interpolation": "bicubic"}
    found = VIEWS["randaugment"](found, g, n=3, m=9, **timm)
    keywords = {"scale": (0.2, 1.0), "hue": 0.0, "jitter": 0.9, "grayscale": 0.3, "blur": 0.4, "sigma": (0.5, 1.5)}
    assert torch.equal(VIEWS["simaugment"](images, generator(), **keywords, n=3, m=9, fill=(1, 2, 3)), found)


def test_nothing_is_left_of_simaugment_without_its_parts():
    images = landscape()[None] / 255
    nothing = {"crop": "none", "jitter": 0.0, "grayscale": 0.0}
    assert torch.equal(VIEWS["simaugment"](images, generator(), **nothing), images)


def test_results_are_levels_of_eight_bits():
    out = VIEWS["simaugment"](batch(64), generator(), blur=0.5, n=2) * 255
    torch.testing.assert_close(out, out.round(), atol=1e-4, rtol=0)
    image = transforms.ToPILImage()(batch(1)[0])
    assert torch.equal(transforms.ToTensor()(image) * 255, from_pil(image))
