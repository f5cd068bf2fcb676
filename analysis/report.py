"""The report of a run: one HTML file that opens offline, on a phone, in the dark and on paper."""

import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from analysis.figures import by_frequency, head_tail
from analysis.load import Run, Trial, load
from analysis.tables import Cell, Table, anything, duration, number, percent, text
from rayltr import records
from rayltr.metrics import GROUPS, SUMMARY

SCORES = (*GROUPS, "balanced")
RAW = (*SCORES, "accuracy")


def write(run_folder: str | os.PathLike, out: str | os.PathLike | None = None) -> Path | str:
    """Write the report of a run folder, by default to its `report.html`, and say where: a path, or a URI as given.

    Raises ValueError, in one line, for a folder that is no run, has no trials or was made by another version.
    """
    page = render(load(run_folder))
    place = records.within(run_folder, "report.html") if out is None else os.fspath(out)
    records.save(place, page.encode())
    return place if "://" in place else Path(place)


def render(run: Run) -> str:
    """The page as a string."""
    figures = {figure.name: figure for figure in (head_tail(run), by_frequency(run)) if figure}
    best = best_table(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        study=run.info.get("study") or "run",
        lede=lede(run),
        facts=facts(run),
        warnings=warnings(run),
        best=best,
        spans=spans(best),
        exports=exports(run),
        noise=noise(run),
        figures=figures,
        trials=trials_table(run),
        failed=failed_table(run),
        groups=group_sizes(run),
        openings=run.info.get("openings") or [],
        command=run.info.get("command"),
        versions=run.info.get("versions") or {},
        plotly=get_plotlyjs() if figures else "",
    )


