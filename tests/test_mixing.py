import copy
import pickle

import numpy as np
import pytest
import torch
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch.nn.functional import cross_entropy

from rayltr import mixing as module
from rayltr.mixing import MIXINGS, blend, remix_weight

COUNTS = torch.tensor([900, 300, 100, 10])
MERGED = {"bbn_mix": 2}
"""How many neighbours become one image, where it is not one alone."""
every_mixing = pytest.mark.parametrize("mixing", MIXINGS.values(), ids=MIXINGS)


def batch(size=64, seed=0, dtype=torch.float32):
    """Images whose pixels all differ, so that a mixed pixel tells where it comes from."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, 8, 12, generator=g, dtype=torch.float64).to(dtype)
    return images, torch.randint(4, (size,), generator=g), COUNTS


def mixed(name, seed=0, **keywords):
    return MIXINGS[name](*batch(), torch.Generator().manual_seed(seed), **keywords)


def shown(mixing, found):
    """The mixed images: those returned, or what a network makes of them that mixes in its first layer."""
    return blend(found[0], found.partner, found[2]) if mixing is MIXINGS["manifold"] else found[0]


@every_mixing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_dtypes_and_ranges(mixing, dtype):
    images, target, counts = batch(dtype=dtype)
    found = mixing(images, target, counts, torch.Generator().manual_seed(0))
    size = 64 // MERGED.get(mixing.__name__, 1)
    _, other, weight = found
    out = shown(mixing, found)
    assert out.shape == (size, *images.shape[1:]) and out.dtype == dtype
    assert other.shape == (size,) and other.dtype == torch.int64
    assert weight.shape == (size,) and weight.dtype == torch.promote_types(dtype, torch.float32)
    assert (weight >= 0).all() and (weight <= 1).all()
    assert (out >= 0).all() and (out <= 1).all()


@every_mixing
def test_the_other_target_is_the_partners(mixing):
    images, target, counts = batch()
    found = mixing(images, target, counts, torch.Generator().manual_seed(0))
    assert isinstance(found, tuple) and len(found) == 3
    if k := MERGED.get(mixing.__name__):
        assert found.partner is None
        firsts_and_others = torch.cat([target[::k], found[1]])
        assert torch.equal(firsts_and_others.sort().values, target.sort().values)
    else:
        assert found.partner.dtype == torch.int64 and torch.equal(found.partner.sort().values, torch.arange(64))
        assert torch.equal(found[1], target[found.partner])


@every_mixing
def test_what_a_mixing_returns_can_be_copied_and_pickled(mixing):
    found = mixing(*batch(), torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))
        assert twin.partner is None if found.partner is None else torch.equal(twin.partner, found.partner)


@every_mixing
def test_the_generator_decides_everything(mixing):
    runs = []
    for noise, seed in [(1, 7), (2, 7), (1, 8)]:
        with torch.random.fork_rng([]):
            torch.manual_seed(noise)
            found = mixing(*batch(), torch.Generator().manual_seed(seed))
            runs.append((shown(mixing, found), *found))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


@every_mixing
def test_the_input_is_left_alone_and_channels_last_is_kept(mixing):
    images, target, counts = batch()
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    found = mixing(images, target, counts, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    assert shown(mixing, found).is_contiguous(memory_format=torch.channels_last)


@every_mixing
def test_equal_images_stay_and_a_single_image_is_its_own_partner(mixing):
    images, target, counts = batch()
    k = MERGED.get(mixing.__name__, 1)
    same = images[:1].expand(64, -1, -1, -1)
    found = mixing(same, target, counts, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shown(mixing, found), same[::k])
    found = mixing(same[:k], target[:1].expand(k), counts, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shown(mixing, found), images[:1])
    assert torch.equal(found[1], target[:1])


@every_mixing
def test_alpha_must_be_positive(mixing):
    with pytest.raises(ValueError, match="alpha of a mixing is above 0, not 0"):
        mixing(*batch(), torch.Generator(), alpha=0.0)


def test_mixup_blends_with_the_image_whose_target_it_returns():
    images, target, _ = batch()
    out, other, weight = mixed("mixup")
    share = weight[0]
    assert 0.05 < share < 0.95 and (weight == share).all()
    blends = share * images[:, None] + (1 - share) * images[None]  # every pair
    fits = (blends - out[:, None]).abs().flatten(2).amax(2) < 1e-6
    assert (fits.sum(0) == 1).all() and (fits.sum(1) == 1).all()  # one partner each, everyone once
    assert torch.equal(other, target[fits.int().argmax(1)])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("name", ["mixup", "cutmix", "bbn_mix"])
def test_the_proportion_follows_the_beta_distribution(name, alpha):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    target = torch.zeros(2, dtype=torch.int64)
    shares = torch.stack([MIXINGS[name](images, target, COUNTS, g, alpha=alpha)[2][0] for _ in range(3000)]).double()
    if name != "cutmix":  # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
        assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
    else:  # boxes are clipped, so more of the image stays
        assert 0.5 < shares.mean() < 0.8


def test_cutmix_pastes_one_box_and_weighs_its_exact_area():
    images, target, _ = batch()
    sizes = set()
    for seed in range(40):
        out, other, weight = mixed("cutmix", seed)
        changed = (out != images).any(1)
        moved = changed.flatten(1).any(1)
        box = changed.any(0)
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)  # a rectangle without gaps
        assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2
        assert (changed[moved] == box).all()  # the same for every image
        assert torch.equal(weight, torch.full((64,), 1 - box.sum().item() / 96))
        sizes.add(int(box.sum()))
        if box.any():
            pasted, sources = out[:, :, box], images[:, :, box]
            partner = [int((sources == p).flatten(1).all(1).nonzero()) for p in pasted]
            assert torch.equal(other, target[partner])
    assert len(sizes) > 10


@pytest.mark.parametrize("switch, kind", [(0.0, "mixup"), (1.0, "cutmix")])
@pytest.mark.parametrize("seed", range(8))
def test_mixup_or_cutmix_is_the_form_of_timm(switch, kind, seed):
    """The partner is the image at the same place from the end; the target is mixed as the images are."""
    images, target, counts = batch(dtype=torch.float64)
    out, other, weight = MIXINGS["mixup_or_cutmix"](
        images, target, counts, torch.Generator().manual_seed(seed), switch=switch
    )
    flipped, share = images.flip(0), weight[0].item()
    assert (weight == share).all() and torch.equal(other, target.flip(0))
    if kind == "mixup":
        torch.testing.assert_close(out, images * share + flipped * (1 - share), rtol=0, atol=1e-12)
    else:
        box = (out != images).any(1).any(0)
        assert torch.equal(out[:, :, ~box], images[:, :, ~box]) and torch.equal(out[:, :, box], flipped[:, :, box])
        assert share == pytest.approx(1 - box.sum().item() / 96, abs=1e-12)
    smoothed = mixup_target(target, 4, share, smoothing=0.1)
    for z in torch.randn(3, 64, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64):
        expected = -(smoothed * z.log_softmax(1)).sum(1)
        losses = [cross_entropy(z, y, reduction="none", label_smoothing=0.1) for y in (target, other)]
        torch.testing.assert_close(weight * losses[0] + (1 - weight) * losses[1], expected, rtol=1e-6, atol=1e-6)


def test_mixup_or_cutmix_switches_and_has_two_proportions():
    images, target = torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    g, mixup, boxes = torch.Generator().manual_seed(0), [], []
    for _ in range(3000):
        out, _, weight = MIXINGS["mixup_or_cutmix"](images, target, COUNTS, g)
        pasted = (out[0] == images[0]) | (out[0] == images[1])
        (boxes if pasted.all() else mixup).append(weight[0].item())
    assert abs(len(mixup) - 1500) < 3.3 * 750**0.5
    shares = torch.tensor(mixup).double()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)
    np.random.seed(0)
    theirs = [cutmix_bbox_and_lam((2, 3, 32, 32), np.random.beta(1, 1))[1] for _ in range(1500)]
    assert np.mean(boxes) == pytest.approx(np.mean(theirs), abs=0.03)  # odd sides are rounded up there


@pytest.mark.parametrize("fraction, side", [(0.0, 0), (0.3, 2), (0.5, 6), (1.0, 12)])
def test_cutmix_boxes_have_even_sides_around_every_centre(fraction, side):
    g, share = torch.Generator().manual_seed(0), torch.tensor(fraction, dtype=torch.float64)
    spans = {tuple(module._span(12, share, g).nonzero().flatten().tolist()) for _ in range(300)}
    expected = {tuple(range(max(c - side // 2, 0), min(c + side // 2, 12))) for c in range(12)}
    assert spans == expected


def test_remix_truth_table():
    """n_i / n_j against 3 and 1/3, the share against 0.5."""
    rows = [  # count, partner's count, share, weight
        (300, 100, 0.4, 0.0),  # common with rare, mostly the rare image: all to the partner
        (299, 100, 0.4, 0.4),
        (300, 100, 0.5, 0.5),
        (300, 100, 0.6, 0.6),
        (100, 300, 0.6, 1.0),  # rare with common, mostly the rare image: all to the first
        (101, 300, 0.6, 0.6),
        (100, 300, 0.5, 0.5),
        (100, 300, 0.4, 0.4),
        (100, 100, 0.1, 0.1),
        (5000, 5, 0.0, 0.0),
        (5, 5000, 1.0, 1.0),
    ]
    count, partner, share, expected = torch.tensor(rows, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(remix_weight(count, partner, share, 3.0, 0.5), expected)
    whole = remix_weight(count.long(), partner.long(), share, 3.0, 0.5)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("seed", range(6))
def test_remix_decides_for_each_image_or_takes_the_batch_mean(seed):
    images, target, _ = batch()
    _, other, plain = mixed("mixup", seed)
    out, remix_other, weight = mixed("remix", seed)
    assert torch.equal(remix_other, other) and torch.equal(out, mixed("mixup", seed)[0])
    expected = [
        0.0 if COUNTS[i] >= 3 * COUNTS[j] and s < 0.5 else 1.0 if 3 * COUNTS[i] <= COUNTS[j] and 1 - s < 0.5 else s
        for i, j, s in zip(target.tolist(), other.tolist(), plain.tolist(), strict=True)
    ]
    torch.testing.assert_close(weight, torch.tensor(expected))
    assert len(weight.unique()) == 2
    mean = mixed("remix", seed, reduce="batch")[2]
    torch.testing.assert_close(mean, weight.mean().expand(64))


def test_remix_without_preference_is_mixup():
    for a, b in zip(mixed("remix", kappa=1e9), mixed("mixup"), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="'sample' or 'batch', not 'mean'"):
        mixed("remix", reduce="mean")


@pytest.mark.parametrize("seed", range(3))
def test_manifold_draws_what_mixup_draws_and_leaves_the_images_to_the_network(seed):
    found, plain = mixed("manifold", seed, alpha=0.5), mixed("mixup", seed, alpha=0.5)
    assert torch.equal(found[0], batch()[0])
    assert torch.equal(found.partner, plain.partner)
    assert torch.equal(found[1], plain[1]) and torch.equal(found[2], plain[2])
    torch.testing.assert_close(blend(found[0], found.partner, found[2]), plain[0])
    other_layer = mixed("manifold", seed, alpha=0.5, layer="fc")
    assert all(torch.equal(a, b) for a, b in zip(found, other_layer, strict=True))


def test_bbn_mix_blends_each_pair_of_neighbours_with_one_proportion():
    images, target, counts = batch(dtype=torch.float64)
    for seed in range(3):
        out, other, weight = MIXINGS["bbn_mix"](images, target, counts, torch.Generator().manual_seed(seed))
        share = weight[0].item()
        assert 0 < share < 1 and (weight == share).all()
        for b in range(32):
            expected = share * images[2 * b] + (1 - share) * images[2 * b + 1]
            torch.testing.assert_close(out[b], expected, rtol=0, atol=1e-9)
            assert other[b] == target[2 * b + 1]


def test_bbn_mix_needs_pairs():
    images, target, counts = batch(5)
    with pytest.raises(ValueError, match="bbn_mix pairs neighbouring images and needs an even batch, not 5"):
        MIXINGS["bbn_mix"](images, target, counts, torch.Generator())


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("shares", [(), (6,)], ids=str)
def test_blend_of_images_features_or_logits(shape, shares):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    partner = torch.tensor([3, 0, 2, 1, 5, 4])
    share = torch.rand(shares, generator=g, dtype=torch.float64)
    found = blend(x, partner, share)
    rows = enumerate(share.expand(6).tolist())
    expected = torch.stack([s * x[b] + (1 - s) * x[int(partner[b])] for b, s in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    slopes = torch.randn(shape, generator=g, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * slopes).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    half = blend(x.bfloat16(), partner, share)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.03, atol=0.03)
