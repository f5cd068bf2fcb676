"""Million-way instance classification (AAAI 2021): features without targets first, then what is made of them.

The first stage tells every training image from all others.  What follows is a probe of its frozen features (their
nearest neighbours, a new classifier, a balanced one), fine-tuning, or the rest of SSD, of which it is the first stage
then.  The first stage comes from short lists, so that it is trained once for all of them.
"""

from typing import Any

from rayltr.spec import FixedTrial, Fn, Stage, Trial, fn
from search_spaces.ssd import distilled, rebalanced

EPOCHS, LAST = 400, 40
"""Of the first stage, and of a classifier after it."""
START = {"lr": 0.12, "flip": 0.5, "prior": True, "rate": 16.0, "smoothing": 0.2, "hardest": 10, "temperature": 0.15}
FINE = {"fine_lr": 0.05, "fine_loss": "cross_entropy"}

PLAIN = {"prior": False, "smoothing": 0.0, "fine_loss": "cross_entropy"}
"""What each trick is where it is left out."""


def space(trial: Trial) -> Stage:
    """The features and one use of them."""
    first = features(trial)
    use = trial.suggest_categorical("use", ["linear", "balanced", "neighbours", "finetune", "ssd"])
    if use == "neighbours":
        return neighbours(first, trial.suggest_categorical("k", [10, 20, 50]))
    if use in ("linear", "balanced"):
        return probed(first, LAST, trial.suggest_float("probe_lr", 0.01, 30.0, log=True), balanced=use == "balanced")
    fine = finetuned(trial, first)
    return fine if use == "finetune" else followed(trial, fine)


def features(trial: Trial) -> Stage:
    """One class per image, by rows that are moved by the same optimiser as the network."""
    smoothing = trial.suggest_categorical("smoothing", [0.0, 0.2])
    method = fn(
        "million",
        prior=trial.suggest_categorical("prior", [True, False]),
        rate=trial.suggest_categorical("rate", [1.0, 4.0, 16.0]),
        temperature=trial.suggest_categorical("temperature", [0.1, 0.15, 0.2]),
        smoothing=smoothing,
        hardest=trial.suggest_categorical("hardest", [10, 100]) if smoothing else None,
    )
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=EPOCHS,
        views=(simple(trial.suggest_categorical("flip", [0.5, 0.0])),),
        method=method,
        optimiser=sgd(trial.suggest_categorical("lr", [0.03, 0.12, 0.48]), 1e-4),
        schedule=fn("cosine", warmup=10 / EPOCHS),
        batch=256,
    )


def simple(flip: float) -> Fn:
    """The view of SimCLR: a crop of a fifth of the image at least, colours, blur."""
    return fn("simaugment", scale=(0.2, 1.0), flip=flip, blur=0.5)


def sgd(lr: float, decay: float) -> Fn:
    return fn("sgd", lr=lr, momentum=0.9, weight_decay=decay)


def neighbours(first: Stage, k: int) -> Stage:
    """The nearest training images, which takes no training."""
    return first.but(epochs=0, init=first, method=fn("neighbours", k=k))


def probed(first: Stage, epochs: int, lr: float, *, balanced: bool = False) -> Stage:
    """A new classifier on frozen features, with the classes as they are or balanced."""
    return first.but(
        epochs=epochs,
        init=first,
        views=(fn("flip_crop", flip=first.views[0].get("flip")),),
        method=fn("supervised", frozen=True, fresh_head=True),
        sampler=fn("power", q=0.0 if balanced else 1.0),
        optimiser=sgd(lr, 0.0),
        schedule=fn("cosine"),
    )


def finetuned(trial: Trial, first: Stage) -> Stage:
    """The whole network, from these features on."""
    return first.but(
        epochs=EPOCHS // 4,
        init=first,
        views=(fn("flip_crop", flip=first.views[0].get("flip")),),
        method=fn("supervised", fresh_head=True),
        loss=fn(trial.suggest_categorical("fine_loss", ["cross_entropy", "balanced_softmax"])),
        optimiser=sgd(trial.suggest_categorical("fine_lr", [0.02, 0.05, 0.1]), 5e-4),
        schedule=fn("cosine", warmup=5 / (EPOCHS // 4)),
        batch=128,
    )


def scratch(fine: Stage) -> Stage:
    """What fine-tuning is compared with: the same from random weights, for the epochs of both stages."""
    assert fine.init is not None
    epochs = fine.init.epochs + fine.epochs
    schedule = fn("cosine", warmup=5 / epochs)
    return fine.but(epochs=epochs, init=None, method=fn("supervised"), schedule=schedule)


def followed(trial: Trial, first: Stage) -> Stage:
    """The second and third stage of SSD: a re-balanced teacher, and a student from random weights."""
    fine = first.but(loss=fn("cross_entropy"))  # the classes are balanced afterwards
    teacher = rebalanced(fine, "lws", 10, sgd(0.2, 5e-4), False).but(init=first)
    weight = trial.suggest_float("w_kd", 0.3, 3.0, log=True)
    return distilled(fine.but(init=None, method=fn("supervised")), teacher, fn("distil", distil=weight))


def photographs(root: str, epochs: int, rate: float) -> Stage:
    """The published recipe; the folder is where the images are expected unless --data names another."""
    return Stage(
        source=fn("folder", root=root),
        epochs=epochs,
        views=(fn("simaugment", brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5),),
        backbone=fn("torchvision", model="resnet50"),
        method=fn("million", rate=rate),
        optimiser=sgd(0.48, 1e-4),
        schedule=fn("cosine", warmup=10 / epochs),
        batch=4096,
    )


def photographs_probed(first: Stage, *, balanced: bool = False) -> Stage:
    """The linear classifier of MoCo on frozen features, with its crops."""
    return probed(first, 100, 30.0, balanced=balanced).but(
        views=(fn("resized_crop", flip=0.5),),
        schedule=fn("multistep", milestones=(0.6, 0.8), gamma=0.1),
        batch=256,
    )


SMALL = {**START, "use": "balanced", "probe_lr": 0.1}
LINEAR = {**SMALL, "use": "linear"}
BALANCED = {**START, **FINE, "fine_loss": "balanced_softmax", "use": "finetune"}

PAPER: dict[str, Any] = {
    "small": SMALL,
    "small_linear": LINEAR,
    "small_linear_random": {**LINEAR, "prior": False},
    "small_linear_hard": {name: value for name, value in LINEAR.items() if name != "hardest"} | {"smoothing": 0.0},
    "small_neighbours": {**START, "use": "neighbours", "k": 20},
    "small_finetune": {**START, **FINE, "use": "finetune"},
    "small_finetune_balanced": BALANCED,
    "small_scratch": scratch(space(FixedTrial(BALANCED))),
    "small_ssd": {**START, **FINE, "use": "ssd", "w_kd": 1.0},
    "paper": photographs_probed(photographs("imagenet", 1000, 1.0)),
    "imagenet_lt": photographs_probed(photographs("imagenet_lt", 1000, 1.0), balanced=True),
}
"""Published are the optimiser, its warm-up, the batch, the temperature, the smoothing and the network.  The number of
hardest classes, the projector, the learning rate of the rows and the length are not; 1000 epochs are the longest that
is told of."""
