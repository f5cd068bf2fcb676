"""What the sections of a report share: the trials to be compared, the bootstrap, and who stands out.

Everything is computed once, when it is first asked for, from explicit seeds.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import nan

import numpy as np
from numpy.typing import NDArray

from analysis import ensembles, estimates, pareto, resample
from analysis.ensembles import Ensembles
from analysis.estimates import Estimate
from analysis.load import Run, Trial
from analysis.taunorm import Normed, normed
from rayltr.choice import ACCURACY, NLL
from rayltr.metrics import GROUPS

Floats = NDArray[np.float64]
Scores = dict[str, Floats]

SCORES = ("balanced", *GROUPS)
TIMES = 1000
"""Bootstrap draws behind every interval."""

THIN = 0.003
"""Points of the front that are closer than this, in both accuracies, are listed once."""

REACH, MOST = 0.03, 400
"""A point may be on the front of another draw if no point beats it by more than this; so many are looked at."""


@dataclass(frozen=True)
class Spot:
    """A point of the front: a trial at a tau, its accuracies, and how often it is on the front of a bootstrap draw."""

    trial: Trial
    tau: float
    scores: dict[str, Estimate]
    share: float


@dataclass(frozen=True, eq=False)
class Evidence:
    """A run and what can be said of it.

    Without stored predictions (`paired` is false) there are scores, but no intervals.
    """

    run: Run
    times: int = TIMES
    seed: int = 0

    @cached_property
    def trials(self) -> list[Trial]:
        """The trials to be compared, best on balance first, so that this decides between equals."""
        return self.run.measured or self.run.ranked

    @property
    def paired(self) -> bool:
        return self.run.items is not None and bool(self.run.measured)

    @cached_property
    def target(self) -> NDArray[np.int64]:
        assert self.run.items is not None
        return self.run.items.target

    @cached_property
    def hits(self) -> NDArray[np.bool_]:
        """At the fitted tau, [M, N]."""
        return np.stack([trial.hits() for trial in self.trials])

    @cached_property
    def likelihood(self) -> NDArray[np.float32] | None:
        """The log-likelihoods of the images, [M, N], where they decide."""
        found = [trial.likelihood for trial in self.trials if trial.likelihood is not None]
        return np.stack(found) if self.run.criterion.by == NLL and self.paired else None

    def deciding(self, score: str) -> str:
        """The name of what decides a choice by a score, among those of `points` and `samples`."""
        return score if self.run.criterion.by == ACCURACY else f"{score}{resample.LIKELIHOOD}"

    @cached_property
    def points(self) -> Scores:
        """The scores at the fitted tau, each [M], and what decides; as recorded, so that every choice is the run's."""
        merit, rows = self.run.criterion.merit, [trial.judged for trial in self.trials]
        scores = {name: np.array([trial.val[f"fitted_{name}"] for trial in self.trials]) for name in SCORES}
        return scores | {self.deciding(name): np.array([merit(row, name) for row in rows]) for name in SCORES}

    @cached_property
    def draws(self) -> NDArray[np.uint16]:
        return resample.draws(self.target, self.times, self.seed)

    @cached_property
    def samples(self) -> Scores:
        """The same in every draw of the images, each [B, M]."""
        return resample.graded(self.hits, self.likelihood, self.target, self.run.groups, self.draws)

    @cached_property
    def control(self) -> int | None:
        """The best of the control arm, by what decides."""
        return next((i for i, trial in enumerate(self.trials) if trial.control), None)

    @cached_property
    def best(self) -> int | None:
        """The best of all on balance, by what decides."""
        return 0 if self.trials else None

    @cached_property
    def costs(self) -> Floats:
        """Seconds of training, infinite where unknown."""
        return np.nan_to_num([trial.cost for trial in self.trials], nan=np.inf)

    @cached_property
    def sizes(self) -> Floats:
        """Weights of the models, infinite where unknown."""
        return np.array([trial.recorded.get("val.weights", np.inf) for trial in self.trials])

    @cached_property
    def shown(self) -> dict[str, Trial]:
        """The control and the best trial, as far as their predictions are stored; one of them if they are the same."""
        places = {"control": self.control, "best": None if self.best == self.control else self.best}
        found = {kind: self.trials[i] for kind, i in places.items() if i is not None}
        return {kind: trial for kind, trial in found.items() if trial.per_class is not None}

    @cached_property
    def normed(self) -> tuple[dict[str, Normed], str]:
        """What tau-norm makes of the trials of `shown`, and of those that it makes nothing of a note why, if any."""
        found: dict[str, Normed] = {}
        missing: dict[str, list[str]] = {}
        for kind, trial in self.shown.items():
            try:
                found[kind] = normed(self.run, trial)
            except ValueError as error:
                missing.setdefault(str(error), []).append(trial.id)
        return found, " ".join(f"No tau-norm of {' and '.join(ids)}: {why}." for why, ids in missing.items())

    def spread(self, name: str = "balanced") -> Floats:
        """The standard deviation [M, M] of the difference of two trials in a score over the draws."""
        shared = np.atleast_2d(np.cov(self.samples[name], rowvar=False))
        own = np.diag(shared)
        return np.sqrt(np.clip(own[:, None] + own[None] - 2 * shared, 0, None))

    @cached_property
    def reliable(self) -> bool:
        """Whether a correction for choosing the best of many can be believed: nearly all classes have some images."""
        return self.paired and estimates.reliable(self.target, self.run.groups)

    @cached_property
    def ensembles(self) -> Ensembles:
        """The ensembles of the run; with several runs only the reason why there are none."""
        if self.run.parts:
            return Ensembles(reason="ensembles are made of the trials of one run; report that run alone")
        return ensembles.study(self.run.folder, seed=self.seed, again=True)

    @cached_property
    def fresh(self) -> dict[int, list[Trial]]:
        """The finalists by their positions: their recipes trained with seeds that chose nothing."""
        return {i: again for i, trial in enumerate(self.trials) if (again := self.run.repeats(trial))}

    @cached_property
    def _repeated(self) -> dict[int, Scores]:
        """The scores of fresh seeds in every draw, by the position of their finalist, each [B, seeds]."""
        return {
            i: resample.grouped(np.stack([one.hits() for one in again]), self.target, self.run.groups, self.draws)
            for i, again in self.fresh.items()
        }

    def _mean(self, i: int, name: str) -> float:
        """A score of a finalist as measured, over its fresh seeds."""
        return float(np.mean([again.val[f"fitted_{name}"] for again in self.fresh[i]]))

    def estimate(self, i: int, name: str) -> Estimate | None:
        """A score of a trial with its interval: over images, and for a finalist over its fresh seeds.

        Of a finalist only these count: the search's own seed chose it, perhaps for its luck.
        """
        if not self.paired or np.isnan(self.points[name][i]):
            return None
        if i in self.fresh:
            return replace(estimates.seeds([*self._repeated[i][name].T]), value=self._mean(i, name))
        return estimates.estimate(float(self.points[name][i]), self.samples[name][:, i])

    def beyond(self, i: int, j: int, name: str) -> Estimate | None:
        """What trial i has more than trial j, compared image by image; of two finalists over their fresh seeds."""
        if not self.paired or np.isnan(self.points[name][[i, j]]).any():
            return None
        if i in self.fresh and j in self.fresh:
            found = estimates.apart([*self._repeated[i][name].T], [*self._repeated[j][name].T])
            return replace(found, value=self._mean(i, name) - self._mean(j, name))
        return estimates.difference(self.samples[name], i, j, self.points[name])

    def changed(self, one: Trial, other: Trial) -> dict[str, Estimate | None]:
        """By score, how much better the other is than the one, on the same images; None where nothing was measured."""
        values = {name: (one.val[f"fitted_{name}"], other.val[f"fitted_{name}"]) for name in SCORES}
        if not self.paired:
            found = {name: Estimate(after - before, nan, nan) for name, (before, after) in values.items()}
        else:
            hits = np.stack([one.hits(), other.hits()])
            samples = resample.grouped(hits, self.target, self.run.groups, self.draws)
            found = {name: estimates.difference(samples[name], 1, 0, values[name]) for name in SCORES}
        return {name: own if np.isfinite(own.value) else None for name, own in found.items()}

    @cached_property
    def attained(self) -> Floats:
        """What at least half of the fresh seeds reach with the finalists at any tau: corners (many, few) [K, 2]."""
        sets: dict[int, list[Floats]] = {}
        for again in (one for repeats in self.fresh.values() for one in repeats):
            points = again.points()[:, 1:]
            sets.setdefault(again.row["seed"], []).append(points[np.isfinite(points).all(1)])
        return pareto.attainment([np.concatenate(own) for own in sets.values()]) if len(sets) > 1 else np.zeros((0, 2))

    @cached_property
    def curves(self) -> Floats:
        """(tau, many, few) of the trials with both, [M', K, 3] as far as predictions are stored."""
        found = [trial.points() for trial in self.both]
        return np.stack(found) if found else np.zeros((0, 2, 3))

    @cached_property
    def both(self) -> list[Trial]:
        """The trials with accuracies on both many and few classes."""
        return [trial for trial in self.trials if np.isfinite(trial.points()).all()]

    @cached_property
    def front(self) -> list[Spot]:
        """The front of many against few over all trials and tau, thinned, from head to tail."""
        if not len(self.curves):
            return []
        flat = self.curves.reshape(-1, 3)
        listed = pareto.thinned(flat[:, 1:], THIN)
        if not self.paired:
            return [self._plain(i) for i in listed]
        rivals = self._rivals(flat[:, 1:], listed)
        steps = self.curves.shape[1]
        hits = np.stack([self.both[i // steps].swept()[i % steps] for i in rivals])
        samples = resample.grouped(hits, self.target, self.run.groups, self.draws)
        now = resample.grouped(hits, self.target, self.run.groups)
        share = pareto.on_front(samples["many"], samples["few"])
        spots = []
        for k in range(len(listed)):
            scores = {n: estimates.estimate(float(now[n][0, k]), samples[n][:, k]) for n in SCORES}
            spots.append(Spot(self.both[rivals[k] // steps], float(flat[rivals[k], 0]), scores, float(share[k])))
        return spots

    def _plain(self, i: int) -> Spot:
        trial, tau = self.both[i // self.curves.shape[1]], float(self.curves.reshape(-1, 3)[i, 0])
        prefix = "" if tau == 0 else "fitted_"
        values = {name: trial.val[f"{prefix}{name}"] for name in SCORES}
        return Spot(trial, tau, {name: Estimate(v, v, v) for name, v in values.items()}, float("nan"))

    def _rivals(self, points: Floats, listed: NDArray[np.int64]) -> NDArray[np.int64]:
        """The listed points of the front, then others that come close to it."""
        edge = points[pareto.front(points)]
        gap = (edge[None] - points[:, None]).min(2).max(1)
        close = np.flatnonzero((gap <= REACH) & ~np.isin(np.arange(len(points)), listed))
        return np.concatenate([listed, close[np.argsort(gap[close], kind="stable")][:MOST]])

    def area(self, trials: list[Trial] | None = None) -> Estimate | None:
        """The area below the front over some trials (all of them) and tau, its choice corrected."""
        chosen = [t for t in (self.both if trials is None else trials) if t in self.both]
        if not self.paired or not chosen:
            return None
        hits = np.concatenate([trial.swept() for trial in chosen])
        points = np.concatenate([trial.points()[:, 1:] for trial in chosen])
        return pareto.area(
            hits[self._rivals(points, pareto.front(points))], self.target, self.run.groups, 200, self.seed
        )
