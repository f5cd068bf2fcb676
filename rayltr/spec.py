"""What to train, as plain values: Fn, Stage, and how they are written down, hashed and scaled.

Standard library only: studies, the report and every command line import this module, so it must load in
milliseconds.  Names are not checked here; `rayltr.catalogue` knows which exist.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

CODE = 1
"""Version of the numerics.  Raise it when changed code trains other weights: old artifacts are then passed by."""

PARENTS = ("resume", "init", "teacher")


@dataclass(frozen=True)
class Fn:
    """A choice on one axis: the name of a function and its keywords, sorted by name."""

    name: str
    keywords: tuple[tuple[str, Any], ...] = ()

    def get(self, keyword: str, default: Any = None) -> Any:
        return dict(self.keywords).get(keyword, default)

    def but(self, **changes: Any) -> "Fn":
        """The same choice with some keywords changed; a keyword set to None is dropped."""
        return fn(self.name, **{**dict(self.keywords), **changes})


def fn(name: str | Callable, **keywords: Any) -> Fn:
    """`fn("ldam", max_margin=0.5)`.  A function may be given instead of its name.  A keyword that is None is absent."""
    name = name if isinstance(name, str) else name.__name__
    return Fn(name, tuple((key, _frozen(keywords[key])) for key in sorted(keywords) if keywords[key] is not None))


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, Fn)):
        return value
    raise ValueError(f"a keyword of fn() is a number, a string, a boolean, a list of these or an Fn, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run.  Everything here changes the numbers; where and how fast it runs is `rayltr.train.Resources`.

    `epochs` is the length of this stage alone, in epochs (0: no training, only the hand-over of weights).
    `horizon` is the length that schedules and progressive samplers refer to, in epochs since the clock started;
    None means the end of this stage.  A stage has at most one of `resume` (weights, optimiser and clock go on) and
    `init` (weights only, clock restarts); a `teacher` is frozen and consulted.
    """

    source: Fn
    epochs: int
    horizon: int | None = None
    method: Fn = field(default=Fn("supervised"))
    views: tuple[Fn, ...] = (Fn("flip_crop"),)
    sampler: Fn = field(default=Fn("power"))
    mixing: Fn | None = None
    backbone: Fn = field(default=Fn("resnet32"))
    head: Fn = field(default=Fn("linear"))
    loss: Fn = field(default=Fn("cross_entropy"))
    weight: Fn | None = None
    optimiser: Fn = field(default=Fn("sgd"))
    schedule: Fn = field(default=Fn("constant"))
    batch: int = 128
    precision: str = "fp32"
    seed: int = 0
    resume: "Stage | None" = None
    init: "Stage | None" = None
    teacher: "Stage | None" = None

    def but(self, **changes: Any) -> "Stage":
        return replace(self, **changes)


AXES = ("source", "method", "views", "sampler", "mixing", "backbone", "head", "loss", "weight", "optimiser", "schedule")


def parents(stage: Stage) -> dict[str, Stage]:
    """The parent stages by role, in the order resume, init, teacher."""
    return {role: parent for role in PARENTS if (parent := getattr(stage, role)) is not None}


def chain(stage: Stage) -> list[Stage]:
    """The stage and everything it needs, parents first, each once."""
    seen: dict[Stage, None] = {}
    for parent in parents(stage).values():
        seen.update(dict.fromkeys(chain(parent)))
    return [*(s for s in seen if s != stage), stage]


def start(stage: Stage) -> int:
    """The clock (in epochs) at which this stage begins: 0, or where the stage it resumes ended."""
    return end(stage.resume) if stage.resume else 0


def end(stage: Stage) -> int:
    """The clock (in epochs) at which this stage ends."""
    return start(stage) + stage.epochs


def scaled(stage: Stage, epochs: int) -> Stage:
    """The same chain made `epochs` long in all; every stage that trains keeps its share, at least one epoch.

    Horizons shrink or grow with the chain, so that a switch at 80 % of a schedule stays there.  Raises ValueError
    when there are more training stages than epochs.
    """
    trained = [s for s in chain(stage) if s.epochs]
    if not trained:
        return stage
    if epochs < len(trained):
        n = len(trained)
        raise ValueError(f"{epochs} epochs are too few for a chain of {n} training stages: give it {n} or more")
    total, cuts, done, given = sum(s.epochs for s in trained), {}, 0, 0
    for position, s in enumerate(trained):
        done += s.epochs
        left = len(trained) - position - 1
        upto = min(max(round(epochs * done / total), given + 1), epochs - left)
        cuts[s], given = upto - given, upto
    return _rescaled(stage, cuts, epochs / total)


def _rescaled(stage: Stage, cuts: dict[Stage, int], factor: float) -> Stage:
    new = {role: _rescaled(parent, cuts, factor) for role, parent in parents(stage).items()}
    short = stage.but(epochs=cuts.get(stage, 0), **new)
    if stage.horizon is None:
        return short
    return short.but(horizon=max(end(short), round(stage.horizon * factor)))


