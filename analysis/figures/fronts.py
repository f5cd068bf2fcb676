"""Head against tail: every trial, every tau, the front with its uncertainty, and how it grew."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from analysis import pareto
from analysis.estimates import Estimate
from analysis.evidence import Evidence, Spot
from analysis.figures import draw
from analysis.figures.draw import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, Figure, Key
from analysis.load import Trial
from analysis.tables import Table, counted, number, percent, ranged, text
from rayltr.metrics import GROUPS

Floats = NDArray[np.float64]

MARGIN = 0.03
"""The space around the front and the trials; tau curves may leave the picture."""

CROSSFITTED = (
    " The ensemble is shown as it scores on images that neither chose its members nor fitted their weights; trials and "
    "front are as measured."
)

STEPS = 6
"""The area is estimated after about so many numbers of trials."""


def head_tail(evidence: Evidence, ensemble: dict[str, Estimate] | None) -> Figure | None:
    """Accuracy on many classes against few, all trials and every tau; None if nothing was measured.

    ensemble: the cross-fitted scores of the best one by group, if there is one.
    """
    shown = evidence.both
    if not shown:
        return None
    control = None if evidence.control is None else evidence.trials[evidence.control]
    best = None if evidence.best is None else evidence.trials[evidence.best]
    others = [trial for trial in shown if trial is not control]
    curves = draw.joined([trial.points()[:, 1:] for trial in others])
    figure = go.Figure([
        draw.scatter(100 * curves, mode="lines", line={"color": SKY, "width": 1}, opacity=0.35),
        *_dots(others),
        *(_control(control) if control in shown else []),
        *_edge(evidence.front, evidence.paired),
    ])  # fmt: skip
    surface = evidence.attained
    if len(surface):
        line = {"color": ORANGE, "width": 2, "dash": "dot", "shape": "vh"}
        figure.add_trace(draw.scatter(100 * surface, mode="lines", line=line))
    if best and best is not control:
        figure.add_trace(draw.label(100 * _fitted(best), "best", "bottom left"))
    if ensemble:
        figure.add_traces(_ensemble(ensemble))
    low, high = _view(evidence, shown, ensemble)
    crosses = ", with 95 % intervals" if evidence.paired else ""
    figure.update_xaxes(title="accuracy on many-shot classes (%)", range=[low[0], high[0]])
    figure.update_yaxes(title="accuracy on few-shot classes (%)", range=[low[1], high[1]])
    return Figure(
        name="front",
        title="Every trial, at every τ",
        html=draw.html(figure, "front"),
        says=f"Scatter plot of {counted(len(shown), 'trial')}: validation accuracy on many- against few-shot classes.",
        caption=_caption(evidence) + (CROSSFITTED if ensemble else ""),
        keys=[
            Key(f"front over all trials and τ{crosses}", GREEN, "triangle-up", 3),
            Key("trial at its fitted τ (larger: better on medium classes)", BLUE, "circle"),
            Key("the same trial, raw (τ = 0)", BLUE, "circle-open"),
            Key("its τ curve", SKY, line=1),
            *([Key("control arm (open: raw), τ curve of its best trial", VERMILION, "diamond", 2)] if control else []),
            *([Key("reached by half of the fresh seeds", ORANGE, line=2, dash=True)] if len(surface) else []),
            *([Key("best ensemble, cross-fitted, with 95 % intervals", PURPLE, "star", 1.5)] if ensemble else []),
        ],
        table=_table(evidence, shown, ensemble),
    )  # fmt: skip


def _caption(evidence: Evidence) -> str:
    found = (
        "Up and to the right is better. A larger τ moves a finished model along its curve, from the head to the tail, "
        "without training: a trick is worth its cost where its trials lie beyond the control's curve, not along it."
    )
    unsure = [spot for spot in evidence.front if spot.share < 0.5]
    if evidence.paired and unsure:
        found += (
            f" {len(unsure)} of the {len(evidence.front)} points listed are on the front in less than half of the "
            "bootstrap draws: which of the close ones is on it is luck."
        )
    return found


def _table(evidence: Evidence, shown: Sequence[Trial], ensemble: dict[str, Estimate] | None) -> Table:
    rows = [
        [text("front"), text(spot.trial.id), number(spot.tau, ".1f"), *(ranged(spot.scores[name]) for name in GROUPS),
         percent(spot.share, 0)]
        for spot in evidence.front
    ]  # fmt: skip
    if ensemble:
        cells = [ranged(ensemble[name]) for name in GROUPS]
        rows.append([text("best ensemble, cross-fitted"), text(None), number(None), *cells, number(None)])
    for trial in shown:
        for kind, tau, prefix in (("fitted", trial.val["tau"], "fitted_"), ("raw", 0.0, "")):
            cells = [percent(trial.val[f"{prefix}{name}"]) for name in GROUPS]
            rows.append([text(kind), text(trial.id), number(tau, ".1f"), *cells, number(None)])
    return Table(["what", "trial", "τ", *(f"{name} %" for name in GROUPS), "on the front %"], rows)


def _fitted(trial: Trial) -> list[float]:
    return np.array([trial.val["fitted_many"], trial.val["fitted_few"]])  # type: ignore[return-value]


def _dots(trials: Sequence[Trial]) -> list[go.Scatter]:
    raw = np.array([(t.val["many"], t.val["few"]) for t in trials]).reshape(-1, 2)
    fitted = np.array([(t.val["fitted_many"], t.val["fitted_few"]) for t in trials]).reshape(-1, 2)
    medium = np.nan_to_num([t.val["fitted_medium"] for t in trials])
    size = 6 + 8 * (medium - medium.min(initial=1)) / max(float(np.ptp(medium)) if len(medium) else 0, 1e-9)
    symbols = ["diamond" if t.control else "circle" for t in trials]
    full = {"symbol": symbols, "size": size.round(1), "color": [VERMILION if t.control else BLUE for t in trials]}
    full["line"] = {"color": "rgba(255,255,255,0.7)", "width": 0.7}
    plain = {**full, "symbol": [f"{symbol}-open" for symbol in symbols], "size": 7, "line": {"width": 1}}
    marks = {"mode": "markers"}
    return [
        draw.scatter(100 * raw, **marks, marker=plain, opacity=0.45, hovertext=_hovers(trials, raw, raw=True)),
        draw.scatter(100 * fitted, **marks, marker=full, opacity=0.8, hovertext=_hovers(trials, fitted)),
    ]


def _hovers(trials: Sequence[Trial], points: Floats, raw: bool = False) -> list[str]:
    return [_hover(t.id, 0.0 if raw else t.val["tau"], xy) for t, xy in zip(trials, points, strict=True)]


def _hover(label: str, tau: float, xy: Sequence[float] | Floats) -> str:
    return f"{label}, τ {tau:.1f}: many {100 * xy[0]:.1f} %, few {100 * xy[1]:.1f} %"


def _edge(spots: Sequence[Spot], crossed: bool) -> list[go.Scatter]:
    many, few = ([spot.scores[name] for spot in spots] for name in ("many", "few"))
    points = np.array([(x.value, y.value) for x, y in zip(many, few, strict=True)]).reshape(-1, 2)
    hover = [_hover(spot.trial.id, spot.tau, xy) for spot, xy in zip(spots, points, strict=True)]
    if crossed:
        hover = [
            f"{text}, on the front in {100 * s.share:.0f} % of draws" for text, s in zip(hover, spots, strict=True)
        ]
    line = draw.scatter(100 * points, mode="lines", line={"color": GREEN, "width": 3})
    marks = {"symbol": "triangle-up", "size": 9, "color": GREEN}
    tips = draw.scatter(100 * points, mode="markers", marker=marks, hovertext=hover)
    if crossed:
        faint = draw.faint(GREEN, 0.45)
        tips.update(error_x=draw.bars(many, faint), error_y=draw.bars(few, faint))
    return [line, tips]


def _control(trial: Trial) -> list[go.Scatter]:
    points = trial.points()
    hover = [_hover(f"control {trial.id}", tau, xy) for tau, *xy in points]
    ends = np.array([[trial.val["many"], trial.val["few"]], _fitted(trial)])
    marks = {"symbol": ["diamond-open", "diamond"], "size": 11, "color": VERMILION,
             "line": {"width": 2, "color": VERMILION}}  # fmt: skip
    return [
        draw.scatter(100 * points[:, 1:], mode="lines", line={"color": VERMILION, "width": 2}, hovertext=hover),
        draw.scatter(100 * ends, mode="markers", marker=marks),
        draw.label(100 * ends[1], "control", "bottom left"),
    ]


def _ensemble(scores: dict[str, Estimate]) -> list[go.Scatter]:
    many, few = scores["many"], scores["few"]
    point, faint = [100 * many.value, 100 * few.value], draw.faint(PURPLE, 0.6)
    marks = {"symbol": "star", "size": 15, "color": PURPLE}
    hover = [f"best ensemble, cross-fitted: many {point[0]:.1f} %, few {point[1]:.1f} %"]
    crosses = {"error_x": draw.bars([many], faint), "error_y": draw.bars([few], faint)}
    return [
        draw.scatter([point], mode="markers", marker=marks, hovertext=hover, **crosses),
        draw.label(point, "ensemble"),
    ]


def _view(evidence: Evidence, shown: Sequence[Trial], ensemble: dict[str, Estimate] | None) -> tuple[Floats, Floats]:
    """The corners of what is drawn: the front and the ensemble with their crosses, and every trial, fitted and raw."""
    points = [_fitted(trial) for trial in shown] + [(trial.val["many"], trial.val["few"]) for trial in shown]
    for scores in [*(spot.scores for spot in evidence.front), *([ensemble] if ensemble else [])]:
        points += [(scores["many"].low, scores["few"].low), (scores["many"].high, scores["few"].high)]
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    pad = np.maximum(MARGIN, 0.05 * (high - low))
    return 100 * (low - pad), 100 * (high + pad)


def growth(evidence: Evidence) -> Figure | None:
    """The area below the front against the number of trials; None without predictions or with a single trial."""
    ordered = sorted(evidence.both, key=lambda trial: (trial.row["ended"] is None, trial.row["ended"], trial.id))
    if not evidence.paired or len(ordered) < 2:
        return None
    sizes = np.unique(np.geomspace(1, len(ordered), STEPS).round().astype(int))
    areas = [(int(k), area) for k in sizes if (area := evidence.area(ordered[:k]))]
    control = evidence.area([trial for trial in ordered if trial.control])
    figure = go.Figure([
        draw.band([k for k, _ in areas], [100 * a.low for _, a in areas], [100 * a.high for _, a in areas],
                  draw.faint(GREEN)),
        draw.scatter([(k, 100 * a.value) for k, a in areas], mode="lines+markers", line={"color": GREEN, "width": 3},
                     marker={"symbol": "triangle-up", "size": 9, "color": GREEN},
                     hovertext=[f"{k} trials: {100 * a.value:.1f} %" for k, a in areas]),
    ])  # fmt: skip
    if control:
        figure.add_trace(draw.scatter([(1, 100 * control.value), (len(ordered), 100 * control.value)], mode="lines",
                                      line={"color": VERMILION, "width": 2, "dash": "dash"}))  # fmt: skip
    figure.update_xaxes(title="trials, in the order in which they ended")
    figure.update_yaxes(title="area (%)")
    rows = [[text("all trials"), number(k, "d"), ranged(a)] for k, a in areas]
    rows += [[text("control arm"), number(sum(t.control for t in ordered), "d"), ranged(control)]] if control else []
    return Figure(
        name="growth",
        title="Did more trials still help?",
        html=draw.html(figure, "growth"),
        says="Line chart: the area below the front of many against few after more and more trials.",
        caption=_grown(areas, control),
        keys=[Key("all trials and τ, with 95 % interval", GREEN, "triangle-up", 3)]
        + ([Key("the whole control arm and τ", VERMILION, line=2, dash=True)] if control else []),
        table=Table(["what", "trials", "area %"], rows),
        height="20rem",
    )


def _grown(areas: Sequence[tuple[int, Estimate]], control: Estimate | None) -> str:
    whole = areas[-1][1]
    found = (
        f"Share of the square from 0 to 100 % in both accuracies that the front covers, scored on images that did not "
        f"choose it: {100 * whole.value:.1f} %."
    )
    if control:
        found += f" The control arm with τ alone covers {100 * control.value:.1f} %; the rest is what the tricks add."
    return found + " A line that is still rising says that more trials would help."


def compared(fronts: dict[str, Floats]) -> Figure:
    """The fronts of several runs, each [K, 2], by name, and what half of them reach."""
    colours, symbols = (BLUE, ORANGE, GREEN, PURPLE, SKY), ("circle", "square", "triangle-up", "star", "diamond")
    marks = [(colours[i % 5], symbols[i % 5]) for i in range(len(fronts))]
    figure = go.Figure([
        draw.scatter(100 * points, mode="lines+markers", line={"color": colour, "width": 2},
                     marker={"symbol": symbol, "size": 8, "color": colour},
                     hovertext=[_point(name, xy) for xy in points])
        for (name, points), (colour, symbol) in zip(fronts.items(), marks, strict=True)
    ])  # fmt: skip
    half = pareto.attainment(list(fronts.values()))
    figure.add_trace(draw.scatter(100 * half, mode="lines", line={"color": GREY, "width": 2, "dash": "dash"}))
    figure.update_xaxes(title="accuracy on many-shot classes (%)")
    figure.update_yaxes(title="accuracy on few-shot classes (%)")
    rows = [[text(name), percent(x), percent(y)] for name, points in fronts.items() for x, y in points]
    rows += [[text("half of the runs"), percent(x), percent(y)] for x, y in half]
    return Figure(
        name="runs",
        title="The fronts of the runs",
        html=draw.html(figure, "runs"),
        says="Line chart: the front of many against few of every run.",
        caption="The front of each run over its trials and τ. Up and to the right is better; the dashed line is what "
        "at least half of the runs reach.",
        keys=[Key(name, *mark, 2) for name, mark in zip(fronts, marks, strict=True)]
        + [Key("half of the runs", GREY, line=2, dash=True)],
        table=Table(["run", "many %", "few %"], rows),
    )


def _point(name: str, xy: Floats) -> str:
    return f"{name}: many {100 * xy[0]:.1f} %, few {100 * xy[1]:.1f} %"
