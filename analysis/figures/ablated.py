"""What the shipped recipe loses when one of its choices is set back."""

from collections.abc import Sequence

import plotly.graph_objects as go

from analysis.ablations import Part
from analysis.evidence import SCORES
from analysis.figures import draw
from analysis.figures.draw import BLUE, VERMILION, Figure, Key
from analysis.figures.tricks import ROW, rows_named
from analysis.tables import Table, anything, gained, text


def told(part: Part) -> str:
    return f"{part.name}: {anything(part.value).text} → {anything(part.plain).text}"


def ablation(winner: str, parts: Sequence[Part], draws: bool) -> Figure:
    """Changes of balanced accuracy, the largest loss first.  draws: whether there are intervals."""
    changes = [part.changes["balanced"] for part in parts]
    names = [draw.shortened(told(part), 34) for part in parts]
    says = [f"{name}: {gained(change).text} points" for name, change in zip(names, changes, strict=True)]
    known = [(i, change) for i, change in enumerate(changes) if change]
    figure = go.Figure([draw.scatter(
        [(100 * change.value, i) for i, change in known], mode="markers", hovertext=[says[i] for i, _ in known],
        marker={"symbol": "circle", "size": 10, "color": BLUE},
        error_x=draw.bars([change for _, change in known], BLUE) if draws else None)])  # fmt: skip
    figure.add_vline(x=0, line={"color": VERMILION, "width": 2})
    figure.update_xaxes(title="change of balanced accuracy (points)")
    rows_named(figure, names)
    rows = [
        [text(part.name), anything(part.value), anything(part.plain), *(gained(part.changes[name]) for name in SCORES)]
        for part in parts
    ]
    within = ", with 95 % intervals over the validation images" if draws else ""
    return Figure(
        name="ablation",
        title="The winner without one of its choices",
        html=draw.html(figure, "ablation"),
        says="Dot plot: the change of balanced accuracy when one choice of the best recipe is set back.",
        caption=f"Trial {winner} trained again with one choice set back to its plain value, compared with itself on "
        f"the same fresh seed at the fitted τ{within}. Left of zero: the recipe needs the choice. One seed says "
        "little about small changes.",
        keys=[Key("one choice set back", BLUE, "circle", 1.5), Key("no change", VERMILION, line=2)],
        table=Table(["choice", "winner", "set back to", *(f"{name}, points" for name in SCORES)], rows),
        height=f"{5 + ROW * len(parts)}rem",
    )
