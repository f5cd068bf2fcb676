"""Bag of Tricks for Long-Tailed Visual Recognition (AAAI 2021): which combination of tricks suits these data?

One trial is one chain: a first stage that many trials share; for deferred tricks, classifier re-training and
distillation a second one; and after mixing, if asked for, a short fine-tuning without it.  What shapes the first stage
is discrete, so that it is trained once for all that build on it.  Lengths are nominal epochs, 200 and with mixing 400;
`--epochs` scales a whole chain.  Over- and under-sampling are not proposed: they are class-balanced sampling in much
longer or shorter epochs, which no comparison at equal epochs can be fair to.
"""

from rayltr.spec import Fn, Stage, Trial, fn
from search_spaces.control import choose_schedule, choose_view
from search_spaces.control import control as control

SGD = {"lr": 0.1, "weight_decay": 2e-4, "flip": 0.5, "schedule": "multistep"}
FIRST = {**SGD, "mixing": "none"}
PLAIN = {**FIRST, "loss": "cross_entropy", "weight": "none", "sampler": "instance"}
WHOLE = {**PLAIN, "when": "whole"}
LATE = {**PLAIN, "when": "deferred", "switch": 0.8}
CSCE = {"weight": "inverse_frequency", "gamma": 1.0}
CB = {"weight": "effective_number", "one_minus_beta": 0.1}
FOCAL = {"loss": "focal", "focal_gamma": 2.0}
CB_FOCAL = {**CB, "loss": "focal", "focal_gamma": 1.0}
CELS = {"loss": "label_smoothing", "epsilon": 0.1, "weight": None}
CELAS = {"loss": "label_aware_smoothing", "smooth_head": 0.4, "smooth_tail": 0.1, "smooth_shape": "concave",
         "weight": None}  # fmt: skip
LDAM = {"loss": "ldam", "max_margin": 0.5}
BSCE = {"loss": "balanced_softmax", "weight": None}
SEQL = {"loss": "seql", "seql_gamma": 0.9, "seql_threshold": 0.005, "weight": None}
CDT = {"loss": "cdt", "cdt_gamma": 0.2, "weight": None}
IB = {"loss": "influence_balanced", "ib_alpha": 1000.0, "weight": None}
BALANCED = {"sampler": "power", "q": 0.0}
SQUARE = {"sampler": "power", "q": 0.5}
PROGRESSIVE = {"sampler": "progressive"}
CAM = {"cam": "code"}
MIXUP = {"mixing": "mixup", "alpha": 1.0, "finetune": False}
MANIFOLD = {"mixing": "manifold", "finetune": False}
REMIX = {"mixing": "remix", "remix_share": "batch", "finetune": False}
CLASSIFIER = {**FIRST, "when": "classifier", "classifier_lr": 0.1}

