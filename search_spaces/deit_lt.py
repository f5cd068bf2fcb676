"""DeiT-LT (CVPR 2024): a vision transformer that learns from the targets and from a small network with a flat minimum.

A chain: the teacher, whose sharpness SAM lowers and whose class weights come late (or PaCo, by SAM); the student, whose
images are strongly augmented and mixed, for itself and for the teacher; and its last epochs, in which the targets are
hard and what the teacher says is weighted by class.  What the last stage need not know comes from short lists, so that
trials share teachers and students.  Lengths are nominal epochs; `--epochs` scales a whole chain.
"""

from typing import Any

from rayltr.spec import FixedTrial, Fn, Stage, Trial, fn
from search_spaces.contrastive import GREY, large, simple, stepped

EPOCHS, SWITCH = 1200, 11 / 12
"""Of the student, and the share of them that comes before the last stage, as published for CIFAR."""
SIZES = {"narrow": (192, 6, 3), "wide": (256, 6, 4), "tiny": (192, 12, 3), "small": (384, 12, 6)}
"""Width, depth and heads of students for images of 32 pixels and patches of 4."""
STRONG = {"m": 9.0, "deviation": 0.5, "space": "timm_increasing", "fill": (124, 116, 104), "interpolation": "bicubic",
          "erase": 0.25}  # fmt: skip
"""What timm calls rand-m9-mstd0.5-inc1, and random erasing."""
OWN = {**STRONG, "erase_own": True}
"""The same for networks that are normalised by the data, not by ImageNet."""
SMOOTH = fn("label_smoothing", epsilon=0.1)
LATE = {"switch": SWITCH, "late_weight": True, "one_minus_beta": 1e-4, "mixing_late": False, "cls_loss": "plain"}
SMALL = {"flip": 0.5, "teacher": "ldam", "rho": 0.8, "student": "tiny", "lr": 5e-4, "alpha": 0.5, "distil": "hard",
         "mixing": "both", "mixup_alpha": 0.8, "repeats": 3, "teacher_view": "same", **LATE}  # fmt: skip

PLAIN = {"teacher": "ce", "rho": 0.0, "distil": "none", "mixing": "none", "mixing_late": False, "repeats": 1,
         "late_weight": False, "cls_loss": "plain"}  # fmt: skip
"""What each trick is where it is left out."""


def space(trial: Trial) -> Stage:
    """The whole chain, for small images."""
    flip = trial.suggest_categorical("flip", [0.5, 0.0])
    name = trial.suggest_categorical("teacher", ["ldam", "ce", "paco"])
    rho = trial.suggest_categorical("rho", [0.0, 0.05, 0.2, 0.5, 0.8])
    teacher = paco(rho, flip) if name == "paco" else cnn(name, rho, flip)
    width, depth, heads = SIZES[trial.suggest_categorical("student", [*SIZES])]
    lr = trial.suggest_categorical("lr", [2.5e-4, 5e-4, 1e-3])
    first = student(
        teacher,
        method=choose_method(trial, scale=30.0 if name == "ldam" else None),
        views=choose_views(trial, flip),
        mixing=choose_mixing(trial),
        sampler=fn("repeated", repeats=trial.suggest_categorical("repeats", [1, 3])),
        backbone=fn("deit", width=width, depth=depth, heads=heads),
        **annealed(lr, EPOCHS),
    )
    begun = first.but(epochs=round(EPOCHS * trial.suggest_categorical("switch", [0.8, 0.85, 0.9, SWITCH, 0.96])))
    weight = None
    if trial.suggest_categorical("late_weight", [True, False]):
        weight = fn("effective_number", beta=1 - trial.suggest_float("one_minus_beta", 1e-5, 1e-2, log=True))
    mixing = begun.mixing if begun.mixing and trial.suggest_categorical("mixing_late", [False, True]) else None
    return late(begun, mixing=mixing, loss=choose_late_loss(trial, mixing), weight=weight)


def choose_method(trial: Trial, scale: float | None) -> Fn:
    """scale: what soft distillation multiplies cosines by."""
    alpha = trial.suggest_categorical("alpha", [0.3, 0.5, 0.7])
    distil = trial.suggest_categorical("distil", ["hard", "soft", "none"])
    if distil != "soft":
        return fn("tokens", alpha=alpha, distil=distil)
    temperature = trial.suggest_categorical("temperature", [1.0, 2.0, 3.0, 5.0])
    return fn("tokens", alpha=alpha, distil="soft", temperature=temperature, scale=scale, normalise="batch")


