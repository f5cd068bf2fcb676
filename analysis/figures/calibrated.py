"""Confidence against accuracy."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from analysis.calibration import Calibration, Reliability, Worth
from analysis.figures import draw
from analysis.figures.draw import BLUE, GREY, GROUP_MARKS, VERMILION, Figure, Key
from analysis.tables import Table, number, percent, points, text
from rayltr.metrics import GROUPS

STATES = {"raw": (VERMILION, "diamond-open"), "fitted": (BLUE, "circle")}
"""The classifier as it was trained, and at its fitted tau and temperature."""


def reliability(states: Mapping[str, Calibration], name: str) -> Figure:
    """Confidence against accuracy in bins, of the classifier `name` raw and fitted."""
    figure = go.Figure([_diagonal()])
    for state, found in states.items():
        figure.add_trace(_bins(found.overall, *STATES[state], state))
    _axes(figure)
    rows = [
        [text(state), number(i + 1, "d"), percent(found.overall.confidence[i]), percent(found.overall.accuracy[i]),
         number(int(found.overall.images[i]), "d")]
        for state, found in states.items()
        for i in range(len(found.overall.images))
    ]  # fmt: skip
    errors = ", ".join(f"{state} {percent(found.overall.ece).text} %" for state, found in states.items())
    return Figure(
        name="reliability",
        title="All images",
        html=draw.html(figure, "reliability"),
        says=f"Reliability diagram of trial {name}, raw and at its fitted τ and temperature.",
        caption="Images in bins of equal size by confidence, weighted so that all classes count the same. On the grey "
        f"line a classifier is as right as it says; below it is over-confident. Mean distance (ECE): {errors}.",
        keys=[Key(f"{name} {'as trained' if state == 'raw' else state}", *STATES[state], 2) for state in states]
        + [Key("as right as it says", GREY, line=1.5, dash=True)],
        table=Table(["what", "bin", "confidence %", "accuracy %", "images"], rows),
        height="24rem",
    )


def by_group(found: Calibration, name: str) -> Figure | None:
    """The same for the images that are predicted into each group; None if that is one group only."""
    parts = {group: part for group, part in found.predicted.items() if len(part.images)}
    if len(parts) < 2:
        return None
    figure = go.Figure([_diagonal(), *(_bins(part, *GROUP_MARKS[group], group) for group, part in parts.items())])
    _axes(figure)
    rows = [
        [text(group), number(i + 1, "d"), percent(part.confidence[i]), percent(part.accuracy[i]),
         number(int(part.images[i]), "d")]
        for group, part in parts.items()
        for i in range(len(part.images))
    ]  # fmt: skip
    return Figure(
        name="reliability-groups",
        title="By the group that is predicted",
        html=draw.html(figure, "reliability-groups"),
        says=f"Reliability diagram of trial {name} for images predicted into each class group.",
        caption="What a user sees is the predicted class. A group whose line lies below the grey one promises too "
        "much whenever it is predicted.",
        keys=[Key(f"predicted as {group}", *GROUP_MARKS[group], 2) for group in parts],
        table=Table(["predicted group", "bin", "confidence %", "accuracy %", "images"], rows),
        height="24rem",
    )


def _diagonal() -> go.Scatter:
    return draw.scatter([(0, 0), (100, 100)], mode="lines", line={"color": GREY, "width": 1.5, "dash": "dash"})


def _bins(found: Reliability, colour: str, symbol: str, word: str) -> go.Scatter:
    shown = 100 * np.stack([found.confidence, found.accuracy], 1)
    hover = [f"{word}: confidence {x:.1f} %, right {y:.1f} %" for x, y in shown]
    line, marks = {"color": colour, "width": 2}, {"symbol": symbol, "size": 8, "color": colour}
    return draw.scatter(shown, mode="lines+markers", line=line, marker=marks, hovertext=hover)


def _axes(figure: go.Figure) -> None:
    figure.update_xaxes(title="confidence (%)", range=[0, 102])
    figure.update_yaxes(title="accuracy (%)", range=[0, 102])


def errors(states: Mapping[str, Calibration]) -> Table:
    """Calibration errors, overall and by predicted group; and by true group the gap of confidence and accuracy."""
    rows = []
    for state, found in states.items():
        whole = found.overall
        mean = float(np.nanmean(found.classwise)) if np.isfinite(found.classwise).any() else None
        rows.append([text(state), text("all"), percent(whole.ece), percent(whole.debiased), percent(mean, 2),
                     number(None), number(found.nll, ".3f")])  # fmt: skip
        for group in GROUPS:
            part = found.predicted[group]
            inner = percent(found.classwise_groups[group], 2)
            rows.append([text(state), text(group), percent(part.ece), percent(part.debiased), inner,
                         points(found.gap[group]), number(None)])  # fmt: skip
    columns = ["what", "predicted group", "ECE %", "ECE without noise %", "ECE class by class %"]
    return Table([*columns, "gap by true group, points", "balanced NLL"], rows)


NAMES = {"none": "none", "one": "one for all", "groups": "one by predicted group"}


def temperatures(worth: Worth) -> Table:
    """What dividing the logits would change, judged on images that were not used to fit."""
    rows = [
        [text(NAMES[name]), text(", ".join(f"{part} {t:.2f}" for part, t in option.temperatures.items()) or None),
         number(option.nll, ".3f"), percent(option.ece), text("recommended" if name == worth.choice else None)]
        for name, option in worth.options.items()
    ]  # fmt: skip
    return Table(["temperature", "fitted values", "balanced NLL", "ECE %", ""], rows)
