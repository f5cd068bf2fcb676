"""Bag of Tricks for Long-Tailed Visual Recognition (AAAI 2021): which combination of tricks suits these data?

One trial is one chain: a recipe from start to end, or a plain first stage and what is done late in it or after it
(other losses and weights, other samplers, a new classifier, a student).  First stages come from a short list, so that
each is trained once for many trials; what follows is tuned finely.  Lengths are nominal epochs, 200 and with mixing
400.  Over- and under-sampling are not proposed: class-balanced sampling in longer or shorter epochs cannot be fair.
"""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn
from search_spaces.control import choose_schedule, choose_sgd, choose_view, multistep
from search_spaces.control import control as control

SGD = {"lr": 0.1, "flip": 0.5, "schedule": "multistep"}
WHOLE = {**SGD, "when": "whole", "mixing": "none", "loss": "cross_entropy", "reweight": False, "resample": False}
PLAIN = {name: WHOLE[name] for name in ("when", "mixing", "loss", "reweight", "resample")} | {"first": "plain"}
WEIGHTED, RESAMPLED = {**WHOLE, "reweight": True}, {**WHOLE, "resample": True}
FIRST = {"flip": 0.5, "lr": 0.1, "first": "plain"}
DRW = {**FIRST, "when": "reweighted", "loss": "cross_entropy"}
DRS = {**FIRST, "when": "resampled", "ramp": False, "q": 0.0}
CLASSIFIER = {**FIRST, "when": "finished", "classifier_lr": 0.1}
CSCE, CB = {"weight": "inverse_frequency", "gamma": 1.0}, {"weight": "effective_number", "one_minus_beta": 0.1}
FOCAL = {"loss": "focal", "focal_gamma": 2.0}
CB_FOCAL = {**CB, "loss": "focal", "focal_gamma": 1.0}
CELS = {"loss": "label_smoothing", "epsilon": 0.1, "reweight": None}
CELAS = {"loss": "label_aware_smoothing", "smooth_head": 0.4, "smooth_tail": 0.1, "smooth_shape": "concave",
         "reweight": None}  # fmt: skip
LDAM, BSCE = {"loss": "ldam", "max_margin": 0.5}, {"loss": "balanced_softmax", "reweight": None}
SEQL = {"loss": "seql", "seql_gamma": 0.9, "seql_threshold": 0.005, "reweight": None}
CDT = {"loss": "cdt", "cdt_gamma": 0.2, "reweight": None}
IB = {"loss": "influence_balanced", "ib_alpha": 1000.0, "reweight": None}
BALANCED, SQUARE = {"sampler": "power", "q": 0.0}, {"sampler": "power", "q": 0.5}
PROGRESSIVE, REVERSE = {"sampler": "progressive"}, {"sampler": "reverse"}
CAM, RAMP = {"when": "mapped", "cam": "code"}, {"ramp": True, "ramp_from": 0.0, "q": None}
MIXED, MIXUP = {"first": "mixup", "finetune": False}, {"mixing": "mixup", "alpha": 1.0, "finetune": False}
MANIFOLD = {"mixing": "manifold", "finetune": False}
REMIX = {"mixing": "remix", "remix_share": "batch", "finetune": False}

