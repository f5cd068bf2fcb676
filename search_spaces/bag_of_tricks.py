"""Bag of Tricks for Long-Tailed Visual Recognition (AAAI 2021): which combination of tricks suits these data?

One trial is one chain: a first stage that many trials share, and, for deferred tricks and classifier re-training, a
second one.  Hyper-parameters of the first stage are discrete so that it is trained once for all that build on it.
Lengths are nominal epochs; `--epochs` scales a whole chain.
"""

from rayltr.spec import Fn, Stage, Trial, fn
from search_spaces.control import choose_schedule, choose_view
from search_spaces.control import control as control

EPOCHS = 200

SGD = {"lr": 0.1, "weight_decay": 2e-4, "flip": 0.5, "schedule": "multistep"}
PLAIN = {"arm": "study", **SGD, "mixing": "none", "loss": "cross_entropy", "weight": "none", "sampler": "instance"}
PRIOR = {name: value for name, value in PLAIN.items() if name != "weight"}  # losses that correct the prior themselves
DEFERRED = {"when": "deferred", "switch": 0.8}

PAPER = {
    "ce": {**PLAIN, "when": "whole"},
    "csce": {**PLAIN, "when": "whole", "weight": "inverse_frequency", "gamma": 1.0},
    "csce_sqrt": {**PLAIN, "when": "whole", "weight": "inverse_frequency", "gamma": 0.5},
    "cb_ce": {**PLAIN, "when": "whole", "weight": "effective_number", "one_minus_beta": 0.1},
    "focal": {**PLAIN, "when": "whole", "loss": "focal", "focal_gamma": 2.0},
    "ldam": {**PLAIN, "when": "whole", "loss": "ldam", "max_margin": 0.5},
    "bsce": {**PRIOR, "when": "whole", "loss": "balanced_softmax"},
    "class_balanced": {**PLAIN, "when": "whole", "sampler": "power", "q": 0.0},
    "square_root": {**PLAIN, "when": "whole", "sampler": "power", "q": 0.5},
    "progressive": {**PLAIN, "when": "whole", "sampler": "progressive"},
    "input_mixup": {**PLAIN, "when": "whole", "mixing": "mixup", "alpha": 1.0},
    "remix": {**PLAIN, "when": "whole", "mixing": "remix", "alpha": 1.0},
    "input_mixup_bsce": {**PRIOR, "when": "whole", "mixing": "mixup", "alpha": 1.0, "loss": "balanced_softmax"},
    "remix_bsce": {**PRIOR, "when": "whole", "mixing": "remix", "alpha": 1.0, "loss": "balanced_softmax"},
    "drw_csce": {**PLAIN, **DEFERRED, "weight": "inverse_frequency", "gamma": 1.0},
    "drw_cb_ce": {**PLAIN, **DEFERRED, "weight": "effective_number", "one_minus_beta": 0.1},
    "drw_bsce": {**PRIOR, **DEFERRED, "loss": "balanced_softmax"},
    "ldam_drw": {**PLAIN, **DEFERRED, "loss": "ldam", "max_margin": 0.5, "weight": "effective_number",
                 "one_minus_beta": 1e-4},
    "drs_balance": {**PLAIN, **DEFERRED, "sampler": "power", "q": 0.0},
    "drs_square": {**PLAIN, **DEFERRED, "sampler": "power", "q": 0.5},
    "drs_progressive": {**PLAIN, **DEFERRED, "sampler": "progressive"},
    "crt": {**SGD, "arm": "study", "mixing": "none", "when": "classifier", "classifier": "crt", "classifier_lr": 0.1},
    "lws": {**SGD, "arm": "study", "mixing": "none", "when": "classifier", "classifier": "lws", "classifier_lr": 0.1},
    "tau_norm": {**SGD, "arm": "study", "mixing": "none", "when": "classifier", "classifier": "tau", "tau": 1.0},
}  # fmt: skip

_ERRORS = {
    "ce": 62.27, "csce": 67.73, "csce_sqrt": 61.64, "cb_ce": 61.03, "focal": 62.78, "ldam": 61.12, "bsce": 57.01,
    "class_balanced": 64.76, "square_root": 63.21, "progressive": 60.96, "input_mixup": 59.18, "remix": 58.61,
    "drw_csce": 58.38, "drw_cb_ce": 60.79, "drw_bsce": 58.18, "ldam_drw": 57.53, "drs_balance": 59.36,
    "drs_square": 59.64, "drs_progressive": 59.59, "crt": 59.74, "lws": 59.84, "tau_norm": 59.04,
}  # fmt: skip
_WHERE = "% error on CIFAR-100-LT, ratio 100 (selected on test)"
PUBLISHED = {name: f"{error:.2f} {_WHERE}" for name, error in _ERRORS.items()}
PUBLISHED |= {
    "input_mixup_bsce": "53.19 % error on CIFAR-100-LT, ratio 100, another draw of images (selected on test)",
    "remix_bsce": "51.97 % error on CIFAR-100-LT, ratio 100, another draw of images (selected on test)",
}


