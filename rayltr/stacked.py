"""Several trials in one process that train their backbones as one.

Every trial runs the ordinary loop, in a thread and a lane of its own, and only one of them at a time.  What they do
together is the backbone: whoever calls it hands in the images and waits; once nobody can go on alone, networks of one
structure are computed at once (see `rayltr.joint`), and so are their gradients later.  Weights, statistics, random
numbers and errors stay each trial's own, so its numbers are those that it has alone, but for the order of sums.  What
cannot be computed at once runs by itself.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from rayltr.interface import Lane
from rayltr.joint import Network, Pass, Stack, autocast, structure

Report = Callable[[Any], None]
Job = Callable[[Lane, Report], None]


def bundle(jobs: Sequence[Job]) -> Iterator[Any]:
    """Runs jobs beside each other in this process and yields what they report, as it comes.

    A job is called with its lane, which belongs in its `Resources`, and a function that reports.  What one raises does
    not touch the others, and is raised when all have ended.  Where nobody listens any more, a report raises
    `InterruptedError`.
    """
    said: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
    errors: list[BaseException] = []
    shared, deaf = Shared(len(jobs)), threading.Event()

    def report(record: Any) -> None:
        if deaf.is_set():
            raise InterruptedError("nobody waits for this trial any more")
        said.put((record,))

    def run(lane: Beside, job: Job) -> None:
        try:
            lane.begin()
            job(lane, report)
        except BaseException as error:
            errors.append(error)
        finally:
            try:
                lane.end()
            finally:
                said.put(())

    for lane, job in zip(shared.lanes, jobs, strict=True):
        threading.Thread(target=run, args=(lane, job), daemon=True).start()
    shared.give()
    left = len(jobs)
    try:
        while left:
            record = said.get()
            left -= not record
            yield from record
    finally:
        deaf.set()
    if errors:
        raise errors[0]


class Beside(Lane):
    """The lane of a trial beside others.

    go: its turn has come.  ready: it could go on.  asks: what it waits for, as a key of what can be done at once, and
    what does it for several lanes.  images, leaf: what goes into its backbone, and the features that come out.
    pending: the pass that awaits the gradient of the leaf.  stack: of which its weights are views.
    """

    network: Network
    images: Tensor
    leaf: Tensor

    def __init__(self, shared: "Shared", members: int):
        self.shared, self.go, self.ready, self.random = shared, threading.Semaphore(0), True, random_state()
        self.members = members
        self.asks: tuple[Hashable, Callable[[list[Beside]], None]] | None = None
        self.error: Exception | None = None
        self.spent, self.since = 0.0, 0.0
        self.backbone: Any = None
        self.pending: Pass | None = None
        self.stack: Stack | None = None

    @contextmanager
    def training(self, module: nn.Module, built: Hashable) -> Iterator[None]:
        backbone: Any = getattr(module, "backbone", None)
        whole = getattr(module, "stacks", False) and getattr(module, "layer", None) is None  # nothing mixes inside it
        if not whole or not any(p.requires_grad for p in backbone.parameters()):
            yield
            return
        kind = built, *structure(backbone)
        self.backbone, self.network = backbone, self.shared.network(kind, backbone)
        backbone.forward = partial(self._forward, kind, backbone.forward)
        try:
            yield
        finally:
            del backbone.forward
            self.backbone = self.pending = self.stack = None

    def _forward(self, kind: Hashable, alone: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and self.backbone.training and not images.requires_grad
        if not trained or self.pending:
            return alone(images)
        self.images, precision = images, autocast(images.device.type)
        self._ask((kind, images.shape, images.dtype, precision), partial(together, precision))
        return self.leaf if self.pending else alone(images)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.pending:
            made = self.pending
            self._ask(made, lambda lanes: made.backward())
            self.pending = None

    def clock(self) -> float:
        """Seconds of this process that went into this trial, with its share of what was done at once."""
        return self.spent + time.monotonic() - self.since

    def rest(self, seconds: float) -> None:
        self._stop()
        self.shared.give(self)
        time.sleep(seconds)
        self.shared.take(self)
        self.begin()

    def begin(self) -> None:
        """Waits for its turn."""
        self.go.acquire()
        restore(self.random)
        self.since = time.monotonic()

    def end(self) -> None:
        self.shared.give(self)

    def _stop(self) -> None:
        self.spent += time.monotonic() - self.since
        self.random = random_state()

    def _ask(self, key: Hashable, work: Callable[[list["Beside"]], None]) -> None:
        """Waits until something is done, at once with what others ask for under the same key."""
        self.asks = key, work
        self._stop()
        self.shared.give(self)
        self.begin()
        error, self.error = self.error, None
        if error is not None:
            raise error


class Shared:
    """Whose turn it is, and what is done at once when nobody can go on alone."""

    def __init__(self, lanes: int):
        self.lanes = [Beside(self, lanes) for _ in range(lanes)]
        self.lock, self.busy = threading.Lock(), True
        self.networks: dict[Hashable, Network] = {}

    def network(self, kind: Hashable, backbone: nn.Module) -> Network:
        if kind not in self.networks:
            self.networks[kind] = Network(backbone)
        return self.networks[kind]

    def give(self, lane: Beside | None = None) -> None:
        """The turn of a lane is over, and that of the next one begins: in a fixed order, so that numbers repeat."""
        first = self.lanes.index(lane) + 1 if lane else 0
        order = self.lanes[first:] + self.lanes[:first]
        while True:
            with self.lock:
                after = next((other for other in order if other.ready), None)
                if after:
                    after.ready = False
                    after.go.release()
                    return
                if not any(other.asks for other in order):
                    self.busy = False  # all have ended, or rest
                    return
            self._answer()

    def take(self, lane: Beside) -> None:
        """A lane that has rested could go on."""
        with self.lock:
            lane.ready = True
            idle, self.busy = not self.busy, True
        if idle:
            self.give()

    def _answer(self) -> None:
        """Does what the lanes ask for, gradients first: so those that fell out of step come back into it."""
        asking = [lane for lane in self.lanes if lane.asks]
        groups: dict[Hashable, list[Beside]] = {}
        for lane in [lane for lane in asking if lane.pending] or asking:
            groups.setdefault(lane.asks[0], []).append(lane)  # type: ignore[index]
        for lanes in groups.values():
            began = time.monotonic()
            try:
                lanes[0].asks[1](lanes)  # type: ignore[index]
            except Exception as error:  # memory, mostly: the fault of none of them alone
                for lane in lanes:
                    lane.error = error
            for lane in lanes:
                lane.spent += (time.monotonic() - began) / len(lanes)
                lane.asks, lane.ready = None, True


def together(precision: tuple[bool, torch.dtype], lanes: list[Beside]) -> None:
    """Computes the features of several lanes; a single one, or what cannot be computed at once, is left alone."""
    network, stack, owners = lanes[0].network, lanes[0].stack, [lane.backbone for lane in lanes]
    if len(lanes) == 1 or not network.possible(lanes[0].images):
        return
    if stack is None or stack.owners != owners or any(lane.stack is not stack for lane in lanes):
        stack = Stack(network, owners)
    made = Pass(stack, [lane.images for lane in lanes], precision)
    for lane, leaf in zip(lanes, made.leaves, strict=True):
        lane.stack, lane.pending, lane.leaf = stack, made, leaf


def random_state() -> tuple[Tensor, Tensor | None]:
    """Of torch's global generators, which first weights and dropout draw from; all others belong to a trial."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def restore(state: tuple[Tensor, Tensor | None]) -> None:
    host, device = state
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
