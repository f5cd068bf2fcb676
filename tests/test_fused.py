"""Predictions with BatchNorm inside the convolutions: the same numbers, from fewer modules, and nothing stays."""

import pytest
import torch
from torch import nn

from rayltr import catalogue
from rayltr.backbones import BACKBONES
from rayltr.fused import fused
from tests.conftest import tiny
from tests.methods.test_methods import CASES, batch_of, built


def settled(module):
    """A module in float64 and eval mode, whose BatchNorms have statistics, weights and biases of their own."""
    g = torch.Generator().manual_seed(0)
    for part in module.requires_grad_(False).modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for value in (part.running_mean, part.running_var, part.weight, part.bias):
                if value is not None:
                    value.uniform_(0.5, 1.5, generator=g)
    return module.double().eval()


def norms(module):
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


class Unsteady(nn.Module):
    """Looks at its images, which no tracer can follow."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.twice, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.other = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, images):
        found = self.first(images)
        found = self.norm(self.twice(self.twice(found)))
        return self.other(found if found.sum() > 0 else -found)


class Branching(nn.Module):
    """A convolution that is seen by two, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.seen, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.again, self.one, self.two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last, self.end = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images):
        seen = self.seen(images)
        found = seen + self.norm(seen)
        return self.end(self.last(self.two(self.again(self.one(self.again(found))))))


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (BACKBONES["resnet20"], 0),
        (lambda: BACKBONES["torchvision"](model="resnet18"), 0),
        (lambda: BACKBONES["timm"](model="resnet18"), 0),
        (lambda: BACKBONES["timm"](model="efficientnet_b0"), 49),
        (Unsteady, 2),
        (Branching, 3),
    ],
    ids=["resnet20", "torchvision", "timm", "norms with activations", "not traced", "other uses"],
)
def test_a_network_gives_the_same_with_fewer_norms(make, left):
    network = settled(make())
    images = torch.rand(2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, parts = network(images), [*network.modules()]
    with torch.inference_mode(), fused(network):
        assert norms(network) == left
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)
    assert all(one is other for one, other in zip(network.modules(), parts, strict=True))
    assert torch.equal(network(images), expected)


@pytest.mark.parametrize("case", CASES)
def test_every_method_predicts_the_same(case):
    stage = catalogue.complete(tiny(**CASES[case]))
    module, images = settled(built(stage)), batch_of(stage).views[0]
    with torch.inference_mode():
        expected = module.predict(images)
        with fused(module):
            found = module.predict(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