def space(trial: Trial) -> Stage:
    """A chain of one or two stages, nominally 200 epochs (mixup runs of the paper: 400; pass --epochs)."""
    when = trial.suggest_categorical("when", ["whole", "deferred", "classifier"])
    plain = first_stage(trial)
    if when == "classifier":
        return classifier(trial, plain)
    loss, head, method = choose_loss(trial)
    change = {"weight": choose_weight(trial, loss), "sampler": choose_sampler(trial), "method": method}
    nothing = loss.name in ("cross_entropy", "ldam") and change["weight"] is None and change["sampler"] == plain.sampler
    if when == "whole" or nothing:  # a deferred trial that changes nothing is the plain one
        return plain.but(loss=loss, head=head, **change)
    switch = trial.suggest_categorical("switch", [0.6, 0.7, 0.8])
    begun = plain.but(epochs=round(EPOCHS * switch), horizon=EPOCHS, head=head)
    if loss.name == "ldam":  # its margins act from the start; only its weights are deferred
        begun = begun.but(loss=loss)
    return begun.but(epochs=EPOCHS - begun.epochs, resume=begun, loss=loss, **change)


def first_stage(trial: Trial) -> Stage:
    """Plain cross-entropy, with or without mixing; its choices are discrete, so that it is shared."""
    lr = trial.suggest_categorical("lr", [0.05, 0.1, 0.2])
    decay = trial.suggest_categorical("weight_decay", [2e-4, 5e-4, 1e-3])
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=EPOCHS,
        views=(choose_view(trial),),
        mixing=choose_mixing(trial),
        optimiser=fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=decay),
        schedule=choose_schedule(trial),
    )


def choose_mixing(trial: Trial) -> Fn | None:
    name = trial.suggest_categorical("mixing", ["none", "mixup", "cutmix", "remix"])
    return None if name == "none" else fn(name, alpha=trial.suggest_categorical("alpha", [0.2, 1.0]))


def choose_loss(trial: Trial) -> tuple[Fn, Fn, Fn]:
    """The loss with the head and the reduction that belong to it."""
    name = trial.suggest_categorical(
        "loss", ["cross_entropy", "balanced_softmax", "logit_adjusted", "focal", "ldam"]
    )  # fmt: skip
    head, method = fn("linear"), fn("supervised")
    if name == "logit_adjusted":
        return fn(name, tau=trial.suggest_float("tau_train", 0.5, 2.0)), head, method
    if name == "focal":
        return fn(name, gamma=trial.suggest_float("focal_gamma", 0.5, 3.0)), head, method.but(reduction="mean")
    if name == "ldam":
        return fn(name, max_margin=trial.suggest_categorical("max_margin", [0.3, 0.5])), fn("cosine"), method
    return fn(name), head, method


def choose_weight(trial: Trial, loss: Fn) -> Fn | None:
    """Class weights; never on top of a loss that corrects the prior already."""
    if loss.name in ("balanced_softmax", "logit_adjusted"):
        return None
    name = trial.suggest_categorical("weight", ["none", "inverse_frequency", "effective_number"])
    if name == "inverse_frequency":
        return fn(name, gamma=trial.suggest_float("gamma", 0.2, 1.0))
    if name == "effective_number":
        return fn(name, beta=1 - trial.suggest_float("one_minus_beta", 1e-4, 1e-1, log=True))
    return None


def choose_sampler(trial: Trial) -> Fn:
    name = trial.suggest_categorical("sampler", ["instance", "power", "progressive"])
    if name == "power":
        return fn("power", q=trial.suggest_float("q", 0.0, 1.0))
    return fn("power") if name == "instance" else fn(name)


def classifier(trial: Trial, plain: Stage) -> Stage:
    """The classifier anew on frozen features: cRT and LWS for 30 epochs of balanced sampling, or tau-normalisation."""
    name = trial.suggest_categorical("classifier", ["crt", "lws", "tau"])
    if name == "tau":
        head = fn("tau_normalised", tau=trial.suggest_float("tau", 0.0, 2.0))
        return plain.but(epochs=0, head=head, init=plain)
    lr = trial.suggest_float("classifier_lr", 0.01, 0.5, log=True)
    return plain.but(
        epochs=30,
        init=plain,
        mixing=None,
        method=fn("supervised", frozen=True, drift=True, fresh_head=name == "crt"),
        head=fn("linear" if name == "crt" else "lws"),
        sampler=fn("power", q=0.0),
        optimiser=fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=fn("multistep", warmup=1 / 6, warmup_from=1 / 3, milestones=(9 / 30, 19 / 30), gamma=0.1),
    )
