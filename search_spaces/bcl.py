"""Balanced contrastive learning (CVPR 2022), beside the logit compensation that it builds on.

One stage; with the contrastive branch, two more views of every image are compared.  What cannot be reproduced from
the paper alone is searched: learning rate, weight decay, classifier and views, in which the authors' recipe and the
two public ports of it differ.
"""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn
from search_spaces.control import choose_sam

GREY = (128, 128, 128)
"""What AutoAugment leaves empty on CIFAR, in the public programs."""
EPOCHS = 200
RECIPE = {"optimiser": "sgd", "lr": 0.15, "weight_decay": 5e-4, "schedule": "multistep", "classifier": "linear",
          "tau": 1.0, "flip": 0.5, "view": "autoaugment"}  # fmt: skip
BRANCH = {"contrastive": True, "ce": 2.0, "mu": 0.6, "temperature": 0.1, "variant": "L1", "complement": True,
          "blur": 0.0, "smallest": 0.08}  # fmt: skip

PLAIN = {"contrastive": False, "view": "crop", "classifier": "linear", "complement": False, "optimiser": "sgd"}
"""What each trick is where it is left out."""


def space(trial: Trial) -> Stage:
    """A classifier with compensated logits, and perhaps the contrastive branch."""
    view, flip = choose_view(trial)
    contrastive = trial.suggest_categorical("contrastive", [True, False])
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=EPOCHS,
        views=(view, *[choose_other_view(trial, flip)] * 2) if contrastive else (view,),
        method=choose_method(trial) if contrastive else fn("supervised"),
        loss=fn("logit_adjusted", tau=trial.suggest_float("tau", 0.5, 2.0)),
        head=choose_head(trial),
        optimiser=choose_optimiser(trial),
        schedule=choose_schedule(trial),
        batch=256,
    )


def choose_method(trial: Trial) -> Fn:
    variant = trial.suggest_categorical("variant", ["L1", "L2", "L3"])
    return fn(
        "bcl",
        ce=trial.suggest_float("ce", 0.5, 3.0),
        contrast=trial.suggest_float("mu", 0.1, 2.0),
        temperature=trial.suggest_float("temperature", 0.03, 0.3, log=True),
        variant=variant,
        complement=variant == "L3" or trial.suggest_categorical("complement", [True, False]),
    )


def choose_view(trial: Trial) -> tuple[Fn, float]:
    """The view of the classifier, and how often it is mirrored: a digit or a sign is not its mirror image."""
    flip = trial.suggest_categorical("flip", [0.5, 0.0])
    if trial.suggest_categorical("view", ["autoaugment", "crop"]) == "crop":
        return fn("flip_crop", flip=flip), flip
    return fn("autoaugment", policy="cifar10", crop="padded", flip=flip, cutout=0.5, fill=GREY), flip


def choose_other_view(trial: Trial, flip: float) -> Fn:
    """The view of the contrastive branch; the public ports disagree about blur and the smallest crop."""
    blur = trial.suggest_categorical("blur", [0.0, 0.5])
    return fn("simaugment", scale=(trial.suggest_categorical("smallest", [0.08, 0.2]), 1.0), flip=flip, blur=blur)


def choose_head(trial: Trial) -> Fn:
    name = trial.suggest_categorical("classifier", ["linear", "cosine"])
    return fn("cosine", scale=trial.suggest_float("scale", 10.0, 40.0)) if name == "cosine" else fn("linear")


def choose_optimiser(trial: Trial) -> Fn:
    lr = trial.suggest_float("lr", 0.05, 0.4, log=True)
    decay = trial.suggest_float("weight_decay", 1e-4, 1e-3, log=True)
    return choose_sam(trial, lr=lr, momentum=0.9, weight_decay=decay)


def choose_schedule(trial: Trial) -> Fn:
    if trial.suggest_categorical("schedule", ["multistep", "cosine"]) == "cosine":
        return fn("cosine", warmup=5 / EPOCHS)
    return multistep(EPOCHS)


def multistep(epochs: int, gamma: float = 0.1) -> Fn:
    """Warm-up for a fortieth of the epochs, steps 40 and 20 epochs before the end of 200 or 400."""
    return fn("multistep", warmup=1 / 40, milestones=(1 - 40 / epochs, 1 - 20 / epochs), gamma=gamma)


def small(epochs: int, lr: float, decay: float, batch: int = 256, gamma: float = 0.1, **other: Any) -> Stage:
    """A recipe for CIFAR that the space does not hold: another length, batch or step of the learning rate."""
    view = fn("autoaugment", policy="cifar10", crop="padded", cutout=0.5, fill=GREY)
    return Stage(
        source=fn("cifar100", ratio=100.0),
        epochs=epochs,
        views=(view, *[fn("simaugment", **other)] * 2),
        backbone=fn("resnet32"),
        method=fn("bcl"),
        loss=fn("logit_adjusted"),
        optimiser=fn("sgd", lr=lr, momentum=0.9, weight_decay=decay),
        schedule=multistep(epochs, gamma),
        batch=batch,
    )


SIM, RAND = fn("simaugment"), fn("simaugment", n=2)
"""The contrastive views for photographs: with RandAugment after the colours ("randclsstack") or without."""


def large(model: str, epochs: int, root: str = "imagenet_lt", lr: float = 0.1, decay: float = 5e-4,
          others: tuple[Fn, Fn] = (SIM, SIM)) -> Stage:  # fmt: skip
    """A recipe for photographs; the folder is where the images are expected unless --data names another."""
    return Stage(
        source=fn("folder", root=root),
        epochs=epochs,
        views=(fn("simaugment", jitter=1.0, hue=0.0, grayscale=0.0, n=2), *others),
        backbone=fn("torchvision", model=model),
        head=fn("cosine", scale=30.0),
        method=fn("bcl", ce=1.0, contrast=0.35, temperature=0.07, hidden=2048, out=1024),
        loss=fn("logit_adjusted"),
        optimiser=fn("sgd", lr=lr, momentum=0.9, weight_decay=decay),
        schedule=fn("cosine"),
        batch=256,
    )


PAPER: dict[str, Any] = {
    "paper": {**RECIPE, **BRANCH},
    "compensation": {**RECIPE, "contrastive": False},
    "port": {**RECIPE, **BRANCH, "lr": 0.3, "weight_decay": 2e-4},
    "cosine_classifier": {**RECIPE, **BRANCH, "classifier": "cosine", "scale": 30.0},
    "without_complement": {**RECIPE, **BRANCH, "complement": False},
    "paper_400": small(400, 0.15, 5e-4),
    "port_400": small(400, 0.3, 2e-4),
    "other_port": small(200, 0.1, 2e-4, batch=128, gamma=0.01, scale=(0.2, 1.0), blur=0.5),
    "imagenet_lt": large("resnext50_32x4d", 90),
    "imagenet_lt_sim_rand": large("resnext50_32x4d", 90, others=(RAND, SIM)),
    "imagenet_lt_rand_rand": large("resnext50_32x4d", 90, others=(RAND, RAND)),
    "imagenet_lt_180": large("resnext50_32x4d", 180),
    "imagenet_lt_resnet50": large("resnet50", 90),
    "inaturalist": large("resnet50", 100, "inaturalist", lr=0.2, decay=1e-4),
}
