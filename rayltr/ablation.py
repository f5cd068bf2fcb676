"""What each choice of the winner brings: the winner with one of them set back to what its study calls plain."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayltr.choice import best
from rayltr.spec import RandomTrial
from rayltr.studies import CHECKED, STUDY, Plan, Study


class Mended:
    """A trial that answers with what is given, and with a plain value or one from the middle where nothing is."""

    def __init__(self, given: Mapping[str, Any], plain: Mapping[str, Any]):
        self.given, self.plain = given, plain
        self.asked: dict[str, Any] = {}

    def _answer(self, name: str, fits: Callable[[Any], bool], otherwise: Any) -> Any:
        known = [own[name] for own in (self.given, self.plain) if name in own and fits(own[name])]
        return self.asked.setdefault(name, known[0] if known else otherwise)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._answer(name, lambda value: value in choices, choices[0])

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        middle = (low * high) ** 0.5 if log else (low + high) / 2
        middle = low + step * round((middle - low) / step) if step else middle
        return self._answer(name, lambda value: low <= value <= high, middle)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        middle = low + step * round((high - low) / 2 / step)
        return self._answer(name, lambda value: low <= value <= high, middle)


def set_back(study: Study, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By the name of each choice that is not plain, the point where it is and all else stays.

    A choice may decide about others: parameters that are no longer asked for are gone, those that are asked for anew
    are plain or else the first of their choices or the middle of their range.
    """
    found = {}
    for name, plain in study.plain.items():
        if name in params and params[name] != plain:
            trial = Mended({**params, name: plain}, study.plain)
            study(trial)
            if trial.asked != dict(params):
                found[name] = trial.asked
    return found


def winner(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The best trial on balance, unless it is plain itself; None before there is one."""
    row = best(rows).get("balanced")
    return row if row and row.get("p.arm") == STUDY else None


def ablatable(study: Study, plan: Plan) -> None:
    """Sets back every choice of random points and presets.  Raises ValueError where that gives no chain."""
    points, asked = [{"arm": STUDY, **params} for params in study.presets.values()], set[str]()
    for seed in range(CHECKED):
        trial = RandomTrial(seed)
        study.space(trial)
        points.append({"arm": STUDY, **trial.asked})
    for params in points:
        asked |= params.keys()
        for changed in set_back(study, params).values():
            plan.stage(study, changed)
    if not study.plain:
        raise ValueError(f"--ablate: the study {study.name} does not say which values of its choices are plain; "
                         'give its file PLAIN = {"mixing": "none", ...}')  # fmt: skip
    if unknown := [name for name in study.plain if name not in asked]:
        raise ValueError(
            f"--ablate: PLAIN of the study {study.name} has {unknown[0]!r}, for which its space never asks"
        )
