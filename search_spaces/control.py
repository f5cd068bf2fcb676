"""The control arm: plain cross-entropy, tuned in the ordinary hyper-parameters and in nothing else.

A trick is worth its name when it beats this arm at the same number of epochs and trials of its own.
"""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn


def control(trial: Trial) -> Stage:
    """Plain cross-entropy with instance-balanced sampling; nominally 200 epochs."""
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=200,
        views=(choose_view(trial),),
        optimiser=choose_sgd(trial),
        schedule=choose_schedule(trial),
    )


def choose_sgd(trial: Trial) -> Fn:
    lr = trial.suggest_categorical("lr", [0.05, 0.1])
    return fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=2e-4)


def choose_sam(trial: Trial, **keywords: Any) -> Fn:
    """SGD with these keywords, or sharpness-aware minimisation around it, whose radius is larger where it adapts."""
    name = trial.suggest_categorical("optimiser", ["sgd", "sam", "adaptive_sam"])
    if name == "sgd":
        return fn("sgd", **keywords)
    if name == "sam":
        return fn("sam", rho=trial.suggest_categorical("rho", [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]), **keywords)
    rho = trial.suggest_categorical("adaptive_rho", [0.2, 0.5, 1.0, 2.0, 4.0])
    return fn("sam", rho=rho, adaptive=True, **keywords)


def choose_view(trial: Trial) -> Fn:
    """Random crops, with mirror images or without: a digit or a sign is not its mirror image."""
    return fn("flip_crop", flip=trial.suggest_categorical("flip", [0.5, 0.0]))


def choose_schedule(trial: Trial, epochs: int = 200) -> Fn:
    """Steps or a half cosine, with a warm-up of 5 of nominally `epochs` epochs."""
    if trial.suggest_categorical("schedule", ["multistep", "cosine"]) == "cosine":
        return fn("cosine", warmup=5 / epochs)
    return multistep(epochs)


def multistep(epochs: int, steps: tuple[float, ...] = (0.8, 0.9)) -> Fn:
    """The published schedule: a warm-up of 5 epochs, steps after these shares of nominally `epochs` epochs."""
    # the published scheduler is stepped before each epoch, hence one epoch earlier
    milestones = tuple((round(share * epochs) - 1) / epochs for share in steps)
    return fn("multistep", warmup=5 / epochs, warmup_from=1 / 3, milestones=milestones, gamma=0.01)