_POINTS: dict[str, dict] = {
    "ce": WHOLE,
    "csce": {**WEIGHTED, **CSCE},
    "csce_sqrt": {**WEIGHTED, **CSCE, "gamma": 0.5},
    "focal": {**WHOLE, **FOCAL},
    "cb_focal": {**WEIGHTED, **CB_FOCAL},
    "cb_ce": {**WEIGHTED, **CB},
    "cels": {**WHOLE, **CELS},
    "celas": {**WHOLE, **CELAS},
    "ldam": {**WHOLE, **LDAM},
    "seql": {**WHOLE, **SEQL},
    "cdt": {**WHOLE, **CDT},
    "bsce": {**WHOLE, **BSCE},
    "class_balanced": {**RESAMPLED, **BALANCED},
    "square_root": {**RESAMPLED, **SQUARE},
    "progressive": {**RESAMPLED, **PROGRESSIVE},
    "bbn": {**RESAMPLED, **REVERSE, "companion": "beside"},
    "input_mixup": {**WHOLE, **MIXUP},
    "manifold_mixup": {**WHOLE, **MANIFOLD},
    "remix": {**WHOLE, **REMIX},
    "drw_csce": {**DRW, **CSCE},
    "drw_focal": {**DRW, **FOCAL, **CSCE},
    "drw_cb_focal": {**DRW, **CB_FOCAL},
    "drw_cb_ce": {**DRW, **CB},
    "drw_cels": {**WHOLE, **CELS},
    "drw_celas": {**WHOLE, **CELAS},
    "ldam_drw": {**DRW, **LDAM, **CB, "one_minus_beta": 1e-4},
    "drw_cdt": {**DRW, **CDT},
    "drw_bsce": {**DRW, **BSCE},
    "drw_ib": {**DRW, **IB, "switch": 0.5},
    "drs_square": {**DRS, "q": 0.5},
    "drs_progressive": {**DRS, **RAMP},
    "drs_balance": DRS,
    "cam_square": {**DRS, **CAM, "q": 0.5},
    "cam_progressive": {**DRS, **RAMP, **CAM, "ramp_from": 0.8},
    "cam_balance": {**DRS, **CAM},
    "tau_norm": {**CLASSIFIER, "then": "tau", "classifier_lr": None, "tau": 1.0},
    "crt": {**CLASSIFIER, "then": "crt"},
    "lws": {**CLASSIFIER, "then": "lws"},
    "dive": {"flip": 0.5, "lr": 0.1, "when": "finished", "then": "dive", "kd_temperature": 2.0, "kd_alpha": 0.5,
             "kd_power": 0.5},
    "input_mixup_csce": {**WEIGHTED, **MIXUP, **CSCE},
    "input_mixup_bsce": {**WHOLE, **MIXUP, **BSCE},
    "input_mixup_balanced": {**RESAMPLED, **MIXUP, **BALANCED},
    "input_mixup_progressive": {**RESAMPLED, **MIXUP, **PROGRESSIVE},
    "input_mixup_bbn": {**RESAMPLED, **REVERSE, "companion": "mixed"},
    "manifold_csce": {**WEIGHTED, **MANIFOLD, **CSCE},
    "manifold_bsce": {**WHOLE, **MANIFOLD, **BSCE},
    "manifold_balanced": {**RESAMPLED, **MANIFOLD, **BALANCED},
    "manifold_progressive": {**RESAMPLED, **MANIFOLD, **PROGRESSIVE},
    "remix_csce": {**WEIGHTED, **REMIX, **CSCE},
    "remix_bsce": {**WHOLE, **REMIX, **BSCE},
    "remix_balanced": {**RESAMPLED, **REMIX, **BALANCED},
    "remix_progressive": {**RESAMPLED, **REMIX, **PROGRESSIVE},
    "input_mixup_cam": {**DRS, **MIXED, **CAM},
    "bag_of_tricks": {**DRS, **MIXED, **CAM, "finetune": True},
    "input_mixup_drw_bsce": {**DRW, **MIXED, **BSCE},
}  # fmt: skip

_CB10, _SEQL10 = {"one_minus_beta": 1e-4}, {"seql_threshold": 0.05}
_FOCAL10 = {"cifar10_100": _CB10, "cifar10_50": {**_CB10, "focal_gamma": 2.0}, "cifar100_50": {"one_minus_beta": 1e-2}}
_ADJUSTED = {
    **dict.fromkeys(("cb_ce", "drw_cb_ce"), {"cifar10_100": _CB10, "cifar10_50": _CB10}),
    **dict.fromkeys(("cb_focal", "drw_cb_focal"), _FOCAL10),
    "seql": {"cifar10_100": _SEQL10, "cifar10_50": _SEQL10, "cifar100_50": {"seql_threshold": 0.006}},
}
"""What the authors chose otherwise on other data than CIFAR-100-LT of ratio 100."""

TRY = ("bag_of_tricks", "input_mixup_drw_bsce", "cam_balance", "crt", "input_mixup_bsce", "dive", "drw_csce")
"""What a search tries first: the best published recipes of different families."""

PAPER = {name: {k: v for k, v in _POINTS[name].items() if v is not None} for name in dict.fromkeys((*TRY, *_POINTS))}
PAPER |= {
    f"{name}_{data}": {**PAPER[name], **change} for name, sets in _ADJUSTED.items() for data, change in sets.items()
}


def space(trial: Trial) -> Stage:
    """A chain of one to three stages."""
    when = trial.suggest_categorical("when", ["whole", "reweighted", "resampled", "mapped", "finished"])
    if when == "whole":
        return whole(trial)
    if when == "finished":
        return finished(trial)
    plain = first_stage(trial, FIRSTS[trial.suggest_categorical("first", [*FIRSTS])])
    last = reweighted(trial, plain) if when == "reweighted" else resampled(trial, plain, maps=when == "mapped")
    return finetuned(trial, last) if plain.mixing else last


