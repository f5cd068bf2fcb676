"""Several experts in one network: RIDE (ICLR 2021), SADE (NeurIPS 2022) and NCL (CVPR 2022).

RIDE is a chain: experts under a margin, the same with class weights late in the training, and perhaps routers that
spare experts where few suffice.  What its last stages need not know comes from short lists, so that trials share the
long one.  Lengths are nominal epochs; `--epochs` scales a whole chain.
"""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn
from search_spaces.control import choose_sam, multistep

STEPS = fn("multistep", warmup=5 / 200, milestones=(0.8, 0.9))
SGD = {"optimiser": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "multistep", "flip": 0.5, "view": "turned"}
RIDE = {**SGD, "family": "ride", "gamma": 0.01, "reduced": True, "experts": 3, "diversity": -0.45, "scale": 30.0,
        "margin": 0.5, "switch": 0.8, "one_minus_beta": 1e-4, "tempered": 0.05, "routed": False}  # fmt: skip
SADE = {**SGD, "family": "sade", "gamma": 0.1, "reduced": True, "scale": 30.0, "tau": 2.0}
NCL = {**SGD, "family": "ncl", "gamma": 0.1, "weight_decay": 2e-4, "view": "autoaugment", "networks": 3, "hard": 0.3,
       "distil": 0.6, "contrast": 0.0}  # fmt: skip

PLAIN = {"view": "turned", "diversity": 0.0, "routed": False, "contrast": 0.0, "optimiser": "sgd"}
"""What each trick is where it is left out."""


def space(trial: Trial) -> Stage:
    """One of the three families."""
    family = trial.suggest_categorical("family", ["ride", "sade", "ncl"])
    return {"ride": ride, "sade": sade, "ncl": ncl}[family](trial)


def common(trial: Trial, steps: Fn, epochs: int, batch: int) -> Stage:
    """What all families choose alike; steps: their schedule, unless it is a half cosine."""
    lr = trial.suggest_categorical("lr", [0.05, 0.1, 0.2, 0.4])
    decay = trial.suggest_categorical("weight_decay", [1e-4, 2e-4, 5e-4, 1e-3])
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=epochs,
        views=(choose_view(trial),),
        optimiser=choose_sam(trial, lr=lr, momentum=0.9, nesterov=True, weight_decay=decay),
        schedule=choose_schedule(trial, steps, epochs),
        batch=batch,
    )


def sgd(lr: float, decay: float) -> Fn:
    return fn("sgd", lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)


def choose_view(trial: Trial) -> Fn:
    """A crop that is turned a little, or AutoAugment; mirrored or not: a digit or a sign is not its mirror image."""
    flip = trial.suggest_categorical("flip", [0.5, 0.0])
    if trial.suggest_categorical("view", ["turned", "autoaugment"]) == "turned":
        return fn("flip_crop", flip=flip, rotation=15.0)
    return fn("autoaugment", policy="cifar10", crop="padded", flip=flip, cutout=0.5, fill=(128, 128, 128))


def choose_schedule(trial: Trial, steps: Fn, epochs: int) -> Fn:
    if trial.suggest_categorical("schedule", ["multistep", "cosine"]) == "cosine":
        return fn("cosine", warmup=5 / epochs)
    return steps.but(gamma=trial.suggest_categorical("gamma", [0.01, 0.1]))


def choose_backbone(trial: Trial) -> Fn:
    """With fewer channels where there are several of the same, or the whole network."""
    return fn("resnet32", reduced=True if trial.suggest_categorical("reduced", [True, False]) else None)


def choose_scale(trial: Trial) -> float:
    return trial.suggest_categorical("scale", [10.0, 20.0, 30.0, 40.0])


def ride(trial: Trial) -> Stage:
    """Experts that share the beginning of a network; class weights and temperatures come late."""
    plain = common(trial, STEPS, 200, 128)
    scale, margin = choose_scale(trial), trial.suggest_categorical("margin", [0.1, 0.3, 0.5, 0.7])
    diversity = trial.suggest_categorical("diversity", [-0.6, -0.45, -0.2, 0.0])
    first = plain.but(
        epochs=round(plain.epochs * trial.suggest_categorical("switch", [0.6, 0.7, 0.8, 0.9, 0.95])),
        horizon=plain.epochs,
        backbone=choose_backbone(trial),
        method=fn("ride", experts=trial.suggest_categorical("experts", [2, 3, 4, 6]), diversity=diversity),
        **margins(scale, margin),
    )
    beta = 1 - trial.suggest_float("one_minus_beta", 1e-5, 1e-2, log=True)
    last = reweighted(first, beta, trial.suggest_float("tempered", 0.0, 0.2))
    if not trial.suggest_categorical("routed", [False, True]):
        return last
    return routed(last, top=30, positive=trial.suggest_float("positive", 5.0, 200.0, log=True))


def margins(scale: float, margin: float) -> dict[str, Fn]:
    """LDAM of cosines that the head multiplies by `scale`, so that the experts' logits have it too."""
    return {"head": fn("cosine", scale=scale), "loss": fn("ldam", max_margin=margin * scale, scale=1.0)}