def choose_views(trial: Trial, flip: float) -> tuple[Fn, ...]:
    """The student's strong view, and perhaps a weak one, like those that the teacher knows, for the teacher."""
    views = (fn("randaugment", crop="padded", flip=flip, **OWN), fn("flip_crop", flip=flip))
    return views[:1] if trial.suggest_categorical("teacher_view", ["same", "weak"]) == "same" else views


def choose_mixing(trial: Trial) -> Fn | None:
    name = trial.suggest_categorical("mixing", ["both", "mixup", "cutmix", "none"])
    if name == "none":
        return None
    alpha = trial.suggest_categorical("mixup_alpha", [0.2, 0.8, 1.0]) if name != "cutmix" else 1.0
    return fn("mixup_or_cutmix" if name == "both" else name, alpha=alpha)


def choose_late_loss(trial: Trial, mixing: Fn | None) -> Fn:
    """Of the class token: as before where mixing stays, else without smoothing; or one that knows the class counts."""
    name = trial.suggest_categorical("cls_loss", ["plain", "logit_adjusted"])
    if name == "logit_adjusted":
        return fn(name, tau=trial.suggest_float("tau", 0.5, 1.5))
    return SMOOTH if mixing else fn("cross_entropy")


def late(begun: Stage, **change: Any) -> Stage:
    """A stage that goes on with another one up to its horizon, with something changed."""
    assert begun.horizon
    return begun.but(epochs=begun.horizon - begun.epochs, resume=begun, **change)


def flat(rho: float, lr: float, decay: float) -> Fn:
    """SGD, sharpness-aware unless rho is 0."""
    keywords = {"lr": lr, "momentum": 0.9, "weight_decay": decay}
    return fn("sam", rho=rho, **keywords) if rho else fn("sgd", **keywords)


def cnn(name: str, rho: float, flip: float = 0.5, epochs: int = 200) -> Stage:
    """LDAM or cross-entropy ("ce"), with weak views; class weights for the last fifth (LDAM-DRW-SAM)."""
    margins: dict[str, Any] = {"head": fn("cosine"), "loss": fn("ldam", max_margin=0.5, scale=30.0)}
    first = Stage(
        source=fn("digits", ratio=20.0),
        epochs=round(0.8 * epochs),
        horizon=epochs,
        views=(fn("flip_crop", flip=flip),),
        optimiser=flat(rho, 0.1, 2e-4),
        schedule=fn("multistep", warmup=5 / 200, warmup_from=1 / 5, milestones=(0.8, 0.9), gamma=0.01),
        precision="bf16",
        **(margins if name == "ldam" else {}),
    )
    return late(first, weight=fn("effective_number", beta=0.9999))


def paco(rho: float, flip: float = 0.5) -> Stage:
    """PaCo as published, by SAM; the authors of DeiT-LT did not publish this stage."""
    return Stage(
        source=fn("digits", ratio=20.0),
        epochs=400,
        views=(fn("autoaugment", policy="cifar10", crop="padded", flip=flip, cutout=0.5, fill=GREY), simple(flip)),
        method=fn("paco", alpha=0.01, temperature=0.05),
        optimiser=flat(rho, 0.05, 5e-4),
        schedule=stepped(400),
        precision="bf16",
    )


def annealed(lr: float, epochs: int) -> dict[str, Fn]:
    """AdamW with the half cosine of timm, from a millionth over five epochs down to a hundred-thousandth."""
    schedule = fn("cosine", warmup=5 / epochs, warmup_from=1e-6 / lr, final=1e-5 / lr, beneath=True)
    return {"optimiser": fn("adamw", lr=lr, weight_decay=0.05, spare=True), "schedule": schedule}


def student(teacher: Stage, **other: Any) -> Stage:
    """Of nominally 1200 epochs, on the teacher's images."""
    usual = {"epochs": EPOCHS, "horizon": EPOCHS, "loss": SMOOTH, "batch": 512, "precision": "bf16"}
    return Stage(source=teacher.source, teacher=teacher, **{**usual, **other})


def on(source: Fn, stage: Stage) -> Stage:
    """A teacher on other images."""
    before = {"resume": on(source, stage.resume)} if stage.resume else {}
    return stage.but(source=source, **before)


CIFAR = fn("cifar100", ratio=100.0)
BOTH = fn("mixup_or_cutmix", alpha=0.8)


def base(teacher: Stage, epochs: int, last: int, batch: int, lr: float, **other: Any) -> Stage:
    """DeiT-B for images of 224 pixels; `batch` is what the authors' several GPUs accumulate."""
    usual = {
        "views": (fn("randaugment", crop="resized", size=224, **STRONG),),
        "mixing": BOTH,
        "sampler": fn("repeated"),
        "backbone": fn("deit", size=224, patch=16, width=768, depth=12, heads=12, imagenet=True),
        "method": fn("tokens"),
        **annealed(lr, epochs),
    }
    return student(teacher, epochs=epochs - last, horizon=epochs, batch=batch, **{**usual, **other})


