"""Which names and keywords exist on every axis, read from the source text: checks and completes stages.

A misspelt loss must be answered in well under a second, and torch alone takes longer than that to import.  So the
tables (`LOSSES = {f.__name__: f for f in (...)}` or a literal dict) are parsed, not imported.  Functions of the
user's own study file take part after `extend`.
"""

import ast
import difflib
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rayltr.spec import AXES, Fn, Stage, end, fn, parents

ROOT = Path(__file__).parent

TABLES = {
    "source": ("data", "SOURCES"),
    "views": ("views", "VIEWS"),
    "sampler": ("samplers.py", "SAMPLERS"),
    "mixing": ("mixing.py", "MIXINGS"),
    "backbone": ("backbones.py", "BACKBONES"),
    "head": ("heads.py", "HEADS"),
    "loss": ("losses.py", "LOSSES"),
    "weight": ("losses.py", "CLASS_WEIGHTS"),
    "optimiser": ("optim.py", "OPTIMISERS"),
    "schedule": ("optim.py", "SCHEDULES"),
}
WORDS = {"views": "view", "weight": "class weight"}
PRECISIONS = ("fp32", "bf16")

USER: dict[str, Callable] = {}
"""Functions of the user's study file, by name."""


@dataclass(frozen=True)
class Signature:
    """What may be written in a Fn: defaults by keyword, and the keywords that have none.

    Of a method: taught, it needs a teacher; views, how many it needs; own_loss, its loss is a part of it, so that a
    stage chooses none, nor a class weight or a mixing; own_weight, it uses the class weight elsewhere than in the loss.
    """

    defaults: dict[str, Any]
    required: tuple[str, ...] = ()
    taught: bool = False
    views: int = 1
    own_loss: bool = False
    own_weight: bool = False

    @property
    def keywords(self) -> tuple[str, ...]:
        return (*self.required, *self.defaults)


def extend(module: ModuleType) -> None:
    """Makes the functions defined in the user's study file usable by name.

    Raises ValueError for a function that is called like one of rayltr's.
    """
    own = {k: v for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__}
    for axis in TABLES:
        if taken := sorted(set(own) & set(names(axis))):
            raise ValueError(f"{module.__file__} defines {taken[0]}, which is a {word(axis)} of rayltr; rename it")
    USER.update(own)


@cache
def names(axis: str) -> dict[str, Signature]:
    """The built-in entries of an axis with their signatures."""
    if axis == "method":
        files = [path for path in sorted((ROOT / "methods").glob("*.py")) if path.stem != "__init__"]
        return {path.stem: _method(path) for path in files}
    place, table = TABLES[axis]
    paths = sorted((ROOT / place).glob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]
    trees = [ast.parse(path.read_text()) for path in paths]
    functions = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    entries = next(found for tree in trees if (found := _table(tree, table)))
    common = _signature(functions["subset"]).defaults if axis == "source" else {}
    signatures = {name: _signature(functions[function]) for name, function in entries.items()}
    return {name: Signature({**s.defaults, **common}, s.required) for name, s in signatures.items()}


@cache
def unweighted() -> dict[str, str]:
    """The losses that take no class weight, with the reason."""
    tree = ast.parse((ROOT / "losses.py").read_text())
    found = next(n for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "UNWEIGHTED")
    assert found.value is not None
    return ast.literal_eval(found.value)


