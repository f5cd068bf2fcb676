"""Tables for people and for programs: what a cell shows, what it is sorted by, and the number behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MISSING = "–"


class Interval(Protocol):
    """A value between two ends, such as `analysis.estimates.Estimate`."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class Cell:
    """Text as shown; `value` is what sorting compares and what files hold, None goes last; the ends of an interval.

    Accuracies are shown in per cent and held as fractions.
    """

    text: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers and gaps only (these are set to the right)."""
        return not any(isinstance(row[column].value, str) for row in self.rows)


def text(value: Any) -> Cell:
    """Any value as text; None as a gap."""
    return Cell(MISSING) if value is None else Cell(str(value), str(value))


def number(value: Any, form: str = ".4g") -> Cell:
    """A number in the format given, the minus as long as the plus; a gap for None and nan."""
    if absent(value):
        return Cell(MISSING)
    shown = format(value, form)
    return Cell(f"−{shown[1:]}" if shown.startswith("-") else shown, float(value))


def percent(fraction: float | None, digits: int = 1) -> Cell:
    """A fraction as a percentage without the sign."""
    if fraction is None or math.isnan(fraction):
        return Cell(MISSING)
    return Cell(f"{100 * fraction:.{digits}f}", float(fraction))


def points(difference: float | None) -> Cell:
    """A difference of fractions in signed percentage points."""
    if difference is None or math.isnan(difference):
        return Cell(MISSING)
    return Cell(signed(difference), float(difference))


def ranged(estimate: Interval | None) -> Cell:
    """An estimate of a fraction as a percentage with its interval."""
    if estimate is None or math.isnan(estimate.value):
        return Cell(MISSING)
    if not estimate.low < estimate.high:  # a single measurement has no interval
        return percent(estimate.value)
    shown = f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return Cell(shown, estimate.value, estimate.low, estimate.high)


def gained(estimate: Interval | None) -> Cell:
    """An estimate of a difference of fractions in signed percentage points with its interval."""
    if estimate is None or math.isnan(estimate.value):
        return Cell(MISSING)
    if not estimate.low < estimate.high:
        return points(estimate.value)
    shown = f"{signed(estimate.value)} [{signed(estimate.low)}, {signed(estimate.high)}]"
    return Cell(shown, estimate.value, estimate.low, estimate.high)


def duration(seconds: float | None) -> Cell:
    """Seconds in the unit that suits them."""
    if seconds is None or math.isnan(seconds):
        return Cell(MISSING)
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return Cell(f"{seconds / length:.1f} {unit}", float(seconds))
    return Cell(f"{seconds:.1f} s", float(seconds))


def anything(value: Any) -> Cell:
    """A parameter: a number if it is one, else text."""
    return number(value) if isinstance(value, float) else Cell(str(value), value) if type(value) is int else text(value)


def signed(fraction: float) -> str:
    """A fraction in percentage points with its sign, the minus as long as the plus."""
    shown = f"{100 * fraction:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown.replace("-", "−")


def thousands(n: float) -> str:
    """A whole number with narrow gaps."""
    return f"{n:,.0f}".replace(",", "\u202f")


def counted(n: int, what: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{thousands(n)} {what}{'' if n == 1 else 's'}"


def absent(value: Any) -> bool:
    return value is None or math.isnan(value)
