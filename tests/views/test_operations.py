"""Every operation against Pillow: the same pixels."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm
from torchvision.transforms import AutoAugment, InterpolationMode, RandAugment
from torchvision.transforms import functional as pillow
from torchvision.transforms._functional_tensor import gaussian_blur
from torchvision.transforms.autoaugment import _apply_op

from rayltr.views.hue import turned_hue
from rayltr.views.operations import MATRICES, OPERATIONS, blurred, named, performed
from rayltr.views.policies import _amount, _strengths
from rayltr.views.resampling import moved
from tests.views.images import batch, from_pil, generator, levels, to_pil

FILL = (10, 20, 30)
every_size = pytest.mark.parametrize("height, width", [(32, 32), (8, 8), (20, 33), (2, 3), (1, 1)])


def amounts(value, size=6):
    return torch.full((size,), value, dtype=torch.float64)


def same(images, found, function):
    for image, result in zip(images, found, strict=True):
        assert torch.equal(from_pil(function(to_pil(image))), result)


@every_size
@pytest.mark.parametrize("bins, policy", [(10, AutoAugment()), (31, RandAugment())], ids=["autoaugment", "randaugment"])
def test_every_operation_of_torchvision_at_every_strength(height, width, bins, policy):
    images, ours = levels(height, width), _strengths(bins, height, width)
    space = policy._augmentation_space(bins, (height, width))
    assert set(space) <= set(ours)
    for name, (strengths, signed) in space.items():
        for bin, sign in itertools.product(range(strengths.numel()), (1.0, -1.0) if signed else (1.0,)):
            strength = float(strengths[bin] if strengths.ndim else 0.0)
            if bins == 31 and bin % 3:
                continue
            (operation,) = named([name], FILL)
            amount = _amount(name, float(ours[name][bin]), amounts(sign))
            found = operation(images, amount) if operation else images
            known = (name, strength * sign if signed else strength, InterpolationMode.NEAREST, list(FILL))
            same(images, found, lambda image, known=known: _apply_op(image, *known))


@every_size
@pytest.mark.parametrize("factor", [0.0, 0.1, 0.6274, 1.0, 1.4, 1.9])
def test_enhancements(height, width, factor):
    images = levels(height, width)
    for name, function in [
        ("Brightness", pillow.adjust_brightness),
        ("Contrast", pillow.adjust_contrast),
        ("Color", pillow.adjust_saturation),
        ("Sharpness", pillow.adjust_sharpness),
    ]:
        found = OPERATIONS[name](images, amounts(factor))
        same(images, found, lambda image, function=function: function(image, factor))


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.003, 0.0, 0.0371, 0.1, 0.5])
def test_hue(turn):
    some = np.stack(np.meshgrid(*[np.arange(0, 256, step) for step in (5, 3, 2)], indexing="ij"), -1).astype(np.uint8)
    image = Image.fromarray(some.reshape(-1, 128, 3))
    found = turned_hue(from_pil(image)[None], amounts(turn, 1))
    assert torch.equal(found[0], from_pil(pillow.adjust_hue(image, turn)))


def test_grayscale():
    images = levels(20, 33)
    same(images, OPERATIONS["Grayscale"](images, amounts(0.0)), lambda image: pillow.rgb_to_grayscale(image, 3))


@pytest.mark.parametrize("bits", range(9))
def test_posterize_down_to_black(bits):
    images = levels(8, 8)
    found = OPERATIONS["Posterize"](images, amounts(float(bits)))
    assert torch.equal(found, (images.int() & ~(2 ** (8 - bits) - 1)).float())


@pytest.mark.parametrize("added", [0, 33, 110])
def test_solarize_add(added):
    images = levels(20, 33)
    found = OPERATIONS["SolarizeAdd"](images, amounts(float(added)))
    same(images, found, lambda image: timm.solarize_add(image, added))


@pytest.mark.parametrize("threshold", [0.0, 56.7, 128.0, 170.0, 255.0, 256.0])
def test_solarize(threshold):
    images = levels(20, 33)
    found = OPERATIONS["Solarize"](images, amounts(threshold))
    same(images, found, lambda image: pillow.solarize(image, threshold) if threshold < 256 else image)


@every_size
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_geometric_operations_with_each_interpolation(height, width, interpolation):
    images = levels(height, width)
    for name, function, values in [
        ("ShearX", timm.shear_x, (0.07, -0.21)),
        ("ShearY", timm.shear_y, (0.3, -0.13)),
        ("TranslateX", lambda image, x, **how: timm.translate_x_abs(image, -x, **how), (3.4, -1.7, 2.0)),
        ("TranslateY", lambda image, y, **how: timm.translate_y_abs(image, -y, **how), (2.25, -0.3, -1.0)),
        ("Rotate", timm.rotate, (13.1, -29.0)),
    ]:
        for value in values:
            found = named([name], FILL, interpolation)[0](images, amounts(value))
            how = {"resample": getattr(Image.Resampling, interpolation.upper()), "fillcolor": FILL}
            same(images, found, lambda image, f=function, v=value, how=how: f(image, v, **how))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.1, 2.0])
def test_blur_is_that_of_torchvision(sigma):
    images = levels(20, 33)
    found = blurred(images, amounts(sigma), widest=2.0)
    expected = gaussian_blur(images.double(), [13, 13], [sigma, sigma])
    assert (found - expected).abs().max() < 0.5 + 1e-3  # rounded to whole levels
    assert torch.equal(found, found.round())


@pytest.mark.parametrize("sigma", [0.5, 1.1, 2.0])
def test_blur_is_nearly_that_of_pillow(sigma):
    image = levels(40, 40)[:1]
    found = blurred(image, amounts(sigma, 1), widest=2.0)[0]
    theirs = from_pil(pillow.to_pil_image(image[0].to(torch.uint8)).filter(timm.ImageFilter.GaussianBlur(sigma)))
    inner = (slice(None), slice(7, -7), slice(7, -7))  # Pillow repeats the border, torchvision mirrors it
    assert (found - theirs)[inner].abs().mean() < 0.05 * (found - image[0])[inner].abs().mean() + 1


def test_blur_of_tiny_images_and_without_width():
    assert torch.equal(blurred(levels(1, 1), amounts(2.0), widest=2.0), levels(1, 1))
    assert torch.equal(blurred(levels(5, 5), amounts(0.0), widest=2.0), levels(5, 5))


@pytest.mark.parametrize("name", [*OPERATIONS, *MATRICES])
def test_every_image_gets_its_own_amount(name):
    images = levels(9, 11)
    given = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.05, 0.0], dtype=torch.float64)
    if name in ("Posterize", "Solarize", "SolarizeAdd", "TranslateX", "TranslateY", "Rotate"):
        given = (10 * given).round().abs()
    (operation,) = named([name])
    alone = [operation(images[i : i + 1], given[i : i + 1]) for i in range(6)]
    assert torch.equal(operation(images, given), torch.cat(alone))


def test_steps_reach_their_images_and_keep_the_others_to_the_bit():
    images = torch.arange(256).float().view(1, 1, 16, 16).expand(4, 3, -1, -1) / 255
    which = torch.tensor([2, 0, 1, 2])
    steps = [(named(["Identity", "Invert", "Brightness"]), which, torch.tensor([0.0, 9.0, 9.0, 2.0]).double())]
    out = performed(images, steps)
    assert torch.equal(out[0], 0 * images[0]) and torch.equal(out[1], images[1])
    assert torch.equal((out[2] * 255).round(), (255 - images[2] * 255).round())
    assert torch.equal((out[3] * 255).round(), (images[3] * 510).round().clamp(max=255))


def test_an_unknown_interpolation_is_named():
    identity = torch.eye(2, 3, dtype=torch.float64).expand(2, -1, -1)
    with pytest.raises(ValueError, match="unknown interpolation 'cubic': known: nearest, bilinear, bicubic"):
        moved(batch(2), identity, torch.zeros(3), "cubic")


def test_single_precision_moves_pixels_of_any_dtype():
    images = torch.rand(2, 3, 8, 8, generator=generator(), dtype=torch.float64)
    identity = torch.eye(2, 3, dtype=torch.float64).expand(2, -1, -1)
    assert torch.equal(moved(images, identity, images.new_zeros(3)), images)
