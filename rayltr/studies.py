"""Studies by name or by file, and the plan that turns a point of a study's space into a chain for the user's data."""

import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import search_spaces
from rayltr import catalogue
from rayltr.spec import AXES, FixedTrial, Fn, Stage, Trial, mapped, parents, scaled, truncated
from search_spaces import control as default_control

CONTROL, STUDY = "control", "study"
"""The two values of the parameter `arm`: the tuned plain baseline that every search contains, and the study itself."""


CHECKED = 24
"""Random points of a space that are checked before a search: a misspelt name is found now, not after hours."""
EVERY = 5
"""The first and then every fifth proposal of a search is of the control arm."""

FIDELITIES = {"none": (), "schedules": (9,), "halving": (3, 3), "curves": (3, 3)}
"""How a search may save epochs: for every rung below the full length, of how many recipes one goes on to the next.

`schedules` and `halving` train complete short schedules, because a recipe that changes something late gains only
then; `curves` trains the beginnings of full schedules, which only some studies allow.
"""


SHORTEST = 3
"""Epochs of the shortest rung: few chains have more than three stages."""


@dataclass(frozen=True)
class Study:
    """A space of chains.

    control: the plain baseline, tuned like the rest.  presets: named points of the space.  chains: named chains that
    lie outside it, such as a recipe for much larger images.  published: what the literature reports for either, by
    the column of the table beside the study (see `reported`).  curves: whether the beginnings of its schedules rank
    its recipes fairly (`CURVES = True` in the file).  plain: the value of a choice that leaves its trick out, by the
    name of its parameter (`PLAIN` in the file); an ablation sets them back one at a time.
    """

    name: str
    space: Callable[[Trial], Stage]
    control: Callable[[Trial], Stage]
    presets: Mapping[str, Mapping[str, Any]]
    chains: Mapping[str, Stage]
    published: Mapping[str, Mapping[str, str]]
    file: Path
    curves: bool = False
    plain: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, trial: Trial) -> Stage:
        """The chain of a trial of either arm."""
        return self.point(trial.suggest_categorical("arm", [STUDY, CONTROL]), trial)

    @property
    def named(self) -> list[str]:
        """Everything that --preset takes."""
        return [*self.presets, *self.chains]

    def point(self, arm: str, trial: Trial) -> Stage:
        """The chain of a trial of one arm.  Raises ValueError for a space that fails there or gives no chain."""
        try:
            stage = (self.control if arm == CONTROL else self.space)(trial)
        except Exception as error:
            place = f" at {asked}" if (asked := getattr(trial, "asked", None)) else ""
            raise ValueError(f"the study {self.name} fails{place}: {type(error).__name__}: {error}") from error
        return sound(stage, f"the study {self.name}")


def names() -> list[str]:
    """The studies that come with rayltr."""
    files = [path for folder in search_spaces.__path__ for path in Path(folder).glob("*.py")]
    return sorted(path.stem for path in files if path.stem not in ("__init__", "control"))


def find(study: str) -> Study:
    """A study by its name, or by the path of a Python file with a function `space(trial) -> Stage`.

    Raises ValueError for what does not exist or is no study.
    """
    if study.endswith(".py") or "/" in study:
        return _study(_from_file(Path(study)), Path(study).stem)
    if study not in names():
        raise ValueError(f"unknown study {study!r}: {meant(study)}; or the path of a .py file")
    return _study(import_module(f"search_spaces.{study}"), study)


def meant(word: str) -> str:
    """What somebody may mean by a study that does not exist."""
    owners = [name for name in names() if word in find(name).named]
    return f"it is a preset: {owners[0]} --preset {word}" if owners else catalogue.nearest(word, names())


def _from_file(path: Path) -> ModuleType:
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"there is no study file {path}; studies that come with rayltr: {', '.join(names())}")
    name = f"rayltr_study_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the study file {path} cannot be loaded: {type(error).__name__}: {error}") from error
    catalogue.extend(module)
    return module


def _study(module: ModuleType, name: str) -> Study:
    if not callable(getattr(module, "space", None)):
        raise ValueError(f"the study {name} has no function space(trial) -> Stage")
    paper = getattr(module, "PAPER", {})
    if not isinstance(paper, Mapping):
        raise ValueError(f"PAPER of the study {name} is a dict of parameters, or of such dicts by name, not {paper!r}")
    if not all(isinstance(value, (Mapping, Stage)) for value in paper.values()):
        paper = {"paper": paper}
    presets = {key: value for key, value in paper.items() if isinstance(value, Mapping)}
    chains = {key: sound(value, f"the study {name}") for key, value in paper.items() if isinstance(value, Stage)}
    plain = getattr(module, "PLAIN", {})
    if not isinstance(plain, Mapping):
        raise ValueError(f"PLAIN of the study {name} is a dict of parameters, not {plain!r}")
    control = getattr(module, "control", apart)
    assert module.__file__ is not None
    file = Path(module.__file__)
    return Study(name, module.space, control, presets, chains, reported(file.with_suffix(".csv")), file,
                 bool(getattr(module, "CURVES", False)), plain)  # fmt: skip


