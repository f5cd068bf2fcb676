"""Tables as the template wants them: what a cell shows, and what it is sorted by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """Text as shown; `value` is what sorting compares, None goes last."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """Column names, which of them hold numbers (set to the right), and rows of cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers and gaps only."""
        return not any(isinstance(row[column].value, str) for row in self.rows)


def text(value: Any) -> Cell:
    """Any value as text; None as a gap."""
    return Cell(MISSING) if value is None else Cell(str(value), str(value))


def number(value: Any, form: str = ".4g") -> Cell:
    """A number in the format given, a gap for None and nan."""
    return Cell(MISSING) if _absent(value) else Cell(format(value, form), float(value))


def percent(fraction: float | None) -> Cell:
    """A fraction as a percentage with one decimal, without the sign."""
    return Cell(MISSING) if _absent(fraction) else number(100 * fraction, ".1f")  # type: ignore[operator]


def duration(seconds: float | None) -> Cell:
    """Seconds in the unit that suits them."""
    if _absent(seconds):
        return Cell(MISSING)
    assert seconds is not None
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return Cell(f"{seconds / length:.1f} {unit}", float(seconds))
    return Cell(f"{seconds:.1f} s", float(seconds))


def anything(value: Any) -> Cell:
    """A parameter: a number if it is one, else text."""
    return number(value) if isinstance(value, float) else Cell(str(value), value) if type(value) is int else text(value)


def _absent(value: Any) -> bool:
    return value is None or math.isnan(value)
