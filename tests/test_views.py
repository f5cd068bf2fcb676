import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from rayltr import views
from rayltr.views import VIEWS

every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
random_view = pytest.mark.parametrize("view", [v for name, v in VIEWS.items() if name != "identity"])


def batch(size=32, height=16, width=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (0.05 + 0.9 * torch.rand(size, 3, height, width, generator=g, dtype=torch.float64)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@every_view
@pytest.mark.parametrize("height, width", [(16, 16), (8, 8), (12, 20), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_dtype_and_range_are_kept(view, height, width, dtype):
    images = batch(height=height, width=width, dtype=dtype)
    before = images.clone()
    out = view(images, generator())
    assert out.shape == images.shape and out.dtype == dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(images, before)


@every_view
def test_channels_last_is_kept_and_changes_nothing(view):
    images = batch()
    last = view(images.contiguous(memory_format=torch.channels_last), generator())
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, view(images, generator()))


@random_view
def test_the_generator_decides_everything(view):
    runs = []
    for noise, seed in [(1, 7), (2, 7), (1, 8)]:
        with torch.random.fork_rng([]):
            torch.manual_seed(noise)
            runs.append(view(batch(), generator(seed)))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@random_view
def test_every_image_gets_its_own_parameters(view):
    same = batch(size=1).expand(32, -1, -1, -1)
    assert len(view(same, generator()).flatten(1).unique(dim=0)) > 15


def test_identity():
    images = batch()
    assert torch.equal(VIEWS["identity"](images, generator()), images)


def crops(image, pad):
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
        (which,) = [key for key, crop in crops(image, pad) if torch.equal(crop, result)]
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


def boxes(batch=4000, height=32, width=32, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    return views._boxes(batch, height, width, scale, ratio, generator())


@pytest.mark.parametrize("size", [None, 24, 9])
@pytest.mark.parametrize("height, width", [(16, 16), (10, 18)])
def test_resized_crop_is_a_crop_that_is_resized(height, width, size):
    images = batch(height=height, width=width, dtype=torch.float64)
    out = VIEWS["resized_crop"](images, generator(), size=size)
    drawn = views._boxes(32, height, width, (0.08, 1.0), (0.75, 1.3333333333333333), generator())
    shape = [size, size] if size else [height, width]
    for image, result, box in zip(images, out, drawn.T.int().tolist(), strict=True):
        expected = reference.resized_crop(image, *box, size=shape, antialias=False)
        torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)


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


def kolmogorov_smirnov(a, b):
    at = torch.cat([a, b]).unique()
    share = [torch.searchsorted(x.sort().values, at, right=True) / len(x) for x in (a, b)]
    return (share[0] - share[1]).abs().max()


@pytest.mark.parametrize("height, width", [(4, 40), (40, 4), (40, 40)])
def test_boxes_fall_back_to_the_middle_as_torchvision_does(height, width):
    scale, ratio = (1.5, 2.0), (0.75, 4 / 3)  # never fits
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
    drawn = boxes(3, height, width, scale, ratio)
    assert drawn.T.int().tolist() == [list(expected)] * 3
