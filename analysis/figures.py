"""The figures of the report: plotly fragments without plotly.js, each with a caption, a legend and its numbers.

Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart; every kind also has its own marker.
Text and grid get their colours from the page's style sheet, so that one figure serves light, dark and print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from analysis.load import Run, Trial
from analysis.pareto import front, hypervolume
from analysis.tables import Table, number, percent, text
from rayltr.metrics import GROUPS

BLUE, SKY, GREEN, VERMILION = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
CLASS_MARKS = {"best": (BLUE, "circle"), "control": (VERMILION, "diamond")}
BINS = 10
"""Binned means run over about this many groups of equally many classes."""


@dataclass(frozen=True)
class Figure:
    """html: the chart.  says: what it shows, for a screen reader.  legend: (kind, text), kinds as in the template."""

    name: str
    html: str
    says: str
    caption: str
    legend: Sequence[tuple[str, str]]
    table: Table


def head_tail(run: Run) -> Figure | None:
    """Accuracy on many classes against few, all finished trials and every tau; None if nothing was measured."""
    shown = [trial for trial in run.finished if np.isfinite(trial.val["fitted_many"] + trial.val["fitted_few"])]
    if not shown:
        return None
    owner = [trial for trial in shown for _ in trial.points()]
    points = np.concatenate([trial.points() for trial in shown])
    edge = [(owner[i], points[i]) for i in front(points[:, 1:])]
    control, best = run.chosen.get("control"), run.chosen.get("balanced")
    others = [trial for trial in shown if trial is not control]
    figure = go.Figure([_curves(others), _edge(edge), *_dots(others), *(_control(control) if control else [])])
    if best and best is not control:
        figure.add_trace(_name(best, "best", "top right"))
    figure.update_xaxes(title="accuracy on many-shot classes (%)")
    figure.update_yaxes(title="accuracy on few-shot classes (%)")
    base = [trial.points()[:, 1:] for trial in shown if trial.control]
    return Figure(
        name="front",
        html=_html(figure, "front"),
        says=f"Scatter plot of {len(shown)} trials: validation accuracy on many-shot against few-shot classes.",
        caption=_front_caption(hypervolume(points[:, 1:]), hypervolume(np.concatenate(base)) if base else None),
        legend=[
            ("front", "front over all trials and τ"),
            ("fitted", "trial at its fitted τ"),
            ("raw", "the same trial, raw (τ = 0)"),
            ("curve", "its τ curve"),
            *([("control", "control arm (open: raw), τ curve of its best trial")] if control else []),
        ],
        table=_front_table(shown, edge, control),
    )


def _front_caption(whole: float, alone: float | None) -> str:
    first = (
        "Up and to the right is better. A larger τ moves a finished model along its curve, from the head to the tail, "
        "without training: a trick is worth its cost where its trials lie beyond the control's curve, not along it. "
    )
    area = f"The front covers {100 * whole:.1f} % of the plane from 0 to 100 % in both directions"
    return first + (f"{area}, the control arm alone {100 * alone:.1f} %." if alone is not None else f"{area}.")


def _front_table(shown: list[Trial], edge: list[tuple[Trial, NDArray]], control: Trial | None) -> Table:
    rows = [("front", trial, *point) for trial, point in edge]
    for trial in shown:
        val = trial.val
        rows.append(("fitted", trial, val["tau"], val["fitted_many"], val["fitted_few"]))
        rows.append(("raw", trial, 0.0, val["many"], val["few"]))
    rows += [("control's τ curve", control, *point) for point in control.points()] if control else []
    cells = [
        [text(kind), text(trial.id), number(tau, ".1f"), percent(many), percent(few)]
        for kind, trial, tau, many, few in rows
    ]
    return Table(["what", "trial", "τ", "many %", "few %"], cells)


def _curves(trials: list[Trial]) -> go.Scatter:
    """All tau curves as one line with gaps: one element however many trials there are."""
    gap = np.full((1, 3), np.nan)
    xyz = np.concatenate([np.concatenate([trial.points(), gap]) for trial in trials] or [gap])
    return _scatter(100 * xyz[:, 1:], mode="lines", line={"color": SKY, "width": 1}, opacity=0.45)


def _dots(trials: list[Trial]) -> list[go.Scatter]:
    raw = np.array([(t.val["many"], t.val["few"]) for t in trials]).reshape(-1, 2)
    fitted = np.array([(t.val["fitted_many"], t.val["fitted_few"]) for t in trials]).reshape(-1, 2)
    symbols = ["diamond" if t.control else "circle" for t in trials]
    full = {"symbol": symbols, "size": 9, "color": [VERMILION if t.control else BLUE for t in trials]}
    plain = {**full, "symbol": [f"{symbol}-open" for symbol in symbols], "size": 7}
    return [
        _scatter(100 * raw, mode="markers", marker=plain, opacity=0.6, hovertext=_hovers(trials, raw, raw=True)),
        _scatter(100 * fitted, mode="markers", marker=full, hovertext=_hovers(trials, fitted)),
    ]


def _hovers(trials: list[Trial], points: NDArray, raw: bool = False) -> list[str]:
    return [_hover(t.id, 0.0 if raw else t.val["tau"], xy) for t, xy in zip(trials, points, strict=True)]


def _edge(edge: list[tuple[Trial, NDArray]]) -> go.Scatter:
    return _scatter(
        100 * np.array([point[1:] for _, point in edge]),
        mode="lines+markers",
        line={"color": GREEN, "width": 3},
        marker={"symbol": "triangle-up", "size": 7, "color": GREEN},
        hovertext=[_hover(trial.id, tau, xy) for trial, (tau, *xy) in edge],
    )


def _control(trial: Trial) -> list[go.Scatter]:
    points = trial.points()
    hover = [_hover(f"control {trial.id}", tau, xy) for tau, *xy in points]
    ends = np.array([[trial.val["many"], trial.val["few"]], [trial.val["fitted_many"], trial.val["fitted_few"]]])
    marks = {"symbol": ["diamond-open", "diamond"], "size": 11, "color": VERMILION}
    marks["line"] = {"width": 2, "color": VERMILION}
    return [
        _scatter(100 * points[:, 1:], mode="lines", line={"color": VERMILION, "width": 2}, hovertext=hover),
        _scatter(100 * ends, mode="markers", marker=marks),
        _name(trial, "control", "bottom left"),
    ]


def _name(trial: Trial, name: str, position: str) -> go.Scatter:
    at = np.array([[trial.val["fitted_many"], trial.val["fitted_few"]]])
    return _scatter(100 * at, mode="text", text=[f"\u2002{name}\u2002"], textposition=position, cliponaxis=False)


def _hover(label: str, tau: float, xy: Sequence[float] | NDArray) -> str:
    return f"{label}, τ {tau:.1f}: many {100 * xy[0]:.1f} %, few {100 * xy[1]:.1f} %"


def by_frequency(run: Run) -> Figure | None:
    """Accuracy of every class against its training images, best trial and control; None if neither was measured."""
    best, control = run.chosen.get("balanced"), run.chosen.get("control")
    drawn = {"best": best if best is not control else None, "control": control}
    lines = {kind: t.per_class for kind, t in drawn.items() if t is not None and t.per_class is not None}
    if not lines:
        return None
    names = {kind: f"{kind} {trial.id}" for kind, trial in drawn.items() if trial}
    figure = go.Figure()
    for kind in reversed(lines):
        figure.add_traces(_classes(run, lines[kind], *CLASS_MARKS[kind]))
    figure.update_xaxes(title="training images of the class (log scale)", type="log", **_log_ticks(run.counts))
    figure.update_yaxes(title="validation accuracy (%)", range=[-2, 108], tickvals=[0, 20, 40, 60, 80, 100])
    _mark_groups(figure, run)
    return Figure(
        name="classes",
        html=_html(figure, "classes"),
        says="Scatter plot of each class's validation accuracy against its number of training images: "
        + " and ".join(names[kind] for kind in lines),
        caption="Each mark is a class, each line the mean over neighbouring classes of similar frequency, at the "
        "fitted τ and temperature. A falling line to the left is what the long tail costs; single marks are noisy, "
        "because a class has few validation images.",
        legend=[(f"{kind}-class", names[kind]) for kind in lines],
        table=_class_table(run, lines),
    )


def _classes(run: Run, per_class: NDArray, colour: str, symbol: str) -> list[go.Scatter]:
    n = np.maximum(run.counts, 1)
    hover = [f"{c}, {k} images: {100 * a:.1f} %" for c, k, a in zip(run.classes, run.counts, per_class, strict=True)]
    marks = {"symbol": symbol, "size": 6, "color": colour}
    bins = np.array_split(np.argsort(n, kind="stable"), min(BINS, max(2, len(n) // 3)))
    measured = [part[~np.isnan(per_class[part])] for part in bins]
    means = np.array([(np.exp(np.log(n[part]).mean()), 100 * per_class[part].mean()) for part in measured if len(part)])
    points = np.stack([n, 100 * per_class], 1)
    return [
        _scatter(points, mode="markers", marker=marks, opacity=0.4, hovertext=hover),
        _scatter(means.reshape(-1, 2), mode="lines", line={"color": colour, "width": 3}),
    ]


def _mark_groups(figure: go.Figure, run: Run) -> None:
    """The name of each group above its classes, a dotted line between groups."""
    spans = {name: np.maximum(run.counts[run.groups[name]], 1) for name in GROUPS if len(run.groups[name])}
    for name, n in spans.items():
        middle = float(np.log10(n.min() * n.max()) / 2)
        figure.add_annotation(x=middle, y=1, yref="paper", yanchor="top", text=name, showarrow=False)
    for left, right in zip(list(spans.values())[1:], spans.values(), strict=False):
        between = float(np.sqrt(float(left.max()) * float(right.min())))
        figure.add_vline(x=between, line={"color": "#8a8a8a", "width": 1, "dash": "dot"})


def _log_ticks(counts: NDArray) -> dict[str, Any]:
    """Ticks at 1, 2, 5, 10, 20, ... up to the largest count; plotly's own where the counts span too little for them."""
    if counts.max() < 5 * counts.min():
        return {}
    values = [step * 10**power for power in range(len(str(counts.max()))) for step in (1, 2, 5)]
    return {"tickvals": values, "ticktext": [f"{value:,}".replace(",", "\u2009") for value in values]}


