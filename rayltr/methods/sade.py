"""Test-agnostic recognition by experts for different class frequencies: SADE (Zhang et al., NeurIPS 2022)."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rayltr.backbones import branched
from rayltr.experts import Heads, is_expert, named
from rayltr.interface import Batch, Parts
from rayltr.parallel import mean
from rayltr.views import simaugment

EXPERTS = ("frequent", "uniform", "rare")
"""What each of the three experts is good at, and the name of its loss."""

TINY = 1e-9
"""Added to priors before their logarithm, as published."""


class Method(nn.Module):
    """Three experts that share the beginning of a network; the heads are their mean `main`, `expert1` to `expert3`.

    Each has a cross-entropy of its own (terms `frequent`, `uniform`, `rare`): of its logits, of its logits plus the
    log prior, and of its logits plus the log prior minus tau times the reversed log prior (section 4.1 of the paper).
    Without an expectation of the test data all weigh the same; `aggregated` learns weights from unlabelled images.

    own: the last residual stages that each expert has for itself; tau >= 0 (published: 2, and 1 for iNaturalist).
    Raises ValueError for a negative tau and for a backbone that cannot be shared.
    """

    own_loss = True
    stacks = True
    shift: Tensor

    def __init__(self, parts: Parts, *, own: int = 2, tau: float = 2.0):
        super().__init__()
        if tau < 0:
            raise ValueError(f"sade needs tau >= 0, not {tau}")
        self.backbone = branched([parts.backbone() for _ in EXPERTS], own)
        self.head = Heads(parts.head(self.backbone.dim) for _ in EXPERTS)
        self.register_buffer("shift", shifts(parts.counts, tau).float(), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses = expertise(self.head(self.backbone(batch.views[0])), batch.target, self.shift)
        means = mean(losses)
        return dict(zip(EXPERTS, means.unbind(), strict=True))

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        return named(self.head(self.backbone(images)))


def reversed_prior(prior: Tensor) -> Tensor:
    """The prior [C] with its ranks reversed: the most frequent class gets the smallest value, and so on.

    Of equally frequent classes the first ranks lower.
    """
    order = prior.argsort(stable=True)
    return torch.empty_like(prior).index_copy(0, order, prior[order.flip(0)])


def shifts(counts: Tensor, tau: float) -> Tensor:
    """What is added to the logits of the three experts, float64 [3, C]; a class without images counts as one image."""
    n = counts.double().clamp(min=1)
    prior = n / n.sum()
    log, reverse = (prior + TINY).log(), (reversed_prior(prior) + TINY).log()
    return torch.stack([torch.zeros_like(log), log, log - tau * reverse])


def expertise(logits: Tensor, target: Tensor, shift: Tensor) -> Tensor:
    """The cross-entropies [B, 3] of the experts' logits [B, 3, C], shifted by [3, C], for the target [B]."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z + shift.to(z)
    return F.cross_entropy(z.transpose(1, 2), target[:, None].expand(-1, len(shift)), reduction="none")


def combined(logits: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum [B, C] of the experts' logits [B, E, C]; weights: [E]."""
    return torch.einsum("bec,e->bc", logits, weights.to(logits))


def stability(one: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    """The cosines [B] of the predictions of two views, from the experts' logits [B, E, C] and their weights [E]."""
    first, second = (combined(logits, weights).softmax(1) for logits in (one, other))
    return F.cosine_similarity(first, second, dim=1, eps=1e-6)


def aggregated(
    module: nn.Module,
    number: int,
    take: Callable[[Tensor], Tensor],
    view: Callable[[Tensor, Generator], Tensor],
    generator: Generator,
    *,
    batch: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    epochs: int = 5,
    steps: int = 400,
    least: float = 0.05,
) -> Tensor:
    """Weights [E] of the experts, sum 1, under which two views of an image are predicted alike (paper, section 4.2).

    module: any method with heads `expert1`, `expert2`, ...  take: the unlabelled images of given rows (int64 [B] on the
    CPU, from 0 to `number` - 1), float [B,3,H,W] in [0, 1] on the module's device.  They are gone through `epochs`
    times, each time in another order.  view: drawn twice for each image, see `published_view`.
    lr, momentum, weight_decay: of SGD with Nesterov momentum (published: those of the training).  The network itself
    learns nothing.

    It ends after `steps` batches (published: no limit; 395 are five epochs of CIFAR's test images), and before a step
    after which a weight is below `least` (published: after an epoch at whose end one is, which may be far below).
    Raises ValueError for a module without experts.
    """
    module.eval()
    experts = _expert_logits(module, take(torch.arange(1))).shape[1]
    free = torch.full((experts,), 1 / experts, device=generator.device, requires_grad=True)
    sgd = torch.optim.SGD([free], lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    found = free.detach().softmax(0)
    for rows in islice(shuffled(number, batch, epochs, generator), steps):
        images = take(rows)
        one, other = (_expert_logits(module, view(images, generator)) for _ in range(2))
        sgd.zero_grad()
        (-stability(one, other, free.softmax(0)).mean()).backward()
        sgd.step()
        changed = free.detach().softmax(0)
        if changed.min() < least:
            break
        found = changed
    return found


def shuffled(number: int, batch: int, epochs: int, generator: Generator) -> Iterator[Tensor]:
    """Rows int64 [B] on the CPU in batches, all of 0 to `number` - 1 in each epoch and each epoch in another order."""
    for _ in range(epochs):
        yield from torch.randperm(number, generator=generator, device=generator.device).cpu().split(batch)


def published_view(images: Tensor, generator: Generator, *, flip: float = 0.5) -> Tensor:
    """What the images are seen as: a padded crop (4 of 32 pixels), mirrored, colour jitter in 0.8 of the cases, no
    colours in 0.2, blurred in 0.2."""
    return simaugment(images, generator, crop="padded", flip=flip, jitter=0.8, grayscale=0.2, blur=0.2)


@torch.no_grad()
def _expert_logits(module: nn.Module, images: Tensor) -> Tensor:
    """The logits of the experts, float32 [B, E, C].  Raises ValueError if there are none."""
    heads: Mapping[str, Tensor] = module.predict(images)  # type: ignore[operator]
    experts = [z for head, z in heads.items() if is_expert(head)]
    if not experts:
        raise ValueError("aggregated needs a method with experts, such as sade, ride or ncl")
    return torch.stack(experts, 1).float()
