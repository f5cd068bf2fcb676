"""What the figures share: colours, marks, axes, and how a chart becomes part of the page.

Charts are plotly fragments without plotly.js.  Colours are Okabe and Ito's (2008), which colour-blind readers can tell
apart; every kind also has its own marker or dash.  Text and grid get their colours from the page's style sheet, so
that one figure serves light, dark and print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from analysis.tables import Interval, Table

BLUE, SKY, GREEN, VERMILION = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
ORANGE, PURPLE, GREY = "#E69F00", "#CC79A7", "#8a8a8a"
GROUP_MARKS = {"many": (BLUE, "circle"), "medium": (ORANGE, "square"), "few": (PURPLE, "triangle-up")}
BLUES = [[0, "rgba(0,114,178,0.04)"], [1, "rgba(0,114,178,0.6)"]]
"""A colour scale from the paper, whatever its colour, to blue."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a marker (plotly's name), a line of some width, or both."""

    text: str
    colour: str
    symbol: str = ""
    line: float = 0
    dash: bool = False


@dataclass(frozen=True)
class Figure:
    """html: the chart.  says: what it shows, for a screen reader.  caption: what to see.  height: CSS, or the usual."""

    name: str
    title: str
    html: str
    says: str
    caption: str
    keys: Sequence[Key]
    table: Table
    height: str = ""
    kind = "figure"


def scatter(points: ArrayLike, **style: Any) -> go.Scatter:
    """A trace through points [N, 2], rounded to two decimals; hovers show `hovertext` or nothing."""
    style["hoverinfo"] = "text" if "hovertext" in style else "skip"
    xy = np.asarray(points, np.float64).reshape(-1, 2)
    return go.Scatter(x=rounded(xy[:, 0]), y=rounded(xy[:, 1]), **style)


def rounded(values: ArrayLike) -> NDArray[np.float32]:
    return np.round(np.asarray(values, np.float64), 2).astype(np.float32)


def joined(curves: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Curves [K, 2] as one line with gaps: one element of the page however many curves there are."""
    gap = np.full((1, 2), np.nan)
    return np.concatenate([part for curve in curves for part in (curve, gap)] or [gap])


def band(x: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str) -> go.Scatter:
    """The area between two lines."""
    there, back = np.stack([x, low], 1), np.stack([x, high], 1)[::-1]
    return scatter(np.concatenate([there, back]), mode="lines", fill="toself", line={"width": 0}, fillcolor=colour)


def bars(values: Sequence[Interval], colour: str) -> dict[str, Any]:
    """Error bars of estimates of fractions, in per cent."""
    above = [100 * (one.high - one.value) for one in values]
    below = [100 * (one.value - one.low) for one in values]
    return {"type": "data", "symmetric": False, "array": rounded(above), "arrayminus": rounded(below), "color": colour,
            "thickness": 1.5, "width": 0}  # fmt: skip


def label(point: Sequence[float], word: str, position: str = "top right") -> go.Scatter:
    """A word beside a point."""
    return scatter([point], mode="text", text=[f"\u2002{word}\u2002"], textposition=position, cliponaxis=False)


def faint(colour: str, alpha: float = 0.18) -> str:
    """A colour of the palette, translucent."""
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},{alpha})"


def shortened(words: str, most: int = 26) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2, 5, 10, 20, ... within a range; plotly's own where it spans too little for them."""
    if not 0 < 5 * low <= high:
        return {}
    values = [step * 10.0**power for power in range(-3, 10) for step in (1, 2, 5)]
    values = [value for value in values if low / 2 <= value <= 2 * high]
    return {"tickvals": values, "ticktext": [f"{value:,.10g}".replace(",", "\u2009") for value in values]}


def matrix(values: ArrayLike, says: Sequence[Sequence[str]], form: str = ".0f") -> go.Heatmap:
    """A square of cells with their numbers, and what a hover says of each; nan is an empty cell."""
    cells = np.asarray(values, np.float64)
    shown = [["" if np.isnan(value) else format(value, form) for value in row] for row in cells]
    places = list(range(len(cells)))
    return go.Heatmap(z=cells, x=places, y=places, text=shown, texttemplate="%{text}", hovertext=says,
                      hoverinfo="text", colorscale=BLUES, zmin=0, showscale=False, xgap=2, ygap=2)  # fmt: skip


def square(figure: go.Figure, names: Sequence[str]) -> None:
    """The axes of a `matrix`: names on both, the first row at the top."""
    labels = [shortened(name, 16) for name in names]
    ticks = {"tickvals": list(range(len(labels))), "ticktext": labels, "showgrid": False, "automargin": True}
    figure.update_xaxes(**ticks, tickangle=-45)
    figure.update_yaxes(**ticks, autorange="reversed")


def html(figure: go.Figure, name: str, top: int = 12) -> str:
    """The chart as a fragment of a page that has plotly.js.  top: margin above, in pixels."""
    axis = {"gridcolor": "#8a8a8a40", "zeroline": False, "linecolor": GREY, "ticks": "outside", "ticklen": 4}
    figure.update_layout(
        template="none",
        autosize=True,
        showlegend=False,
        dragmode=False,
        hovermode="closest",
        margin={"l": 52, "r": 16, "t": top, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(**axis, title_standoff=8)
    figure.update_yaxes(**axis, title_standoff=8)
    config = {"responsive": True, "displayModeBar": False, "doubleClick": False, "showTips": False}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=f"plot-{name}")