def paper(teacher: Stage, batch: int = 1024) -> Stage:
    """CIFAR at 224 pixels; the teacher sees the student's images at 32, normalised for the student, as published."""
    network = fn("deit", size=224, patch=16, width=768, depth=12, heads=12, crop=0.875, imagenet=True)
    method = fn("tokens", teacher_size=32, teacher_renorm=False, antialias=False)
    lr = 2.5e-4 * batch / 1024
    begun = base(on(CIFAR, teacher), 1200, 100, batch, lr, backbone=network, method=method)
    return late(begun, mixing=None, loss=fn("cross_entropy"), weight=fn("effective_number", beta=0.9999))


def photographs(teacher: Stage, epochs: int, last: int) -> Stage:
    """ImageNet-LT and iNaturalist (`--size 224`): mixing stays to the end."""
    return late(base(teacher, epochs, last, 2048, 5e-4), weight=fn("effective_number", beta=0.9999))


def resnet(root: str, lr: float, decay: float) -> Stage:
    """LDAM-DRW-SAM for photographs: rho is 0.05, 0.1 and 0.5; that it rises at the epochs 5 and 60 is a guess."""
    first = cnn("ldam", 0.05, epochs=90).but(
        resume=None,
        source=fn("folder", root=root),
        epochs=5,
        views=(fn("simaugment", jitter=1.0, hue=0.0, grayscale=0.0),),
        backbone=fn("torchvision", model="resnet50"),
        loss=fn("ldam", max_margin=0.3, scale=30.0),
        weight=None,
        optimiser=flat(0.05, lr, decay),
        schedule=fn("cosine"),
        batch=256,
    )
    second = first.but(epochs=55, resume=first, optimiser=flat(0.1, lr, decay))
    return second.but(epochs=30, resume=second, optimiser=flat(0.5, lr, decay),
                      weight=fn("effective_number", beta=0.9999))  # fmt: skip


def large_paco(root: str, decay: float) -> Stage:
    """PaCo for photographs, by SAM; its rho is a guess."""
    plain = large("paco", "resnet50", 0.02, 0.2)
    return plain.but(source=fn("folder", root=root), optimiser=flat(0.05, 0.02, decay), precision="bf16")


def laptop() -> Stage:
    """A small student and its teacher in less than half an hour on two CPU cores; the schedule is far too short."""
    # little of SAM's radius suits so few epochs; a network of six blocks, patches of 8; every image once an epoch
    begun = student(
        on(CIFAR, cnn("ldam", 0.1, epochs=10)),
        epochs=27,
        horizon=30,
        views=(fn("randaugment", crop="padded", **OWN),),
        mixing=BOTH,
        backbone=fn("deit", patch=8, width=192, depth=6, heads=3),
        method=fn("tokens"),
        batch=128,
        optimiser=fn("adamw", lr=1e-3, weight_decay=0.05, spare=True),
        schedule=fn("cosine", warmup=0.1, final=0.01),
    )
    return late(begun, mixing=None, loss=fn("cross_entropy"), weight=fn("effective_number", beta=0.9999))


def alone(last: Stage) -> Stage:
    """The transformer of a chain as a plain classifier, on the same images, as long: no teacher, no class weights."""
    assert last.resume
    without: dict[str, Any] = {"teacher": None, "method": fn("supervised")}
    return last.but(resume=last.resume.but(**without), weight=None, **without)


PAPER: dict[str, Any] = {
    "small": SMALL,
    "small_vit": alone(space(FixedTrial(SMALL))),
    "laptop": laptop(),
    "laptop_vit": alone(laptop()),
    "paper": paper(paco(0.5)),  # the authors do not tell the rho of this teacher
    "paper_ldam": paper(cnn("ldam", 0.8)),
    "paper_one_gpu": paper(paco(0.5), batch=512),
    "teacher_ldam": on(CIFAR, cnn("ldam", 0.8)),
    "teacher_ce": on(CIFAR, cnn("ce", 0.8)),
    "teacher_paco": on(CIFAR, paco(0.5)),
    "imagenet_lt": photographs(large_paco("imagenet_lt", 5e-4), 1400, 200),
    "imagenet_lt_ldam": photographs(resnet("imagenet_lt", 0.2, 2e-4), 1400, 200),
    "inaturalist": photographs(large_paco("inaturalist", 1e-4), 1000, 100),
    "inaturalist_ldam": photographs(resnet("inaturalist", 0.1, 1e-4), 1000, 100),
}
