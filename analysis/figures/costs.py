"""What quality cost, how trials learned, and which other frequencies of classes a model can stand."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from analysis.evidence import Evidence
from analysis.fidelity import Curve
from analysis.figures import draw
from analysis.figures.draw import BLUE, GREEN, SKY, VERMILION, Figure, Key
from analysis.load import Trial
from analysis.pareto import front
from analysis.shift import Shift
from analysis.tables import Table, duration, number, percent, points, ranged, text
from rayltr.metrics import GROUPS

Floats = NDArray[np.float64]

UNITS = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def quality(evidence: Evidence) -> Figure | None:
    """Balanced accuracy against training time; None where no time is recorded."""
    at = [i for i, trial in enumerate(evidence.trials) if trial.cost > 0 and np.isfinite(trial.cost)]
    if not at:
        return None
    trials = [evidence.trials[i] for i in at]
    seconds, score = np.array([trial.cost for trial in trials]), evidence.points["balanced"][at]
    unit = next((name for name, length in UNITS.items() if np.median(seconds) >= length), "seconds")
    xy = np.stack([seconds / UNITS[unit], 100 * score], 1)
    edge = front(xy * [-1, 1])[::-1]
    hover = [f"{t.id}: {y:.1f} % after {duration(t.cost).text}" for t, (_, y) in zip(trials, xy, strict=True)]
    marks = {"symbol": ["diamond" if t.control else "circle" for t in trials], "size": 9,
             "color": [VERMILION if t.control else BLUE for t in trials]}  # fmt: skip
    figure = go.Figure([
        draw.scatter(xy, mode="markers", marker=marks, opacity=0.75, hovertext=hover),
        draw.scatter(xy[edge], mode="lines", line={"color": GREEN, "width": 3, "shape": "hv"}),
    ])  # fmt: skip
    figure.update_xaxes(title=f"{unit} of training (log scale)", type="log",
                        **draw.log_ticks(float(xy[:, 0].min()), float(xy[:, 0].max())))  # fmt: skip
    figure.update_yaxes(title="balanced accuracy (%)")
    measured = [evidence.estimate(i, "balanced") for i in at]
    rows = [
        [text(t.id), text("control" if t.control else None), duration(t.cost),
         ranged(measured[k]) if measured[k] else percent(score[k]), text("yes" if k in edge else None)]
        for k, t in enumerate(trials)
    ]  # fmt: skip
    return Figure(
        name="cost",
        title="Quality against training time",
        html=draw.html(figure, "cost"),
        says=f"Scatter plot: balanced accuracy of {len(at)} trials against their training time.",
        caption="Up and to the left is better. The line joins the trials that no other beats in both; to its right, "
        "time bought nothing.",
        keys=[
            Key("trial at its fitted τ", BLUE, "circle"),
            Key("control arm", VERMILION, "diamond"),
            Key("cheapest for what it reaches", GREEN, line=3),
        ],
        table=Table(["trial", "arm", "training", "balanced %", "on the line"], rows),
    )


def learning(curves: Mapping[str, Sequence[Curve]], best: Trial | None, control: Trial | None) -> Figure | None:
    """Training loss along the chain, by trial id; best and control drawn out.  None without epochs."""
    lines = {trial: _chained(parts) for trial, parts in curves.items()}
    lines = {trial: line for trial, line in lines.items() if len(line)}
    if not lines:
        return None
    named = {"best": (best if best is not control else None, BLUE, "solid"), "control": (control, VERMILION, "dash")}
    shown = [(word, trial.id, colour, dash) for word, (trial, colour, dash) in named.items() if trial]
    shown = [entry for entry in shown if entry[1] in lines]
    figure = go.Figure([draw.scatter(draw.joined(list(lines.values())), mode="lines", line={"color": SKY, "width": 1},
                                     opacity=0.45)])  # fmt: skip
    for word, trial, colour, dash in shown:
        line = lines[trial]
        hover = [f"{word} {trial}, epoch {x:.0f}: {y:.3g}" for x, y in line]
        style = {"color": colour, "width": 2.5, "dash": dash}
        figure.add_trace(draw.scatter(line, mode="lines", line=style, hovertext=hover))
    figure.update_xaxes(title="epoch of the chain")
    figure.update_yaxes(title="training loss", rangemode="tozero")
    rows = [
        [text(trial), number(len(line), "d"), number(line[0, 1], ".4g"), number(line[-1, 1], ".4g")]
        for trial, line in lines.items()
    ]
    return Figure(
        name="learning",
        title="Learning curves",
        html=draw.html(figure, "learning"),
        says=f"Line chart: training loss of {len(lines)} trials by epoch.",
        caption="Losses of different kinds have different scales, so compare shapes, not heights: a curve that still "
        "falls at its end was too short. Jumps are the beginning of another stage.",
        keys=[
            *(Key(f"{word} {trial}", colour, line=2.5, dash=dash == "dash") for word, trial, colour, dash in shown),
            Key("other trials", SKY, line=1),
        ],
        table=Table(["trial", "epochs", "first loss", "last loss"], rows),
        height="22rem",
    )


def _chained(parts: Sequence[Curve]) -> Floats:
    """Epoch and the sum of all terms of the training loss, stage after stage."""
    stages: dict[int, list[Curve]] = {}
    for part in parts:
        if part.split == "train":
            stages.setdefault(part.stage, []).append(part)
    found: list[Floats] = []
    for _, terms in sorted(stages.items()):
        length = min(len(term.value) for term in terms)
        total = np.sum([term.value[:length] for term in terms], axis=0)
        found.append(np.stack([terms[0].begun + np.arange(1, length + 1), total], 1))
    return np.concatenate(found) if found else np.zeros((0, 2))


def shifted(found: Mapping[str, Sequence[Shift]]) -> Figure | None:
    """Accuracy under other class frequencies, by name of the trial (best, control), plain and adjusted."""
    found = {name: rows for name, rows in found.items() if rows and not np.isnan(rows[0].plain)}
    if not found:
        return None
    figure, keys = go.Figure(), []
    first = next(iter(found.values()))
    labels = ["1" if s.direction == "uniform" else f"{s.ratio:.0f}" for s in first]
    for (name, rows), (colour, symbol) in zip(found.items(), ((BLUE, "circle"), (VERMILION, "diamond")), strict=False):
        for kind, values, dash, mark in (
            ("as it is", [s.plain for s in rows], "dash", f"{symbol}-open"),
            ("told the new frequencies", [s.adjusted for s in rows], "solid", symbol),
        ):
            hover = [f"{name}, {kind}, {s.direction} {s.ratio:.0f}: {100 * v:.1f} %"
                     for s, v in zip(rows, values, strict=True)]  # fmt: skip
            line, marker = {"color": colour, "width": 2.5, "dash": dash}, {"symbol": mark, "size": 8, "color": colour}
            places = np.stack([np.arange(len(rows)), 100 * np.array(values)], 1)
            figure.add_trace(draw.scatter(places, mode="lines+markers", line=line, marker=marker, hovertext=hover))
            keys.append(Key(f"{name}, {kind}", colour, mark, 2.5, dash == "dash"))
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels,
                        title="← head-heavy · ratio · tail-heavy →")  # fmt: skip
    figure.update_yaxes(title="accuracy (%)")
    return Figure(
        name="shift",
        title="Accuracy if the classes come in other frequencies",
        html=draw.html(figure, "shift"),
        says="Line chart: accuracy against the imbalance of the test data, forward and backward.",
        caption="On the left the frequent classes of training stay frequent, in the middle all are equally frequent, "
        "on the right the order is reversed. Adding the logarithm of the known frequencies to the logits costs "
        "nothing; the gap between the lines is what it gives.",
        keys=keys,
        table=_shifts(found),
        height="24rem",
    )  # fmt: skip


def _shifts(found: Mapping[str, Sequence[Shift]]) -> Table:
    rows = [
        [text(name), text(s.direction), number(s.ratio, ".0f"), percent(s.plain), percent(s.adjusted),
         points(s.adjusted - s.plain), points(s.error),
         *(percent(s.groups[group][side]) for group in GROUPS for side in (0, 1)), percent(s.covered, 0)]
        for name, shifts in found.items()
        for s in shifts
    ]  # fmt: skip
    sides = [f"{group} {side} %" for group in GROUPS for side in ("plain", "adjusted")]
    columns = ["trial", "direction", "ratio", "plain %", "adjusted %", "gain, points", "standard error, points"]
    return Table([*columns, *sides, "measured share %"], rows)
