import random

import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as pillow
from torchvision.transforms.v2 import functional as reference

from rayltr.views import VIEWS, crops, draws
from tests.views.images import batch, from_pil, generator, kolmogorov_smirnov, levels, to_pil


def all_crops(image, pad):
    """Every crop of an image by (top, left, mirrored), one at a time."""
    height, width = image.shape[1:]
    padded = F.pad(image, (pad,) * 4)
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + height, left : left + width]
            yield (top, left, False), crop
            yield (top, left, True), crop.flip(2)


@pytest.mark.parametrize("height, width, padding, pad", [(16, 16, None, 2), (8, 8, None, 1), (8, 10, 3, 3)])
def test_flip_crop_gives_exactly_one_of_the_possible_crops(height, width, padding, pad):
    images = batch(size=40, height=height, width=width)
    out = VIEWS["flip_crop"](images, generator(), padding=padding)
    found = []
    for image, result in zip(images, out, strict=True):
        (which,) = [key for key, crop in all_crops(image, pad) if torch.equal(crop, result)]
        found.append(which)
    tops, lefts, mirrored = zip(*found, strict=True)
    assert set(tops) == set(lefts) == set(range(2 * pad + 1))
    assert 8 < sum(mirrored) < 32


def test_flip_crop_is_uniform():
    marked = torch.zeros(1, 3, 8, 8)
    marked[:, :, 4, 2] = 1  # tells place and side
    out = VIEWS["flip_crop"](marked.expand(18_000, -1, -1, -1), generator())[:, 0]
    seen = out.sum(0).flatten()
    seen = seen[seen > 0]
    assert len(seen) == 18  # 3 x 3 places, two sides
    assert (seen - 1000).square().sum() / 1000 < 45  # chi-square with 17 degrees of freedom: p < 0.0003


def test_flip_crop_without_flip_or_padding():
    images = batch()
    assert torch.equal(VIEWS["flip_crop"](images, generator(), padding=0, flip=0.0), images)
    assert torch.equal(VIEWS["flip_crop"](images, generator(), padding=0, flip=1.0), images.flip(3))


@pytest.mark.parametrize("height, width", [(16, 16), (9, 14)])
def test_flip_crop_turns_as_pillow_does(height, width):
    images = levels(height, width)
    drawn = generator()
    draws.integers(0, 0, (2, 6, 1), drawn)
    draws.uniform((6, 1), drawn)
    angles = draws.uniform((6,), drawn, -15.0, 15.0)
    out = VIEWS["flip_crop"](images / 255, generator(), padding=0, flip=0.0, rotation=15.0)
    for image, result, angle in zip(images, out, angles, strict=True):
        expected = from_pil(pillow.rotate(to_pil(image), float(angle)))
        assert torch.equal(expected, (result * 255).round())
    assert angles.abs().max() > 7


