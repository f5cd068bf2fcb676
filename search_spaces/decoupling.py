"""Decoupling (Kang et al., ICLR 2020): an ordinary network first, then a classifier on its frozen features.

Joint training, and after it classifier re-training (cRT), learnable weight scaling (LWS), tau-normalisation or the
nearest class mean (NCM).  The first stage is that of the control arm and comes from a short list, so that it is
trained once for all of them.
"""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn
from search_spaces.control import control as control

FIRST = {"lr": 0.1, "flip": 0.5, "schedule": "cosine"}
SECOND = {"classifier_lr": 0.2, "num_samples_cls": 4, "stage2_bn": "train"}
ROOTS = {"imagenet_lt": ("resnext50_32x4d", 5e-4, 10), "inaturalist": ("resnet50", 1e-4, 30)}
"""Of the sets of photographs: the network, the weight decay and the epochs of cRT."""

PLAIN = {"classifier": "joint"}
"""What each trick is where it is left out."""


def space(trial: Trial) -> Stage:
    """The plain network, and one of the classifiers on top of it."""
    joint = control(trial)
    name = trial.suggest_categorical("classifier", ["joint", "crt", "lws", "tau", "ncm"])
    if name == "joint":
        return joint
    if name == "tau":
        return normalised(joint, trial.suggest_float("tau", 0.0, 2.0, step=0.1))
    if name == "ncm":
        return nearest(joint, trial.suggest_categorical("features", ["cl2n", "l2n", "un"]))
    lr = trial.suggest_float("classifier_lr", 0.01, 0.5, log=True)
    each = trial.suggest_categorical("num_samples_cls", [1, 2, 4])
    drift = trial.suggest_categorical("stage2_bn", ["eval", "train"]) == "train"
    return retrained(joint, name, 10, sgd(lr, 5e-4), each, drift)


def sgd(lr: float, decay: float) -> Fn:
    return fn("sgd", lr=lr, momentum=0.9, weight_decay=decay)


def retrained(joint: Stage, name: str, epochs: int, optimiser: Fn, each: int, drift: bool) -> Stage:
    """A new classifier (crt), or factors for the logits of the old one (lws), from as many images of every class.

    each: neighbours of one class.  drift: BatchNorm statistics follow the balanced images, as in the authors' program.
    """
    return joint.but(
        epochs=epochs,
        horizon=None,
        init=joint,
        method=fn("supervised", frozen=True, drift=drift, fresh_head=name == "crt"),
        head=fn("linear" if name == "crt" else "lws"),
        sampler=fn("class_aware", each=each),
        optimiser=optimiser,
        schedule=fn("cosine"),
    )


def normalised(joint: Stage, tau: float) -> Stage:
    """Weights divided by a power of their lengths, and no bias; nothing is trained."""
    return joint.but(epochs=0, horizon=None, init=joint, head=fn("tau_normalised", tau=tau, bias=False))


def nearest(joint: Stage, features: str) -> Stage:
    return joint.but(epochs=0, horizon=None, init=joint, method=fn("ncm", features=features))


def large(root: str, name: str) -> Stage:
    """The authors' recipe for photographs; the folder is where the images are expected unless --data names another."""
    model, decay, epochs = ROOTS[root]
    view = fn("simaugment", jitter=1.0, hue=0.0, grayscale=0.0) if root == "imagenet_lt" else FLIPPED
    joint = Stage(
        source=fn("folder", root=root),
        epochs=90,
        views=(view,),
        backbone=fn("torchvision", model=model),
        optimiser=sgd(0.2, decay),
        schedule=fn("cosine"),
        batch=512,
    )
    if name == "joint":
        return joint
    if name == "tau":  # the authors choose it on validation images and publish no value
        return normalised(joint, 0.7)
    if name == "ncm":
        return nearest(joint, "cl2n")
    return retrained(joint, name, epochs if name == "crt" else 5, joint.optimiser, 4, drift=True)


FLIPPED = fn("resized_crop", flip=0.5)
NAMES = ("joint", "crt", "lws", "tau", "ncm")

PAPER: dict[str, Any] = {
    "joint": {**FIRST, "classifier": "joint"},
    "crt": {**FIRST, **SECOND, "classifier": "crt"},
    "lws": {**FIRST, **SECOND, "classifier": "lws"},
    "tau": {**FIRST, "classifier": "tau", "tau": 0.7},
    "ncm": {**FIRST, "classifier": "ncm", "features": "cl2n"},
    **{f"{name}_{root}": large(root, name) for root in ROOTS for name in NAMES},
}
