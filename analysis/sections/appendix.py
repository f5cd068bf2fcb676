"""Everything else: all trials, what they were made of, and how to get all this again."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.evidence import Evidence
from analysis.load import Run, Trial
from analysis.page import Block, Code, Listing, Note, Section, Terms, blocks
from analysis.tables import Cell, Table, anything, duration, number, percent, text
from rayltr.metrics import GROUPS, SUMMARY

SCORES = (*GROUPS, "balanced")
RAW = (*SCORES, "accuracy")
HIDDEN = ("rows",)
"""Parts of the manifest that are too long to be read: the rows of the splits."""

DEFINITIONS = (
    ("balanced accuracy", "the mean over classes of the share of a class's images that is predicted right"),
    ("many, medium, few", "groups of classes by number of training images; a group's score is the mean over classes"),
    ("τ (tau)", "logits z become z / T − τ · log(share of the class in training): 0 leaves the model as it is, 1 "
     "removes the training frequencies, more favours rare classes; fitted on validation, it costs no training"),
    ("T, temperature", "divides the logits: above 1 the model becomes less confident; fitted together with τ, always "
     "by the NLL, also where accuracy ranks the trials: accuracy moves in steps of single images and does not know T"),
    ("NLL", "negative log-likelihood in nats, here of the balanced classes at the fitted τ and T"),
    ("front", "trials and τ that no other beats on both many-shot and few-shot classes"),
    ("area", "the share of the square from 0 to 100 % in both accuracies that lies below the front"),
    ("on the front %", "in how many bootstrap draws of the validation images no other point beats this one"),
    ("95 % interval", "from 1 000 bootstrap draws of the validation images, class by class, the same for all trials; "
     "seeds are drawn as well where a recipe was trained with several"),
    ("corrected", "the choice is made again in each draw and scored on the images that were not drawn (bootstrap bias "
     "corrected cross-validation), which takes off what being chosen adds"),
    ("as measured", "on the validation images that made the choice, so it flatters what they chose"),
    ("raw", "the logits as trained: neither τ nor temperature"),
    ("optimism", "how much the score of the chosen trial as measured is above the corrected one"),
    ("not distinguishable", "the 95 % interval of the difference, image by image, contains zero"),
    ("control arm", "trials of plain cross-entropy without tricks, tuned like the others"),
    ("ECE", "expected calibration error: mean distance of confidence and accuracy over 15 bins of equally many images"),
    ("expert", "a head of a trial; ensembles choose among all experts, not only each trial's own prediction"),
)  # fmt: skip


def section(evidence: Evidence) -> Section:
    """All trials, failures, recipes, manifest, definitions and commands."""
    run = evidence.run
    failed = failures(run)
    note = (
        "Validation scores at the fitted τ and temperature T (NLL: class-balanced), then as trained, parameters (– "
        "where not active) and cost. Accuracies and ECE in per cent. Press a heading to sort."
    )
    parts = blocks(
        Listing("trials", "All trials", trials(run), note),
        Listing("failed", "Failed trials", failed) if failed.rows else None,
        _recipes(evidence), _manifests(run), Terms("Definitions", DEFINITIONS), _commands(run),
    )  # fmt: skip
    return Section("appendix", "Appendix", "Appendix", parts)


def trials(run: Run) -> Table:
    """All trials: scores, parameters, cost, and recorded metrics that are not shown elsewhere (of single heads)."""
    params = list(dict.fromkeys(name for trial in run.trials for name in trial.params))
    shown = {f"val.{name}" for name in SUMMARY} | {f"test.{prefix}{name}" for name in RAW for prefix in ("", "fitted_")}
    extra = [name for name in dict.fromkeys(n for trial in run.trials for n in trial.recorded) if name not in shown]
    tested = any(trial.test for trial in run.trials)
    columns = ["trial", "state", *(f"{name} %" for name in SCORES), "NLL", "τ", "T", *(f"raw {name} %" for name in RAW)]
    columns += ["raw worst tenth %", "raw ECE %", "raw balanced NLL", "raw NLL"]
    columns += [f"test {name} %" for name in SCORES] if tested else []
    columns += [*params, "seed", "epochs", "time", "objective", *extra]
    return Table(columns, [_cells(trial, params, extra, tested) for trial in run.trials])


def _cells(trial: Trial, params: Sequence[str], extra: Sequence[str], tested: bool) -> list[Cell]:
    row, val = trial.row, trial.val
    return [
        *(text(trial.id), text(row["state"]), *(percent(val[f"fitted_{name}"]) for name in SCORES)),
        *(number(val["fitted_nll"], ".3f"), number(val["tau"], ".1f"), number(val["temperature"], ".3g")),
        *(percent(val[name]) for name in (*RAW, "worst_decile", "ece")),
        *(number(val["balanced_nll"], ".3f"), number(val["nll"], ".3f")),
        *(percent(trial.test.get(name)) for name in SCORES if tested),
        *(anything(trial.params.get(name)) for name in params),
        *(number(row["seed"], "d"), _epochs(row), duration(row["wall_s"]), number(row["objective"])),
        *(number(trial.recorded.get(name)) for name in extra),
    ]


def failures(run: Run) -> Table:
    """Trials that failed, with the last line of their error."""
    failed = [trial for trial in run.trials if trial.row["state"] == "failed"]
    return Table(["trial", "error"], [[text(trial.id), text(_last_line(trial.row["error"]))] for trial in failed])


def _epochs(row: Mapping[str, Any]) -> Cell:
    trained, asked = row["epochs_trained"], row["epochs_asked"]
    if trained != asked and None not in (trained, asked):
        return Cell(f"{trained} of {asked}", trained)
    return number(trained, "d")


def _last_line(error: str | None) -> str | None:
    lines: Iterable[str] = reversed((error or "").strip().splitlines())
    return next((line.strip() for line in lines if line.strip()), None)


def _recipes(evidence: Evidence) -> list[Block]:
    """The resolved recipes of the trials that are best at something, and of the control."""
    roles: dict[str, list[str]] = {}
    for role, trial in evidence.run.chosen.items():
        roles.setdefault(trial.id, []).append(role if role == "control" else f"best {role}")
    by_id = {trial.id: trial for trial in evidence.run.trials}
    return [
        Code(f"Recipe of {name} ({', '.join(why)})", json.dumps(json.loads(recipe), indent=1), folded=True)
        for name, why in roles.items()
        if (recipe := by_id[name].row["recipe"])
    ]


def _manifests(run: Run) -> list[Block]:
    """What run.json says of data, arguments, seeds and openings."""
    return [
        Code(f"Manifest of {part.folder}", json.dumps(_readable(part.info), indent=1, default=str), folded=True)
        for part in run.parts or (run,)
    ]


def _readable(info: Mapping[str, Any]) -> dict[str, Any]:
    data = {name: value for name, value in info["data"].items() if name not in HIDDEN}
    return {**info, "data": data}


def _commands(run: Run) -> list[Block]:
    """How to get the search, the report and a trial again."""
    parts = run.parts or (run,)
    folders = " ".join(shlex.quote(part.folder) for part in parts)
    found: list[Block] = [Code("Search again", command) for part in parts if (command := part.info.get("command"))]
    found.append(Code("Write this report again", f"python -m analysis {folders}"))
    if best := run.chosen.get("balanced"):
        again = f"python -m rayltr.train {shlex.quote(best.folder)} --trial {best.row['trial']}"
        found.append(Code(f"Train the best trial, {best.id}, again and compare", again))
    openings = [
        f"{opening['when']} for {', '.join(opening['trials'])}"
        for part in parts
        for opening in part.info.get("openings") or []
    ]
    said = f"The test split was opened: {'; '.join(openings)}." if openings else "The test split was never opened."
    return [*found, Note(said)]
