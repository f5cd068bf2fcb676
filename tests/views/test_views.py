"""What every view keeps."""

import pytest
import torch

from rayltr.views import VIEWS
from tests.views.images import batch, generator

every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
random_view = pytest.mark.parametrize("view", [v for name, v in VIEWS.items() if name != "identity"])
WITHIN = {"erasing": {"std": (0.0, 0.0, 0.0)}}
"""What keeps a view within the range of images, where noise does not."""
OUTCOMES = {"grayscale": 2, "blur": 10, "erasing": 5}
"""How many different results there are at least, where not nearly every image has its own."""


@every_view
@pytest.mark.parametrize("height, width", [(16, 16), (8, 8), (12, 20), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_dtype_and_range_are_kept(view, height, width, dtype):
    images = batch(height=height, width=width, dtype=dtype)
    before = images.clone()
    out = view(images, generator(), **WITHIN.get(view.__name__, {}))
    assert out.shape == images.shape and out.dtype == dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(images, before)


@every_view
@pytest.mark.parametrize("size, height, width", [(0, 8, 8), (1, 8, 8), (1, 12, 7), (2, 224, 224)])
def test_any_number_of_images_of_any_size(view, size, height, width):
    out = view(batch(size, height, width), generator())
    assert out.shape == (size, 3, height, width) and out.isfinite().all()


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
    assert len(view(same, generator()).flatten(1).unique(dim=0)) >= OUTCOMES.get(view.__name__, 16)


@every_view
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_black_and_white_stay_within_range(view, level):
    out = view(torch.full((64, 3, 8, 8), level), generator(), **WITHIN.get(view.__name__, {}))
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1


def test_identity():
    images = batch()
    assert torch.equal(VIEWS["identity"](images, generator()), images)