def lede(run: Run) -> str:
    """The outcome in two sentences."""
    best, control = run.chosen.get("balanced"), run.chosen.get("control")
    count = f"{len(run.finished)} of {len(run.trials)} trials finished."
    if best is None:
        return f"{count} None of them has validation scores, so there is nothing to compare yet."
    score = best.val["fitted_balanced"]
    reached = f"{count} The best, {best.id}, predicts {percent(score).text} % of each class right on average"
    if control is None:
        return f"{reached} (validation)."
    if best is control:
        return f"{reached} (validation). It is of the control arm: no trick beat plain cross-entropy."
    gain = 100 * (score - control.val["fitted_balanced"])
    return f"{reached}, {gain:.1f} points more than plain cross-entropy after the same correction (validation)."


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, on what: names and values."""
    data = run.info["data"]
    states = [trial.row["state"] for trial in run.trials]
    ended = ", ".join(f"{states.count(state)} {state}" for state in records.STATES if state in states)
    trained, asked = (sum(t.row[f"epochs_{kind}"] or 0 for t in run.trials) for kind in ("trained", "asked"))
    found = {
        "Data": _named(data.get("source"), "root", "fn"),
        "Classes": _thousands(len(run.counts)),
        "Images": ", ".join(f"{_thousands(n)} {split}" for split, n in (data.get("images") or {}).items()),
        "Imbalance": f"{_thousands(run.counts.max())} : {_thousands(run.counts.min())} images per class",
        "Trials": f"{len(run.trials)} ({ended})",
        "Epochs": f"{_thousands(trained)} trained of {_thousands(asked)} asked",
        "Validation protocol": _named(data.get("protocol"), "validation"),
        "Test split opened": _times(len(run.info.get("openings") or [])),
    }
    return [(name, value) for name, value in found.items() if value]


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = [str(warning) for warning in run.info["data"].get("warnings") or []]
    if "control" not in run.chosen:
        found.append("No control arm finished: without plain cross-entropy, nothing here shows what the tricks add.")
    if empty := [name for name in GROUPS if not len(run.groups[name])]:
        found.append(f"No class belongs to: {', '.join(empty)}. Scores of such a group are left empty.")
    return found + [trial.problem for trial in run.trials if trial.problem]


def best_table(run: Run) -> Table:
    """Validation scores at the fitted tau beside test scores, where the test split was opened."""
    tested = any(trial.test for trial in run.chosen.values())
    rows = []
    for name, trial in run.chosen.items():
        cells = [text(_role(name)), text(trial.id), number(trial.val["tau"], ".1f")]
        cells += [percent(trial.val[f"fitted_{score}"]) for score in SCORES]
        rows.append([*cells, *(percent(trial.test.get(score)) for score in SCORES if tested)])
    return Table(["choice", "trial", "τ", *SCORES, *(SCORES if tested else ())], rows)


def spans(table: Table) -> list[tuple[str, int]]:
    """The headings above those of the table of best configurations, and how many columns each spans."""
    found = [("", 3), ("validation", len(SCORES)), ("test", len(SCORES))]
    return found if len(table.columns) > 3 + len(SCORES) else found[:2]


def exports(run: Run) -> list[dict[str, Any]]:
    """Every chosen trial once: what it is best at, its parameters, and the command that exports it."""
    roles: dict[Trial, list[str]] = {}
    for name, trial in run.chosen.items():
        roles.setdefault(trial, []).append(_role(name))
    found = []
    for trial, names in roles.items():
        params = [(name, anything(value).text) for name, value in trial.params.items()]
        command = f"python -m rayltr.export {shlex.quote(run.folder)} --trial {trial.id} --out export-{trial.id}"
        found.append({"roles": ", ".join(names), "trial": trial.id, "params": params, "command": command})
    return found


def noise(run: Run) -> str:
    """How far a validation score can be trusted."""
    best = run.chosen.get("balanced")
    if best is None or math.isnan(best.error):
        return ""
    return (
        f"One standard error of the best balanced score is {100 * best.error:.1f} points, from the number of "
        f"validation images alone; and the best of {len(run.finished)} looks better than it is."
    )


def trials_table(run: Run) -> Table:
    """All trials: scores, parameters, cost, and recorded metrics that are not shown elsewhere (of single heads)."""
    params = list(dict.fromkeys(name for trial in run.trials for name in trial.params))
    shown = {f"val.{name}" for name in SUMMARY} | {f"test.{prefix}{name}" for name in RAW for prefix in ("", "fitted_")}
    extra = [name for name in dict.fromkeys(n for trial in run.trials for n in trial.recorded) if name not in shown]
    columns = ["trial", "state", *SCORES, "NLL", "τ", "T", *(f"raw {name}" for name in RAW)]
    columns += ["raw worst tenth", "raw ECE", "raw balanced NLL", "raw NLL", *params, "epochs", "time", "objective"]
    return Table([*columns, *extra], [_trial_cells(trial, params, extra) for trial in run.trials])


def _trial_cells(trial: Trial, params: list[str], extra: list[str]) -> list[Cell]:
    row, val = trial.row, trial.val
    return [
        *(text(trial.id), text(row["state"]), *(percent(val[f"fitted_{name}"]) for name in SCORES)),
        *(number(val["fitted_nll"], ".3f"), number(val["tau"], ".1f"), number(val["temperature"], ".3g")),
        *(percent(val[name]) for name in (*RAW, "worst_decile", "ece")),
        *(number(val["balanced_nll"], ".3f"), number(val["nll"], ".3f")),
        *(anything(trial.params.get(name)) for name in params),
        *(_epochs(row), duration(row["wall_s"]), number(row["objective"])),
        *(number(trial.recorded.get(name)) for name in extra),
    ]


def failed_table(run: Run) -> Table:
    """Trials that failed, with the last line of their error."""
    failed = [trial for trial in run.trials if trial.row["state"] == "failed"]
    return Table(["trial", "error"], [[text(trial.id), text(_last_line(trial.row["error"]))] for trial in failed])


def group_sizes(run: Run) -> str:
    """What many, medium and few mean here."""
    n = {name: len(run.groups[name]) for name in GROUPS}
    if run.rule == "shots":
        return (
            f"Many: classes with more than 100 training images ({n['many']}); medium: 20 to 100 ({n['medium']}); "
            f"few: fewer than 20 ({n['few']}). A group's score is the mean over its classes."
        )
    return (
        f"Many, medium and few are thirds of the classes by number of training images ({n['many']}, {n['medium']}, "
        f"{n['few']}), because the usual limits of 20 and 100 would leave a group empty. A group's score is the mean "
        "over its classes."
    )


def _epochs(row: dict[str, Any]) -> Cell:
    trained, asked = row["epochs_trained"], row["epochs_asked"]
    return (
        Cell(f"{trained} of {asked}", trained) if trained != asked and None not in (trained, asked) else text(trained)
    )


def _last_line(error: str | None) -> str | None:
    lines: Iterable[str] = reversed((error or "").strip().splitlines())
    return next((line.strip() for line in lines if line.strip()), None)


def _role(choice: str) -> str:
    return choice if choice == "control" else f"best {choice}"


def _named(value: Any, *keys: str) -> str:
    """A value that is written as a name, or as a mapping with its name under one of the keys."""
    if isinstance(value, dict):
        value = next((value[key] for key in keys if key in value), None)
    return "" if value is None else str(value)


def _times(n: int) -> str:
    return {0: "never", 1: "once"}.get(n, f"{n} times")


def _thousands(n: int) -> str:
    return f"{n:,}".replace(",", "\u202f")