def first_stage(trial: Trial, mixing: Fn | None) -> Stage:
    """Plain cross-entropy as published, with or without mixing; there are few, so that each is shared."""
    epochs = 400 if mixing else 200
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=epochs,
        views=(choose_view(trial),),
        mixing=mixing,
        optimiser=choose_sgd(trial),
        schedule=multistep(epochs),
    )


def whole(trial: Trial) -> Stage:
    """One recipe from start to end, tuned in the ordinary hyper-parameters too; after mixing, perhaps fine-tuned."""
    plain = first_stage(trial, choose_mixing(trial))
    plain = plain.but(schedule=choose_schedule(trial, plain.epochs))
    loss = choose_loss(trial)
    weighted = loss["loss"].name in WEIGHABLE and trial.suggest_categorical("reweight", [False, True])
    last = plain.but(**loss, weight=choose_weight(trial) if weighted else None)
    if trial.suggest_categorical("resample", [False, True]):
        last = last.but(sampler=choose_sampler(trial))
    if plain.mixing:
        return finetuned(trial, last)
    if last.sampler.name != "reverse" or trial.suggest_categorical("companion", ["beside", "mixed"]) == "beside":
        return last  # pairs of an ordinary and a reversed draw stand beside each other, or are mixed
    return last.but(mixing=fn("bbn_mix"), batch=2 * last.batch, epochs=400, schedule=choose_schedule(trial, 400))


SWITCH = 0.8  # of a schedule; its learning rate falls there, too
FIRSTS = {"plain": None, "mixup": fn("mixup", alpha=1.0)}
"""The mixings of first stages on which others build."""

WEIGHABLE = ("cross_entropy", "focal", "ldam")
"""The losses that take class weights; deferred, they act from the start and only their weights come late."""

CAMS = {
    "code": fn("cam"),
    "paper": fn("cam", threshold=1.0, transforms=("flip", "translate", "rotate", "scale"), originals="none"),
}
"""Class activation maps as the authors' code uses them, and as their paper describes it."""


def choose_mixing(trial: Trial) -> Fn | None:
    name = trial.suggest_categorical("mixing", ["none", "mixup", "manifold", "cutmix", "remix"])
    if name == "none":
        return None
    if name == "remix":
        return fn(name, reduce=trial.suggest_categorical("remix_share", ["sample", "batch"]))
    return fn(name, alpha=trial.suggest_float("alpha", 0.1, 1.0) if name in ("mixup", "cutmix") else 1.0)


def choose_loss(trial: Trial) -> dict[str, Fn]:
    """The loss with the head and the reduction that belong to it."""
    names = ["cross_entropy", "balanced_softmax", "logit_adjusted", "focal", "ldam", "cdt", "seql",
             "label_smoothing", "label_aware_smoothing", "influence_balanced"]  # fmt: skip
    name = trial.suggest_categorical("loss", names)
    head = fn("cosine" if name == "ldam" else "linear")
    method = fn("supervised", reduction="mean" if name in ("focal", "influence_balanced") else None)
    return {"loss": fn(name, **loss_keywords(trial, name)), "head": head, "method": method}


def loss_keywords(trial: Trial, loss: str) -> dict[str, float | str]:
    if loss == "logit_adjusted":
        return {"tau": trial.suggest_float("tau_train", 0.5, 2.0)}
    if loss == "focal":  # it acts from the start, even where its weights are deferred
        return {"gamma": trial.suggest_categorical("focal_gamma", [1.0, 2.0])}
    if loss == "ldam":
        return {"max_margin": trial.suggest_categorical("max_margin", [0.3, 0.5])}
    if loss == "cdt":
        return {"gamma": trial.suggest_float("cdt_gamma", 0.05, 0.5)}
    if loss == "seql":
        gamma = trial.suggest_float("seql_gamma", 0.5, 0.99)
        return {"gamma": gamma, "threshold": trial.suggest_float("seql_threshold", 1e-3, 0.1, log=True)}
    if loss == "label_smoothing":
        return {"epsilon": trial.suggest_float("epsilon", 0.02, 0.3)}
    if loss == "label_aware_smoothing":
        head, tail = trial.suggest_float("smooth_head", 0.2, 0.5), trial.suggest_float("smooth_tail", 0, 0.2)
        shape = trial.suggest_categorical("smooth_shape", ["concave", "linear", "convex"])
        return {"head": head, "tail": tail, "shape": shape}
    if loss == "influence_balanced":
        return {"alpha": trial.suggest_float("ib_alpha", 100, 10000, log=True)}
    return {}


