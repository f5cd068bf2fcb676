"""The control arm: plain cross-entropy, tuned in the ordinary hyper-parameters and in nothing else.

A trick is worth its name when it beats this arm at the same number of epochs and trials of its own.
"""

from rayltr.spec import Stage, Trial, fn


def control(trial: Trial) -> Stage:
    """Plain cross-entropy with instance-balanced sampling; nominally 200 epochs."""
    lr = trial.suggest_categorical("lr", [0.05, 0.1, 0.2])
    decay = trial.suggest_categorical("weight_decay", [2e-4, 5e-4, 1e-3])
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=200,
        views=(fn("flip_crop"),),
        optimiser=fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=decay),
        schedule=fn(trial.suggest_categorical("schedule", ["multistep", "cosine"]), warmup=0.025),
    )
