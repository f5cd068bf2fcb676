"""Class activation maps and what is done with them, against slow versions on single pixels."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed, nn

from rayltr import build, catalogue
from rayltr.interface import Facts, Resources
from rayltr.methods import cam
from rayltr.spec import fn
from rayltr.train import train
from tests.conftest import tiny

COUNTS = (500, 50, 5)
FACTS = Facts(("a", "b", "c"), np.array(COUNTS), (0.5,) * 3, (0.25,) * 3, (8, 8))
CLOSE = {"rtol": 0, "atol": 1e-9}
PAPER = ("flip", "translate", "rotate", "scale")
ALL = tuple(cam.TRANSFORMS)
BELOW = 1 - 2**-53
"""The largest number that `torch.rand` gives in float64."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def some_masks(batch, height, width, seed=0):
    return uniform(batch, height, width, seed=seed) < 0.1


def method(teacher=None, head="linear", facts=FACTS, **keywords):
    stage = catalogue.complete(tiny(method=fn("cam", **keywords), head=fn(head), teacher=tiny()))
    return build.method(stage, facts, teacher)


def teacher(head="linear", seed=1):
    """A supervised stage with random statistics, in eval mode and double precision."""
    made = build.method(catalogue.complete(tiny(head=fn(head), seed=seed)), FACTS).double()
    for name, value in made.state_dict().items():
        if value.is_floating_point() and "body" in name and value.ndim == 1:
            value.copy_(0.5 + uniform(len(value), seed=len(name)))
    return made.eval().requires_grad_(False)


def slow_activation(features, weight):
    found = np.zeros(features.shape[1:])
    for channel, w in zip(features, weight, strict=True):
        found += w * channel
    found -= found.min()
    return (
        np.zeros_like(found, np.uint8) if found.max() == 0 else np.floor(255 * (found / found.max())).astype(np.uint8)
    )


def slow_foreground(small, height, width, threshold):
    """Each pixel's centre is looked up between the centres of the map's pixels."""
    big = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            y = (row + 0.5) * small.shape[0] / height - 0.5
            x = (column + 0.5) * small.shape[1] / width - 0.5
            y, x = min(max(y, 0), small.shape[0] - 1), min(max(x, 0), small.shape[1] - 1)
            big[row, column] = slow_bilinear(small.astype(float), x, y)
    return big >= threshold * big.mean()


def slow_bilinear(image, x, y):
    """The value at a place between pixels; outside is 0."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total += image[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def slow_box(mask, kind):
    columns = [x for x in range(mask.shape[1]) if mask[:, x].any()] or [0]
    rows = [y for y in range(mask.shape[0]) if mask[y].any()] or [0]
    last = -1 if kind == "object" else 1
    return tuple(end for line in (columns, rows) for end in (line[0], (line * 2 if len(line) == 1 else line)[last]))


def slow_matrix(name, draws, box, height, width):
    """Forward, from image to transformed image, as [3, 3]; the rotation is OpenCV's getRotationMatrix2D."""
    turn, grow, right, down = draws
    x_min, x_max, y_min, y_max = box
    angle = math.radians(-45 + math.floor(90 * turn)) if name in ("rotate_scale", "rotate") else 0.0
    scale = (80 + math.floor(40 * grow)) / 100 if name in ("rotate_scale", "scale") else 1.0
    if name == "translate":
        dx = range(-x_min, width - x_max)[math.floor(right * (width - x_max + x_min))]
        dy = range(-y_min, height - y_max)[math.floor(down * (height - y_max + y_min))]
        return np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1]], float)
    if name == "flip":
        return np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]], float)
    x, y, a, b = (x_min + x_max) / 2, (y_min + y_max) / 2, scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[a, b, (1 - a) * x - b * y], [-b, a, b * x + (1 - a) * y], [0, 0, 1]])


def slow_composed(image, mask, forward):
    back, out = np.linalg.inv(forward), image.copy()
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            x, y, _ = back @ (column, row, 1)
            valid = slow_bilinear(np.ones(mask.shape), x, y) > 1e-3
            if valid and (mask[row, column] or slow_bilinear(mask.astype(float), x, y) > 1e-3):
                out[:, row, column] = [slow_bilinear(channel, x, y) for channel in image]
    return out


