"""What the student of DeiT-LT gains over a plain loop: `python -m benchmarks.deit_lt`.

Trains the student of the preset `small` with its teacher, turn by turn with a straightforward program of the same
recipe: single precision, the libraries' defaults, timm's views image by image, timm's mixing and its numbers looked at
after every step.  Prints images per second of both and the median ratio.  The exit code is 1 below 1.8 times on a CPU
and 3 times on a GPU.  With --others it also times what ours does not do on this device: the other kernel of attention,
and the student compiled (beside the seconds that its first epoch takes longer).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.models.deit import VisionTransformerDistilled
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from rayltr import build, transformers
from rayltr.build import method
from rayltr.catalogue import complete
from rayltr.data import Data, load
from rayltr.interface import Resources, State
from rayltr.spec import Stage, fn, parents
from rayltr.studies import STUDY, Plan, find
from rayltr.train import facts, train

FLOORS = {"cpu": 1.8, "cuda": 3.0}
CLASSES = 100
POSTERIZE: Any = auto_augment.NAME_TO_OP["PosterizeIncreasing"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.deit_lt", description=__doc__.split("\n")[0])
    made.add_argument("--images", type=int, default=8, help="images of each of 100 classes (default: 8)")
    made.add_argument("--repeats", type=int, default=3, help="epochs of each program (default: 3)")
    made.add_argument("--batch", type=int, default=128, help="default: 128")
    made.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    made.add_argument("--loaders", type=int, default=0, help="processes for the views of the plain one (default: 0)")
    made.add_argument("--others", action="store_true", help="also the other attention kernel, and torch.compile")
    made.add_argument("--device", help="cpu or cuda; default: what there is")
    return made


class Viewed(Dataset):
    """The images of a data set, seen as timm sees them; the strength with which Pillow fails gives black."""

    def __init__(self, images: np.ndarray, target: np.ndarray, mean: Sequence[float], std: Sequence[float]):
        self.images, self.target = images, target
        hints = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
        auto_augment.NAME_TO_OP["PosterizeIncreasing"] = black_or_posterized
        self.view = transforms.Compose([
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", hints),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            RandomErasing(0.25, mode="pixel", device="cpu"),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.view(Image.fromarray(self.images[row])), int(self.target[row])


def black_or_posterized(image: Image.Image, bits: int, **more: Any) -> Image.Image:
    return POSTERIZE(image, bits, **more) if bits else Image.new(image.mode, image.size)


def plain(stage: Stage, data: Data, teacher: nn.Module, device: torch.device, loaders: int) -> Iterator[float]:
    """Seconds of an epoch, for ever."""
    network = {name: stage.backbone.get(name) for name in ("depth", "patch", "size", "width", "heads")}
    student: Any = VisionTransformerDistilled(
        img_size=network["size"], patch_size=network["patch"], embed_dim=network["width"], depth=network["depth"],
        num_heads=network["heads"], num_classes=CLASSES, drop_path_rate=stage.backbone.get("drop_path"),
    ).to(device)  # fmt: skip
    student.set_distilled_training(True)
    optimiser = create_optimizer_v2(student, opt="adamw", lr=stage.optimiser.get("lr"), weight_decay=0.05)
    viewed = Viewed(data.train.take(np.arange(len(data.train))), data.train.target, data.mean, data.std)
    sampler = RepeatAugSampler(viewed, num_replicas=1, rank=0)
    loader = DataLoader(viewed, stage.batch, sampler=sampler, num_workers=loaders, drop_last=True,
                        persistent_workers=loaders > 0, pin_memory=device.type == "cuda")  # fmt: skip
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    soft = SoftTargetCrossEntropy()
    student.train()
    while True:
        began = time.perf_counter()
        for images, target in loader:
            images, target = mix(images.to(device), target.to(device))
            cls, dist = student(images)
            with torch.no_grad():
                taught = teacher(images)
            first, second = 0.5 * soft(cls, target), 0.5 * F.cross_entropy(dist, taught.argmax(1))
            if not np.isfinite((first + second).item()):
                raise RuntimeError("the loss is no number")
            optimiser.zero_grad()
            (first + second).backward()
            optimiser.step()
            first.item(), second.item()
        yield time.perf_counter() - began


def ours(stage: Stage, data: Data, taught: State, resources: Resources) -> Iterator[float]:
    """Seconds of an epoch of the stage, as many as it has."""
    seconds: list[float] = []
    train(stage, {"teacher": taught}, data=data, resources=resources, splits=(),
          on_epoch=lambda record: seconds.append(record["wall_s"]))  # fmt: skip
    yield from seconds


def compiled(*given: Any) -> nn.Module:
    """A method whose network, if it is the student's, goes through torch.compile."""
    made: Any = method(*given)
    if hasattr(made, "head_dist"):
        made.backbone.body.tokens = torch.compile(made.backbone.body.tokens)
    return made


def others() -> dict[str, AbstractContextManager]:
    """What ours does not do on this device, as changes to it."""
    fused = patch.object(transformers, "FUSED", {"cpu", "cuda"} - transformers.FUSED)
    return {"other kernel": fused, "compiled": patch.object(build, "method", compiled)}


def untrained(stage: Stage, data: Data) -> tuple[State, nn.Module]:
    """A teacher as it begins, and its network for images that are normalised already."""
    fresh = build.method(stage, facts(data)).state_dict()
    state = State(fresh, {}, 0, tuple(fresh))
    made: Any = build.teacher(stage, facts(data), state)
    return state, nn.Sequential(made.backbone.body, made.head)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    resources = Resources(device=options.device, threads=options.threads)
    torch.set_num_threads(options.threads)
    study, device = find("deit_lt"), resources.place()
    source = fn("synthetic", classes=CLASSES, per_class=options.images, size=32, ratio=1.0)
    stage = Plan("", source=source, batch=options.batch).stage(study, {"arm": STUDY, **study.presets["small"]}).resume
    assert stage is not None
    stage, data = complete(stage.but(epochs=1)), load(source)
    taught, network = untrained(parents(stage)["teacher"], data)
    slow = plain(stage, data, network.to(device), device, options.loaders)
    shown = len(data.train) // 256 * 256 // options.batch * options.batch
    next(slow), next(ours(stage, data, taught, resources))
    pairs = [(next(slow), next(ours(stage, data, taught, resources))) for _ in range(options.repeats)]
    ratio, floor = median(one / other for one, other in pairs), FLOORS[device.type]
    print(f"DeiT-Ti, 32 pixels, patches of 4, with a ResNet-32; batch {options.batch}, {device}, "
          f"{options.threads} threads, {shown} images an epoch")  # fmt: skip
    for name, place in (("plain loop, fp32", 0), ("rayltr, bf16", 1)):
        print(f"{name:18} {shown / median(pair[place] for pair in pairs):9.1f} images/s")
    print(f"{ratio:.2f} times as fast (floor {floor})")
    for name, way in others().items() if options.others else ():
        with way:
            first, *later = ours(stage.but(epochs=1 + options.repeats), data, taught, resources)
        usual = median(later)
        print(f"{name:18} {shown / usual:9.1f} images/s; its first epoch took {first - usual:.0f} s longer")
    return int(ratio < floor)


if __name__ == "__main__":
    sys.exit(main())
