"""How a search draws its points: a balanced design first, then a model of what was found, and what is known before.

The Optuna study of a search may hold results of other runs beside its own trials (see `warm`).  Those take Optuna
numbers too, so a trial is counted by `number`, which leaves them out: it is dense and never changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any

import numpy as np
import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from rayltr import records
from rayltr.catalogue import nearest
from rayltr.choice import rung_of, score, whole
from rayltr.objectives import OBJECTIVES, direction
from rayltr.studies import EVERY, STUDY, Plan, Study

Ranges = dict[str, BaseDistribution]
Point = tuple[str, dict[str, Any], list[float]]

STRATA = 8
"""Parts of a range of numbers of which a block of the design meets each once; a category is a part of its own."""
REDRAWN = 8
"""How often a model draws anew for a trial when it gives what was proposed before; after that the design draws it."""
RECIPES = 5
"""How many recipes of a run with other data are tried first."""
RESULT, RECIPE = "result_of", "recipe_of"
"""User attributes with the run and trial that an added result, or the point of a trial, was taken from."""


class Design(RandomSampler):
    """A balanced quasi-random design for spaces with conditional parameters.

    Every parameter has a Latin hypercube of its own, in blocks (McKay et al. 1979, "A comparison of three methods for
    selecting values of input variables"): as many consecutive draws of it as it has choices or strata meet each once,
    in random order, so it is balanced over the trials that have it.  A value depends on the seed, the name and how
    many earlier trials drew that name: not on results, on what runs beside it, or on a restart in mid-trial.
    """

    def __init__(self, seed: int):
        super().__init__(seed)
        self.seed = seed

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        having = [one for one in earlier(study, trial) if param_name in one.params]
        drawn = sum(param_name not in one.system_attrs.get("fixed_params", {}) for one in having)
        parts = strata(param_distribution)
        block, place = divmod(drawn, parts)
        random = np.random.default_rng(list(f"{self.seed}/{param_name}/{block}".encode()))
        stratum, within = random.permutation(parts)[place], random.random(parts)[place]
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[stratum]
        even = _SearchSpaceTransform({param_name: param_distribution})  # where a uniform draw is one of the range
        low, high = even.bounds[0]
        return even.untransform(np.array([low + (stratum + within) / parts * (high - low)]))[param_name]


def strata(distribution: Any) -> int:
    """The number of parts of a range: one for each value where they are few, else STRATA."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    even = distribution.step is not None and not distribution.log
    return min(STRATA, round((distribution.high - distribution.low) / distribution.step) + 1) if even else STRATA


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": RandomSampler,
    "quasi": Design,
}


class Phased(BaseSampler):
    """Draws the first `designed` trials by `Design`, later ones by the sampler of a name.

    Every later trial has a sampler of its own, seeded by its number: draws follow from the seed and the history alone,
    and a search that is resumed with the same seed does not repeat its first ones.  Where all parameters are
    categories, a model soon gives the same few points for ever; they would teach it nothing.
    """

    def __init__(self, name: str, seed: int, designed: int):
        self.name, self.seed, self.designed = name, seed, designed
        self.design, self.open = Design(seed), dict[int, BaseSampler]()

    def of(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        """The sampler of a trial."""
        if (own := number(study, trial)) < self.designed:
            return self.design
        if own not in self.open:
            seed = np.random.SeedSequence([self.seed, own]).generate_state(1)[0]
            self.open[own] = SAMPLERS[self.name](int(seed))
        return self.open[own]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Ranges:
        return self.of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Ranges) -> dict[str, Any]:
        own = self.of(study, trial)
        for _ in range(REDRAWN):
            drawn = own.sample_relative(study, trial, search_space)
            if not drawn or not repeated(study, trial, drawn):
                return drawn
        self.open[number(study, trial)] = self.design
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.of(study, trial).before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.of(study, trial).after_trial(study, trial, state, values)
        self.open.pop(number(study, trial), None)


def sampler(name: str, seed: int, designed: int) -> BaseSampler:
    """The sampler of a search; `quasi` is a design throughout, `random` has none.  Resume with the same arguments."""
    return Design(seed) if name == "quasi" else Phased(name, seed, 0 if name == "random" else designed)


def designed(trials: int, starts: int = 0) -> int:
    """After how many trials of a search its design ends.

    Three tenths of all trials, rounded up, are points of the study that it draws, besides the control arm's and the
    presets that are tried first (`starts`).
    """
    free = -starts
    for own in range(trials):
        free += own % EVERY != 0
        if 10 * free >= 3 * trials:
            return own + 1
    return trials


def earlier(study: optuna.Study, trial: Any) -> list[FrozenTrial]:
    """The search's own trials with a smaller Optuna number, in order: without the results that `warm` added."""
    there = study.get_trials(deepcopy=False)
    return [one for one in there if one.number < trial.number and RESULT not in one.user_attrs]


def number(study: optuna.Study, trial: Any) -> int:
    """The number of a trial among the search's own: 0, 1, 2, ... whatever results were added before or between."""
    return len(earlier(study, trial))


def repeated(study: optuna.Study, trial: FrozenTrial, drawn: Mapping[str, Any]) -> bool:
    """Whether a trial that gets these values for all it may ask would be one that was drawn before."""
    point = {**drawn, **trial.system_attrs.get("fixed_params", {})}
    return any(one.params and one.params.items() <= point.items() for one in earlier(study, trial))


