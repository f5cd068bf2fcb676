"""Vision transformers with a class and a distillation token, and measures of what their tokens have learnt.

Attention is [B, heads, N, N], rows are queries, over N tokens: the two, then the patches row by row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the pixels of ImageNet."""
FUSED = {"cuda", "xpu", "mps"}
"""Devices on which the fused kernels of attention are the faster ones (measured: not on CPUs)."""
PREFIX = 2
"""The tokens that are no patches."""


class TwoTokens(nn.Module):
    """timm's distilled vision transformer `body`, without classifiers; its features are the mean of the two tokens.

    crop: images of another size are resized to size / crop, and the middle is cut out.  imagenet: they are normalised
    by the statistics of ImageNet, not by those of the data.
    """

    def __init__(self, body: Any, crop: float, imagenet: bool):
        super().__init__()
        self.body, self.dim, self.side, self.crop = body, body.embed_dim, body.patch_embed.img_size[0], crop
        self.statistics = IMAGENET if imagenet else None

    def sized(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in [0, 1] as [B,3,side,side]."""
        side = self.side
        if images.shape[2:] == (side, side):
            return images
        whole = round(side / self.crop)
        edge = (whole - side) // 2
        large = F.interpolate(images, (whole, whole), mode="bicubic", antialias=True).clamp(0, 1)
        return large[:, :, edge : edge + side, edge : edge + side]

    def tokens(self, images: Tensor) -> Tensor:
        """The class token and the distillation token after the last norm: [B, 2, dim]."""
        for block in self.body.blocks:
            block.attn.fused_attn = images.device.type in FUSED
        return self.body.forward_features(images)[:, :PREFIX]

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(images).mean(1)

    def layers(self) -> dict[str, nn.Module]:
        """The blocks: blocks.0, blocks.1, ..."""
        return {f"blocks.{number}": block for number, block in enumerate(self.body.blocks)}


@contextmanager
def outputs(parts: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what some parts of a network give out while it runs, in the order in which they run."""
    found: list[Tensor] = []
    handles = [part.register_forward_hook(lambda module, given, out: found.append(out.detach())) for part in parts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def attention(network: TwoTokens, images: Tensor) -> list[Tensor]:
    """The attention of every block, [B, heads, N, N], for images as the network takes them.

    Made again from queries and keys, since fused kernels do not give it.
    """
    parts = [block.attn for block in network.body.blocks]
    with torch.no_grad(), outputs([part.qkv for part in parts]) as found:
        network.tokens(images)
    made = []
    for part, out in zip(parts, found, strict=True):
        queries, keys, _ = _wide(out).unflatten(2, (3, part.num_heads, -1)).permute(2, 0, 3, 1, 4)
        made.append((part.scale * queries @ keys.transpose(-2, -1)).softmax(-1))
    return made


def blocks(network: TwoTokens, images: Tensor) -> Tensor:
    """The two tokens after every block, before the last norm: [blocks, B, 2, dim]."""
    with torch.no_grad(), outputs([*network.body.blocks]) as found:
        network.tokens(images)
    return torch.stack([out[:, :PREFIX] for out in found])


def token_distance(tokens: Tensor) -> Tensor:
    """1 - the mean cosine between the two tokens [B, 2, D] of an image; a scalar in 0..2."""
    cls, dist = _wide(tokens).unbind(1)
    return 1 - F.cosine_similarity(cls, dist, dim=1).mean()


def attention_distance(attention: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """How far each head looks, in pixels [heads]: the mean distance from a patch to the patches it attends to.

    attention: [B, heads, N, N]; the tokens that are no patches are left out and each row is normalised again.  grid:
    rows and columns of patches, of `patch` pixels a side (Raghu et al., Do Vision Transformers See Like CNNs, 2021).
    """
    rows, columns = torch.meshgrid(*(torch.arange(length) for length in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).to(attention) * patch
    patches = attention[:, :, PREFIX:, PREFIX:]
    share = patches / patches.sum(-1, keepdim=True)
    return (share * torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")).sum(-1).mean((0, 2))


def feature_rank(features: Tensor, share: float = 0.99) -> int:
    """The fewest principal components that hold `share` of the variance of features [n, D]; at most n - 1.

    It grows with n, so give at least some hundred rows (Andriushchenko et al., SAM Leads to Low-Rank Features, 2023).
    """
    wide = features.double()
    variance = torch.linalg.svdvals(wide - wide.mean(0)).square()
    held = variance.cumsum(0) / variance.sum()
    return int((held < share - 1e-12).sum()) + 1


def judged(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy (0..1) and mean entropy (nats) of a teacher's logits [B, C]; target [B], of mixes the main one."""
    logs = _wide(logits).log_softmax(1)
    return (logits.argmax(1) == target).to(logs).mean(), -(logs.exp() * logs).sum(1).mean()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
