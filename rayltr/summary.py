"""The end of a search: best.json, what was saved, the best configurations and the front as text, the report."""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from analysis import ablations, fidelity
from analysis.evidence import Evidence
from analysis.load import Run, load
from analysis.pareto import front
from rayltr import records
from rayltr.choice import NLL, SCORES, WHOLE, ablated, best, criterion, finalist, score
from rayltr.progress import Progress, described

SHOWN = 8


def finished(run: Path, progress: Progress, before: Collection[str]) -> int:
    """Prints and writes what was found; returns how many trials failed.  `before`: those that were over already."""
    rows = records.read_trials(run).to_pylist()
    chosen = best(rows)
    records.save(run / "best.json", json.dumps({name: kept(row) for name, row in chosen.items()}, indent=1).encode())
    progress.say(effort(rows, before, run))
    rungs = [one for one in fidelity.agreement(rows) if one.family is None and not math.isnan(one.tau)]
    if rungs:
        said = [{"from": one.low, "to": one.high, "recipes": one.recipes, "kendall": one.tau} for one in rungs]
        records.write_run(run, {**records.read_run(run), "rungs": said})
        progress.say("\n".join(map(agreed, rungs)))
    if chosen:
        loaded = load(run)
        by = criterion(rows)
        told = f"\n\nthe best are chosen by NLL: {by.why}" * (by.by == NLL)
        progress.say(f"\n{table(chosen)}{told}\n\n{front_table(loaded)}\n")
        for more in filter(None, (finalists_table(rows), ablation_table(rows), spare(loaded))):
            progress.say(f"{more}\n")
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


def effort(rows: Sequence[Mapping[str, Any]], before: Collection[str], run: Path) -> str:
    new = [row for row in rows if row["trial"] not in before]
    if not new:
        return f"nothing to train: all {len(rows)} trials of this search are stored in {run}"
    done = fidelity.effort(new)
    return (
        f"{done.asked} epochs asked, {done.trained} trained; saved: {done.shared} by sharing stages, "
        f"{done.resumed} by resuming, {done.early} by training only the best in full"
    )


def agreed(rung: fidelity.Agreement) -> str:
    lengths = f"{rung.low:.2g} and {rung.high:.2g} of the full length"
    warning = "; low: the short schedules ranked badly, more --epochs or --fidelity none may find better" * rung.poor
    return f"rank correlation of {rung.recipes} promoted recipes at {lengths}: {rung.tau:.2f} (Kendall){warning}"


def table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """The best configurations; accuracies in percent at fitted tau, validation and (test)."""
    lines = ["best by     trial" + "".join(f"{head:>15}" for head in SCORES) + "   % on validation (test)"]
    for name, row in chosen.items():
        both = [(score(row, f"fitted_{head}"), row.get(f"m.test.fitted_{head}")) for head in SCORES]
        cells = [f"{percent(val)} ({percent(test)})" for val, test in both]
        lines.append(f"{name:12}{row['trial']}" + "".join(f"{cell:>15}" for cell in cells))
    recipes = {row["trial"]: described(row) for row in chosen.values()}
    return "\n".join([*lines, "", *(f"{trial}: {recipe}" for trial, recipe in sorted(recipes.items()))])


def finalists_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation of the balanced accuracy of every finalist over its fresh seeds; "" without any."""
    seeds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if finalist(row) and row["state"] == "complete":
            seeds.setdefault(row["trial"].partition("+")[0], []).append(row)
    lines = []
    for trial, own in seeds.items():
        val = [score(row, "fitted_balanced") for row in own]
        test = [row.get("m.test.fitted_balanced") for row in own]
        known = [value for value in test if value is not None]
        lines.append(f"{trial:10}{len(own):7}{spread(val):>18}{spread(known):>18}")
    head = f"finalists  seeds{'validation':>18}{'test':>18}   % balanced, mean and s.d. over fresh seeds"
    return "\n".join([head, *lines]) if lines else ""


def ablation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the winner loses with each of its choices set back, in points, on the same seed; "" without an ablation."""
    done = {row["trial"]: row for row in rows if row["state"] == "complete"}
    names, tables = [f"fitted_{head}" for head in SCORES], []
    for whole in (row for row in done.values() if ablated(row) == WHOLE):
        origin = whole["trial"].removesuffix(f"-{WHOLE}")
        head = f"{f'{origin} without':34}" + "".join(f"{name:>10}" for name in SCORES)
        lines = [f"{head}   % of it whole, and change in points", f"{WHOLE:34}{cells(whole, names, '10.1f')}"]
        for row in (row for row in done.values() if row["trial"].startswith(f"{origin}-") and row is not whole):
            name = ablated(row)
            said = f"{name}: {row.get(f'p.{name}')}, not {whole.get(f'p.{name}')}"
            lines.append(f"{said[:33]:34}{cells(row, names, '+10.1f', whole)}")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def spare(run: Run) -> str:
    """Which choices the winner of an ablation is better without, by the 95 % interval over the images; "" for none."""
    winner, parts = ablations.parts(Evidence(run))
    said = ablations.spare(parts)
    return f"{winner} is better without {said}" if said else ""


def cells(row: Mapping[str, Any], names: Sequence[str], form: str, other: Mapping[str, Any] | None = None) -> str:
    """Scores in per cent, or how far they are from those of another trial."""
    return "".join(format(100 * (score(row, name) - (score(other, name) if other else 0.0)), form) for name in names)


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return (
        f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else percent(values[0])
    )


def front_table(run: Run) -> str:
    """The head/tail front over all trials and tau, thinned to a few lines."""
    trials = [trial for trial in run.finished if np.isfinite(trial.points()[:, 1:]).all()]
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