def distributions(study: Study, draws: int = 256) -> Ranges:
    """The distribution of every parameter of either arm that a preset, or one of `draws` random points, asks for."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the study that notes them is no news
    notes, found = optuna.create_study(sampler=RandomSampler(seed=0)), dict[str, BaseDistribution]()
    for params in study.presets.values():
        notes.enqueue_trial({"arm": STUDY, **params})
    for _ in range(len(study.presets) + draws):
        trial = notes.ask()
        with suppress(ValueError):  # a rare point that is no chain has asked for its parameters all the same
            study(trial)
        found |= trial.distributions
    return found


def starts(study: Study, trials: int, asked: Sequence[str] | None) -> list[dict[str, Any]]:
    """Points to evaluate first: presets of the study by name, or, for None, its first ones (a tenth of the trials).

    Raises ValueError for an unknown name, and for a preset that is no point of the space: it would end the search.
    """
    points: list[dict[str, Any]] = []
    for name in list(study.presets)[: -(-trials // 10)] if asked is None else asked:
        if name not in study.presets:
            have = nearest(name, study.presets) if study.presets else "it defines no PAPER"
            raise ValueError(f"the study {study.name} has no preset {name!r}; {have}")
        point = {"arm": STUDY, **study.presets[name]}
        Plan(study.name).stage(study, point)
        points += [] if point in points else [point]
    return points


def propose(study: optuna.Study, point: Mapping[str, Any], **origin: str) -> bool:
    """Has a point evaluated soon; False if it was proposed before, or if there is no place left for it.

    It takes the place of the next trial that is laid down with nothing but the same arm, so that arms and number of
    trials stay as they are.  origin: noted in the trial's user attributes.
    """
    point = {"arm": STUDY, **point}
    laid = [(one, one.system_attrs.get("fixed_params")) for one in study.get_trials(deepcopy=False)]
    if any(fixed == point for _, fixed in laid):
        return False
    for trial, fixed in laid:
        if trial.state == TrialState.WAITING and fixed == {"arm": point["arm"]} and not trial.params:
            study._storage.set_trial_system_attr(trial._trial_id, "fixed_params", point)
            for key, value in origin.items():
                study._storage.set_trial_user_attr(trial._trial_id, key, value)
            return True
    return False


def warm(
    study: optuna.Study,
    space: Study,
    runs: Sequence[str | PathLike],
    objectives: Sequence[str],
    same: Callable[[dict[str, Any]], bool],
) -> str:
    """Starts a search from what other runs found, and says in a line what it took; nothing is taken twice.

    The results of a run that is the `same` by its run.json (equal data and epochs) are added to the Optuna study.  Of
    any other run the best recipes by the first objective are proposed.  What the space does not know is left out.
    Raises ValueError for a folder that is no run, before anything is taken.
    """
    ranges, taken = distributions(space), []
    equals = [(run, same(records.read_run(run))) for run in runs]
    for run, equal, points in [(run, equal, _points(run, ranges, objectives, equal)) for run, equal in equals]:
        count = _add(study, points, ranges) if equal else _try(study, points, direction(objectives[0]))
        what = f"{count} {'result' if equal else 'recipe'}{'s' * (count != 1)} of {run}"
        taken += [what if equal else f"{what} to try first"] if count else []
    return f"warm start: {', '.join(taken) or 'nothing new in ' + ', '.join(map(str, runs))}"


def _points(run: str | PathLike, ranges: Ranges, objectives: Sequence[str], equal: bool) -> list[Point]:
    """(origin, parameters that the space knows, values of the objectives) of complete trials; the first is finite.

    Results count on the lowest rung, which is what the sampler of an `equal` run was told; recipes at full length.
    """
    home = records.filesystem(run)[1]
    rows = [row for row in records.read_trials(run).to_pylist() if row["state"] == "complete"]
    rows = [row for row in rows if (rung_of(row) == 0 if equal else whole(row))]
    aims = [OBJECTIVES[name] for name in objectives]
    points = [(f"{home}:{row['trial']}", _known(row, ranges), [score(row, aim) for aim in aims]) for row in rows]
    return [point for point in points if set(point[1]) - {"arm"} and math.isfinite(point[2][0])]


def _known(row: Mapping[str, Any], ranges: Ranges) -> dict[str, Any]:
    """The parameters of a row that are in the space, as it has them: the records may hold 1 as 1.0 or as "1"."""
    known = {}
    for name, distribution in ranges.items():
        value = row.get(f"{records.PARAMETER}{name}")
        value = next((one for one in getattr(distribution, "choices", ()) if str(one) == value), value)
        with suppress(ValueError):  # None, or no number
            inner = distribution.to_internal_repr(value)
            if distribution._contains(inner):
                known[name] = distribution.to_external_repr(inner)
    return known


def _add(study: optuna.Study, points: Sequence[Point], ranges: Ranges) -> int:
    there = {trial.user_attrs.get(RESULT) for trial in study.get_trials(deepcopy=False)}
    new = [one for one in points if one[0] not in there and all(map(math.isfinite, one[2]))]
    for origin, params, values in new:
        known = {name: ranges[name] for name in params}
        study.add_trial(create_trial(values=values, params=params, distributions=known, user_attrs={RESULT: origin}))
    return len(new)


def _try(study: optuna.Study, points: Sequence[Point], goal: str) -> int:
    best: dict[frozenset, Point] = {}
    for one in sorted(points, key=lambda one: one[2][0], reverse=goal == "max"):
        best.setdefault(frozenset(one[1].items()), one)
    return sum(propose(study, params, **{RECIPE: origin}) for origin, params, _ in list(best.values())[:RECIPES])