_POINTS: dict[str, dict] = {
    "ce": WHOLE,
    "csce": {**WHOLE, **CSCE},
    "csce_sqrt": {**WHOLE, **CSCE, "gamma": 0.5},
    "focal": {**WHOLE, **FOCAL},
    "cb_focal": {**WHOLE, **CB_FOCAL},
    "cb_ce": {**WHOLE, **CB},
    "cels": {**WHOLE, **CELS},
    "celas": {**WHOLE, **CELAS},
    "ldam": {**WHOLE, **LDAM},
    "seql": {**WHOLE, **SEQL},
    "cdt": {**WHOLE, **CDT},
    "bsce": {**WHOLE, **BSCE},
    "class_balanced": {**WHOLE, **BALANCED},
    "square_root": {**WHOLE, **SQUARE},
    "progressive": {**WHOLE, **PROGRESSIVE},
    "bbn": {**WHOLE, "sampler": "reverse", "companion": "beside"},
    "input_mixup": {**WHOLE, **MIXUP},
    "manifold_mixup": {**WHOLE, **MANIFOLD},
    "remix": {**WHOLE, **REMIX},
    "drw_csce": {**LATE, **CSCE},
    "drw_focal": {**LATE, **FOCAL, **CSCE},
    "drw_cb_focal": {**LATE, **CB_FOCAL},
    "drw_cb_ce": {**LATE, **CB},
    "drw_cels": {**WHOLE, **CELS},
    "drw_celas": {**WHOLE, **CELAS},
    "ldam_drw": {**LATE, **LDAM, **CB, "one_minus_beta": 1e-4},
    "drw_cdt": {**LATE, **CDT},
    "drw_bsce": {**LATE, **BSCE},
    "drw_ib": {**LATE, **IB, "switch": 0.5},
    "drs_square": {**LATE, **SQUARE, "cam": "none"},
    "drs_progressive": {**LATE, **PROGRESSIVE, "ramp": "global", "cam": "none"},
    "drs_balance": {**LATE, **BALANCED, "cam": "none"},
    "cam_square": {**LATE, **SQUARE, **CAM},
    "cam_progressive": {**LATE, **PROGRESSIVE, "ramp": "local", **CAM},
    "cam_balance": {**LATE, **BALANCED, **CAM},
    "tau_norm": {**FIRST, "when": "classifier", "classifier": "tau", "tau": 1.0},
    "crt": {**CLASSIFIER, "classifier": "crt"},
    "lws": {**CLASSIFIER, "classifier": "lws"},
    "dive": {**SGD, "when": "distilled", "kd_temperature": 2.0, "kd_alpha": 0.5, "kd_power": 0.5},
    "input_mixup_csce": {**WHOLE, **MIXUP, **CSCE},
    "input_mixup_bsce": {**WHOLE, **MIXUP, **BSCE},
    "input_mixup_balanced": {**WHOLE, **MIXUP, **BALANCED},
    "input_mixup_progressive": {**WHOLE, **MIXUP, **PROGRESSIVE},
    "input_mixup_bbn": {**WHOLE, "sampler": "reverse", "companion": "mixed"},
    "manifold_csce": {**WHOLE, **MANIFOLD, **CSCE},
    "manifold_bsce": {**WHOLE, **MANIFOLD, **BSCE},
    "manifold_balanced": {**WHOLE, **MANIFOLD, **BALANCED},
    "manifold_progressive": {**WHOLE, **MANIFOLD, **PROGRESSIVE},
    "remix_csce": {**WHOLE, **REMIX, **CSCE},
    "remix_bsce": {**WHOLE, **REMIX, **BSCE},
    "remix_balanced": {**WHOLE, **REMIX, **BALANCED},
    "remix_progressive": {**WHOLE, **REMIX, **PROGRESSIVE},
    "input_mixup_cam": {**LATE, **MIXUP, **BALANCED, **CAM},
    "bag_of_tricks": {**LATE, **MIXUP, **BALANCED, **CAM, "finetune": True},
    "input_mixup_drw_bsce": {**LATE, **MIXUP, **BSCE},
}  # fmt: skip

_ADJUSTED: dict[str, dict[str, dict]] = {
    "cb_ce": dict.fromkeys(("cifar10_100", "cifar10_50"), {"one_minus_beta": 1e-4}),
    "cb_focal": {
        "cifar10_100": {"one_minus_beta": 1e-4},
        "cifar10_50": {"one_minus_beta": 1e-4, "focal_gamma": 2.0},
        "cifar100_50": {"one_minus_beta": 1e-2},
    },
    "seql": {
        **dict.fromkeys(("cifar10_100", "cifar10_50"), {"seql_threshold": 0.05}),
        "cifar100_50": {"seql_threshold": 0.006},
    },
}
"""What the authors chose otherwise on other data than CIFAR-100-LT of ratio 100."""

_ADJUSTED |= {f"drw_{name}": _ADJUSTED[name] for name in ("cb_ce", "cb_focal")}

