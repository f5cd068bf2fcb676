"""Which images need another expert: RIDE's second stage (Wang et al., ICLR 2021), with the experts frozen."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr.backbones import branched
from rayltr.experts import Heads
from rayltr.interface import Batch, Parts
from rayltr.parallel import mean


class Method(nn.Module):
    """Routers between the experts of a finished stage, given as `init=`; the head is `main`.

    Router i sees the `top` largest of the mean logits of the experts 1 to i and the features of expert i, and says
    whether expert i + 1 is asked too.  It learns from images that are wrong so far and that one of the later means
    has right, as in the authors' code.  The term is `routing`, the binary cross-entropy averaged over
    the routers.  A prediction is the mean over the experts that were asked; only those are computed.

    experts, own: as in the stage before.  top: at most so many logits (published: 30 for CIFAR, else 50); hidden:
    what a router makes of the features; positive > 0: the weight of images that need help, with which the share of
    computation grows (published: 100).  Raises ValueError for values outside.
    """

    own_loss = True

    def __init__(
        self,
        parts: Parts,
        *,
        experts: int = 3,
        own: int = 2,
        top: int = 30,
        hidden: int = 16,
        positive: float = 100.0,
    ):
        super().__init__()
        if experts < 2 or min(top, hidden, positive) <= 0:
            raise ValueError("route needs experts >= 2, top > 0, hidden > 0 and positive > 0")
        self.backbone = branched([parts.backbone() for _ in range(experts)], own).requires_grad_(False)
        dim: int = self.backbone.dim
        self.head = Heads(parts.head(dim) for _ in range(experts)).requires_grad_(False)
        self.top, self.positive = min(top, len(parts.counts)), positive
        self.hidden = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(experts - 1))
        self.confidence = nn.Linear(hidden + self.top, 1)
        self.fresh = ("hidden.", "confidence.")

    def train(self, mode: bool = True) -> "Method":
        super().train(mode)
        self.backbone.eval()
        self.head.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            features = self.backbone(batch.views[0])
            means = running_means(self.head(features))
        asked = torch.stack([self.ask(i, features[:, i], means[:, i]) for i in range(len(self.hidden))], 1)
        losses = misjudged(asked, helped(means, batch.target), self.positive)
        return {"routing": mean(losses)}

    def ask(self, router: int, features: Tensor, mean: Tensor) -> Tensor:
        """The logit [B] of asking one more expert, for the last one's features [B, D] and the mean logits [B, C]."""
        seen = F.relu(self.hidden[router](F.normalize(features)))
        return self.confidence(torch.cat([mean.topk(self.top, 1).values, seen.to(mean)], 1))[:, 0]

    def routed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and how many experts each image was shown to [B]; an expert sees only those that ask for it."""
        body = self.backbone.body
        shared = body.stem(self.backbone.normalised(images))
        features = body.ends[0](shared)
        total = _wide(self.head[0](features))
        used, rows = total.new_ones(len(total)), torch.arange(len(total), device=total.device)
        for number in range(1, len(body.ends)):
            rows = rows[self.ask(number - 1, features, total[rows] / number) > 0]
            if not len(rows):
                break
            features = body.ends[number](shared[rows])
            total = total.index_add(0, rows, _wide(self.head[number](features)))
            used = used.index_add(0, rows, used.new_ones(len(rows)))
        return total / used[:, None], used

    def unrolled(self, images: Tensor) -> Tensor:
        """The logits [B, C] of `routed` from all experts, without a step that depends on the images."""
        features = self.backbone(images)
        means = running_means(self.head(features))
        enough = torch.stack([self.ask(i, features[:, i], means[:, i]) <= 0 for i in range(len(self.hidden))], 1)
        last = (enough.long().cumsum(1) == 0).sum(1)
        return means.gather(1, last[:, None, None].expand(-1, 1, means.shape[2]))[:, 0]

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B,C] by head."""
        # ONNX knows no batches whose size is found on the way
        return {"main": self.unrolled(images) if torch.compiler.is_exporting() else self.routed(images)[0]}


def running_means(logits: Tensor) -> Tensor:
    """The means of the first, the first two, ... of the logits [B, E, C]; the same shape, in float32 or wider."""
    wide = _wide(logits)
    return wide.cumsum(1) / torch.arange(1, wide.shape[1] + 1, device=wide.device)[:, None]


def helped(means: Tensor, target: Tensor) -> Tensor:
    """Which images are wrong after so many experts and right after some later one: bool [B, E - 1].

    means: `running_means` [B, E, C]; target: [B].
    """
    right = means.argmax(2) == target[:, None]
    later = right.flip(1).cumsum(1).flip(1)[:, 1:] > 0
    return ~right[:, :-1] & later


def misjudged(asked: Tensor, wanted: Tensor, positive: float) -> Tensor:
    """Binary cross-entropies, averaged over the routers [B]; asked: logits, wanted: bool, both [B, E - 1].

    positive: the weight of what is wanted.
    """
    z = _wide(asked)
    weight = z.new_tensor(positive)
    return F.binary_cross_entropy_with_logits(z, wanted.to(z), pos_weight=weight, reduction="none").mean(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
