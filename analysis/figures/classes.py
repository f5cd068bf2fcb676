"""Accuracy of single classes against their training frequency, and the difference to the control."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from analysis import estimates, perclass, resample
from analysis.estimates import Estimate
from analysis.evidence import Evidence
from analysis.figures import draw
from analysis.figures.draw import BLUE, GREEN, GREY, VERMILION, Figure, Key
from analysis.load import Run, Trial
from analysis.tables import Table, gained, number, percent, points, ranged, text
from rayltr.metrics import GROUPS

Floats = NDArray[np.float64]

MARKS = {"best": (BLUE, "circle"), "control": (VERMILION, "diamond")}
MANY = 300
"""With more classes than this, marks are smaller."""


def by_frequency(evidence: Evidence) -> Figure | None:
    """Accuracy of every class against its training images, best trial and control; None if neither was measured."""
    trials, run = evidence.shown, evidence.run
    if not trials or run.items is None:
        return None
    figure = go.Figure()
    means = {kind: _means(run, trial) for kind, trial in trials.items()}
    for kind, trial in trials.items():
        figure.add_traces(_classes(run, trial, means[kind], *MARKS[kind]))
    _frequency(figure, run)
    figure.update_yaxes(title="validation accuracy (%)", range=[-2, 108], tickvals=[0, 20, 40, 60, 80, 100])
    names = {kind: f"{kind} {trial.id}" for kind, trial in trials.items()}
    return Figure(
        name="classes",
        title="Accuracy against training images",
        html=draw.html(figure, "classes"),
        says="Scatter plot of each class's validation accuracy against its number of training images: "
        + " and ".join(names.values()),
        caption="Each mark is a class at the fitted τ and temperature, each line the mean over classes of similar "
        "frequency with its 95 % interval. A line that falls to the left is what the long tail costs; single marks "
        "are noisy, because a class has few validation images.",
        keys=[Key(f"{names[kind]}: classes and their mean", *MARKS[kind], 3) for kind in trials],
        table=_table(run, trials),
    )


def _means(run: Run, trial: Trial) -> list[tuple[float, Estimate]]:
    """The mean number of training images (geometric) and the mean accuracy of each bin of classes."""
    assert run.items is not None and trial.per_class is not None
    n, hits = np.maximum(run.counts, 1), np.nan_to_num(trial.per_class) * run.items.images
    found = [(_middle(n[part]), perclass.pooled(hits, run.items.images, part)) for part in perclass.bins(run.counts)]
    return [(x, mean) for x, mean in found if not np.isnan(mean.value)]


def _middle(n: NDArray[np.int64]) -> float:
    return float(np.exp(np.log(n).mean()))


def _classes(run: Run, trial: Trial, means: list[tuple[float, Estimate]], colour: str, symbol: str) -> list[go.Scatter]:
    assert trial.per_class is not None
    n = np.maximum(run.counts, 1)
    known = ~np.isnan(trial.per_class)
    hover = [
        f"{run.classes[c]}, {run.counts[c]} images: {100 * trial.per_class[c]:.1f} %" for c in np.flatnonzero(known)
    ]
    marks = {"symbol": symbol, "size": 4 if len(n) > MANY else 6, "color": colour}
    shown = np.stack([n, 100 * trial.per_class], 1)[known]
    x, y = [x for x, _ in means], [100 * mean.value for _, mean in means]
    low, high = [100 * mean.low for _, mean in means], [100 * mean.high for _, mean in means]
    return [
        draw.scatter(shown, mode="markers", marker=marks, opacity=0.4, hovertext=hover),
        draw.band(x, low, high, draw.faint(colour)),
        draw.scatter(np.stack([x, y], 1), mode="lines", line={"color": colour, "width": 3}),
    ]


def _frequency(figure: go.Figure, run: Run) -> None:
    """The axis of training images, with the name of each group above its classes and a dotted line between groups."""
    ticks = draw.log_ticks(max(int(run.counts.min()), 1), int(run.counts.max()))
    figure.update_xaxes(title="training images of the class (log scale)", type="log", **ticks)
    spans = {name: np.maximum(run.counts[run.groups[name]], 1) for name in GROUPS if len(run.groups[name])}
    for name, n in spans.items():
        middle = float(np.log10(float(n.min()) * float(n.max())) / 2)
        figure.add_annotation(x=middle, y=1, yref="paper", yanchor="top", text=name, showarrow=False)
    for left, right in zip(list(spans.values())[1:], spans.values(), strict=False):
        between = float(np.sqrt(float(left.max()) * float(right.min())))
        figure.add_vline(x=between, line={"color": GREY, "width": 1, "dash": "dot"})


def _table(run: Run, trials: Mapping[str, Trial]) -> Table:
    assert run.items is not None
    images = run.items.images
    group = {int(c): name for name, members in run.groups.items() for c in members}
    found = {kind: perclass.single(trial.per_class, images, run.counts) for kind, trial in trials.items()}  # type: ignore[arg-type]
    both = len(trials) == 2
    rows = [
        [text(name), text(group[c]), number(int(run.counts[c]), "d"), number(int(images[c]), "d"),
         *(ranged(estimates[c]) for estimates in found.values()),
         *([points(found["best"][c].value - found["control"][c].value)] if both else [])]
        for c, name in enumerate(run.classes)
    ]  # fmt: skip
    columns = ["class", "group", "training images", "validation images", *(f"{kind} %" for kind in found)]
    return Table([*columns, *(["difference, points"] if both else [])], rows)


def difference(evidence: Evidence) -> Figure | None:
    """Best minus control, class by class; None where they are the same or not measured."""
    trials, run = evidence.shown, evidence.run
    if len(trials) < 2 or run.items is None:
        return None
    gap = trials["best"].per_class - trials["control"].per_class  # type: ignore[operator]
    n = np.maximum(run.counts, 1)
    known = ~np.isnan(gap)
    means = _gains(evidence, trials)
    x = [x for x, _ in means]
    marks = {"symbol": "circle", "size": 4 if len(n) > MANY else 6, "color": GREEN}
    hover = [f"{run.classes[c]}, {run.counts[c]} images: {100 * gap[c]:+.1f} points" for c in np.flatnonzero(known)]
    figure = go.Figure([
        draw.scatter(np.stack([n, 100 * gap], 1)[known], mode="markers", marker=marks, opacity=0.4, hovertext=hover),
        draw.band(x, [100 * m.low for _, m in means], [100 * m.high for _, m in means], draw.faint(GREEN)),
        draw.scatter([(at, 100 * m.value) for at, m in means], mode="lines", line={"color": GREEN, "width": 3}),
        draw.scatter([(n.min(), 0), (n.max(), 0)], mode="lines", line={"color": VERMILION, "width": 2}),
    ])  # fmt: skip
    _frequency(figure, run)
    figure.update_yaxes(title="best minus control (points)")
    better, worse = int((gap[known] > 0).sum()), int((gap[known] < 0).sum())
    rows = [[number(x, ".0f"), gained(mean)] for x, mean in means]
    return Figure(
        name="gains",
        title="Which classes gained",
        html=draw.html(figure, "gains"),
        says="Scatter plot: accuracy of each class with the best trial minus that with the control.",
        caption=f"{better} classes are better than with the control, {worse} worse. The line is the mean over classes "
        "of similar frequency with its 95 % interval, compared image by image; where the band touches zero, nothing "
        "is proven.",
        keys=[Key("best minus control: classes and their mean", GREEN, "circle", 3), Key("control", VERMILION, line=2)],
        table=Table(["training images (mean)", "difference, points"], rows),
        height="22rem",
    )


def _gains(evidence: Evidence, trials: Mapping[str, Trial]) -> list[tuple[float, Estimate]]:
    """The paired difference of the best to the control, for every bin of classes."""
    run = evidence.run
    parts = {str(k): part for k, part in enumerate(perclass.bins(run.counts))}
    hits = np.stack([trials["best"].hits(), trials["control"].hits()])
    samples = resample.grouped(hits, evidence.target, parts, evidence.draws)
    now = resample.grouped(hits, evidence.target, parts)
    n = np.maximum(run.counts, 1)
    found = [(_middle(n[part]), estimates.difference(samples[k], 0, 1, now[k][0])) for k, part in parts.items()]
    return [(x, gain) for x, gain in found if not np.isnan(gain.value)]


def worst(evidence: Evidence, most: int = 20) -> Table:
    """The classes with the lowest accuracy of the best trial (or the control), the rarest of equals first."""
    trials, run = evidence.shown, evidence.run
    kind = "best" if "best" in trials else "control"
    if kind not in trials:
        return Table([], [])
    full = _table(run, {**trials, kind: trials[kind]})
    at = full.columns.index(f"{kind} %")
    measured = [row for row in full.rows if isinstance(row[at].value, float)]
    measured.sort(key=lambda row: (row[at].value, row[2].value))  # type: ignore[arg-type,return-value]
    return Table(full.columns, measured[:most])


def confused(evidence: Evidence, most: int = 20) -> Table:
    """The rare classes that the best trial (or the control) most often takes for classes of a more frequent group."""
    trials, run = evidence.shown, evidence.run
    trial = trials.get("best", trials.get("control"))
    columns = ["class", "training images", "taken for", "its training images", "share of its images %", "images"]
    if trial is None or trial.pred is None:
        return Table(columns, [])
    found = perclass.confusions(trial.pred, evidence.target, run.groups, len(run.counts))[:most]
    rows = [
        [text(run.classes[one.true]), number(int(run.counts[one.true]), "d"), text(run.classes[one.said]),
         number(int(run.counts[one.said]), "d"), percent(one.share), number(one.images, "d")]
        for one in found
    ]  # fmt: skip
    return Table(columns, rows)
