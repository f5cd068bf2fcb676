"""Supervised and parametric contrastive learning: SupCon and a classifier after it, PaCo and GPaCo."""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn

GREY = (128, 128, 128)
"""What AutoAugment leaves empty on CIFAR, in the public programs."""
EPOCHS = 400
COMMON = {"lr": 0.05, "flip": 0.5}
SUPCON = {"family": "supcon", "lr": 0.4, "flip": 0.5, "temperature": 0.1, "q": 0.0, "classifier_lr": 0.1}
PACO = {**COMMON, "family": "paco", "temperature": 0.05, "alpha": 0.01, "momentum": 0.999}
GPACO = {**COMMON, "family": "gpaco", "temperature": 0.05, "alpha": 0.05, "smoothing": 0.0}


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
        optimiser=fn("sgd", lr=trial.suggest_float("lr", 0.01, 0.4, log=True), momentum=0.9, weight_decay=5e-4),
        schedule=stepped(EPOCHS),
        batch=128,
    )


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
        optimiser=fn("sgd", lr=trial.suggest_float("lr", 0.01, 0.4, log=True), momentum=0.9, weight_decay=1e-4),
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
        temperature=trial.suggest_float("temperature", 0.03, 0.3, log=True),
        alpha=trial.suggest_float("alpha", 0.005, 0.1, log=True),
        momentum=trial.suggest_categorical("momentum", [0.99, 0.999]),
    )


def choose_gpaco(trial: Trial) -> Fn:
    return fn(
        "gpaco",
        temperature=trial.suggest_float("temperature", 0.03, 0.3, log=True),
        alpha=trial.suggest_float("alpha", 0.005, 0.1, log=True),
        smoothing=trial.suggest_categorical("smoothing", [0.0, 0.1]),
    )


def large(name: str, model: str, lr: float, temperature: float, alpha: float = 0.05, n: int = 0) -> Stage:
    """A recipe for photographs of 400 epochs; n: operations of RandAugment after the colours of view 1."""
    rand = fn("simaugment", n=n) if n else fn("simaugment", jitter=1.0, hue=0.0, grayscale=0.0, n=2)
    keywords = {"alpha": alpha, "temperature": temperature, "queue": 8192, "out": 128}
    return Stage(
        source=fn("folder", root="imagenet_lt"),
        epochs=400,
        views=(rand, fn("simaugment", scale=(0.2, 1.0), jitter=1.0, hue=0.0, blur=0.5)),
        backbone=fn("torchvision", model=model),
        method=fn(name, **keywords),
        optimiser=fn("sgd", lr=lr, momentum=0.9, weight_decay=5e-4),
        schedule=fn("cosine", warmup=10 / 400),
        batch=128,
    )


PAPER: dict[str, Any] = {
    "supcon": SUPCON,
    "paco": PACO,
    "gpaco": GPACO,
    "paco_imagenet_lt_resnet50": large("paco", "resnet50", 0.02, 0.2),
    "paco_imagenet_lt": large("paco", "resnext50_32x4d", 0.02, 0.07, n=2),
    "gpaco_imagenet_lt_resnet50": large("gpaco", "resnet50", 0.04, 0.2, n=2),
}
