"""Fixtures shared by all tests: a private cache, a quiet machine, small stages."""

import os
from pathlib import Path

import pytest

from rayltr.spec import Stage, fn

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"  # nothing is written to the home directory

CIFAR100 = Path(__file__).parents[2] / "shared/data/cifar100"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Decoded data of the tests are kept apart from the user's."""
    os.environ["RAYLTR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def tiny(**changes) -> Stage:
    """A stage that trains in well under a second: 4 classes of synthetic 8 x 8 images, a narrow ResNet-20."""
    stage = Stage(
        source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0),
        epochs=2,
        backbone=fn("resnet20", width=4),
        optimiser=fn("sgd", lr=0.05),
        batch=16,
    )
    return stage.but(**changes)
