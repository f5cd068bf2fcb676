"""What tau alone gives: balanced accuracy along tau, tau-norm beside it, and what tricks add beyond the control."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from analysis.evidence import SCORES, Evidence
from analysis.figures import draw
from analysis.figures.draw import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, Figure, Key
from analysis.load import Trial
from analysis.pareto import hypervolume
from analysis.tables import Cell, Table, number, percent, points, text
from analysis.taunorm import POWERS, Normed
from rayltr.metrics import TAUS

Floats = NDArray[np.float64]

NORMED = {"best": (PURPLE, "triangle-up"), "control": (ORANGE, "square")}
"""Colours and marks of tau-norm."""

LEVELS = 13
"""Head accuracies at which the two envelopes are compared in the table."""


def along_tau(evidence: Evidence) -> Figure | None:
    """Balanced accuracy of every trial at every tau; None without stored predictions."""
    drawn = [trial for trial in evidence.trials if trial.curve]
    if not drawn:
        return None
    control = None if evidence.control is None else evidence.trials[evidence.control]
    best = None if evidence.best is None else evidence.trials[evidence.best]
    arm = [trial for trial in drawn if trial.control]
    whole, plain = _upper(drawn), _upper(arm) if arm else None
    faint = draw.joined([_line(trial) for trial in drawn])
    figure = go.Figure([draw.scatter(faint, mode="lines", line={"color": SKY, "width": 1}, opacity=0.35)])
    figure.add_trace(_thick(whole, GREEN, "dot"))
    if plain is not None:
        figure.add_trace(_thick(plain, VERMILION, "dash"))
    if best and best is not control:
        figure.add_traces(_named(best, "best", BLUE, "circle"))
    if control:
        figure.add_traces(_named(control, "control", VERMILION, "diamond"))
    norms, _ = evidence.normed
    for kind, own in norms.items():
        figure.add_traces(_normed(own, *NORMED[kind]))
    climbs = [own.scores["balanced"][: own.at + 1] for own in norms.values()]
    figure.update_xaxes(title=f"{'τ or t' if norms else 'τ'} (larger: more for rare classes)")
    figure.update_yaxes(title="balanced accuracy (%)", range=_heights([whole, plain, best, control, *climbs]))
    gap = None if plain is None else whole - plain
    rows = [
        [number(tau, ".1f"), percent(whole[k]), percent(None if plain is None else plain[k]),
         points(None if gap is None else gap[k]), *(_at(own, tau) for own in norms.values())]
        for k, tau in enumerate(TAUS)
    ]  # fmt: skip
    return Figure(
        name="taus",
        title="Balanced accuracy along τ",
        html=draw.html(figure, "taus"),
        says=f"Line chart: balanced accuracy of {len(drawn)} trials against τ, with the best of all at each τ"
        f"{', and of tau-norm against its power t' if norms else ''}.",
        caption=_lesson(whole, plain) + (_beside(list(norms.values())) if norms else ""),
        keys=[
            *([Key(f"best, {best.id}, at its fitted τ", BLUE, "circle", 2)] if best and best is not control else []),
            *([Key(f"control, {control.id}, at its fitted τ", VERMILION, "diamond", 2)] if control else []),
            Key("best of all trials at each τ", GREEN, line=2.5, dash=True),
            *([Key("best of the control arm at each τ", VERMILION, line=2.5, dash=True)] if arm else []),
            *(Key(f"tau-norm of {own.trial}", *NORMED[kind], 2) for kind, own in norms.items()),
            Key("every trial", SKY, line=1),
        ],
        table=Table(["τ or t", "all trials %", "control arm %", "difference, points",
                     *(f"tau-norm of the {kind} %" for kind in norms)], rows),
    )  # fmt: skip


def _normed(own: Normed, colour: str, symbol: str) -> list[go.Scatter]:
    line = np.stack([POWERS, 100 * own.scores["balanced"]], 1)
    hover = [f"tau-norm of {own.trial}, t {power:.1f}: {score:.1f} %" for power, score in line]
    return [
        draw.scatter(line, mode="lines", line={"color": colour, "width": 2}, hovertext=hover),
        draw.scatter([line[own.at]], mode="markers", marker={"symbol": symbol, "size": 11, "color": colour}),
    ]


def _at(own: Normed, tau: float) -> Cell:
    """Balanced accuracy of tau-norm where t has this value; a gap beyond its end."""
    place = np.flatnonzero(np.isclose(POWERS, tau))
    return percent(float(own.scores["balanced"][place[0]]) if len(place) else None)


def corrections(evidence: Evidence) -> Table:
    """Tau-norm beside logit adjustment, each where its NLL is lowest; no rows without tau-norm."""
    rows = []
    for kind, own in evidence.normed[0].items():
        trial, scores = evidence.shown[kind], {name: values[own.at] for name, values in own.scores.items()}
        assert trial.curve is not None
        adjusted = {name: trial.val[f"fitted_{name}"] for name in scores}
        fitted = (trial.val["tau"], trial.val["temperature"], trial.val["fitted_nll"])
        normed = (POWERS[own.at], own.temperature[own.at], own.nll[own.at])
        for name, found, best, curve, grid in (("logit adjustment", adjusted, fitted, trial.curve, TAUS),
                                               ("tau-norm", scores, normed, own.scores, POWERS)):  # fmt: skip
            peak = int(curve["balanced"].argmax())
            rows.append([text(f"{kind} {trial.id}"), text(name), number(best[0], ".1f"), number(best[1], ".3g"),
                         number(best[2], ".3f"), *(percent(found[score]) for score in SCORES),
                         percent(curve["balanced"][peak]), number(grid[peak], ".1f")])  # fmt: skip
    columns = ["trial", "correction", "τ or t", "temperature", "NLL", *(f"{name} %" for name in SCORES)]
    return Table([*columns, "peak %", "at"], rows)


def normed(evidence: Evidence) -> Table:
    """All scores of tau-norm at every power."""
    rows = [
        [text(own.trial), number(power, ".1f"), number(own.temperature[k], ".3g"), number(own.nll[k], ".3f"),
         *(percent(own.scores[name][k]) for name in ("accuracy", *SCORES))]
        for own in evidence.normed[0].values()
        for k, power in enumerate(POWERS)
    ]  # fmt: skip
    return Table(["trial", "power", "temperature", "NLL", "accuracy %", *(f"{name} %" for name in SCORES)], rows)


def _lesson(whole: Floats, plain: Floats | None) -> str:
    found = "Training tricks and τ shift the same balance between head and tail, so compare the peaks, not the start."
    if plain is None:
        return found
    zero = int(np.abs(TAUS).argmin())
    raw, peak = 100 * (whole[zero] - plain[zero]), 100 * (np.nanmax(whole) - np.nanmax(plain))
    return (
        f"{found} At τ = 0 the best trial is {raw:.1f} points above the control arm, at each one's best τ "
        f"{peak:.1f} points: the second number, as measured, is what the tricks add beyond τ."
    )


def _beside(norms: Sequence[Normed]) -> str:
    """What tau-norm is, and its best."""
    peaks = [f"{100 * own.scores['balanced'].max():.1f} % ({own.trial})" for own in norms]
    return (
        " Tau-norm, the other correction that trains nothing, divides the weights of each class by the power t of "
        f"their length: it shares the axis, not the meaning of its numbers, and was tried up to {POWERS[-1]:.1f}. "
        f"Marked where its NLL is lowest, its balanced accuracy peaks at {' and '.join(peaks)}."
    )


def _heights(lines: Sequence[Floats | Trial | None]) -> list[float]:
    """The range of what is drawn out; the other trials may leave the picture."""
    drawn = [line.curve["balanced"] if isinstance(line, Trial) and line.curve else line for line in lines]
    values = 100 * np.concatenate([line for line in drawn if isinstance(line, np.ndarray)])
    low, high = np.nanmin(values), np.nanmax(values)
    pad = max(1.0, 0.08 * (high - low))
    return [float(low - 2 * pad), float(high + pad)]


def _upper(trials: Sequence[Trial]) -> Floats:
    return np.max([trial.curve["balanced"] for trial in trials if trial.curve], axis=0)


def _line(trial: Trial) -> Floats:
    assert trial.curve is not None
    return np.stack([trial.curve["tau"], 100 * trial.curve["balanced"]], 1)


def _thick(values: Floats, colour: str, dash: str) -> go.Scatter:
    line = {"color": colour, "width": 2.5, "dash": dash}
    return draw.scatter(np.stack([TAUS, 100 * values], 1), mode="lines", line=line)


def _named(trial: Trial, word: str, colour: str, symbol: str) -> list[go.Scatter]:
    line = _line(trial)
    fitted = line[int(np.abs(line[:, 0] - trial.val["tau"]).argmin())]
    hover = [f"{word} {trial.id}, τ {tau:.1f}: {score:.1f} %" for tau, score in line]
    marks = {"symbol": symbol, "size": 11, "color": colour}
    return [
        draw.scatter(line, mode="lines", line={"color": colour, "width": 2}, hovertext=hover),
        draw.scatter([fitted], mode="markers+text", marker=marks, text=[word], textposition="bottom center"),
    ]


def beyond(evidence: Evidence) -> Figure | None:
    """Tail accuracy that all trials reach beyond the control arm at the same head accuracy; None without both."""
    arm = [trial for trial in evidence.both if trial.control and trial.curve]
    if not arm or len(arm) == len(evidence.both):
        return None
    whole = np.concatenate([trial.points()[:, 1:] for trial in evidence.both])
    plain = np.concatenate([trial.points()[:, 1:] for trial in arm])
    at = np.unique(np.concatenate([whole[:, 0], plain[:, 0]]))
    at = at[(at <= plain[:, 0].max()) & (at >= plain[:, 0].min())]
    reached, base = envelope(whole, at), envelope(plain, at)
    gain = 100 * (reached - base)
    mean = float(gain[1:] @ np.diff(at) / (at[-1] - at[0])) if len(at) > 1 else float(gain.mean())
    figure = go.Figure([
        draw.band(100 * at, np.zeros(len(at)), gain, draw.faint(GREEN)),
        draw.scatter(np.stack([100 * at, gain], 1), mode="lines", line={"color": GREEN, "width": 3},
                     hovertext=[f"many {100 * x:.1f} %: {y:.1f} points" for x, y in zip(at, gain, strict=True)]),
        draw.scatter([(100 * at[0], 0), (100 * at[-1], 0)], mode="lines", line={"color": VERMILION, "width": 2}),
    ])  # fmt: skip
    figure.update_xaxes(title="accuracy on many-shot classes (%)")
    figure.update_yaxes(title="more on few-shot classes (points)")
    shown = np.unique(np.linspace(0, len(at) - 1, LEVELS).round().astype(int))
    rows = [[percent(at[k]), percent(reached[k]), percent(base[k]), points(reached[k] - base[k])] for k in shown]
    return Figure(
        name="beyond",
        title="What the tricks add beyond τ",
        html=draw.html(figure, "beyond"),
        says="Area chart: tail accuracy gained over the control arm at the same head accuracy.",
        caption="Both sides may choose trial and τ freely: at each accuracy on many-shot classes, how many points more "
        "on few-shot classes the best of all trials has than the best of the control arm. Zero means that τ alone does "
        f"as well. The mean over this range is {mean:.1f} points, the largest {gain.max():.1f}; as measured, of "
        f"{len(evidence.both)} trials against {len(arm)}, which flatters the larger side.",
        keys=[
            Key("all trials and τ, over the control arm", GREEN, line=3),
            Key("control arm and τ", VERMILION, line=2),
        ],
        table=Table(["many %", "few of all %", "few of control %", "difference, points"], rows),
        height="20rem",
    )  # fmt: skip


def envelope(curve: Floats, at: Floats) -> Floats:
    """The best second coordinate among points [K, 2] whose first is at least each of `at`; nan where there is none."""
    order = np.argsort(curve[:, 0])
    best = np.maximum.accumulate(curve[order, 1][::-1])[::-1]
    place = np.searchsorted(curve[order, 0], at)
    return np.where(place < len(best), best[np.minimum(place, len(best) - 1)], np.nan)


def areas(evidence: Evidence) -> Table:
    """Each trial's own curve: its area, and the area it adds to that of the control arm."""
    arm = [trial.points()[:, 1:] for trial in evidence.both if trial.control]
    base = np.concatenate(arm) if arm else np.zeros((0, 2))
    alone = hypervolume(base)
    rows = [
        (trial, hypervolume(own), hypervolume(np.concatenate([base, own])) - alone)
        for trial in evidence.both
        for own in [trial.points()[:, 1:]]
    ]
    rows.sort(key=lambda row: -row[2])
    cells = [
        [text(trial.id), text("control" if trial.control else None), number(trial.val["tau"], ".1f"),
         percent(trial.val["balanced"]), percent(trial.val["fitted_balanced"]), percent(area),
         points(more if arm else None)]
        for trial, area, more in rows
    ]  # fmt: skip
    columns = ["trial", "arm", "fitted τ", "balanced, raw %", "balanced, fitted %", "area of its τ curve %"]
    return Table([*columns, "area beyond the control arm, points"], cells)
