"""The report of a run: one HTML file that opens offline, on a phone, in the dark and on paper; and its numbers."""

import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from analysis import numbers
from analysis.cards import Card, cards
from analysis.evidence import Evidence
from analysis.figures import taus
from analysis.load import Run, load
from analysis.merging import merged
from analysis.page import Page
from analysis.sections import appendix, decide, effort, models, tokens, trade, why
from analysis.tables import Table, counted, number, percent, signed, text
from rayltr import records
from rayltr.choice import ACCURACY
from rayltr.metrics import GROUPS

Folder = str | os.PathLike


def write(run_folder: Folder | Sequence[Folder], out: Folder | None = None, most: float | None = None) -> Path | str:
    """Write the report of one run folder, or of several to compare, and say where: a path, or a URI as given.

    By default that is `report.html` in the (first) run; `report/` beside it holds the numbers.
    most: weights that a model may have to be called small (see `analysis.cards.cards`).  Raises ValueError, in
    one line, for a folder that is no run, has no trials or was made by another version, and for runs of other images.
    """
    folders = [run_folder] if isinstance(run_folder, (str, os.PathLike)) else list(run_folder)
    page = build(merged([load(folder) for folder in folders]), most)
    place = records.within(folders[0], "report.html") if out is None else os.fspath(out)
    records.save(place, render(page).encode())
    numbers.write(place.removesuffix(".html") + ("" if place.endswith(".html") else "-numbers"), page)
    return place if "://" in place else Path(place)


def build(run: Run, most: float | None = None) -> Page:
    """Everything that the report says; `most` as in `write`."""
    evidence = Evidence(run)
    deck = cards(evidence, evidence.ensembles, most)
    title = " and ".join(dict.fromkeys(str(part.info.get("study") or "run") for part in run.parts or (run,)))
    return Page(
        title=title,
        lede=lede(evidence, deck),
        sections=[
            decide.section(evidence, deck),
            decide.trust(evidence, deck),
            trade.head_tail(evidence),
            trade.tau(evidence),
            trade.frequency(evidence),
            *filter(None, [tokens.section(evidence)]),
            why.section(evidence),
            models.calibrations(evidence),
            models.ensembles(evidence),
            effort.section(evidence),
            models.priors(evidence),
            appendix.section(evidence),
        ],
        versions=run.info.get("versions") or {},
        more={"tau-curves": tau_curves(run), "tau-norm-curves": taus.normed(evidence)},
    )


def lede(evidence: Evidence, deck: Sequence[Card]) -> str:
    """The outcome in two sentences."""
    run = evidence.run
    count = f"{len(run.finished)} of {counted(len(run.searched), 'trial')} finished."
    if evidence.best is None:
        return f"{count} None of them has validation scores, so there is nothing to compare yet."
    best, score = evidence.trials[evidence.best], float(evidence.points["balanced"][evidence.best])
    first = next((claim for card in deck for claim in card.claims if claim.score == "balanced"), None)
    score = first.shown.value if first and first.shown else score
    by = "" if run.criterion.by == ACCURACY else f" by {run.criterion.by}"
    reached = (
        f"{count} The best on balance{by}, {best.id}, predicts {percent(score).text} % of each class right on average"
    )
    if evidence.control is None:
        return f"{reached} (validation)."
    if evidence.best == evidence.control:
        return f"{reached} (validation). It is of the control arm: no trick beat plain cross-entropy."
    gain = evidence.beyond(evidence.best, evidence.control, "balanced")
    if gain is None:
        plain = float(evidence.points["balanced"][evidence.control])
        return f"{reached}; plain cross-entropy with the same correction {percent(plain).text} % (validation)."
    if evidence.best in evidence.fresh and evidence.control in evidence.fresh:
        reached += f" with {len(evidence.fresh[evidence.best])} fresh seeds"
    if gain.value <= 0:
        return (
            f"{reached} (validation). That is no more than plain cross-entropy with the same correction: "
            f"{signed(gain.value)} points (95 % interval {signed(gain.low)} to {signed(gain.high)})."
        )
    shown = f"{100 * gain.value:.1f} points (95 % interval {signed(gain.low)} to {signed(gain.high)})"
    if gain.low <= 0:
        return (
            f"{reached} (validation). It is {shown} above plain cross-entropy: these images cannot tell the two apart."
        )
    return f"{reached} (validation): {shown} more than plain cross-entropy with the same correction."


def tau_curves(run: Run) -> Table:
    """Accuracies of every trial at every tau."""
    names = ("accuracy", "balanced", *GROUPS)
    rows = [
        [text(trial.id), number(tau, ".1f"), *(percent(trial.curve[name][k]) for name in names)]
        for trial in run.trials
        if trial.curve
        for k, tau in enumerate(trial.curve["tau"])
    ]
    return Table(["trial", "τ", *(f"{name} %" for name in names)], rows)


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    drawn = any(section.drawn for section in page.sections)
    environment.filters["points"] = signed
    return environment.get_template("report.html.j2").render(page=page, plotly=get_plotlyjs() if drawn else "")