def truncated(stage: Stage, epochs: int) -> Stage:
    """The same chain cut off after `epochs` epochs in all; schedules stay those of the whole chain."""
    done = 0
    if epochs >= sum(own.epochs for own in chain(stage)):
        return stage
    for own in chain(stage):
        if own.epochs and done + own.epochs >= epochs:
            return own.but(epochs=epochs - done, horizon=own.horizon or end(own))
        done += own.epochs
    return stage


def mapped(stage: Stage, change: Callable[[Stage], Stage]) -> Stage:
    """The chain with `change` applied to every stage, parents first."""
    return change(stage.but(**{role: mapped(parent, change) for role, parent in parents(stage).items()}))


def dump(value: Any) -> Any:
    """A Stage, Fn or plain value as JSON-ready data; fields that are None are left out."""
    if isinstance(value, Fn):
        return {"fn": value.name, **{key: dump(item) for key, item in value.keywords}}
    if isinstance(value, Stage):
        return {f.name: dump(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) is not None}
    if isinstance(value, (list, tuple)):
        return [dump(item) for item in value]
    return value


def parse(data: Mapping[str, Any]) -> Stage:
    """The Stage that `dump` wrote.  Raises ValueError for a field that does not exist or is missing."""
    known = {f.name for f in fields(Stage)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"a stage has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}")
    if missing := sorted({"source", "epochs"} - set(data)):
        raise ValueError(f"a stage needs the field {missing[0]!r}")
    values: dict[str, Any] = {key: parse(v) if key in PARENTS else _parsed(v) for key, v in data.items()}
    return Stage(**values)


def _parsed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return fn(value["fn"], **{key: _parsed(item) for key, item in value.items() if key != "fn"})
    if isinstance(value, list):
        return tuple(_parsed(item) for item in value)
    return value


def line(stage: Stage) -> str:
    """64 hex digits that name everything about a stage but its length; parents enter by their addresses."""
    data = dump(stage)
    del data["epochs"]
    data |= {role: digest(parent) for role, parent in parents(stage).items()}
    text = json.dumps({"code": CODE, **data}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest(stage: Stage) -> str:
    """The address of a stage: `line@epoch`, where epoch is the clock at its end.

    Equal completed stages have equal addresses on every machine; complete a stage (`rayltr.catalogue.complete`)
    before its address is used, so that a default written out and a default left out are the same.
    """
    return f"{line(stage)}@{end(stage)}"


def flat(stage: Stage) -> dict[str, Any]:
    """One level of readable names and values: `loss`, `loss.gamma`, `resume.epochs`, ... for tables and records."""
    return dict(_leaves("", dump(stage)))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if "fn" in value:
            yield prefix.rstrip("."), value["fn"]
        for key, item in value.items():
            if key != "fn":
                yield from _leaves(f"{prefix}{key}.", item)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for position, item in enumerate(value):
            yield from _leaves(f"{prefix}{position}.", item)
    else:
        yield prefix.rstrip("."), value


class Trial(Protocol):
    """What a space may ask of a trial: the part of Optuna's `Trial` that `FixedTrial` and `RandomTrial` offer too."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...


class FixedTrial:
    """Replays one point of a space: the `suggest_*` calls return the values given.  Needs no Optuna.

    Raises ValueError when a parameter is missing or outside what the space allows there.  `asked` holds the
    parameters that the space has used.
    """

    def __init__(self, params: Mapping[str, Any]):
        self.params = dict(params)
        self.asked: dict[str, Any] = {}

    def _value(self, name: str, allowed: Callable[[Any], bool], what: str) -> Any:
        if name not in self.params:
            raise ValueError(f"the space asks for the parameter {name!r}, which is not given")
        if not allowed(self.params[name]):
            raise ValueError(f"parameter {name} = {self.params[name]!r} is not {what}")
        self.asked[name] = self.params[name]
        return self.params[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._value(name, lambda value: value in choices, f"one of {list(choices)}")

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self._value(name, lambda value: low <= value <= high, f"between {low} and {high}")

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return self._value(name, lambda value: low <= value <= high, f"between {low} and {high}")


class RandomTrial:
    """Draws a random point of a space, to check a space before it is searched.

    `asked` holds what was drawn, `ranges` what each parameter was drawn from (choices, or the kind of numbers).
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.asked: dict[str, Any] = {}
        self.ranges: dict[str, str] = {}

    def _drawn(self, name: str, value: Any, kind: Any) -> Any:
        self.ranges[name] = str(kind)
        return self.asked.setdefault(name, value)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._drawn(name, self.random.choice(choices), list(choices))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        value = self.random.uniform(low, high)
        value = low + step * int((value - low) / step) if step else value
        return self._drawn(name, value, "logarithmic numbers" if log else "numbers")

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return self._drawn(name, self.random.randrange(low, high + 1, step), "whole numbers")
