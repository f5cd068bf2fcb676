"""Self-supervision to distillation (SSD, ICCV 2021): four stages, each handing weights to the next.

I features from a self-supervised task beside the classifier; II the classifier re-balanced on frozen features;
III a student from random weights, one of whose two classifiers learns the soft targets of II; IV one of the student's
classifiers re-balanced (optional).  I and II come from short lists, so that trials share them and a trial that differs
in the distillation trains only what follows.  Lengths are nominal epochs; `--epochs` scales the whole chain.
"""

from typing import Any

from rayltr.spec import Fn, Stage, Trial, fn, mapped
from search_spaces.control import choose_view
from search_spaces.control import control as control

EPOCHS, LAST = 200, 10
"""Of the first and third stage, and of the second and fourth."""
CLEAN = {"stage2_bn": "eval", "teacher_bn": "running", "stage4_head": "soft"}
RELEASE = {"stage2_bn": "train", "teacher_bn": "batch", "stage4_head": "hard"}
"""What the paper says, and what the published program does."""
POINT = {"lr": 0.1, "flip": 0.5, "self_task": "rotation", "w_rot": 1.0, "rebalance": "lws", "stage2_lr": 0.2,
         "stage2_decay": 5e-4, "kd_temperature": 2.0, "w_kd": 1.0, "stage4": True}  # fmt: skip

PLAIN = {"stage4": False}
"""What each trick is where it is left out."""


def space(trial: Trial) -> Stage:
    """The whole chain."""
    first = learnt(trial)
    lr = trial.suggest_categorical("stage2_lr", [0.1, 0.2])
    last = sgd(lr, trial.suggest_categorical("stage2_decay", [0.0, 5e-4]))
    drift = trial.suggest_categorical("stage2_bn", ["eval", "train"]) == "train"
    teacher = rebalanced(first, trial.suggest_categorical("rebalance", ["lws", "crt"]), LAST, last, drift)
    student = distilled(first, teacher, choose_distillation(trial))
    if not trial.suggest_categorical("stage4", [True, False]):
        return student
    return finished(student, trial.suggest_categorical("stage4_head", ["soft", "hard", "sum"]), LAST, last, drift)


def sgd(lr: float, decay: float) -> Fn:
    return fn("sgd", lr=lr, momentum=0.9, weight_decay=decay)


def learnt(trial: Trial) -> Stage:
    """The first stage; a second view is the key of instance discrimination."""
    view, task = choose_view(trial), choose_task(trial)
    key = fn("simaugment", scale=(0.2, 1.0), flip=view.get("flip"), blur=0.5)
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=EPOCHS,
        views=(view, key) if task.name == "instance" else (view,),
        method=task,
        optimiser=sgd(trial.suggest_categorical("lr", [0.05, 0.1]), 5e-4),
        schedule=fn("cosine", warmup=5 / EPOCHS),
        batch=128,
    )


def choose_task(trial: Trial) -> Fn:
    task = trial.suggest_categorical("self_task", ["rotation", "instance", "both"])
    rotation = trial.suggest_categorical("w_rot", [0.1, 0.3, 1.0, 3.0]) if task != "instance" else None
    if task == "rotation":
        return fn("rotation", rotation=rotation)
    contrast = trial.suggest_categorical("w_con", [0.1, 0.3, 1.0, 3.0])
    temperature = trial.suggest_categorical("temperature", [0.07, 0.1, 0.2])
    groups = trial.suggest_categorical("groups", [1, 4])
    return fn("instance", contrast=contrast, rotation=rotation, temperature=temperature, groups=groups)


def choose_distillation(trial: Trial) -> Fn:
    return fn(
        "distil",
        distil=trial.suggest_float("w_kd", 0.3, 3.0, log=True),
        temperature=trial.suggest_float("kd_temperature", 1.0, 4.0),
        teacher_bn=trial.suggest_categorical("teacher_bn", ["running", "batch"]),
    )


def rebalanced(first: Stage, name: str, epochs: int, optimiser: Fn, drift: bool, batch: int = 128) -> Stage:
    """Frozen features and balanced classes: factors for the logits (lws), or a new classifier (crt).

    drift: BatchNorm statistics follow the balanced images.
    """
    return first.but(
        epochs=epochs,
        init=first,
        views=first.views[:1],
        method=fn("supervised", frozen=True, drift=drift, fresh_head=name == "crt"),
        head=fn("linear" if name == "crt" else "lws"),
        sampler=fn("class_aware", each=2),
        optimiser=optimiser,
        schedule=fn("cosine"),
        batch=batch,
    )


def distilled(first: Stage, teacher: Stage, method: Fn) -> Stage:
    """A student that begins anew: from the teacher's weights it would stay where the teacher is."""
    return first.but(views=first.views[:1], method=method, teacher=teacher)


def finished(student: Stage, chosen: str, epochs: int, optimiser: Fn, drift: bool, batch: int = 128) -> Stage:
    """One of the student's classifiers, with factors for its logits."""
    last = rebalanced(student, "lws", epochs, optimiser, drift, batch)
    return last.but(method=fn("student", chosen=chosen, drift=drift), teacher=None)


GPUS = 8
"""Of the published program, which shuffles keys among them."""
QUERY = fn("simaugment", jitter=1.0, hue=0.0, grayscale=0.0)
KEY = fn("simaugment", scale=(0.2, 1.0), blur=0.5)


def photographs(root: str, model: str, epochs: int, lr: float, decay: float, batch: int, queue: int | None) -> Stage:
    """The first stage for photographs; the folder is where the images are expected unless --data names another."""
    return Stage(
        source=fn("folder", root=root),
        epochs=epochs,
        views=(QUERY, KEY),
        backbone=fn("torchvision", model=model),
        method=fn("instance", queue=queue, groups=GPUS),
        optimiser=sgd(lr, decay),
        schedule=fn("cosine"),
        batch=batch,
    )


def followed(first: Stage, how: dict[str, str], *, stage4: bool = True) -> Stage:
    """The other stages for photographs."""
    drift = how["stage2_bn"] == "train"
    last = sgd(0.2, first.optimiser.get("weight_decay"))
    teacher = rebalanced(first, "lws", 5, last, drift, batch=512)
    student = distilled(first, teacher, fn("distil", teacher_bn=how["teacher_bn"]))
    return finished(student, how["stage4_head"], 5, last, drift, batch=512) if stage4 else student


def walked(last: Stage) -> Stage:
    """A chain whose balanced classes each of the GPUs draws for itself, from the images that it was dealt."""
    walks = fn("class_aware", each=2, walks=GPUS)
    return mapped(last, lambda own: own.but(sampler=walks) if own.sampler.name == walks.name else own)


IMAGENET = photographs("imagenet_lt", "resnext50_32x4d", 135, 0.1, 5e-4, 256, None)
RELEASED = IMAGENET.but(method=IMAGENET.method.but(queue_label_init=0))
INATURALIST = photographs("inaturalist", "resnet50", 90, 0.2, 1e-4, 512, 65536)

PAPER: dict[str, Any] = {
    "paper": {**POINT, **CLEAN},
    "release": {**POINT, **RELEASE},
    "imagenet_lt": followed(IMAGENET, CLEAN),
    "imagenet_lt_release": walked(followed(RELEASED, RELEASE)),
    "imagenet_lt_release_student": walked(followed(RELEASED, RELEASE, stage4=False)),
    "inaturalist": followed(INATURALIST, CLEAN),
}
"""Nothing is published of the recipes for CIFAR and iNaturalist but their results; those are proposals."""
