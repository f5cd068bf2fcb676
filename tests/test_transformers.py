import math

import pytest
import torch
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from torch.nn import functional as F

from rayltr.backbones import BACKBONES, Normalised
from rayltr.transformers import attention, attention_distance, blocks, feature_rank, judged, token_distance
from tests.views.images import from_pil, landscape, to_pil

SIDES = {"size": 16, "patch": 4, "width": 16, "depth": 3, "heads": 2}


def network(**keywords):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return BACKBONES["deit"](**{**SIDES, **keywords}).eval()


def images(size=16, count=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("keywords", "millions"),
    [
        ({"size": 224, "patch": 16, "width": 768, "heads": 12}, 85.82),
        ({"size": 224, "patch": 16}, 5.53),
        ({}, 5.37),
        ({"patch": 8}, 5.38),
        ({"width": 256, "depth": 6, "heads": 4}, 4.77),
    ],
)
def test_the_sizes_are_the_published_ones(keywords, millions):
    with torch.device("meta"):
        body = BACKBONES["deit"](**keywords)
    heads = 2 * 10 * (body.dim + 1)
    assert (sum(p.numel() for p in body.parameters()) + heads) / 1e6 == pytest.approx(millions, abs=0.006)


@torch.no_grad()
def test_the_tokens_are_those_of_timm_whichever_way_attention_is_computed():
    body = network().double()
    theirs = VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    theirs.load_state_dict(body.body.state_dict())
    assert theirs.blocks[0].attn.fused_attn
    expected = theirs.double().eval().forward_features(images())[:, :2]
    torch.testing.assert_close(body.tokens(images()), expected)
    assert not any(block.attn.fused_attn for block in body.body.blocks), "images on a CPU"
    torch.testing.assert_close(body(images()), expected.mean(1))
    assert list(body.layers()) == ["blocks.0", "blocks.1", "blocks.2"]


def test_layers_are_dropped_ever_more_often():
    rates = [block.drop_path2.drop_prob for block in network(depth=12, drop_path=0.1).body.blocks[1:]]
    assert rates == pytest.approx([0.1 * number / 11 for number in range(1, 12)])


def test_images_of_another_size_are_resized_as_pillow_does_and_cut_in_the_middle():
    body = network(size=14, patch=7, crop=0.875)  # 14 of 16
    (found,) = body.sized(landscape(8)[None] / 255) * 255
    expected = from_pil(to_pil(landscape(8)).resize((16, 16), Image.Resampling.BICUBIC))[:, 1:15, 1:15]
    assert (expected - found).abs().max() <= 1.01  # rounded after the columns and again after the rows
    own = images(14)
    assert body.sized(own) is own


def test_it_is_normalised_by_the_data_or_by_imagenet():
    seen = []
    for imagenet in (False, True):
        wrapped = Normalised(network(imagenet=imagenet), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).double()
        seen.append(wrapped.normalised(images()))
    for found, mean, std in zip(seen, (0.4, 0.485), (0.2, 0.229), strict=True):
        torch.testing.assert_close(found[:, 0], (images()[:, 0] - mean) / std, rtol=1e-6, atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="'deit' cannot be made here: dim should be divisible by num_heads"):
        BACKBONES["deit"](width=16, heads=3)


# --------------------------------------------------------------------------------------------------------- the measures


@torch.no_grad()
def test_attention_is_what_the_blocks_use():
    """The last block's output, made again from it."""
    body = network().double()
    found = attention(body, images())
    assert [a.shape for a in found] == [(3, 2, 18, 18)] * 3
    torch.testing.assert_close(found[0].sum(-1), torch.ones(3, 2, 18, dtype=torch.float64))
    for number, block in enumerate(body.body.blocks):
        given, out = [], []
        handles = [
            block.attn.register_forward_pre_hook(lambda part, inputs, given=given: given.append(inputs[0])),
            block.attn.register_forward_hook(lambda part, inputs, output, out=out: out.append(output)),
        ]
        body.tokens(images())
        values = block.attn.qkv(given[0]).unflatten(2, (3, 2, 8))[:, :, 2].transpose(1, 2)
        made = block.attn.proj((found[number] @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out[0], made)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_blocks_end_in_the_tokens():
    body = network()
    found = blocks(body, images().float())
    assert found.shape == (3, 3, 2, 16)
    torch.testing.assert_close(body.body.norm(found[-1]), body.tokens(images().float()))
    assert not any(part._forward_hooks for part in body.modules())


def slow_distance(share, rows, columns, patch):
    """Of one head of one image, [N][N] with two tokens before the patches."""
    total = 0.0
    for query in range(rows * columns):
        own = share[query + 2][2:]
        for key, weight in enumerate(own):
            down, right = query // columns - key // columns, query % columns - key % columns
            total += weight / sum(own) * math.hypot(down, right) * patch
    return total / (rows * columns)


def test_the_attention_distance_against_a_slow_reference():
    g = torch.Generator().manual_seed(0)
    share = torch.randn(2, 3, 14, 14, generator=g, dtype=torch.float64).softmax(-1)
    found = attention_distance(share, (3, 4), 8)
    expected = [sum(slow_distance(share[b, h].tolist(), 3, 4, 8) for b in range(2)) / 2 for h in range(3)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_attention_distance_of_plain_cases():
    uniform = torch.full((1, 1, 198, 198), 1 / 198, dtype=torch.float64)
    assert attention_distance(uniform, (14, 14), 16).item() == pytest.approx(116.5, abs=0.05)
    itself = torch.eye(198, dtype=torch.float64)[None, None]
    assert attention_distance(itself, (14, 14), 16).item() == pytest.approx(0, abs=1e-12)
    y, x = torch.arange(196) // 14, torch.arange(196) % 14
    near = ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)
    around = F.pad(near.double(), (2, 0, 2, 0), value=1.0)[None, None]
    assert attention_distance(around, (14, 14), 16).item() == pytest.approx(16.7, abs=0.1)


def test_the_distance_of_the_tokens():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 3.0]]])
    assert token_distance(tokens).item() == pytest.approx(1 - (0 + 1) / 2)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_feature_rank_counts_directions_that_vary(rank):
    g = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64)).Q[:, :rank]
    features = torch.randn(400, rank, generator=g, dtype=torch.float64) @ directions.T + 7
    assert feature_rank(features) == rank == feature_rank((features + 1).float())


def test_the_feature_rank_against_eigenvalues():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(50, 8, generator=g, dtype=torch.float64) * torch.linspace(3, 0.1, 8, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0).tolist()
    for share in (0.5, 0.9, 0.99):
        held, expected = 0.0, 0
        while held < share * sum(values):
            held, expected = held + values[expected], expected + 1
        assert feature_rank(features, share) == expected


def test_a_teacher_is_judged():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    accuracy, entropy = judged(logits, torch.tensor([0, 1, 1]))
    assert accuracy.item() == pytest.approx(2 / 3)
    parts = [1 / (1 + math.exp(-z)) for z in (2.0, 0.0, 5.0)]
    expected = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in parts) / 3
    assert entropy.item() == pytest.approx(expected, rel=1e-5)