def reweighted(first: Stage, beta: float, tempered: float) -> Stage:
    """The rest of the training, with class weights and a diversity that knows the class frequencies."""
    assert first.horizon
    return first.but(
        epochs=first.horizon - first.epochs,
        resume=first,
        weight=fn("effective_number", beta=beta),
        method=first.method.but(tempered=tempered),
    )


def routed(last: Stage, top: int, positive: float) -> Stage:
    """Five balanced epochs of routers between frozen experts."""
    return last.but(
        epochs=5,
        horizon=None,
        resume=None,
        init=last,
        method=fn("route", experts=last.method.get("experts"), top=top, positive=positive),
        loss=fn("cross_entropy"),
        weight=None,
        sampler=fn("power", q=0.0),
        optimiser=sgd(0.01, 5e-4),
        schedule=fn("cosine"),
        batch=512,
    )


def sade(trial: Trial) -> Stage:
    """Three experts for three class frequencies."""
    return common(trial, STEPS, 200, 128).but(
        backbone=choose_backbone(trial),
        head=fn("cosine", scale=choose_scale(trial)),
        method=fn("sade", tau=trial.suggest_float("tau", 0.0, 3.0)),
    )


def ncl(trial: Trial) -> Stage:
    """Whole networks that teach each other; with the contrast a second view of every image is compared."""
    plain = common(trial, multistep(400), 400, 64)
    contrast = trial.suggest_categorical("contrast", [0.0, 1.0])
    other = fn("simaugment", scale=(0.2, 1.0), flip=plain.views[0].get("flip"), blur=0.5)
    return plain.but(
        views=(*plain.views, other) if contrast else plain.views,
        method=fn(
            "ncl",
            experts=trial.suggest_categorical("networks", [2, 3]),
            hard=trial.suggest_float("hard", 0.1, 0.5),
            distil=trial.suggest_float("distil", 0.0, 1.0),
            contrast=contrast,
        ),
    )


LT, INAT = "imagenet_lt", "inaturalist"


def large(root: str, model: str, method: Fn, **other: Any) -> Stage:
    """A recipe for photographs; the folder is where the images are expected unless --data names another."""
    reduced = None if method.name == "ncl" else True
    lr, batch = (0.1, 256) if root == LT else (0.2, 512)
    steps = fn("multistep", warmup=5 / 100, milestones=(0.6, 0.8), gamma=0.1)
    usual = {"epochs": 100, "schedule": steps, "optimiser": sgd(lr, 2e-4), "batch": batch}
    return Stage(
        source=fn("folder", root=root),
        views=(fn("simaugment", jitter=1.0, hue=0.0, grayscale=0.0),),
        backbone=fn("torchvision", model=model, reduced=reduced),
        method=method,
        **{"head": fn("cosine", scale=30.0), **usual, **other},
    )


def large_ride(root: str, model: str, experts: int, tempered: float) -> Stage:
    """RIDE without routers: 80 epochs, then 20 with class weights."""
    method = fn("ride", experts=experts, diversity=-0.2)
    return reweighted(large(root, model, method, epochs=80, horizon=100, **margins(30.0, 0.5)), 0.9999, tempered)


def large_ncl(root: str, model: str, epochs: int, scale: float) -> Stage:
    how = {"schedule": fn("cosine", final=5e-4), "optimiser": sgd(0.2, 2e-4), "batch": 256}
    return large(root, model, fn("ncl"), epochs=epochs, head=fn("cosine", scale=scale), **how)


X50, R50 = "resnext50_32x4d", "resnet50"

PAPER: dict[str, Any] = {
    "ride_3": RIDE,
    "ride_3_routed": {**RIDE, "routed": True, "positive": 100.0},
    "ride_4": {**RIDE, "experts": 4},
    "ride_6": {**RIDE, "experts": 6},
    "sade": SADE,
    "sade_cifar10": {**SADE, "lr": 0.05, "reduced": False},
    "ncl": NCL,
    "ncl_contrast": {**NCL, "contrast": 1.0},
    "ride_3_imagenet_lt": large_ride(LT, X50, 3, 0.02),
    "ride_3_routed_imagenet_lt": routed(large_ride(LT, X50, 3, 0.02), top=50, positive=100.0),
    "ride_6_imagenet_lt": large_ride(LT, X50, 6, 0.02),
    "ride_3_inaturalist": large_ride(INAT, R50, 3, 0.015),
    "ride_3_routed_inaturalist": routed(large_ride(INAT, R50, 3, 0.015), top=50, positive=100.0),
    "ride_6_inaturalist": large_ride(INAT, R50, 6, 0.015),
    "sade_imagenet_lt": large(LT, X50, fn("sade"), epochs=180, batch=64, optimiser=sgd(0.025, 5e-4),
                              schedule=fn("cosine")),
    "sade_inaturalist": large(INAT, R50, fn("sade", tau=1.0)),
    "ncl_imagenet_lt": large_ncl(LT, R50, 200, 16.0),
    "ncl_imagenet_lt_resnext50": large_ncl(LT, X50, 200, 16.0),
    "ncl_inaturalist": large_ncl(INAT, R50, 400, 32.0),
}  # fmt: skip
