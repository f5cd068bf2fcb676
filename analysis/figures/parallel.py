"""All recipes at once: a line for each trial through the values of its parameters to its score."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.figures import draw
from analysis.figures.draw import BLUE, GREY, Figure
from analysis.tables import Table, anything, percent, text

AXES, LINES = 6, 150
"""At most so many parameters, the most telling first, and trials, the best first, are drawn; the table has all."""

ABSENT = "(none)"
"""Where a line crosses the axis of a parameter that its recipe does not have."""

FLOOR = 0.2
"""Where the smallest number lies, above trials that have none."""

TICKS = 4
"""Of an axis of numbers; fewer different values have a tick each."""

Axis = tuple[list[float], dict[float, str]]
"""The height of every line on an axis, from 0 to 1, and what is written at which height."""


def recipes(
    ids: Sequence[str], params: Sequence[Mapping[str, Any]], balanced: Sequence[float], ranked: Sequence[str]
) -> Figure:
    """The recipes of T trials as lines.

    ids: names of the trials; params: the active parameters of each; balanced: the score of each, in [0, 1]; ranked:
    the names of the parameters that took more than one value, the most telling first.
    """
    order = sorted(range(len(ids)), key=lambda i: balanced[i])[-LINES:]
    shown = list(ranked[:AXES])
    axes = [axis([params[i].get(name) for i in order]) for name in shown]
    axes.append(axis([round(100 * balanced[i], 1) for i in order]))
    figure = go.Figure()
    for line, i in enumerate(order):
        rank = line / max(len(order) - 1, 1)
        colour = draw.faint(BLUE, round(0.12 + 0.75 * rank**2, 2))
        figure.add_trace(go.Scatter(
            x=list(range(len(axes))), y=[heights[line] for heights, _ in axes], mode="lines+markers", hoverinfo="text",
            hovertext=f"{ids[i]}: {percent(balanced[i]).text} %", line={"color": colour, "width": 1 + 1.5 * rank},
            marker={"color": colour, "size": 7}))  # fmt: skip
    for place, (_, ticks) in enumerate(axes):
        figure.add_vline(x=place, line={"color": GREY, "width": 1})
        spots = [(place, height) for height in ticks]
        figure.add_trace(draw.scatter(spots, mode="text", hovertext=[""] * len(ticks),
                                      text=list(ticks.values()), textposition="top center",
                                      cliponaxis=False))  # fmt: skip
    names = [draw.shortened(name, 14) for name in (*shown, "balanced, %")]
    figure.update_xaxes(tickvals=list(range(len(axes))), ticktext=names, showgrid=False, range=[-0.35, len(axes) - 0.6])
    figure.update_yaxes(visible=False, range=[-0.04, 1.1])
    return Figure(
        name="recipes",
        title="All recipes",
        html=draw.html(figure, "recipes"),
        says="Parallel coordinates: one line per trial through its parameters to its balanced accuracy.",
        caption="Every line is a trial; the stronger, the higher its balanced accuracy at the fitted τ. Click a point "
        "to keep only the lines through it, on several axes if you like; click it again to let "
        f"go.{_left(ids, ranked)}",
        keys=[],
        table=Table(["trial", *ranked, "balanced %"], [
            [text(name), *(anything(own[key]) if own.get(key) is not None else text(None) for key in ranked),
             percent(value)]
            for name, own, value in zip(ids, params, balanced, strict=True)
        ]),
        height="26rem",
    )  # fmt: skip


def _left(ids: Sequence[str], ranked: Sequence[str]) -> str:
    lines = f"the best {LINES} trials" if len(ids) > LINES else ""
    axes = f"the {AXES} parameters that explain most" if len(ranked) > AXES else ""
    both = " and ".join(part for part in (lines, axes) if part)
    return f" Drawn: {both}." if both else ""


def axis(values: Sequence[Any]) -> Axis:
    """Numbers by their size (by their logarithm where they span much), other values one above the other.

    What is absent lies at the bottom.
    """
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in there):
        heights, ticks = _scale(np.asarray(there, np.float64))
        floor = FLOOR if len(there) < len(values) else 0.0
        raised = iter(heights)
        places = [0.0 if value is None else floor + (1 - floor) * next(raised) for value in values]
        return places, {**({0.0: ABSENT} if floor else {}), **{floor + (1 - floor) * at: t for at, t in ticks.items()}}
    known = sorted(set(there), key=lambda value: (isinstance(value, str), value))
    levels = [*([None] if len(there) < len(values) else []), *known]
    above = {level: place / max(len(levels) - 1, 1) for place, level in enumerate(levels)}
    said = {height: ABSENT if level is None else anything(level).text for level, height in above.items()}
    return [above[value] for value in values], {height: draw.shortened(words, 16) for height, words in said.items()}


def _scale(values: np.ndarray) -> Axis:
    size = np.log(values) if values.min() > 0 and values.max() / values.min() >= 10 else values
    low, span = size.min(), np.ptp(size) or 1.0
    ticks = np.unique(size)
    if len(ticks) > TICKS:
        ticks = np.linspace(size.min(), size.max(), TICKS)
    shown = np.exp(ticks) if size is not values else ticks
    words = [f"{value:.3g}" for value in shown]
    return ((size - low) / span).tolist(), dict(zip(((ticks - low) / span).tolist(), words, strict=True))
