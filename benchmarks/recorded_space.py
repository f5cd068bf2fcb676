"""A small discrete study of real long-tail recipes: every point of it can be trained, and its results kept as a table.

Nominally 54 epochs of a network that is small enough to train them all in minutes.  A recipe re-weights, re-samples or
changes its loss from the start or in the last third, or trains the classifier anew; each with or without mixup and
mirror images (which digits are not), and at one of two learning rates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from rayltr.backbones import Pooled
from rayltr.spec import Fn, Stage, Trial, fn

EPOCHS, SWITCH, CLASSIFIER = 54, 36, 11
FIRST = {"ldam": {"loss": fn("ldam"), "head": fn("cosine")}}
"""What acts from the start even where the sampler is deferred."""


def small(*, width: int = 16) -> nn.Module:
    """Three convolutions with `width`, 2 `width` and 4 `width` channels."""
    layers: list[nn.Module] = []
    for inside, out in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(inside, out, 3, 1 if inside == 3 else 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return Pooled(nn.Sequential(*layers), 4 * width)


def plain(trial: Trial) -> Stage:
    lr = trial.suggest_categorical("lr", [0.02, 0.16])
    return Stage(
        source=fn("digits", ratio=100.0),
        epochs=EPOCHS,
        views=(fn("flip_crop", flip=trial.suggest_categorical("flip", [0.5, 0.0])),),
        backbone=fn(small),
        optimiser=fn("sgd", lr=lr, weight_decay=5e-4, nesterov=True),
        schedule=fn("cosine", warmup=0.1),
        batch=16,
    )


def control(trial: Trial) -> Stage:
    """Plain cross-entropy, tuned in mirror images, the learning rate and its course."""
    course = trial.suggest_categorical("course", ["cosine", "multistep"])
    milestones = (0.7, 0.9) if course == "multistep" else None
    return plain(trial).but(schedule=fn(course, warmup=0.1, milestones=milestones))


def space(trial: Trial) -> Stage:
    mixing = trial.suggest_categorical("mixing", ["none", "mixup"])
    stage = plain(trial).but(mixing=None if mixing == "none" else fn("mixup", alpha=0.4))
    when = trial.suggest_categorical("when", ["whole", "deferred", "classifier"])
    if when == "classifier":
        return classifier(trial, stage)
    loss = trial.suggest_categorical("loss", ["cross_entropy", "balanced_softmax", "ldam"])
    weight = choose_weight(trial, loss)
    sampler = fn("power", q=trial.suggest_categorical("q", [1.0, 0.0]))
    stage, change = stage.but(**FIRST.get(loss, {})), {"loss": fn(loss), "weight": weight, "sampler": sampler}
    if when == "whole":
        return stage.but(**change)
    first = stage.but(epochs=SWITCH, horizon=EPOCHS)
    return first.but(**change, epochs=EPOCHS - SWITCH, resume=first)


def choose_weight(trial: Trial, loss: str) -> Fn | None:
    """Inverse class frequencies, for plain cross-entropy."""
    if loss != "cross_entropy":
        return None
    name = trial.suggest_categorical("weight", ["none", "inverse_frequency"])
    return None if name == "none" else fn(name)


def classifier(trial: Trial, stage: Stage) -> Stage:
    """cRT and LWS on frozen features with balanced sampling, and tau-normalisation without any training."""
    name = trial.suggest_categorical("classifier", ["crt", "lws", "tau_normalised"])
    if name == "tau_normalised":
        return stage.but(epochs=0, head=fn(name), init=stage)
    first = stage.but(epochs=EPOCHS - CLASSIFIER)
    return first.but(
        epochs=CLASSIFIER,
        init=first,
        mixing=None,
        method=fn("supervised", frozen=True, fresh_head=name == "crt"),
        head=fn("linear" if name == "crt" else name),
        sampler=fn("power", q=0.0),
    )


class Fork(Exception):
    """A space asks for a parameter that is not decided yet."""


class Walk:
    """A trial that knows some parameters and raises `Fork` for the others; for spaces of categories alone."""

    def __init__(self, params: Mapping[str, Any]):
        self.params = params

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name not in self.params:
            raise Fork(name, choices)
        return self.params[name]


def points(space: Callable[[Any], Stage], params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every point of a space of categories that has these parameters."""
    try:
        space(Walk(params))
    except Fork as fork:
        name, choices = fork.args
        return [point for value in choices for point in points(space, {**params, name: value})]
    return [dict(params)]