def test_maps():
    features, weight = uniform(20, 6, 4, 5) - 0.2, uniform(20, 6, seed=1) - 0.5
    found = cam.activation(features, weight)
    assert found.dtype == torch.uint8
    for f, w, result in zip(features.numpy(), weight.numpy(), found.numpy(), strict=True):
        np.testing.assert_array_equal(result, slow_activation(f, w))
    assert (found.amax((1, 2)) == 255).all() and (found.amin((1, 2)) == 0).all()


def test_half_precision_features_are_summed_in_the_precision_of_the_weights():
    features, weight = uniform(4, 64, 8, 8).bfloat16(), uniform(4, 64, seed=1).float()
    expected = cam.activation(features.float(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cam.activation(features, weight), expected)


def test_a_constant_map_makes_everything_foreground():
    maps = cam.activation(torch.ones(2, 3, 4, 4), torch.tensor([[1.0, 2, 3], [0, 0, 0]]))
    assert (maps == 0).all()
    assert cam.foreground(maps, (8, 8), 0.75).all() and cam.foreground(maps, (8, 8), 1.0).all()


@pytest.mark.parametrize("threshold", [0.75, 1.0])
@pytest.mark.parametrize("size, small", [((32, 32), (8, 8)), ((10, 14), (3, 4)), ((8, 8), (2, 2)), ((4, 4), (4, 4))])
def test_foreground(size, small, threshold):
    maps = (256 * uniform(6, *small)).to(torch.uint8)
    found = cam.foreground(maps, size, threshold)
    for one, mask in zip(maps.numpy(), found.numpy(), strict=True):
        np.testing.assert_array_equal(mask, slow_foreground(one, *size, threshold))


@pytest.mark.parametrize("kind", cam.BOXES)
def test_boxes(kind):
    masks = torch.cat([some_masks(50, 6, 9), torch.zeros(2, 6, 9, dtype=torch.bool)])
    masks[-1, 2, 3] = True
    found = torch.stack(cam.boxes(masks, kind), 1).tolist()
    assert found == [list(slow_box(mask, kind)) for mask in masks.numpy()]


def test_the_corner_box_ends_at_the_second_column_and_row():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:7, 1] = mask[0, 4, 5:7] = True
    assert [int(end) for end in cam.boxes(mask)] == [1, 6, 2, 6]
    assert [int(end) for end in cam.boxes(mask, "corner")] == [1, 5, 2, 3]