def reported(table: Path) -> dict[str, dict[str, str]]:
    """What the literature reports, by preset and column, from the table beside a study, if there is one.

    Columns: `preset`, one per data set (top-1 error in %), and `note`; cells may be empty and are then left out.
    """
    if not table.is_file():
        return {}
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["preset"]: {key: cell for key, cell in row.items() if cell and key != "preset"} for row in rows}


def listing(study: Study) -> list[str]:
    """The presets of a study, one per line, with their published errors."""
    return [f"--preset {name:26} {_cells(study.published.get(name, {}))}".rstrip() for name in study.named]


def _cells(row: Mapping[str, str]) -> str:
    errors = ", ".join(f"{error} ({data.replace('_', ' ')})" for data, error in row.items() if data != "note")
    return "; ".join(part for part in (errors and f"published error % {errors}", row.get("note")) if part)


def apart(trial: Trial) -> Stage:
    """The default control arm, under parameter names of its own: a study may use the same words for other ranges."""
    return default_control.control(Renamed(trial))


class Renamed:
    """A trial whose parameters are called `control.<name>`."""

    def __init__(self, trial: Trial):
        self.trial = trial

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.trial.suggest_categorical(f"control.{name}", choices)

    def suggest_float(self, name: str, *range: Any, **how: Any) -> float:
        return self.trial.suggest_float(f"control.{name}", *range, **how)

    def suggest_int(self, name: str, *range: Any, **how: Any) -> int:
        return self.trial.suggest_int(f"control.{name}", *range, **how)


def sound(stage: Any, origin: str) -> Stage:
    """The chain, if it is made of Stages, Fns and numbers.  Raises ValueError, naming `origin`, for what is not."""
    if not isinstance(stage, Stage):
        raise ValueError(f"{origin} gives {stage!r}, which is no Stage")
    for axis in AXES:
        value = getattr(stage, axis)
        if axis == "views" and not (isinstance(value, tuple) and all(isinstance(view, Fn) for view in value)):
            raise ValueError(f"{origin}: the views of a stage are a tuple of fn(...), not {value!r}")
        if axis != "views" and not (isinstance(value, Fn) or value is None and axis in ("mixing", "weight")):
            raise ValueError(f"{origin}: the {axis} of a stage is fn(...), not {value!r}")
    for name, value in (("epochs", stage.epochs), ("horizon", stage.horizon or 0)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{origin}: the {name} of a stage is a whole number, not {value!r}")
    for parent in parents(stage).values():
        sound(parent, origin)
    return stage


@dataclass(frozen=True)
class Plan:
    """What the command line changes in every chain of a study; None leaves the study's own choice.

    study: name or path.  epochs: length of the whole chain.  cut: train only its first epochs, on its own schedule.
    Resources and places are not here: a plan changes numbers.
    """

    study: str
    source: Fn | None = None
    epochs: int | None = None
    batch: int | None = None
    backbone: Fn | None = None
    precision: str | None = None
    seed: int | None = None
    cut: int | None = None

    def changed(self, stage: Stage) -> Stage:
        """The chain as it is run: on the user's data, scaled to the epochs asked for, completed and checked."""
        wanted = {name: getattr(self, name) for name in ("source", "batch", "backbone", "precision", "seed")}
        changes = {name: value for name, value in wanted.items() if value is not None}
        stage = mapped(stage, lambda own: own.but(**changes))
        whole = catalogue.complete(stage if self.epochs is None else scaled(stage, self.epochs))
        return whole if self.cut is None else truncated(whole, self.cut)

    def stage(self, study: Study, params: Mapping[str, Any]) -> Stage:
        """The chain of one point of the space.  Raises ValueError for a parameter the space does not use."""
        trial = FixedTrial(params)
        stage = study(trial)
        if unused := sorted(set(params) - set(trial.asked)):
            raise ValueError(f"the study {study.name} has no use for the parameter {unused[0]!r} at this point")
        return self.changed(stage)


def rungs(plan: Plan, fidelity: str) -> tuple[Plan, ...]:
    """The plans of the rungs of a search, shortest first; the last is the plan itself.

    Raises ValueError when the shortest rung would have less than three epochs.
    """
    blocks = FIDELITIES[fidelity]
    if not blocks:
        return (plan,)
    assert plan.epochs is not None
    lengths = [round(plan.epochs / math.prod(blocks[rung:])) for rung in range(len(blocks))]
    if lengths[0] < SHORTEST:
        raise ValueError(f"--fidelity {fidelity} trains recipes for a {math.prod(blocks)}th of --epochs {plan.epochs} "
                         f"first; that takes at least {SHORTEST * math.prod(blocks)} epochs")  # fmt: skip
    how = "cut" if fidelity == "curves" else "epochs"
    return (*(replace(plan, **{how: length}) for length in lengths), plan)  # type: ignore[arg-type]


def jobs(trials: int, fidelity: str) -> int:
    """How many trainings a search of so many proposals has, on all rungs."""
    control = math.ceil(trials / EVERY)
    arms, total = [control, trials - control], trials
    for block in FIDELITIES[fidelity]:
        arms = [math.ceil(count / block) for count in arms]
        total += sum(arms)
    return total
