"""The end of a search: best.json, what was saved, the best configurations and the front as text, the report."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from analysis.load import load
from analysis.pareto import front
from rayltr import records
from rayltr.choice import best, rung_of, score, share
from rayltr.progress import Progress, described

HEADS = ("balanced", "many", "medium", "few")
SHOWN = 8


def finished(run: Path, progress: Progress, before: int) -> int:
    """Prints and writes what was found; returns how many trials failed.  `before`: rows that were there already."""
    rows = records.read_trials(run).to_pylist()
    chosen = best(rows)
    records.save(run / "best.json", json.dumps({name: kept(row) for name, row in chosen.items()}, indent=1).encode())
    progress.say(effort(rows, before, run))
    if rungs := agreement(rows):
        records.write_run(run, {**records.read_run(run), "rungs": rungs})
        progress.say("\n".join(map(agreed, rungs)))
    if chosen:
        progress.say(f"\n{table(chosen)}\n\n{front_table(run)}\n")
    run = Path(os.path.relpath(run)) if run.is_relative_to(Path.cwd()) else run
    report = import_module("analysis.report").write(run)  # plotly, only now that there is something to draw
    progress.say(f"report: {report}")
    if chosen:
        progress.say(f"next:   python -m rayltr.export {run} --best balanced --out model")
    failed = sum(row["state"] == "failed" for row in rows)
    if failed:
        progress.say(f"{failed} of {len(rows)} trials failed; the report lists them with their errors")
    return failed


def kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What best.json holds of a trial."""
    fields = {key: row[key] for key in ("trial", "address", "objective", "recipe")}
    return fields | {key: v for key, v in row.items() if key[:2] in ("p.", "m.") and v is not None}


def effort(rows: Sequence[Mapping[str, Any]], before: int, run: Path) -> str:
    if before == len(rows):
        return f"nothing to train: all {len(rows)} trials of this search are stored in {run}"
    new = [row for row in rows[before:] if row["state"] == "complete"]
    asked, trained, resumed = (
        sum(row[f"epochs_{kind}"] or 0 for row in new) for kind in ("asked", "trained", "resumed")
    )
    longest = {row["number"]: row for row in sorted(new, key=share)}
    early = sum(round(row["epochs_asked"] / share(row)) - row["epochs_asked"] for row in longest.values())
    return (
        f"{asked} epochs asked, {trained} trained; saved: {asked - trained - resumed} by sharing stages, "
        f"{resumed} by resuming, {early} by training only the best in full"
    )


def agreement(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How the objective of each rung ranks the recipes that were promoted, against the next: Spearman's correlation.

    Only the best of a rung are promoted, so this is lower than it would be over all recipes.
    """
    by_rung: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] == "complete" and row["objective"] is not None:
            by_rung.setdefault(rung_of(row), {})[row["number"]] = row
    found = []
    for rung in sorted(by_rung)[:-1]:
        low, high = by_rung[rung], by_rung[rung + 1]
        pairs = np.array(
            [(low[number]["objective"], row["objective"]) for number, row in high.items() if number in low]
        )
        if len(pairs) > 2:
            one, other = (share(row) for row in (next(iter(low.values())), next(iter(high.values()))))
            ranks = pairs.argsort(0).argsort(0)
            found.append(
                {
                    "from": one,
                    "to": other,
                    "recipes": len(pairs),
                    "spearman": float(np.asarray(np.corrcoef(ranks.T))[0, 1]),
                }
            )
    return found


def agreed(rung: Mapping[str, Any]) -> str:
    return (f"rank correlation of {rung['recipes']} promoted recipes at {rung['from']:.2g} and {rung['to']:.2g} of the "
            f"full length: {rung['spearman']:.2f}")  # fmt: skip


def table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """The best configurations; accuracies in percent at fitted tau, validation and (test)."""
    lines = ["best by     trial" + "".join(f"{head:>15}" for head in HEADS) + "   % on validation (test)"]
    for name, row in chosen.items():
        both = [(score(row, f"fitted_{head}"), row.get(f"m.test.fitted_{head}")) for head in HEADS]
        cells = [f"{percent(val)} ({percent(test)})" for val, test in both]
        lines.append(f"{name:12}{row['trial']}" + "".join(f"{cell:>15}" for cell in cells))
    recipes = {row["trial"]: described(row) for row in chosen.values()}
    return "\n".join([*lines, "", *(f"{trial}: {recipe}" for trial, recipe in sorted(recipes.items()))])


def front_table(run: Path) -> str:
    """The head/tail front over all trials and tau, thinned to a few lines."""
    trials = [trial for trial in load(run).finished if np.isfinite(trial.points()[:, 1:]).all()]
    if not trials:
        return "no front: the many or the few classes have no validation images"
    points = np.concatenate([trial.points() for trial in trials])
    names = np.repeat([trial.row["trial"] for trial in trials], [len(trial.points()) for trial in trials])
    found = front(points[:, 1:])
    shown = found[np.unique(np.linspace(0, len(found) - 1, SHOWN).round().astype(int))]
    lines = [f"front of many against few over all trials and tau ({len(found)} points)", "  many    few  trial    tau"]
    lines += [f"{percent(points[i, 1])}  {percent(points[i, 2])}  {names[i]}  {points[i, 0]:5.1f}" for i in shown]
    return "\n".join(lines)


def percent(value: float | None) -> str:
    return "    -" if value is None or np.isnan(value) else f"{100 * value:5.1f}"