def test_rotation_is_counter_clockwise_about_the_centre_and_its_inverse_is_as_promised():
    x, y, angle, scale = (torch.tensor([value], dtype=torch.float64) for value in (3.5, 2.0, 90.0, 2.0))
    there, back = cam.rotation(x, y, angle, scale)[0].numpy(), cam.rotation(x, y, -angle, 1 / scale)[0].numpy()
    np.testing.assert_allclose(there @ (3.5, 2.0, 1), (3.5, 2.0), **CLOSE)
    np.testing.assert_allclose(there @ (4.5, 2.0, 1), (3.5, 0.0), **CLOSE)  # from the right to the top
    np.testing.assert_allclose(np.vstack([there, [0, 0, 1]]) @ np.vstack([back, [0, 0, 1]]), np.eye(3), **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_affines_are_the_inverse_of_the_transforms(name):
    masks, draws = some_masks(30, 12, 9), uniform(5, 30)
    found = cam.affines(list(draws), torch.tensor([cam.TRANSFORMS[name]]), cam.boxes(masks), (12, 9))
    for mask, u, affine in zip(masks.numpy(), draws[1:].T.tolist(), found.numpy(), strict=True):
        forward = slow_matrix(name, u, slow_box(mask, "object"), 12, 9)
        np.testing.assert_allclose(affine, np.linalg.inv(forward)[:2], **CLOSE)


def parameters(name, draws, box=(2, 6, 1, 3)):
    """Angle, scale, dx and dy of transforms of images of 8 x 10, from the affine maps."""
    ends = tuple(torch.full(draws.shape[1:], end) for end in box)
    a, b = cam.affines(list(draws), torch.tensor([cam.TRANSFORMS[name]]), ends, (8, 10)).unbind(1)
    scale = 1 / torch.hypot(a[:, 0], a[:, 1])
    return torch.rad2deg(torch.atan2(-a[:, 1], a[:, 0])), 100 * scale, -a[:, 2], -b[:, 2]


@pytest.mark.parametrize("draw, expected", [(0.0, (-45, 80, -2, -1)), (BELOW, (44, 119, 3, 4))])
def test_the_extremes(draw, expected):
    draws = torch.full((5, 1), draw, dtype=torch.float64)
    found = [parameters(name, draws)[i] for i, name in enumerate(("rotate", "scale", "translate", "translate"))]
    np.testing.assert_allclose(torch.cat(found), expected, **CLOSE)


@pytest.mark.parametrize("name, which, low, high", [("rotate_scale", 0, -45, 44), ("rotate_scale", 1, 80, 119),
                                                    ("translate", 2, -2, 3), ("translate", 3, -1, 4)])  # fmt: skip
def test_parameters_are_uniform_whole_numbers(name, which, low, high):
    found = parameters(name, uniform(5, 9000))[which]
    assert (found - found.round()).abs().max() < 1e-9
    seen = torch.bincount((found.round() - low).long(), minlength=high - low + 1)
    expected = 9000 / (high - low + 1)
    degrees = high - low
    assert len(seen) == degrees + 1
    assert (seen - expected).square().sum() / expected < degrees + 4 * (2 * degrees) ** 0.5  # chi-square


@pytest.mark.parametrize("name", ALL)
def test_composition(name):
    images, masks, draws = uniform(6, 3, 7, 9), some_masks(6, 7, 9), uniform(5, 6)
    affine = cam.affines(list(draws), torch.tensor([cam.TRANSFORMS[name]]), cam.boxes(masks), (7, 9))
    found = cam.composed(images, masks, affine).numpy()
    for image, mask, u, result in zip(images.numpy(), masks.numpy(), draws[1:].T.tolist(), found, strict=True):
        forward = slow_matrix(name, u, slow_box(mask, "object"), 7, 9)
        np.testing.assert_allclose(result, slow_composed(image, mask, forward), **CLOSE)


@pytest.mark.parametrize("height, width", [(8, 8), (9, 7)])
def test_shifts_and_flips_are_exact(height, width):
    images, masks = uniform(1, 3, height, width), some_masks(1, height, width)
    flip = torch.tensor([[[-1.0, 0, width - 1], [0, 1, 0]]], dtype=torch.float64)
    shown = torch.where((masks | masks.flip(2))[:, None], images.flip(3), images)
    torch.testing.assert_close(cam.composed(images, masks, flip), shown, **CLOSE)
    shift = torch.tensor([[[1.0, 0, -2], [0, 1, 1]]], dtype=torch.float64)  # two to the right, one up
    moved, where = images.roll((-1, 2), (2, 3)), masks | masks.roll((-1, 2), (1, 2))
    where[:, -1] = where[:, :, :2] = False  # nothing came there
    torch.testing.assert_close(cam.composed(images, masks, shift), torch.where(where[:, None], moved, images), **CLOSE)


def test_an_empty_mask_leaves_the_image():
    images = uniform(4, 3, 8, 8)
    affine = cam.rotation(*(torch.full((4,), value) for value in (3.0, 3.0, 30.0, 0.9))).double()
    assert torch.equal(cam.composed(images, torch.zeros(4, 8, 8, dtype=torch.bool), affine), images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_dtype_range_and_memory_format_are_kept(dtype):
    images = (0.9 + 0.1 * uniform(32, 3, 10, 12)).to(dtype).contiguous(memory_format=torch.channels_last)
    before, module = images.clone(), method(originals="none")
    module.maps = (256 * uniform(32, 3, 4)).to(torch.uint8)
    found = module.alter(images, torch.zeros(32, dtype=torch.long), torch.arange(32), generator())
    assert found.shape == images.shape and found.dtype == dtype and torch.equal(images, before)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.min() >= 0 and found.max() <= 1 and not torch.equal(found, images)


def test_white_stays_white_or_darker():
    """The weights of four neighbours sum to 1 up to rounding only."""
    masks, draws = torch.ones(64, 10, 12, dtype=torch.bool), uniform(5, 64)
    affine = cam.affines(list(draws), torch.tensor([cam.TRANSFORMS["rotate_scale"]]), cam.boxes(masks), (10, 12))
    assert cam.composed(torch.ones(64, 3, 10, 12), masks, affine).max() == 1


def test_original_shares():
    """500 + 5 images in every class of the stored set; with a limit, some get none and none gets more than that."""
    counts = torch.tensor([500, 150, 100, 99, 5])
    np.testing.assert_allclose(cam.original_shares(counts), counts / 505, rtol=1e-6)
    np.testing.assert_allclose(cam.original_shares(counts, 100), [1, 1, 1, 99 / 199, 5 / 105], rtol=1e-12)
    np.testing.assert_allclose(cam.original_shares(torch.tensor([3, 0, 1])), [3 / 4, 1 / 4, 1 / 4], rtol=1e-12)


@pytest.mark.parametrize("keywords, shares", [({}, [500 / 505, 50 / 505, 5 / 505]), ({"limit": 40}, [1, 1, 5 / 45]),
                                              ({"originals": "none"}, [0, 0, 0])])  # fmt: skip
def test_how_many_images_stay(keywords, shares):
    module, each = method(**keywords), 4000
    module.maps = torch.zeros(1, 2, 2, dtype=torch.uint8)
    target = torch.arange(3).repeat_interleave(each)
    images = torch.rand(1, 3, 4, 4, generator=generator()).expand(len(target), -1, -1, -1)
    # all is foreground and the box the whole image: no shift is possible, but rotation and flip show
    module.effects = module.effects[:1]
    same = (module.alter(images, target, torch.zeros_like(target), generator()) == images).all((1, 2, 3))
    for share, found in zip(shares, same.view(3, each).double().mean(1).tolist(), strict=True):
        assert abs(found - share) <= 4 * (share * (1 - share) / each) ** 0.5 + 1 / 400  # angle 0, scale 1: 1 in 3600


@pytest.mark.parametrize("transforms", [("rotate_scale", "translate", "flip"), PAPER])
def test_every_transform_is_drawn_equally_often(transforms):
    effects = torch.tensor([cam.TRANSFORMS[name] for name in transforms])
    ends = tuple(torch.full((8000,), end) for end in (2, 6, 1, 3))
    found = cam.affines(list(uniform(5, 8000)), effects, ends, (8, 10))
    linear, start = found[:, :, :2], found[:, :, 2]
    flipped = linear[:, 0, 0] < 0
    turned = (linear[:, 0, 1] != 0) & ~flipped
    scaled = (linear.det().abs() - 1).abs() > 1e-9
    moved = ~flipped & ~turned & ~scaled & (start != 0).any(1)
    share = 8000 / len(transforms)
    for seen, lost in ((flipped, 0), (turned, 1 / 90), (moved, 1 / 36)):
        assert abs(int(seen.sum()) - share * (1 - lost)) < 4 * share**0.5
    both = int((turned & scaled).sum())
    assert (both == 0) == ("rotate_scale" not in transforms)


def test_the_generator_decides_everything():
    module, images = method(originals="none"), torch.rand(16, 3, 8, 8, generator=generator())
    module.maps = (256 * uniform(16, 2, 2)).to(torch.uint8)
    runs = []
    for noise, seed in [(1, 7), (2, 7), (1, 8)]:
        with torch.random.fork_rng([]):
            torch.manual_seed(noise)
            runs.append(module.alter(images, torch.zeros(16, dtype=torch.long), torch.arange(16), generator(seed)))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_nothing_waits_for_the_device():
    """On torch's meta device, which has no values, whatever needs a value on the host fails."""
    module = method().to("meta")
    module.maps = torch.zeros(16, 2, 2, dtype=torch.uint8, device="meta")
    images, target = torch.empty(16, 3, 8, 8, device="meta"), torch.empty(16, dtype=torch.long, device="meta")
    assert module.alter(images, target, target, generator()).shape == images.shape


@pytest.mark.parametrize("head", ["linear", "cosine", "tau_normalised", "lws"])
def test_preparing_and_altering(head):
    parent, images, target = teacher(head), uniform(9, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2, 1, 1, 0])
    if head == "lws":
        parent.head.scale.copy_(torch.tensor([2.0, -1.0, 0.5]))
    module, order = method(parent, head, transforms=ALL).double(), torch.tensor([4, 2, 0, 1, 3, 5, 8, 7, 6])
    with torch.no_grad():
        module.prepare(((rows, images[rows], target[rows]) for rows in order.split(4)), 9)
        features = parent.backbone.feature_map(images).numpy()
    signs = parent.head.scale.sign() if head == "lws" else torch.ones(3)
    weight = (parent.head.weight * signs[:, None])[target].numpy()
    expected = np.stack([slow_activation(f, w) for f, w in zip(features, weight, strict=True)])
    np.testing.assert_array_equal(module.maps, expected)
    rows = torch.tensor([8, 3, 4, 4, 0, 2, 5, 1, 6, 7])
    found = module.alter(images[rows], target[rows], rows, generator()).numpy()
    for row, result, u in zip(rows.tolist(), found, uniform(6, 10).T.tolist(), strict=True):
        mask, image = slow_foreground(expected[row], 8, 8, 0.75), images[row].numpy()
        forward = slow_matrix(ALL[int(5 * u[1])], u[2:], slow_box(mask, "object"), 8, 8)
        stays = u[0] < COUNTS[target[row]] / 505
        np.testing.assert_allclose(result, image if stays else slow_composed(image, mask, forward), **CLOSE)


def worker(number, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    torch.save(prepared(torch.arange(number, 7, 2)), f"{folder}/{number}.pt")
    distributed.destroy_process_group()


def prepared(rows):
    """The maps after a worker has seen these of 7 images."""
    images, target, module = uniform(7, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2, 1]), method(teacher())
    with torch.no_grad():
        module.prepare(((part, images[part], target[part]) for part in rows.split(3)), 7)
    return module.maps


def test_two_workers_have_the_maps_of_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    whole = prepared(torch.arange(7))
    for number in range(2):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt"), whole)


def test_weights_and_keywords_are_those_of_supervised():
    module, plain = method(teacher()), build.method(catalogue.complete(tiny()), FACTS)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    known = catalogue.names("method")
    assert known["supervised"].defaults.items() <= known["cam"].defaults.items()
    assert known["cam"].taught


def test_a_stage_with_cam_resumes_one_without():
    one, parent = Resources(device="cpu", threads=1), tiny(epochs=1)
    before, _ = train(parent, resources=one)
    plain = tiny(epochs=1, views=(fn("identity"),), resume=parent)
    expected = train(plain, {"resume": before}, resources=one)[0].model
    for limit in (None, 1):
        stage = plain.but(teacher=parent, method=fn("cam", limit=limit))
        found = train(stage, {"resume": before, "teacher": before}, resources=one)[0].model
        assert found.keys() == expected.keys()
        # with a limit of 1 no class is short of images, and every image stays
        assert all(torch.equal(expected[name], found[name]) for name in expected) == (limit == 1)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"transforms": ()}, "at least one of the transforms rotate_scale, rotate, scale, translate, flip"),
        ({"transforms": ("flip", "blur")}, "unknown transform 'blur': known: rotate_scale, rotate, scale, translate"),
        ({"box": "tight"}, "unknown box 'tight': known: object, corner"),
        ({"originals": "some"}, "unknown choice of originals 'some': known: published, none"),
        ({"limit": 0}, "the limit of generated images is at least 1, not 0"),
    ],
)
def test_unknown_values_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        method(**keywords)


FLAT = SimpleNamespace(feature_map=lambda images: images.flatten(1))


@pytest.mark.parametrize(
    "parent, message",
    [
        (None, "cam needs a teacher: the stage whose class activation maps it uses"),
        (SimpleNamespace(backbone=nn.Identity(), head=nn.Linear(3, 3)), "whose backbone has a feature_map"),
        (SimpleNamespace(backbone=SimpleNamespace(feature_map=None), head=nn.Identity()), "whose head has a weight"),
        (SimpleNamespace(backbone=FLAT, head=nn.Linear(3, 3)), r"feature maps \[B, D, h, w\], not \[2, 192\]"),
    ],
)
def test_teachers_without_maps_are_refused(parent, message):
    module = method(parent)
    with pytest.raises(ValueError, match=message):
        module.prepare([(torch.arange(2), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))], 2)
