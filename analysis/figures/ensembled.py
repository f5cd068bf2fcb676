"""Ensembles: how they grow, how their members differ."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from analysis.crossfit import Score
from analysis.ensembles import Ensembles
from analysis.figures import draw
from analysis.figures.draw import BLUE, PURPLE, VERMILION, Figure, Key
from analysis.tables import Table, duration, gained, number, percent, ranged, text
from rayltr.metrics import GROUPS


def growth(found: Ensembles) -> Figure | None:
    """Balanced accuracy against the number of members, judged on images that did not choose; None below two sizes."""
    if len(found.growth) < 2:
        return None
    sizes = list(range(1, len(found.growth) + 1))
    out = [score.balanced for score in found.growth]
    hover = [
        f"at most {n}: {100 * o.value:.1f} % balanced, {duration(s.cost).text} of training"
        for n, o, s in zip(sizes, out, found.growth, strict=True)
    ]
    figure = go.Figure([
        draw.band(sizes, [100 * o.low for o in out], [100 * o.high for o in out], draw.faint(PURPLE)),
        draw.scatter([(n, 100 * o.value) for n, o in zip(sizes, out, strict=True)], mode="lines+markers",
                     line={"color": PURPLE, "width": 3}, marker={"symbol": "star", "size": 12, "color": PURPLE},
                     hovertext=hover),
        draw.scatter([(sizes[0], 100 * out[0].value), (sizes[-1], 100 * out[0].value)], mode="lines",
                     line={"color": BLUE, "width": 2, "dash": "dash"}),
    ])  # fmt: skip
    figure.update_xaxes(title="distinct members at most", tickvals=sizes)
    figure.update_yaxes(title="balanced accuracy (%)")
    return Figure(
        name="members",
        title="More members",
        html=draw.html(figure, "members"),
        says="Line chart: balanced accuracy of greedy ensembles with one to several members.",
        caption="Members are chosen on one half of the validation images and judged on the other. Each member costs "
        "one more network per image. Where the line is flat, stop.",
        keys=[
            Key("greedy ensemble, with 95 % interval", PURPLE, "star", 3),
            Key("best single", BLUE, line=2, dash=True),
        ],
        table=scores(found.growth),
        height="20rem",
    )


def scores(found: Sequence[Score]) -> Table:
    """Ways to predict: what each is worth, by cross-fitting and on all images, and what it costs."""
    rows = [
        [text(score.name), number(len(score.members), "d"), ranged(score.balanced), gained(score.gain_balanced),
         *(gained(score.gain_groups[group]) for group in GROUPS), number(score.nll.value, ".3f"),
         *(percent(score.whole[name]) for name in ("balanced", *GROUPS)), number(score.whole["nll"], ".3f"),
         number(score.passes, "d"), duration(score.cost), text(", ".join(score.members))]
        for score in found
    ]  # fmt: skip
    columns = ["what", "members", "balanced %", "gain over single, points"]
    columns += [f"gain {group}, points" for group in GROUPS]
    columns += ["NLL", "balanced on all images %", *(f"{group} on all images %" for group in GROUPS)]
    return Table([*columns, "NLL on all images", "networks", "training", "of"], rows)


def gains(found: Ensembles) -> Figure | None:
    """What the ensemble gains over the best single model, by group."""
    if found.ensemble is None:
        return None
    own = {"balanced": found.ensemble.gain_balanced, **found.ensemble.gain_groups}
    own = {name: gain for name, gain in own.items() if not np.isnan(gain.value)}
    at = list(range(len(own)))
    trace = draw.scatter(
        [(100 * gain.value, y) for y, gain in zip(at, own.values(), strict=True)],
        mode="markers",
        marker={"symbol": "star", "size": 13, "color": PURPLE},
        hovertext=[f"{name}: {gained(gain).text} points" for name, gain in own.items()],
        error_x=draw.bars(list(own.values()), PURPLE),
    )
    figure = go.Figure([trace])
    figure.add_vline(x=0, line={"color": VERMILION, "width": 2})
    figure.update_xaxes(title="gain (points)")
    figure.update_yaxes(tickvals=at, ticktext=list(own), range=[len(own) - 0.5, -0.5], automargin=True, showgrid=False)
    return Figure(
        name="ensemble-gains",
        title="Who gains",
        html=draw.html(figure, "ensemble-gains"),
        says="Dot chart: gain of the ensemble over the best single model, by class group.",
        caption="Cross-fitted, with 95 % intervals; an interval that contains zero proves nothing.",
        keys=[Key("ensemble", PURPLE, "star", 1.5), Key("best single model", VERMILION, line=2)],
        table=Table(["classes", "gain, points"], [[text(name), gained(gain)] for name, gain in own.items()]),
        height="15rem",
    )


def differences(found: Ensembles) -> Figure | None:
    """Which errors of one member another gets right; None without members."""
    if found.differences is None or len(found.members) < 2:
        return None
    names = [member.name for member in found.members]
    rescue = found.differences.rescue["all"].copy()
    np.fill_diagonal(rescue, np.nan)
    says = [
        [
            f"{other} gets {100 * value:.0f} % of the errors of {one} right"
            for other, value in zip(names, row, strict=True)
        ]
        for one, row in zip(names, rescue, strict=True)
    ]
    figure = go.Figure([draw.matrix(100 * rescue, says)])
    draw.square(figure, names)
    figure.update_xaxes(title="is right")
    figure.update_yaxes(title="errs")
    parts = found.differences
    rows = [
        [text(group), text(one), text(other), percent(parts.disagreement[group][i, j]),
         number(parts.correlation[group][i, j], ".2f"), percent(parts.rescue[group][i, j])]
        for group in parts.rescue
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i != j
    ]  # fmt: skip
    return Figure(
        name="rescues",
        title="How the members differ",
        html=draw.html(figure, "rescues"),
        says="Matrix: the share of each member's errors that each other member gets right.",
        caption="Share of the row's errors that the column gets right, in per cent, over all classes alike. Members "
        "help each other where these numbers are large; by group they are in the table.",
        keys=[],
        table=Table(["classes", "errs", "is right", "disagreement %", "correlation of errors", "rescued %"], rows),
        height="24rem",
    )
