"""What mattered: shares of the variance, effects in points, interactions, and parameters of a branch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.effects import Effects, Level
from analysis.figures import draw
from analysis.figures.draw import BLUE, GREEN, VERMILION, Figure, Key
from analysis.tables import Table, anything, gained, number, percent, text

FACTORS, PANELS = 12, 8
"""At most so many factors, and parameters of branches, are drawn; the tables have all."""

RELIABLE = 0.3
"""Of effects that predict less of the variance than this nothing should be concluded."""

ROW = 1.6
"""Height of a row in rem."""


def shares(found: Effects) -> Figure:
    """How much of the differences between trials each parameter explains."""
    pairs = {f"{a} × {b}": share for (a, b), share in found.pairs.items()}
    both = sorted({**found.shares, **pairs}.items(), key=lambda item: -item[1])
    shown = [(name, share) for name, share in both[:FACTORS] if share >= 0.005] or both[:3]
    names, values = [draw.shortened(name, 28) for name, _ in shown], [100 * share for _, share in shown]
    figure = go.Figure([go.Bar(
        x=draw.rounded(values), y=list(range(len(shown))), orientation="h", hoverinfo="text",
        hovertext=[f"{name}: {value:.0f} %" for name, value in zip(names, values, strict=True)],
        marker={"color": [GREEN if name in pairs else BLUE for name, _ in shown],
                "pattern": {"shape": ["/" if name in pairs else "" for name, _ in shown]}},
        text=[f"{value:.0f} %" for value in values], textposition="outside", cliponaxis=False)])  # fmt: skip
    figure.update_xaxes(title="share of the differences (%)", range=[0, max(values, default=1) * 1.2])
    rows_named(figure, names)
    rows = [[text(name), text("pair" if name in pairs else "alone"), percent(share)] for name, share in both]
    return Figure(
        name="shares",
        title="What made the difference",
        html=draw.html(figure, "shares"),
        says="Bar chart: share of the variance between trials that each parameter and pair explains.",
        caption="How much of the differences in balanced accuracy at the fitted τ comes from which parameter, and from "
        f"two acting together.{_told(found.explained)}",
        keys=[Key("parameter alone", BLUE, "square"), Key("two together, beyond their sum (hatched)", GREEN, "square")],
        table=Table(["parameter", "kind", "share %"], rows),
        height=f"{5 + ROW * len(shown)}rem",
    )


def _told(explained: float) -> str:
    if np.isnan(explained):
        return ""
    found = f" Of trials that were not used, they predict {100 * explained:.0f} % of the differences"
    return f"{found}: too little to rely on." if explained < RELIABLE else f"{found}."


def rows_named(figure: go.Figure, names: Sequence[str]) -> None:
    """One row per name, from top to bottom."""
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(names), "range": [len(names) - 0.5, -0.5]}
    figure.update_yaxes(**ticks, automargin=True, showgrid=False)


def forest(by_score: Mapping[str, Effects]) -> Figure | None:
    """The effect of every level of the leading factors on balanced accuracy; the table has all scores."""
    found = by_score["balanced"]
    entries = [(name, level) for name in list(found.levels)[:FACTORS] for level in found.levels[name]]
    if not entries:
        return None
    names = [draw.shortened(f"{name}: {_value(level.value)}", 28) for name, level in entries]
    sure = [level.difference.low > 0 or level.difference.high < 0 for _, level in entries]
    figure = go.Figure()
    for certain, symbol, colour in ((True, "circle", BLUE), (False, "circle-open", BLUE)):
        at = [i for i, one in enumerate(sure) if one is certain]
        effects = [entries[i][1].difference for i in at]
        hover = [
            f"{names[i]}: {gained(entries[i][1].difference).text} points, {entries[i][1].trials} trials" for i in at
        ]
        figure.add_trace(draw.scatter(
            [(100 * one.value, i) for one, i in zip(effects, at, strict=True)], mode="markers", hovertext=hover,
            marker={"symbol": symbol, "size": 9, "color": colour, "line": {"width": 2, "color": colour}},
            error_x=draw.bars(effects, colour)))  # fmt: skip
    figure.add_vline(x=0, line={"color": VERMILION, "width": 2})
    figure.update_xaxes(title="effect (points)")
    rows_named(figure, names)
    return Figure(
        name="effects",
        title="Effects in points",
        html=draw.html(figure, "effects"),
        says="Forest plot: the effect of each value of each parameter on balanced accuracy, with intervals.",
        caption="How much better trials with this value are than the mean over all values of the parameter, other "
        "things being equal, with 95 % intervals over trials. Filled: the interval leaves out zero.",
        keys=[Key("sure", BLUE, "circle", 1.5), Key("may be chance", BLUE, "circle-open", 1.5),
              Key("no effect", VERMILION, line=2)],
        table=levels(by_score, "levels"),
        height=f"{5 + ROW * len(entries)}rem",
    )  # fmt: skip


def levels(by_score: Mapping[str, Effects], kind: str) -> Table:
    """The differences of all levels, of factors ("levels") or of parameters of a branch ("conditional"), by score."""
    keys = [(name, i) for name, own in getattr(by_score["balanced"], kind).items() for i in range(len(own))]
    rows = []
    for name, i in keys:
        own: dict[str, Level] = {score: getattr(found, kind)[name][i] for score, found in by_score.items()
                                 if name in getattr(found, kind) and i < len(getattr(found, kind)[name])}  # fmt: skip
        first = own["balanced"]
        cells = [gained(own[score].difference) if score in own else number(None) for score in by_score]
        rows.append([text(name), anything(first.value), number(first.trials, "d"), *cells])
    return Table(["parameter", "value", "trials", *(f"{score}, points" for score in by_score)], rows)


def interactions(found: Effects) -> Figure | None:
    """The shares of all pairs as a matrix, alone on the diagonal; None below two factors."""
    names = list(found.shares)[:FACTORS]
    if len(names) < 2:
        return None
    cells = np.full((len(names), len(names)), np.nan)
    says = [["" for _ in names] for _ in names]
    for i, one in enumerate(names):
        for j, other in enumerate(names[: i + 1]):
            share = found.shares[one] if i == j else found.pairs.get((one, other), found.pairs.get((other, one), 0.0))
            cells[i, j] = 100 * share
            says[i][j] = f"{one} alone: {100 * share:.1f} %" if i == j else f"{one} × {other}: {100 * share:.1f} %"
    figure = go.Figure([draw.matrix(cells, says)])
    draw.square(figure, names)
    return Figure(
        name="interactions",
        title="Which tricks depend on each other",
        html=draw.html(figure, "interactions"),
        says="Matrix: share of the variance explained by each pair of parameters; each alone on the diagonal.",
        caption="Share of the differences in per cent: alone on the diagonal, elsewhere what two parameters do "
        "together beyond the sum. A strong cell off the diagonal: choose these two together, not one after the other.",
        keys=[],
        table=Table(["one", "other", "share %"], [
            [text(names[i]), text(names[j] if i != j else "(alone)"), percent(cells[i, j] / 100)]
            for i in range(len(names)) for j in range(i + 1)
        ]),
        height="28rem",
    )  # fmt: skip


def branches(by_score: Mapping[str, Effects]) -> Figure | None:
    """Parameters that only some trials have, each inside its branch; None without such."""
    found = by_score["balanced"].conditional
    shown = list(found)[:PANELS]
    if not shown:
        return None
    titles = [draw.shortened(f"{name} ({sum(level.trials for level in found[name])} trials)", 34) for name in shown]
    gap = min(0.2, 0.6 / len(shown)) if len(shown) > 1 else 0
    figure = make_subplots(rows=len(shown), cols=1, subplot_titles=titles, vertical_spacing=gap)
    for row, name in enumerate(shown, 1):
        own = found[name]
        labels = [draw.shortened(_value(level.value), 12) for level in own]
        angle = -25 if max(map(len, labels)) > 6 else 0  # names side by side would not fit on a phone
        effects = [level.difference for level in own]
        hover = [f"{name} {label}: {gained(level.difference).text} points, {level.trials} trials"
                 for label, level in zip(labels, own, strict=True)]  # fmt: skip
        trace = draw.scatter([(i, 100 * one.value) for i, one in enumerate(effects)], mode="lines+markers",
                             line={"color": BLUE, "width": 2}, marker={"symbol": "square", "size": 9, "color": BLUE},
                             hovertext=hover, error_y=draw.bars(effects, draw.faint(BLUE, 0.6)))  # fmt: skip
        figure.add_trace(trace, row=row, col=1)
        figure.add_hline(y=0, line={"color": VERMILION, "width": 1.5}, row=row, col=1)
        figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=angle, row=row, col=1)
        figure.update_yaxes(title="points", row=row, col=1)
    return Figure(
        name="branches",
        title="Parameters that only some recipes have",
        html=draw.html(figure, "branches", top=34),
        says="Line charts: effect of each conditional parameter among the trials that have it.",
        caption="Each is judged only among the trials that have it, against the mean of these; other things being "
        "equal, with 95 % intervals. More drawn values than five are grouped, shown by their median.",
        keys=[Key("difference to the mean of the branch", BLUE, "square", 2), Key("no effect", VERMILION, line=1.5)],
        table=levels(by_score, "conditional"),
        height=f"{2 + 13 * len(shown)}rem",
    )


def _value(value: Any) -> str:
    return anything(value).text