def _method(path: Path) -> Signature:
    tree = ast.parse(path.read_text())
    made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Method")
    sign = _signature(next(f for f in made.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"))
    said = {ast.unparse(n.targets[0]): n.value for n in made.body if isinstance(n, ast.Assign)}
    told = ("taught", "views", "own_loss", "own_weight")
    return replace(sign, **{name: ast.literal_eval(said[name]) for name in told if name in said})


def _table(tree: ast.Module, name: str) -> dict[str, str]:
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name:
            value = getattr(node, "value", None)
            if isinstance(value, ast.Dict):
                return {ast.literal_eval(k): v.id for k, v in zip(value.keys, value.values, strict=True)}  # type: ignore
            if isinstance(value, ast.DictComp):
                return {item.id: item.id for item in value.generators[0].iter.elts}  # type: ignore[attr-defined]
    return {}


def _signature(function: ast.FunctionDef) -> Signature:
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    given = [(arg.arg, default) for arg, default in pairs]
    return Signature(
        {name: ast.literal_eval(default) for name, default in given if default is not None},
        tuple(name for name, default in given if default is None),
    )


def _user_signature(function: Callable) -> Signature:
    given = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return Signature(
        {p.name: p.default for p in given if p.default is not p.empty},
        tuple(p.name for p in given if p.default is p.empty),
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean a? ` and the list of what exists, for an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def signature(axis: str, choice: Fn) -> Signature:
    """The signature of a choice.  Raises ValueError, listing what exists, when there is no such name."""
    if choice.name in names(axis):
        return names(axis)[choice.name]
    if choice.name in USER and axis != "method":
        return _user_signature(USER[choice.name])
    known = {*names(axis), *(USER if axis not in ("method", "source") else ())}
    raise ValueError(f"unknown {word(axis)} {choice.name!r}: {nearest(choice.name, known)}")


def word(axis: str) -> str:
    """What an entry of an axis is called."""
    return WORDS.get(axis, axis)


def completed(axis: str, choice: Fn) -> Fn:
    """The choice with its defaults written out and integers made floats where the default is a float.

    Raises ValueError for an unknown name, an unknown keyword or a required keyword left out.
    """
    sign, given = signature(axis, choice), dict(choice.keywords)
    what = f"{word(axis)} {choice.name}"
    for keyword in given:
        if keyword not in sign.keywords and keyword != "code":
            raise ValueError(f"{what} has no keyword {keyword!r}: {nearest(keyword, sign.keywords)}")
    if missing := [keyword for keyword in sign.required if keyword not in given]:
        raise ValueError(f"{what} needs the keyword {missing[0]!r}")
    for keyword, value in given.items():
        _check_kind(what, keyword, value, sign.defaults.get(keyword))
    whole = {key: _like(default, given.get(key, default)) for key, default in sign.defaults.items()}
    extra = {"code": _source_digest(USER[choice.name])} if choice.name not in names(axis) else {}
    return fn(choice.name, **{**given, **whole, **extra})


def _check_kind(what: str, keyword: str, value: Any, default: Any) -> None:
    """Raises ValueError for a value that is no finite number, or not of the default's kind."""
    for kind, name in ((bool, "true or false"), ((int, float), "a number"), (str, "a name"), (tuple, "a list")):
        if isinstance(default, kind):
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{what}: {keyword} is {name}, not {value!r}")
            break
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what}: {keyword} is {value}, which is no finite number")


def _like(default: Any, value: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, tuple) and any(isinstance(item, float) for item in default):
        return tuple(float(item) if isinstance(item, int) else item for item in value)
    return value


def _source_digest(function: Callable) -> str:
    """A user's function is part of a stage's identity by its whole file: it may use anything in it."""
    return hashlib.sha256(Path(function.__code__.co_filename).read_bytes()).hexdigest()[:16]


def complete(stage: Stage) -> Stage:
    """The whole chain with every default written out.  Raises ValueError with one clear line for what cannot be."""
    changes: dict[str, Any] = {role: complete(parent) for role, parent in parents(stage).items()}
    for axis in AXES:
        choice = getattr(stage, axis)
        if isinstance(choice, tuple):
            changes[axis] = tuple(completed(axis, view) for view in choice)
        elif choice is not None:
            changes[axis] = completed(axis, choice)
    whole = stage.but(**changes)
    whole = whole.but(horizon=whole.horizon or max(end(whole), 1))
    _check(whole)
    return whole


def _check(stage: Stage) -> None:
    for name in ("epochs", "horizon", "batch", "seed"):
        value = getattr(stage, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < (1 if name in ("batch", "horizon") else 0):
            raise ValueError(f"a stage's {name} is a whole number, not {value!r}")
    if stage.precision not in PRECISIONS:
        raise ValueError(f"unknown precision {stage.precision!r}: {nearest(stage.precision, PRECISIONS)}")
    if stage.resume and stage.init:
        raise ValueError("a stage either resumes another or is initialised from it, not both")
    if end(stage) > stage.horizon:  # type: ignore[operator]
        raise ValueError(f"the stage ends at epoch {end(stage)}, beyond its horizon of {stage.horizon} epochs")
    if not stage.views:
        raise ValueError("a stage needs at least one view; fn('identity') leaves images as they are")
    sign = signature("method", stage.method)
    if stage.weight and stage.loss.name in unweighted() and not sign.own_weight:
        raise ValueError(f"the loss {stage.loss.name} takes no class weight: {unweighted()[stage.loss.name]}")
    _check_method(stage, sign)
    if stage.resume:
        _check_resume(stage, stage.resume)


def _check_method(stage: Stage, sign: Signature) -> None:
    name = f"the method {stage.method.name}"
    if len(stage.views) < sign.views:
        raise ValueError(f"{name} needs {sign.views} views, the stage has {len(stage.views)}")
    if sign.taught and stage.teacher is None:
        raise ValueError(f"{name} needs a teacher: a finished stage, given as teacher=...")
    if stage.teacher and not sign.taught:
        raise ValueError(f"{name} consults no teacher; leave teacher= out")
    chosen = {"loss": stage.loss.name != Stage.loss.name, "weight": stage.weight, "mixing": stage.mixing}
    if sign.own_loss and any(chosen.values()):
        axis = next(axis for axis, value in chosen.items() if value)
        raise ValueError(f"{name} has a loss of its own; leave {axis}= out")


def _check_resume(stage: Stage, before: Stage) -> None:
    """What owns weights must stay when weights and optimiser go on; losses, samplers, views and numbers may change."""
    for axis in ("source", "backbone", "head"):
        if getattr(stage, axis) != getattr(before, axis):
            raise ValueError(f"a stage that resumes another keeps its {axis} ({getattr(before, axis).name}); use init=")
    one, other = (s.optimiser.get("base", s.optimiser.name) for s in (stage, before))
    if one != other:
        raise ValueError(f"a stage that resumes another goes on with its optimiser ({other}), not {one}; use init=")
    if stage.optimiser.get("spare") != before.optimiser.get("spare"):  # its groups of weights are others
        raise ValueError("a stage that resumes another keeps `spare` of its optimiser; use init=")
    if stage.method.get("frozen") != before.method.get("frozen"):
        raise ValueError("a stage that resumes another trains the same weights; use init= to freeze or thaw some")