def _class_table(run: Run, lines: dict[str, NDArray]) -> Table:
    group = {int(c): name for name, members in run.groups.items() for c in members}
    columns = {f"{kind} %": values for kind, values in lines.items()}
    if len(lines) == 2:
        columns["difference"] = lines["best"] - lines["control"]
    rows = [
        [text(name), text(group[c]), number(int(run.counts[c]), "d"), *(percent(v[c]) for v in columns.values())]
        for c, name in enumerate(run.classes)
    ]
    return Table(["class", "group", "images", *columns], rows)


def _scatter(points: NDArray, **style: Any) -> go.Scatter:
    style["hoverinfo"] = "text" if "hovertext" in style else "skip"
    return go.Scatter(x=np.round(points[:, 0], 2), y=np.round(points[:, 1], 2), **style)


def _html(figure: go.Figure, name: str) -> str:
    axis = {"gridcolor": "#8a8a8a40", "zeroline": False, "linecolor": "#8a8a8a", "ticks": "outside", "ticklen": 4}
    figure.update_layout(
        template="none",
        autosize=True,
        showlegend=False,
        dragmode=False,
        hovermode="closest",
        margin={"l": 52, "r": 16, "t": 12, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(**axis, title_standoff=8)
    figure.update_yaxes(**axis, title_standoff=8)
    config = {"responsive": True, "displayModeBar": False, "doubleClick": False, "showTips": False}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=f"plot-{name}")
