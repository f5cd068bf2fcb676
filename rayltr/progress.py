"""What a running search shows: a live table on a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Mapping
from threading import Event
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rayltr.choice import SCORES, score

QUIET_S = 15.0
"""Without a terminal, a trial's progress is printed at most this often."""


class Progress:
    """Told of every report of every trial.

    farewell: what to say when the search ends before its time.  over: set while no trial runs.
    """

    def __init__(self) -> None:
        self.farewell, self.over = "", Event()
        self.console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.live: Live | None = None
        self.running: dict[str, Mapping[str, Any]] = {}
        self.rows: list[Mapping[str, Any]] = []
        self.left, self.began, self.said = 0, time.monotonic(), 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, and a terminal cannot be restored."""
        return {}

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def begin(self, trials: int, concurrent: int) -> None:
        self.over.clear()
        self.left, self.said = len(self.rows) + trials, time.monotonic()
        self.say(f"{trials} trials to run, {concurrent} at once")
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, get_renderable=self._table)
            self.live.start()

    def moved(self, record: Mapping[str, Any]) -> None:
        """A running trial reports an epoch (or only its start)."""
        trial = record["trial"]
        first = "epoch" not in self.running.get(trial, {})  # its begin and its first epoch are always shown
        self.running[trial] = record
        if self.live or not (first or time.monotonic() - self.said > QUIET_S):
            return
        self.said = time.monotonic()
        self.say(f"  {trial} {stood(record)}")

    def ended(self, row: Mapping[str, Any]) -> None:
        self.running.pop(row["trial"], None)
        self.rows.append(row)
        if self.live is None:
            self.say(f"  {row['trial']} {outcome(row)}  [{len(self.rows)}/{self.left}]")

    def close(self) -> None:
        self.over.set()
        if self.live:
            self.live.stop()
            self.live = None

    def _table(self) -> Table:
        title = f"{len(self.rows)} of {self.left} trials, {time.monotonic() - self.began:.0f} s"
        table = Table(title=title, box=None, header_style="bold")
        for name in ("trial", *SCORES, "NLL", "what"):
            table.add_column(name, justify="left" if name in ("trial", "what") else "right", no_wrap=name != "what")
        for row in self.rows[-25:]:
            table.add_row(row["trial"], *cells(row), described(row))
        for trial, record in sorted(self.running.items()):
            table.add_row(trial, "", "", "", "", "", stood(record))
        return table


def stood(record: Mapping[str, Any]) -> str:
    """Where a running trial stands."""
    if "epoch" not in record:
        return "begins"
    terms = ", ".join(f"{name} {value:.3f}" for name, value in record["terms"].items())
    rate = f"{record['images_per_s']:.0f} images/s"
    return f"stage {record['stage'] + 1}, epoch {record['epoch']}/{record['of_epochs']}: {terms}, {rate}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Balanced, many, medium, few (percent, at fitted tau) and NLL of a finished trial, as text."""
    shares = [100 * score(row, f"fitted_{name}") for name in SCORES]
    return [*("-" if share != share else f"{share:.1f}" for share in shares), f"{score(row, 'fitted_nll'):.3f}"]


def outcome(row: Mapping[str, Any]) -> str:
    if row["state"] != "complete":
        return f"{row['state']}: {(row['error'] or 'no reason given').strip().splitlines()[-1]}"
    balanced, many, medium, few, nll = cells(row)
    cost = f"{row['epochs_trained']} of {row['epochs_asked']} epochs trained, {row['wall_s']:.1f} s"
    scores = f"balanced {balanced} %, many {many}, medium {medium}, few {few}, NLL {nll}"
    return "; ".join(filter(None, (scores, cost, described(row))))


def by_head(split: str, scores: Mapping[str, float]) -> list[str]:
    """A line on every head: in percent, at fitted tau and as it predicts; the one that a model ships with first."""
    fitted = "fitted_balanced"
    heads = [name.removesuffix(fitted) for name in scores if name == fitted or name.endswith(f".{fitted}")]
    lines = []
    for head in sorted(heads):
        name = f"  {head[:-1]}" if head else split
        groups = (f"{group} {100 * scores[f'{head}fitted_{group}']:.1f}" for group in SCORES)
        raw = f"uncorrected: balanced {100 * scores[f'{head}balanced']:.1f}"
        lines.append(f"{name}: {', '.join(groups)}; {raw}")
    return lines


def described(row: Mapping[str, Any]) -> str:
    """The parameters of a trial in one line."""
    params = {name[2:]: value for name, value in row.items() if name.startswith("p.") and value is not None}
    params = {name: value for name, value in params.items() if (name, value) != ("arm", "study")}
    return " ".join(f"{name}={short(value)}" for name, value in params.items())


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
