"""The images of a split part by part; those that have to be decoded are decoded ahead, beside the training."""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rayltr.data import Split
from rayltr.data.images import Lazy, cpus
from rayltr.data.processes import CONTEXT, LOST, MOST, apart, follow, in_order, may_start, preload

AHEAD, EACH = 4, 2
"""Parts that are decoded ahead by a thread, or by each process."""
FEW = 2_000
"""Images from which processes pay for their start."""
SHARED = Path("/dev/shm")


class Decoded(Dataset):
    """The images at arrays of rows, as a process gives them back: an error is given, not raised.

    Raised there, it would lose its one line among those of that process's traceback.
    """

    def __init__(self, images: Lazy):
        self.images = images

    def __getitem__(self, rows: np.ndarray) -> np.ndarray | Exception:
        try:
            return self.images.take(rows)
        except Exception as error:
            return error


class Reader:
    """Reads parts of a split, again and again: the same images whoever decodes them.

    A process per CPU of a trial does if it has several and the images are many, else a thread.  Processes start when
    they are first needed and end with the reader.  members: readers that share the CPUs.
    """

    def __init__(self, split: Split, device: torch.device, members: int = 1):
        self.split, self.device, self.members = split, device, members
        self.parts: list[np.ndarray] = []
        self.loader: DataLoader | None = None

    def __call__(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """uint8 [B,H,W,3], pinned where processes decode for a GPU: the images of each part (rows [B]) in turn.

        Raises ValueError naming an image that cannot be read, ChildProcessError when a process was killed.
        """
        images = self.split.images
        if not isinstance(images, Lazy):
            return map(self._take, parts)
        if self.loader is None and (count := processes(images.size, parts, self.members)):
            self.loader = self._by_processes(images, count)
        return self._by_a_thread(parts) if self.loader is None else self._loaded(self.loader, parts)

    def _take(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.split.take(rows))

    def _by_a_thread(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(1) as pool:
            yield from in_order(lambda rows: pool.submit(self._take, rows), parts, AHEAD)

    def _loaded(self, loader: DataLoader, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        self.parts[:] = [self.split.rows[rows] for rows in parts]
        yield from map(sound, handed_over(loader))

    def _by_processes(self, images: Lazy, count: int) -> DataLoader:
        preload(__name__)
        return DataLoader(
            Decoded(images),
            batch_size=None,
            sampler=self.parts,
            num_workers=count,
            prefetch_factor=EACH,
            pin_memory=self.device.type == "cuda",
            persistent_workers=True,
            worker_init_fn=follow,
            multiprocessing_context=CONTEXT,
            generator=torch.Generator(),  # else it draws from the one that the training draws from
        )


def handed_over(loader: DataLoader) -> Iterator[Tensor | Exception]:
    """What the processes of a loader give.  Raises ChildProcessError when one was killed."""
    try:
        with apart():
            found = iter(loader)
        yield from found
    except (RuntimeError, EOFError, OSError) as error:
        raise ChildProcessError(f"{LOST} ({' '.join(str(error).split())})") from error


def sound(images: Tensor | Exception) -> Tensor:
    """The images.  Raises what there is instead of them."""
    try:
        if isinstance(images, Exception):
            raise images
        return images
    finally:
        del images  # else the error holds itself through its traceback, and with it the processes


def processes(size: tuple[int, int], parts: Sequence[np.ndarray], members: int = 1) -> int:
    """How many processes decode images of `size` (H, W) for one of `members`; none where one thread does better.

    They hand images over in shared memory, of which a container may have too little.
    """
    count = min(torch.get_num_threads(), cpus(), MOST) // members
    longest = max(map(len, parts), default=0)
    needed = 3 * size[0] * size[1] * longest * (count * EACH + 1)
    fits = not SHARED.is_dir() or shutil.disk_usage(SHARED).free > needed
    return count if count > 1 and sum(map(len, parts)) >= FEW and fits and may_start() else 0