PAPER = {name: {key: value for key, value in point.items() if value is not None} for name, point in _POINTS.items()}
PAPER |= {
    f"{name}_{data}": {**PAPER[name], **change} for name, sets in _ADJUSTED.items() for data, change in sets.items()
}


def space(trial: Trial) -> Stage:
    """A chain of one to three stages."""
    when = trial.suggest_categorical("when", ["whole", "deferred", "classifier", "distilled"])
    plain = first_stage(trial, None if when == "distilled" else choose_mixing(trial))
    if when == "distilled":
        return distilled(trial, plain)
    if when == "classifier":
        return classifier(trial, plain)
    loss, head, method = choose_loss(trial)
    change = {"loss": loss, "head": head, "method": method, "weight": choose_weight(trial, loss)}
    sampler = choose_sampler(trial, when, plain)
    last = deferred(trial, plain, sampler, change) if when == "deferred" else plain.but(**change, **sampler)
    return finetuned(trial, last) if plain.mixing else last


def first_stage(trial: Trial, mixing: Fn | None) -> Stage:
    """Plain cross-entropy, with or without mixing; its choices are discrete, so that it is shared."""
    lr = trial.suggest_categorical("lr", [0.05, 0.1, 0.2])
    decay = trial.suggest_categorical("weight_decay", [2e-4, 5e-4])
    epochs = 400 if mixing else 200
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=epochs,
        views=(choose_view(trial),),
        mixing=mixing,
        optimiser=fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=decay),
        schedule=choose_schedule(trial, epochs),
    )


CAMS = {
    "none": None,
    "code": fn("cam"),
    "paper": fn("cam", threshold=1.0, transforms=("flip", "translate", "rotate", "scale"), originals="none"),
}
"""No class activation maps, as the authors' code uses them, and as their paper describes it."""


def choose_mixing(trial: Trial) -> Fn | None:
    name = trial.suggest_categorical("mixing", ["none", "mixup", "manifold", "cutmix", "remix"])
    if name == "none":
        return None
    if name == "remix":
        return fn(name, reduce=trial.suggest_categorical("remix_share", ["sample", "batch"]))
    return fn(name, alpha=trial.suggest_categorical("alpha", [0.2, 1.0]) if name in ("mixup", "cutmix") else 1.0)


def choose_loss(trial: Trial) -> tuple[Fn, Fn, Fn]:
    """The loss with the head and the reduction that belong to it."""
    names = ["cross_entropy", "balanced_softmax", "logit_adjusted", "focal", "ldam", "cdt", "seql",
             "label_smoothing", "label_aware_smoothing", "influence_balanced"]  # fmt: skip
    name = trial.suggest_categorical("loss", names)
    head = fn("cosine" if name == "ldam" else "linear")
    method = fn("supervised", reduction="mean" if name in ("focal", "influence_balanced") else None)
    return fn(name, **loss_keywords(trial, name)), head, method


def loss_keywords(trial: Trial, loss: str) -> dict[str, float | str]:
    if loss == "logit_adjusted":
        return {"tau": trial.suggest_float("tau_train", 0.5, 2.0)}
    if loss == "focal":  # it acts from the start, even where its weights are deferred
        return {"gamma": trial.suggest_categorical("focal_gamma", [0.5, 1.0, 2.0, 3.0])}
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
        ends = {
            "head": trial.suggest_float("smooth_head", 0.2, 0.5),
            "tail": trial.suggest_float("smooth_tail", 0, 0.2),
        }
        return {**ends, "shape": trial.suggest_categorical("smooth_shape", ["concave", "linear", "convex"])}
    if loss == "influence_balanced":
        return {"alpha": trial.suggest_float("ib_alpha", 100, 10000, log=True)}
    return {}


def choose_weight(trial: Trial, loss: Fn) -> Fn | None:
    """Class weights for the losses that take them."""
    if loss.name not in ("cross_entropy", "focal", "ldam"):
        return None
    name = trial.suggest_categorical("weight", ["none", "inverse_frequency", "effective_number"])
    if name == "inverse_frequency":
        return fn(name, gamma=trial.suggest_float("gamma", 0.2, 1.0))
    if name == "effective_number":
        return fn(name, beta=1 - trial.suggest_float("one_minus_beta", 1e-4, 1e-1, log=True))
    return None


