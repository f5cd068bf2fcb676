"""Two tokens, one for the targets and one for a teacher: DeiT (ICML 2021) and, with late class weights, DeiT-LT."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.fused import fuse
from rayltr.interface import Batch, Parts
from rayltr.methods import supervised
from rayltr.parallel import all_sum, world
from rayltr.transformers import judged, token_distance

KINDS, NORMS = ("hard", "soft", "none"), ("numel", "batch")
BODY = "backbone.body.body."
"""What the names of timm's weights begin with here."""


class Method(supervised.Method):
    """A class token that learns from targets and a distillation token that learns from a teacher.

    The terms are `cls`, (1 - alpha) times the stage's loss of the first classifier, and `dist`, alpha times the
    distillation of the second.  The teacher sees the last view of the stage: with one view the student's own images,
    mixed and augmented as they are (Rangwani et al., DeiT-LT, CVPR 2024), with a second one that, unmixed: what it
    says of both parts of a mixed image then counts by their shares.  The class weight
    of the stage, which DeiT-LT brings in late, is for the distillation only, by the class that the *teacher* says;
    the term is then the mean weighted by the weights drawn, as in the authors' code.

    It measures `token_distance`, 1 - the mean cosine of the two tokens of the student's images as it is trained on
    them, and of the teacher's images `teacher_accuracy`, of mixes by their main target, and `teacher_entropy` (nats).

    Heads: `main`, the mean of both logits; `cls`; `dist`; and for each share s of `fusion`, `cls25` for 0.25, the sum
    of s times the one and 1 - s times the other.

    alpha in [0, 1].  distil: "hard" compares with the teacher's class, "soft" with its probabilities at `temperature`
    > 0, after its logits were multiplied by `scale` (30 for a cosine head of scale 1); under weights w they are
    proportional to w p; with "none", an ablation, the teacher is only measured, and the second token learns from the
    targets as the first one does.  normalise: what soft distillation is divided by besides the images: "numel" the
    classes, as published, "batch" nothing.  teacher_size: the side that the teacher's images are resized to, with
    antialiasing or not.  teacher_renorm=False gives the teacher images that are normalised for the student, as
    published.
    Raises ValueError for values outside, another backbone than deit, and for mixing inside the network.
    """

    taught = True
    own_weight = True
    stacks = False
    drawn: Tensor | None

    def __init__(
        self,
        parts: Parts,
        *,
        alpha: float = 0.5,
        distil: str = "hard",
        temperature: float = 1.0,
        scale: float = 1.0,
        normalise: str = "numel",
        fusion: tuple[float, ...] = (0.25, 0.75),
        teacher_size: int | None = None,
        teacher_renorm: bool = True,
        antialias: bool = True,
    ):
        if not 0 <= alpha <= 1 or min(temperature, scale) <= 0 or any(not 0 <= share <= 1 for share in fusion):
            raise ValueError("tokens needs alpha and shares of fusion from 0 to 1, temperature > 0 and scale > 0")
        if len({share_name(share) for share in fusion}) < len(fusion):
            raise ValueError(f"tokens: shares of fusion must differ by a hundredth or more, not {fusion}")
        if distil not in KINDS or normalise not in NORMS:
            raise ValueError(f"tokens: distil is one of {', '.join(KINDS)}, normalise one of {', '.join(NORMS)}")
        if parts.layer:
            raise ValueError("tokens cannot mix inside the network, where its teacher sees nothing; mix the images")
        super().__init__(replace(parts, weight=None))
        if not hasattr(self.backbone.body, "tokens"):  # type: ignore[union-attr]
            raise ValueError("tokens needs a backbone with two tokens: deit")
        self.head_dist = parts.head(self.backbone.dim)  # type: ignore[arg-type]
        self.fresh += tuple(f"head_dist.{name}" for name in getattr(self.head_dist, "fresh", ()))
        for head in (self.head, self.head_dist):
            started(head)
        self.alpha, self.distil, self.fusion = alpha, distil, fusion
        self.temperature, self.scale, self.normalise = temperature, scale, normalise
        self.teacher_size, self.teacher_renorm, self.antialias = teacher_size, teacher_renorm, antialias
        if parts.teacher:
            fuse(*parts.teacher.children())
        self.teacher: tuple[nn.Module | None] = (parts.teacher,)  # in a tuple: no part of this method's own weights
        self.as_trained = parts.teacher_scale / scale  # cosines are multiplied as in the teacher's own loss
        self.measured: dict[str, Tensor] = {}
        self.register_buffer("drawn", parts.weight, persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        cls, dist, tokens = self.both(batch.views[0])
        with torch.no_grad():
            taught = self.taught_by(batch.views[-1])
            shown = batch.target if len(batch.views) > 1 else batch.main
            accuracy, entropy = judged(self.as_trained * taught, shown)
            distance = token_distance(tokens)
        self.measured = {"token_distance": distance, "teacher_accuracy": accuracy, "teacher_entropy": entropy}
        own = self.compared(cls, tokens[:, 0], batch)
        return {"cls": (1 - self.alpha) * own, "dist": self.alpha * self.far(dist, taught, tokens, batch)}

    def both(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits [B,C] of both classifiers, and the two tokens [B,2,D]."""
        backbone: nn.Module = self.backbone
        tokens = backbone.body.tokens(backbone.normalised(images))  # type: ignore[union-attr, operator]
        return self.head(tokens[:, 0]), self.head_dist(tokens[:, 1]), tokens

    def taught_by(self, images: Tensor) -> Tensor:
        """The teacher's logits [B,C] for images in [0, 1]."""
        (teacher,) = self.teacher
        assert teacher is not None
        if self.teacher_size and images.shape[2:] != (self.teacher_size, self.teacher_size):
            side = (self.teacher_size, self.teacher_size)
            images = F.interpolate(images, side, mode="bicubic", align_corners=False, antialias=self.antialias)
        if not self.teacher_renorm:
            own, other = self.backbone, teacher.backbone
            images = (images - own.mean) / own.std * other.std + other.mean  # type: ignore[operator, union-attr]
        return self.scale * next(iter(teacher.predict(images).values()))  # type: ignore[operator]

    def far(self, logits: Tensor, taught: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        """How far the second token's logits [B,C] are from the teacher's, over the batches of all workers."""
        if self.distil == "none":
            losses, weight = self.untaught(logits, tokens[:, 1], batch), self.counting(batch.main)
        else:
            pairs = [self.compared_with(said, share, logits) for said, share in lessons(taught, batch)]
            losses, weight = (torch.cat(both) for both in zip(*pairs, strict=True))
        return (weight * losses).sum() * world() / all_sum(weight.sum())

    def compared_with(self, taught: Tensor, share: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What distillation from a teacher's logits [B,C] costs each image [B], and how much that counts [B]."""
        if self.distil == "hard":
            target = taught.argmax(1)
            return F.cross_entropy(_wide(logits), target, reduction="none"), share * self.counting(target)
        losses = divergence(logits, taught, self.temperature, self.drawn)
        return losses / (logits.shape[1] if self.normalise == "numel" else 1), share

    def counting(self, target: Tensor) -> Tensor:
        """The class weights [B] of targets [B]."""
        return torch.ones(len(target), device=target.device) if self.drawn is None else self.drawn[target]

    def untaught(self, logits: Tensor, token: Tensor, batch: Batch) -> Tensor:
        """The stage's loss [B] of the second token against the targets."""
        losses = self.loss(logits, batch.target, self.counts, token)
        if batch.mixed is None or batch.weight is None:
            return losses
        return batch.weight * losses + (1 - batch.weight) * self.loss(logits, batch.mixed, self.counts, token)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        cls, dist = (_wide(z) for z in self.both(images)[:2])
        fused = {share_name(share): share * cls + (1 - share) * dist for share in self.fusion}
        return {"main": (cls + dist) / 2, "cls": cls, "dist": dist, **fused}

    def as_timm(self) -> tuple[str, dict[str, int], dict[str, Tensor]] | None:
        """A model of timm, its sizes and its weights; None where the classifiers are not linear."""
        if not isinstance(self.head, nn.Linear) or not isinstance(self.head_dist, nn.Linear):
            return None
        body: Any = self.backbone.body.body  # type: ignore[union-attr]
        side, patch = body.patch_embed.img_size[0], body.patch_embed.patch_size[0]
        sizes = {"img_size": side, "patch_size": patch, "embed_dim": body.embed_dim, "depth": len(body.blocks)}
        sizes["num_heads"] = body.blocks[0].attn.num_heads
        return "deit_tiny_distilled_patch16_224", sizes, to_timm(self.state_dict())


def share_name(share: float) -> str:
    """The head that has this share of the class token."""
    return f"cls{round(100 * share)}"


def lessons(taught: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """What a teacher says [B,C] of the student's images, and its share [B] of them.

    A teacher with a view of its own has seen unmixed images: of a mixed one it says something about either part.
    Raises ValueError for a mixing that does not tell the partners.
    """
    if batch.mixed is None or batch.weight is None or len(batch.views) == 1:
        return [(taught, torch.ones(len(taught), device=taught.device))]
    if batch.partner is None:
        raise ValueError("the teacher of tokens has a view of its own, so images must be mixed by mixup, cutmix or "
                         "another mixing with partners in the batch")  # fmt: skip
    return [(taught, batch.weight), (taught[batch.partner], 1 - batch.weight)]


def divergence(logits: Tensor, taught: Tensor, temperature: float, weight: Tensor | None) -> Tensor:
    """T^2 KL(q, softmax(z / T)) [B] of logits [B,C] from a teacher's z': q is softmax(z' / T), proportional to
    `weight` [C] times that if there is one."""
    found = F.log_softmax(_wide(logits) / temperature, 1)
    wanted = _wide(taught) / temperature
    wanted = F.log_softmax(wanted if weight is None else wanted + weight.log().to(wanted), 1)
    return temperature**2 * F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)


def started(head: nn.Module) -> None:
    """A linear classifier as timm starts those of transformers."""
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of this method under the names of timm's `deit_*_distilled` models, which have no normalisation."""
    kept = {name: value for name, value in state.items() if name not in ("backbone.mean", "backbone.std")}
    return {name.removeprefix(BODY): value for name, value in kept.items()}


def from_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of timm's model under the names of this method, for `load_state_dict(..., strict=False)`."""
    return {name if name.startswith("head") else BODY + name: value for name, value in weights.items()}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