def choose_weight(trial: Trial) -> Fn:
    name = trial.suggest_categorical("weight", ["inverse_frequency", "effective_number"])
    if name == "inverse_frequency":
        return fn(name, gamma=trial.suggest_float("gamma", 0.2, 1.0))
    return fn(name, beta=1 - trial.suggest_float("one_minus_beta", 1e-4, 1e-1, log=True))


def choose_sampler(trial: Trial) -> Fn:
    name = trial.suggest_categorical("sampler", ["power", "progressive", "reverse"])
    return fn(name, q=trial.suggest_float("q", 0.0, 1.0) if name == "power" else None)


def late(plain: Stage, switch: float, **change: Any) -> Stage:
    """A stage that goes on with another one after a share of its schedule, with something changed."""
    begun = plain.but(epochs=round(plain.epochs * switch), horizon=plain.epochs)
    return begun.but(epochs=plain.epochs - begun.epochs, resume=begun, **change)


def reweighted(trial: Trial, plain: Stage) -> Stage:
    """Another loss, or class weights, late in the training."""
    loss = choose_loss(trial)
    if loss["loss"].name == "influence_balanced":  # published with a step of the schedule at the switch
        switch = trial.suggest_categorical("switch", [0.5, SWITCH])
        return late(plain.but(schedule=multistep(plain.epochs, tuple(sorted({switch, SWITCH, 0.9})))), switch, **loss)
    if loss["loss"].name in WEIGHABLE:
        return late(plain.but(**loss), SWITCH, weight=choose_weight(trial))
    return late(plain, SWITCH, **loss)


def resampled(trial: Trial, plain: Stage, *, maps: bool) -> Stage:
    """Another sampler late in the training, of images as they are or transformed by their class activation maps."""
    if trial.suggest_categorical("ramp", [False, True]):
        sampler = fn("progressive", start=trial.suggest_float("ramp_from", 0.0, SWITCH))
    else:
        sampler = fn("power", q=trial.suggest_float("q", 0.0, 1.0))
    last = late(plain, SWITCH, sampler=sampler)
    return last.but(teacher=last.resume, method=CAMS[trial.suggest_categorical("cam", [*CAMS])]) if maps else last


def finetuned(trial: Trial, last: Stage) -> Stage:
    """A few epochs without mixing, balanced and with a small learning rate; the loss stays only under a cosine head."""
    if not trial.suggest_categorical("finetune", [False, True]):
        return last
    return last.but(
        **dict.fromkeys(("horizon", "resume", "teacher", "mixing", "weight")),
        epochs=20,
        init=last,
        method=fn("supervised"),
        loss=last.loss if last.head == fn("cosine") else fn("cross_entropy"),
        sampler=fn("power", q=0.0),
        optimiser=last.optimiser.but(lr=0.01 * last.optimiser.get("lr")),
        schedule=fn("multistep", milestones=(7 / 20, 15 / 20), gamma=0.1),
    )


def finished(trial: Trial) -> Stage:
    """What is done with a network that is trained to the end: a new classifier, or a student."""
    then = trial.suggest_categorical("then", ["crt", "lws", "tau", "dive"])
    if then == "dive":
        return distilled(trial, first_stage(trial, None))
    return classifier(trial, first_stage(trial, FIRSTS[trial.suggest_categorical("first", [*FIRSTS])]), then)


def distilled(trial: Trial, plain: Stage) -> Stage:
    """DiVE: a student beside a teacher that was trained with the balanced softmax; both have earlier steps."""
    teacher = plain.but(loss=fn("balanced_softmax"), schedule=multistep(plain.epochs, (0.6, 0.8)))
    temperature, alpha = trial.suggest_float("kd_temperature", 1.0, 5.0), trial.suggest_float("kd_alpha", 0.2, 0.9)
    power = trial.suggest_float("kd_power", 0.3, 1.0)
    return teacher.but(method=fn("dive", temperature=temperature, alpha=alpha, power=power), teacher=teacher)


def classifier(trial: Trial, plain: Stage, name: str) -> Stage:
    """The classifier anew on frozen features: cRT and LWS for 30 epochs of balanced sampling, or tau-normalisation."""
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