def choose_sampler(trial: Trial, when: str, plain: Stage) -> dict:
    """The sampler and, for pairs of an ordinary and a reversed draw that are mixed, what else this changes."""
    name = trial.suggest_categorical("sampler", ["instance", "power", "progressive", "reverse"])
    if name == "power":
        return {"sampler": fn(name, q=trial.suggest_float("q", 0.0, 1.0))}
    pairs = name == "reverse" and when == "whole" and plain.mixing is None
    if pairs and trial.suggest_categorical("companion", ["beside", "mixed"]) == "mixed":
        more = {"mixing": fn("bbn_mix"), "batch": 2 * plain.batch}
        return {"sampler": fn(name), **more, "epochs": 400, "schedule": choose_schedule(trial, 400)}
    return {"sampler": fn("power" if name == "instance" else name)}


def deferred(trial: Trial, plain: Stage, sampler: dict, change: dict) -> Stage:
    """Loss, weight or sampler change late in the training; a trial that defers nothing is the plain one."""
    switch = trial.suggest_categorical("switch", [0.5, 0.6, 0.7, 0.8])
    if change["loss"].name == "influence_balanced":  # published with a step of the schedule at the switch
        steps = tuple(sorted({switch, 0.8, 0.9}))
        plain = plain.but(schedule=choose_schedule(trial, plain.epochs, steps))
    begun = plain.but(epochs=round(plain.epochs * switch), horizon=plain.epochs)
    if change["loss"].name in ("focal", "ldam"):  # they act from the start; only their weights are deferred
        begun = begun.but(**{**change, "weight": None})
    late = begun.but(**change, epochs=plain.epochs - begun.epochs, resume=begun)
    if sampler["sampler"] == fn("power"):
        return late if late.but(epochs=begun.epochs, resume=None) != begun else begun.but(epochs=plain.epochs)
    if sampler["sampler"].name == "progressive":
        ramp = trial.suggest_categorical("ramp", ["global", "local"])
        sampler = {"sampler": fn("progressive", start=switch if ramp == "local" else None)}
    cam = CAMS[trial.suggest_categorical("cam", [*CAMS])]
    if cam is None:
        return late.but(**sampler)
    return late.but(**sampler, teacher=begun, method=cam.but(reduction=late.method.get("reduction")))


def finetuned(trial: Trial, last: Stage) -> Stage:
    """A few epochs without mixing, balanced and with a small learning rate; the loss stays only under a cosine head."""
    if not trial.suggest_categorical("finetune", [False, True]):
        return last
    change = {} if last.head == fn("cosine") else {"loss": fn("cross_entropy")}
    return last.but(
        **change,
        epochs=20,
        horizon=None,
        resume=None,
        teacher=None,
        init=last,
        method=fn("supervised"),
        mixing=None,
        weight=None,
        sampler=fn("power", q=0.0),
        optimiser=last.optimiser.but(lr=0.01 * last.optimiser.get("lr")),
        schedule=fn("multistep", milestones=(7 / 20, 15 / 20), gamma=0.1),
    )


def distilled(trial: Trial, plain: Stage) -> Stage:
    """DiVE: a student beside a teacher that was trained with the balanced softmax; both have earlier steps."""
    teacher = plain.but(loss=fn("balanced_softmax"), schedule=choose_schedule(trial, plain.epochs, (0.6, 0.8)))
    method = fn(
        "dive",
        temperature=trial.suggest_float("kd_temperature", 1.0, 5.0),
        alpha=trial.suggest_float("kd_alpha", 0.2, 0.9),
        power=trial.suggest_float("kd_power", 0.3, 1.0),
    )
    return teacher.but(method=method, teacher=teacher)


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
