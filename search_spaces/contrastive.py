"""Supervised and parametric contrastive learning: SupCon and a classifier after it, PaCo and GPaCo."""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn
from search_spaces.control import choose_sam

GREY = (128, 128, 128)
"""What AutoAugment leaves empty on CIFAR, in the public programs."""
EPOCHS = 400
COMMON = {"optimiser": "sgd", "flip": 0.5}
SUPCON = {**COMMON, "family": "supcon", "lr": 0.4, "weight_decay": 1e-4, "temperature": 0.1, "q": 0.0,
          "classifier_lr": 0.1}  # fmt: skip
CENTRES = {**COMMON, "lr": 0.05, "weight_decay": 5e-4, "centre_temperature": 0.05}
PACO = {**CENTRES, "family": "paco", "alpha": 0.01, "momentum": 0.999}
GPACO = {**CENTRES, "family": "gpaco", "alpha": 0.05, "smoothing": 0.0}

PLAIN = {"smoothing": 0.0, "optimiser": "sgd"}
"""What each trick is where it is left out."""


def space(trial: Trial) -> Stage:
    """One of the three families; SupCon's classifier is a stage of its own on frozen features."""
    family = trial.suggest_categorical("family", ["supcon", "paco", "gpaco"])
    flip = trial.suggest_categorical("flip", [0.5, 0.0])
    if family == "supcon":
        return classified(trial, features(trial, flip))
    method = choose_paco(trial) if family == "paco" else choose_gpaco(trial)
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=EPOCHS,
        views=(fn("autoaugment", policy="cifar10", crop="padded", flip=flip, cutout=0.5, fill=GREY), simple(flip)),
        method=method,
        optimiser=choose_optimiser(trial),
        schedule=stepped(EPOCHS),
        batch=128,
    )


def choose_optimiser(trial: Trial) -> Fn:
    lr = trial.suggest_float("lr", 0.01, 0.4, log=True)
    decay = trial.suggest_float("weight_decay", 1e-4, 1e-3, log=True)
    return choose_sam(trial, lr=lr, momentum=0.9, weight_decay=decay)


def simple(flip: float) -> Fn:
    """The view of SimCLR: a crop of a fifth of the image at least, colours, blur."""
    return fn("simaugment", scale=(0.2, 1.0), flip=flip, blur=0.5)


def stepped(epochs: int) -> Fn:
    """Ten epochs of warm-up, steps 80 and 40 epochs before the end of 400."""
    return fn("multistep", warmup=10 / epochs, milestones=(1 - 80 / epochs, 1 - 40 / epochs), gamma=0.1)


def features(trial: Trial, flip: float) -> Stage:
    """SupCon: nothing but features, most of the epochs."""
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=EPOCHS - EPOCHS // 10,
        views=(simple(flip), simple(flip)),
        method=fn("supcon", temperature=trial.suggest_float("temperature", 0.03, 0.3, log=True)),
        optimiser=choose_optimiser(trial),
        schedule=fn("cosine", warmup=10 / EPOCHS),
        batch=256,
    )


def classified(trial: Trial, before: Stage) -> Stage:
    """A new classifier on frozen features, with more or less balanced classes."""
    return before.but(
        epochs=EPOCHS // 10,
        init=before,
        views=(fn("flip_crop", flip=before.views[0].get("flip")),),
        method=fn("supervised", frozen=True, fresh_head=True),
        sampler=fn("power", q=trial.suggest_float("q", 0.0, 1.0)),
        optimiser=fn("sgd", lr=trial.suggest_float("classifier_lr", 0.01, 1.0, log=True), weight_decay=0.0),
        schedule=fn("cosine"),
    )


def choose_paco(trial: Trial) -> Fn:
    return fn(
        "paco",
        temperature=trial.suggest_float("centre_temperature", 0.05, 0.3, log=True),
        alpha=trial.suggest_float("alpha", 0.005, 0.1, log=True),
        momentum=trial.suggest_categorical("momentum", [0.99, 0.999]),
    )


def choose_gpaco(trial: Trial) -> Fn:
    return fn(
        "gpaco",
        temperature=trial.suggest_float("centre_temperature", 0.05, 0.3, log=True),
        alpha=trial.suggest_float("alpha", 0.005, 0.1, log=True),
        smoothing=trial.suggest_categorical("smoothing", [0.0, 0.1]),
    )


def large(name: str, model: str, lr: float, temperature: float, n: int = 0, root: str = "imagenet_lt",
          decay: float = 5e-4, library: str = "torchvision") -> Stage:  # fmt: skip
    """A recipe for photographs of 400 epochs; n: operations of RandAugment after the colours of view 1."""
    rand = fn("simaugment", n=n) if n else fn("simaugment", jitter=1.0, hue=0.0, grayscale=0.0, n=2)
    keywords = {"alpha": 0.05, "temperature": temperature, "queue": 8192, "out": 128}
    return Stage(
        source=fn("folder", root=root),
        epochs=400,
        views=(rand, fn("simaugment", scale=(0.2, 1.0), jitter=1.0, hue=0.0, blur=0.5)),
        backbone=fn(library, model=model),
        method=fn(name, **keywords),
        optimiser=fn("sgd", lr=lr, momentum=0.9, weight_decay=decay),
        schedule=fn("cosine", warmup=10 / 400),
        batch=128,
    )


X50, X101 = "resnext50_32x4d", "resnext101_32x4d"
INAT: dict[str, Any] = {"root": "inaturalist", "decay": 1e-4}

PAPER: dict[str, Any] = {
    "supcon": SUPCON,
    "paco": PACO,
    "gpaco": GPACO,
    "paco_imagenet_lt_resnet50": large("paco", "resnet50", 0.02, 0.2),
    "paco_imagenet_lt": large("paco", X50, 0.02, 0.07, n=2),
    "paco_imagenet_lt_resnext101": large("paco", X101, 0.03, 0.2, n=3, library="timm"),
    "paco_inaturalist": large("paco", "resnet50", 0.02, 0.2, **INAT),
    "gpaco_imagenet_lt_resnet50": large("gpaco", "resnet50", 0.04, 0.2, n=2),
    "gpaco_imagenet_lt": large("gpaco", X50, 0.04, 0.2, n=2),
    "gpaco_imagenet_lt_resnext101": large("gpaco", X101, 0.04, 0.2, n=3, library="timm"),
    "gpaco_inaturalist": large("gpaco", "resnet50", 0.04, 0.2, n=2, **INAT),
}