@pytest.mark.parametrize("size, side", [(None, 6), (3, 3), (12, 12)])
def test_cutout_blackens_a_square_clipped_at_the_border(size, side):
    images = batch(size=400, height=12, width=12)
    out = VIEWS["cutout"](images, generator(), size=size)
    hole = (out == 0).all(1)
    torch.testing.assert_close(out, images * ~hole[:, None])
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):
        assert (line.int().diff().abs().sum(1) <= 2).all()
        possible = {min(c - side // 2 + side, 12) - max(c - side // 2, 0) for c in range(12)}
        assert set(line.sum(1).tolist()) == possible
    assert hole.any(0).all()


def test_cutout_has_every_centre_alike():
    """A square of one pixel is its centre, so that every place is hit as often, in rows and columns apart."""
    hole = (VIEWS["cutout"](torch.ones(1, 1, 1, 1).expand(24_000, 1, 6, 8), generator(), size=1) == 0)[:, 0]
    assert (hole.sum((1, 2)) == 1).all()
    assert (hole.sum(0) - 500).square().sum() / 500 < 85  # chi-square with 47 degrees of freedom: p < 0.0006


@pytest.mark.parametrize("side", [3, 6])
def test_cutout_hits_the_border_less_often(side):
    """Of 12 uniform centres, those that reach a position: `side` in the middle, fewer at the border."""
    hole = (VIEWS["cutout"](torch.ones(1, 1, 1, 1).expand(12_000, 1, 12, 12), generator(), size=side) == 0)[:, 0]
    centres = range(12)
    reached = [sum(c - side // 2 <= place < c - side // 2 + side for c in centres) / 12 for place in range(12)]
    for line in (hole.any(2), hole.any(1)):
        found = line.double().mean(0)
        spread = [(share * (1 - share) / 12_000) ** 0.5 for share in reached]
        assert all(abs(f - r) < 4 * s for f, r, s in zip(found.tolist(), reached, spread, strict=True))


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_erasing_has_the_boxes_of_timm_as_often(height, width):
    """Marked by noise around 9, far outside of every image."""
    size = 4000
    keywords = {"mean": (9.0, 9.0, 9.0), "std": (1.0, 1.0, 1.0)}
    ours = VIEWS["erasing"](torch.zeros(size, 3, height, width), generator(), **keywords)
    random.seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        theirs = RandomErasing(0.25, mode="pixel", device="cpu")(torch.zeros(size, 3, height, width))
    holes = [(images != 0).all(1) for images in (ours, theirs)]
    hit = [hole.any(2).any(1) for hole in holes]
    assert abs(int(hit[0].sum()) - 0.25 * size) < 3.3 * (size * 0.25 * 0.75) ** 0.5
    for places in (1, 2):
        lines = [hole[chosen].any(places).double() for hole, chosen in zip(holes, hit, strict=True)]
        for measure in (lambda line: line.sum(1), lambda line: line.argmax(1)):
            one, other = (measure(line)[:900].double() for line in lines)
            assert kolmogorov_smirnov(one, other) < 1.95 * (2 / 900) ** 0.5
    rows, columns = holes[0].any(2), holes[0].any(1)
    assert torch.equal(holes[0], rows[:, :, None] & columns[:, None, :])
    noise = (ours - 9)[holes[0][:, None].expand_as(ours)]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_erasing_is_noise_in_normalised_images_and_leaves_the_others():
    images = batch(400, dtype=torch.float64)
    keywords = {"mean": (0.1, 0.5, 0.9), "std": (0.3, 0.2, 0.1)}
    out = VIEWS["erasing"](images, generator(), p=1.0, **keywords)
    normalised = [(out[:, c] - keywords["mean"][c]) / keywords["std"][c] for c in range(3)]
    for c in range(3):
        noise = normalised[c][out[:, c] != images[:, c]]
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert torch.equal(VIEWS["erasing"](images, generator(), p=0.0), images)


def boxes(batch=4000, height=32, width=32, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    return crops.boxes(batch, height, width, scale, ratio, generator())


@pytest.mark.parametrize("interpolation", [None, "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [None, 24, 5])
@pytest.mark.parametrize("height, width", [(16, 16), (10, 18)])
def test_resized_crop_is_a_crop_that_is_resized_with_antialiasing(height, width, size, interpolation):
    images = batch(height=height, width=width, dtype=torch.float64)
    out = VIEWS["resized_crop"](images, generator(), size=size, interpolation=interpolation)
    shape = [size, size] if size else [height, width]
    mode = pillow.InterpolationMode(interpolation or "bilinear")
    for image, result, box in zip(images, out, boxes(32, height, width).T.int().tolist(), strict=True):
        expected = reference.resized_crop(image, *box, size=shape, interpolation=mode, antialias=True)
        torch.testing.assert_close(result, expected.clamp(0, 1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crop_is_that_of_pillow_but_for_its_rounding(interpolation):
    images = levels(40, 40)
    out = VIEWS["resized_crop"](images / 255, generator(), size=9, interpolation=interpolation) * 255
    mode = getattr(Image.Resampling, interpolation.upper())
    for image, result, (top, left, tall, wide) in zip(images, out, boxes(6, 40, 40).T.tolist(), strict=True):
        box = (left, top, left + wide, top + tall)
        expected = from_pil(to_pil(image).crop(box).resize((9, 9), mode))
        assert (expected - result).abs().max() <= 1.01  # rounded after the columns and again after the rows


def test_resized_crop_mirrors_as_often_as_asked():
    images = batch(2000, 8, 8, dtype=torch.float64)
    plain = VIEWS["resized_crop"](images, generator())
    found = VIEWS["resized_crop"](images, generator(), flip=0.3)
    mirrored = (found == plain.flip(3)).all(3).all(2).all(1)
    assert ((found == plain).all(3).all(2).all(1) | mirrored).all()
    assert abs(int(mirrored.sum()) - 600) < 3.3 * (2000 * 0.3 * 0.7) ** 0.5


def test_boxes_lie_inside_and_have_the_distribution_of_torchvision():
    top, left, tall, wide = boxes()
    assert (tall >= 1).all() and (wide >= 1).all()
    assert (top >= 0).all() and (left >= 0).all() and (top + tall <= 32).all() and (left + wide <= 32).all()
    image = torch.empty(3, 32, 32)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    for ours, other in zip((top, left, tall, wide), theirs.T.double(), strict=True):
        assert kolmogorov_smirnov(ours, other) < 1.95 * (2 / 4000) ** 0.5  # p < 0.001
    assert kolmogorov_smirnov(tall * wide, (theirs[:, 2] * theirs[:, 3]).double()) < 1.95 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("height, width", [(4, 40), (40, 4), (40, 40)])
def test_boxes_fall_back_to_the_middle_as_torchvision_does(height, width):
    scale, ratio = (1.5, 2.0), (0.75, 4 / 3)  # never fits
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
    drawn = boxes(3, height, width, scale, ratio)
    assert drawn.T.int().tolist() == [list(expected)] * 3


def test_what_is_misspelt_is_named():
    with pytest.raises(ValueError, match="unknown interpolation 'cubic' of resized_crop: known: bilinear, bicubic"):
        VIEWS["resized_crop"](batch(), generator(), interpolation="cubic")
    with pytest.raises(ValueError, match="only a resized crop has a size, and the crop is 'padded'"):
        crops.cropped(batch(), generator(), "padded", 0.5, size=24)
    with pytest.raises(ValueError, match="unknown crop 'random': known: none, padded, resized"):
        crops.cropped(batch(), generator(), "random", 0.5)
