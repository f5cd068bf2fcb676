"""What a search does next: proposals, promotions to longer training, trials to repeat; no Ray and no Optuna here.

A job is one training of one recipe on one rung, that is, at one length.  Every proposal is trained on the lowest rung;
with each block of them (by their numbers, each arm by itself) one goes to the next: the best of all blocks so far that
has not gone yet, nor any trial with the same recipe.  Where trials have another merit, it decides every second time.
None of this depends on the order in which trials end, so an interrupted search promotes what an undisturbed one would.

Jobs that want the same stage are not run at the same time: the later one is kept back, without a machine, and others
go first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, takewhile
from typing import Any

from rayltr.spec import Stage, chain, digest, line

KEPT_BACK = 8
"""So many jobs may wait for others; no more are proposed meanwhile, because a sampler learns from what has ended."""

Values = tuple[float, ...]
"""What a job reached, one number per objective, each so that less is better."""


@dataclass(frozen=True)
class Job:
    """One recipe at one length.

    number: of the proposal; rung: from 0.  asked: Optuna's number of the proposal.  stage: the completed chain, None
    when the point is no valid chain (`broken` says why).  again: it is repeated, alone on its machines.  seed: added
    to the search's, for a finalist.  without: the choice that is set back in it, for an ablation.
    """

    number: int
    rung: int
    params: dict[str, Any]
    asked: int = -1
    stage: Stage | None = field(default=None, compare=False)
    broken: str | None = None
    again: bool = False
    seed: int = 0
    without: str = ""

    @property
    def trial(self) -> str:
        """The identifier in the records: 0007, on a higher rung 0007.1, with a fresh seed 0007+1, ablated 0007+1-q."""
        marks = (".", self.rung), ("+", self.seed), ("-", self.without)
        return f"{self.number:04d}" + "".join(f"{mark}{value}" for mark, value in marks if value)

    @property
    def arm(self) -> Any:
        return self.params.get("arm")

    @cached_property
    def stages(self) -> list[tuple[str, str, int]]:
        """(line, address, epochs) of every stage, parents first."""
        return [(line(own), digest(own), own.epochs) for own in chain(self.stage)] if self.stage else []

    @cached_property
    def shape(self) -> Any:
        """What jobs share that pay when they are trained as one; one that is no valid chain has a shape of its own."""
        own = chain(self.stage) if self.stage else []
        kinds = {(one.method.name, one.backbone, one.batch, one.precision, one.source) for one in own if one.epochs}
        return (frozenset(kinds), sum(one.epochs for one in own)) if self.stage else self.trial


class Agenda:
    """The jobs of a search.

    propose: gives the next proposal as a job of rung 0, or None when all have been asked.  promoted: a job on the next
    rung.  blocks: how many jobs of each rung one is promoted from; there is one rung more than blocks.
    ahead: how many proposals are drawn in advance in order to begin with the one of which most is trained already.
    """

    def __init__(
        self,
        propose: Callable[[], Job | None],
        promoted: Callable[[Job], Job] = lambda job: job,
        blocks: Sequence[int] = (),
        ahead: int = 0,
    ):
        self.propose, self.promoted, self.blocks, self.ahead = propose, promoted, tuple(blocks), ahead
        self.known: dict[tuple[int, int], Job] = {}
        self.found: dict[tuple[int, int], Values | None] = {}
        self.merits: dict[tuple[int, int], float] = {}
        self.waiting: list[Job] = []
        self.running: dict[str, tuple[Job, int]] = {}
        self.made: set[str] = set()
        self.chosen: dict[tuple[int, Any], list[int | None]] = {}
        self.asked_all = False

    def next(self, like: Job | None = None) -> Job | None:
        """The job to begin now, or None when nothing may begin before another ends; only one of the shape of `like`."""
        if any(job.again for job, _ in self.running.values()):
            return None
        free = self.ready(like)
        while not self.asked_all and len(free) <= self.ahead and len(self.waiting) < self.ahead + KEPT_BACK:
            self.proposed()
            free = self.ready(like)
        if not free:
            return None
        first = max(free, key=self.trained) if self.ahead else free[0]
        self.waiting.remove(first)
        self.running[first.trial] = (first, 0)
        return first

    def ready(self, like: Job | None = None) -> list[Job]:
        """The waiting jobs that could begin now."""
        self.waiting += self.due()
        return [job for job in self.waiting if self.free(job) and (like is None or job.shape == like.shape)]

    def proposed(self) -> None:
        job = self.propose()
        if job is None:
            self.asked_all = True
            return
        self.known[job.number, 0] = job
        self.waiting.append(job)

    def finished(self) -> bool:
        """Whether nothing runs and nothing is left to do."""
        return not self.running and not self.ready() and self.asked_all

    def moved(self, trial: str, position: int) -> None:
        """A running job has come to the stage at this position of its chain."""
        if trial in self.running:
            job, before = self.running[trial]
            self.running[trial] = (job, position)
            self.made.update(address for _, address, _ in job.stages[before:position])

    def ended(self, job: Job, values: Values | None, merit: float | None = None) -> None:
        """A job has ended for good: with its values and perhaps another merit (more is better), or None: it failed."""
        self.running.pop(job.trial, None)
        self.known[job.number, job.rung] = job
        self.found[job.number, job.rung] = values
        if merit is not None:
            self.merits[job.number, job.rung] = merit
        if values is not None:
            self.made.update(address for _, address, _ in job.stages)

    def repeat(self, job: Job, *, alone: bool = True) -> None:
        """A job that died is run once more, when nothing else runs or, if it need not be `alone`, before others."""
        self.running.pop(job.trial, None)
        self.waiting.insert(0, replace(job, again=alone))

    def dropped(self, job: Job) -> None:
        """A job has neither ended nor will it be run again here: a resumed search proposes it once more."""
        self.running.pop(job.trial, None)

    def free(self, job: Job) -> bool:
        """Whether no running job is making something that this one needs."""
        if job.again:
            return not self.running
        missing = {line for line, address, _ in job.stages if address not in self.made}
        busy = {line for other, position in self.running.values() for line, _, _ in other.stages[position:]}
        return not missing & busy

    def trained(self, job: Job) -> int:
        """How many of the job's epochs other jobs have trained already."""
        return sum(epochs for _, address, epochs in job.stages if address in self.made)

    def due(self) -> list[Job]:
        """Jobs to promote: with every block that has ended one, unless it was promoted before."""
        found = []
        for rung, size in enumerate(self.blocks):
            came = self.at(rung)
            for arm in dict.fromkeys(self.known[own, rung].arm for own in came):
                numbers = [own for own in came if self.known[own, rung].arm == arm]
                chosen = self.chosen.setdefault((rung, arm), [])
                while self.done(seen := numbers[: size * (len(chosen) + 1)], rung, size, len(chosen)):
                    chosen.append(best := self.best(seen, chosen, rung))
                    if best is not None and (best, rung + 1) not in self.known:
                        found.append(self.promoted(self.known[best, rung]))
                        self.known[best, rung + 1] = found[-1]
        return found

    def at(self, rung: int) -> list[int]:
        """The proposals on a rung, in an order that no machine has a part in; none behind one that is still missing."""
        if not rung:
            return [*takewhile(lambda own: (own, 0) in self.known, count())]
        came = [own for (below, _), chosen in self.chosen.items() if below == rung - 1 for own in chosen]
        return [own for own in came if own is not None]

    def done(self, numbers: Sequence[int], rung: int, size: int, blocks: int) -> bool:
        """Whether proposals that are one block more than `blocks` have ended, or a part of one if no more can come."""
        ready = len(numbers) == size * (blocks + 1) or len(numbers) > size * blocks and self.closed(rung)
        return ready and all((own, rung) in self.found for own in numbers)

    def best(self, numbers: Sequence[int], chosen: Sequence[int | None], rung: int) -> int | None:
        """The best of the proposals that have a result and whose recipes were not chosen before."""
        taken = [self.known[own, rung].stages for own in chosen if own is not None]
        found = {own: self.found[own, rung] for own in numbers if self.known[own, rung].stages not in taken}
        good = {own: values for own, values in found.items() if values is not None}
        merits = {own: self.merits[own, rung] for own in good if (own, rung) in self.merits}
        if merits and len(chosen) % 2:
            return max(merits, key=merits.__getitem__)
        # only these can be the first; to rank all proposals so far would take the cube of their number
        front = {own: one for own, one in good.items() if not any(dominates(other, one) for other in good.values())}
        order = zip(ranked([*front.values()]), front, strict=True)
        return min(order, key=lambda pair: pair[0], default=(None, None))[1]

    def closed(self, rung: int) -> bool:
        """Whether no further job can come to a rung."""
        below = (self.known[key] for key in self.known if key[1] < rung)
        return self.asked_all and all((job.number, job.rung) in self.found for job in below)


