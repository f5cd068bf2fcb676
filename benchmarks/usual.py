"""The field's usual way, to compare with: Pillow transforms, a DataLoader, float32, one tensor after the other."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from rayltr.data import Data, Split

View = Callable[[Image.Image], Tensor]


class Images(Dataset):
    """The images of a split, each by its view(s), and their classes."""

    def __init__(self, split: Split, views: Sequence[View]):
        self.pixels, self.target, self.views = split.take(np.arange(len(split))), split.target, views

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, i: int) -> tuple[list[Tensor], int]:
        image = Image.fromarray(self.pixels[i])
        return [view(image) for view in self.views], int(self.target[i])


def flip_crop(data: Data) -> View:
    """Crop with a margin of 4, mirror, normalise."""
    return transforms.Compose(
        [
            transforms.RandomCrop(data.size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )


def plain(data: Data) -> View:
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])


def loader(split: Split, views: Sequence[View], batch: int, workers: int, *, training: bool) -> DataLoader:
    """A DataLoader; its workers stay between epochs."""
    return DataLoader(
        Images(split, views),
        batch,
        shuffle=training,
        drop_last=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def epoch(model: nn.Module, batches: DataLoader, optimiser: torch.optim.Optimizer, device: torch.device) -> int:
    """Trains one epoch with cross-entropy as tutorials do, a loss read at every step; how many images it saw."""
    model.train()
    seen, total = 0, 0.0
    for (images, *_), target in batches:
        images, target = images.to(device), target.to(device)
        optimiser.zero_grad()
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimiser.step()
        total += loss.item()
        seen += len(target)
    return seen


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader, device: torch.device) -> Tensor:
    """Logits [N, C]."""
    model.eval()
    return torch.cat([model(images.to(device)).cpu() for (images, *_), _ in batches])