def ranked(values: Sequence[Values]) -> list[tuple[float, float, int]]:
    """A sort key per point, the best least: non-dominated rank, then crowding distance, then the order given.

    Deb et al., NSGA-II, 2002.  With one objective this is the order of the values.
    """
    left, rank = set(range(len(values))), dict.fromkeys(range(len(values)), 0.0)
    layer = 0
    crowd: dict[int, float] = {}
    while left:
        front = {i for i in left if not any(dominates(values[j], values[i]) for j in left)}
        rank |= dict.fromkeys(front, float(layer))
        crowd |= crowding({i: values[i] for i in front})
        left, layer = left - front, layer + 1
    return [(rank[i], -crowd[i], i) for i in range(len(values))]


def dominates(one: Values, other: Values) -> bool:
    """No objective is worse, and one is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def crowding(front: dict[int, Values]) -> dict[int, float]:
    """The crowding distance of every point of a front; infinite at the ends."""
    found = dict.fromkeys(front, 0.0)
    for axis in range(len(next(iter(front.values()), ()))):
        order = sorted(front, key=lambda i: front[i][axis])
        width = front[order[-1]][axis] - front[order[0]][axis] or 1.0
        for before, i, after in zip([None, *order], order, [*order[1:], None], strict=False):
            ends = before is None or after is None
            found[i] += math.inf if ends else (front[after][axis] - front[before][axis]) / width  # type: ignore[index]
    return found
