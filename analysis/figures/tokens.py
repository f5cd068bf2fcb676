"""Two tokens: which classes each knows, how they drew apart in training, how far heads look, how rich features are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.estimates import Estimate
from analysis.figures import draw
from analysis.figures.draw import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, Figure, Key
from analysis.tables import Table, number, percent, ranged, text
from analysis.tokens import ACCURACY, DISTANCE, ENTROPY, Floats
from rayltr.metrics import GROUPS

MARKS = {"cls": (BLUE, "circle"), "main": (GREEN, "diamond"), "dist": (PURPLE, "triangle-up")}
WORDS = {"cls": "class token", "main": "mean of both", "dist": "distillation token"}
SHARES = {"cls": 1.0, "main": 0.5, "dist": 0.0}
PANELS = {DISTANCE: "distance of the tokens", ACCURACY: "teacher: accuracy (%)", ENTROPY: "teacher: entropy (nats)"}
ROWS = 60
"""At most so many epochs are listed."""


def heads(found: Mapping[str, Mapping[str, Estimate]], name: str) -> Figure:
    """The accuracy of both tokens and of their mean, by class group."""
    scores = [score for score in ("balanced", *GROUPS) if not np.isnan(found["main"][score].value)]
    figure = go.Figure()
    for place, (head, (colour, symbol)) in zip((-0.2, 0.0, 0.2), MARKS.items(), strict=True):
        values = [found[head][score] for score in scores]
        hover = [f"{WORDS[head]}, {score}: {ranged(v).text} %" for score, v in zip(scores, values, strict=True)]
        figure.add_trace(draw.scatter([(i + place, 100 * v.value) for i, v in enumerate(values)], mode="markers",
                                      marker={"symbol": symbol, "size": 11, "color": colour}, hovertext=hover,
                                      error_y=draw.bars(values, colour)))  # fmt: skip
    figure.update_xaxes(tickvals=list(range(len(scores))), ticktext=scores, showgrid=False,
                        range=[-0.5, len(scores) - 0.5])  # fmt: skip
    figure.update_yaxes(title="validation accuracy (%)", rangemode="tozero")
    return Figure(
        name="token-heads",
        title="Which token knows which classes",
        html=draw.html(figure, "token-heads"),
        says=f"Dot chart: accuracy of the class token, the distillation token and their mean by class group, {name}.",
        caption="As they predict, without any correction, with 95 % intervals. Where the method works, the class token "
        "leads on many classes, the distillation token on few, and the mean is near the better one on both.",
        keys=[Key(WORDS[head], colour, symbol, 1.5) for head, (colour, symbol) in MARKS.items()],
        table=scored(found),
        height="22rem",
    )


def scored(found: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """Every head by its accuracies; `cls75` has three quarters of the class token."""
    shown = sorted(found, key=_share, reverse=True)
    rows = [
        [text(head), percent(_share(head), 0), *(ranged(found[head][score]) for score in ("balanced", *GROUPS))]
        for head in shown
    ]
    return Table(["head", "share of the class token %", "balanced %", *(f"{group} %" for group in GROUPS)], rows)


def _share(head: str) -> float:
    return SHARES[head] if head in SHARES else int(head.removeprefix("cls")) / 100


def training(curves: Mapping[str, Mapping[str, Sequence[Floats]]], shown: str) -> Figure | None:
    """The distance of the tokens, and how the teacher judged the images, epoch by epoch; None without records."""
    own = curves.get(shown)
    if not own:
        return None
    others = {name: values for name, values in curves.items() if name != shown}
    figure = make_subplots(rows=len(PANELS), cols=1, subplot_titles=[*PANELS.values()], vertical_spacing=0.13)
    switches = [float(part[0, 0]) - 0.5 for part in own[DISTANCE][1:]]
    for row, measure in enumerate(PANELS, 1):
        factor = 100 if measure == ACCURACY else 1
        line = np.concatenate(own[measure]) * [1, factor]
        hover = [f"epoch {x:.0f}: {y:.3g}" for x, y in line]
        if others and measure == DISTANCE:
            far = [_thinned(np.concatenate(values[measure])) for values in others.values()]
            figure.add_trace(_line(draw.joined(far), SKY, 1, opacity=0.45, hoverinfo="skip"), row=row, col=1)
        figure.add_trace(_line(line, BLUE, 2.5, hovertext=hover, hoverinfo="text"), row=row, col=1)
        for at in switches:
            figure.add_vline(x=at, line={"color": GREY, "width": 1, "dash": "dot"}, row=row, col=1)
        figure.update_yaxes(rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title="epoch of the student", row=len(PANELS), col=1)
    return Figure(
        name="token-training",
        title="While it was trained",
        html=draw.html(figure, "token-training", top=34),
        says=f"Line charts by epoch: distance of the two tokens, accuracy and entropy of the teacher, {shown}.",
        caption="On the student's own batches, augmented and mixed as they are. The distance is 1 − the mean cosine of "
        "the two tokens: near 0 both say the same, and the second is of no use. It should rise, most of all once the "
        "last stage begins (dotted). The teacher is less sure, and more often wrong, the stranger the images are: "
        "where mixing ends its accuracy rises.",
        keys=[Key(shown, BLUE, line=2.5), *([Key("other students", SKY, line=1)] if others else []),
              *([Key("another stage begins", GREY, line=1, dash=True)] if switches else [])],
        table=_epochs(own),
        height="36rem",
    )  # fmt: skip


def _line(points: Floats, colour: str, width: float, **style: Any) -> go.Scatter:
    """A line; distances and entropies need more than the two decimals that `draw.scatter` keeps."""
    xy = np.round(points, 5).astype(np.float32)
    return go.Scatter(x=xy[:, 0], y=xy[:, 1], mode="lines", line={"color": colour, "width": width}, **style)


def _thinned(points: Floats, most: int = 200) -> Floats:
    return points[:: -(-len(points) // most)]


def _epochs(own: Mapping[str, Sequence[Floats]]) -> Table:
    """Epochs at even distances, the first and the last of every stage among them."""
    whole = {measure: np.concatenate(own[measure]) for measure in PANELS}
    ends = np.cumsum([0, *(len(part) for part in own[DISTANCE])])
    even = np.linspace(0, ends[-1] - 1, min(ends[-1], ROWS)).round().astype(int)
    kept = np.unique([*even, *ends[:-1], *(ends[1:] - 1)])
    rows = [
        [number(whole[DISTANCE][k, 0], ".0f"), number(whole[DISTANCE][k, 1], ".4f"), percent(whole[ACCURACY][k, 1]),
         number(whole[ENTROPY][k, 1], ".3f")]
        for k in kept
    ]  # fmt: skip
    return Table(["epoch", "distance of the tokens", "teacher: accuracy %", "teacher: entropy (nats)"], rows)


def attention(found: Mapping[str, Any]) -> Figure:
    """How far the heads of the first blocks look, of what `rayltr.inspect` measured."""
    blocks, uniform = found["attention"]["blocks"], found["attention"]["uniform"]
    looks = ((BLUE, "circle", "solid"), (ORANGE, "square", "dash"))
    figure, keys, most = go.Figure(), [], max(map(len, blocks))
    for number_, (heads_, (colour, symbol, dash)) in enumerate(zip(blocks, looks, strict=False), 1):
        hover = [f"block {number_}, head {i}: {value:.1f} pixels" for i, value in enumerate(heads_, 1)]
        figure.add_trace(draw.scatter([*enumerate(heads_, 1)], mode="lines+markers", hovertext=hover,
                                      line={"color": colour, "width": 2, "dash": dash},
                                      marker={"symbol": symbol, "size": 9, "color": colour}))  # fmt: skip
        keys.append(Key(f"block {number_}", colour, symbol, 2, dash == "dash"))
    figure.add_trace(draw.scatter([(1, uniform), (most, uniform)], mode="lines",
                                  line={"color": VERMILION, "width": 2, "dash": "dot"}))  # fmt: skip
    figure.update_xaxes(title="heads, ascending", tickvals=list(range(1, most + 1)))
    figure.update_yaxes(title="distance (pixels)", rangemode="tozero")
    rows = [
        [number(k, "d"), number(i, "d"), number(value, ".1f"), number(value / uniform, ".2f")]
        for k, own in enumerate(blocks, 1)
        for i, value in enumerate(own, 1)
    ]
    return Figure(
        name="token-attention",
        title="How far its heads look",
        html=draw.html(figure, "token-attention"),
        says="Line chart: mean attention distance of every head of the first blocks.",
        caption="The mean distance from a patch to those that it attends to. Heads far below the dotted line look at "
        "the neighbourhood, as convolutions do; a student that a convolutional network taught should have some. A "
        "transformer that learnt alone from few images stays close to the line.",
        keys=[*keys, Key("looking everywhere alike", VERMILION, line=2, dash=True)],
        table=Table(["block", "head", "distance (pixels)", "share of looking everywhere"], rows),
        height="20rem",
    )


def ranks(found: Mapping[str, Any]) -> Figure:
    """The rank of the distillation token after every block, of what `rayltr.inspect` measured."""
    rank = found["rank"]
    values, cap = rank["blocks"], min(rank["images"] - 1, rank["width"])
    hover = [f"block {k}: {value}" for k, value in enumerate(values, 1)]
    figure = go.Figure([
        draw.scatter([*enumerate(values, 1)], mode="lines+markers", line={"color": PURPLE, "width": 2.5},
                     marker={"symbol": "triangle-up", "size": 10, "color": PURPLE}, hovertext=hover),
    ])  # fmt: skip
    keys = [Key("rank", PURPLE, "triangle-up", 2.5)]
    if max(values) > cap / 3:
        figure.add_hline(y=cap, line={"color": VERMILION, "width": 2, "dash": "dot"})
        keys.append(Key("most that is possible", VERMILION, line=2, dash=True))
    figure.update_xaxes(title="block", tickvals=list(range(1, len(values) + 1)))
    figure.update_yaxes(title="rank", rangemode="tozero")
    few = f" Only {rank['images']} such images are known, which bounds the rank: compare shapes, not heights." if (
        cap < rank["width"]
    ) else ""  # fmt: skip
    return Figure(
        name="token-ranks",
        title="How rich its features are on few classes",
        html=draw.html(figure, "token-ranks"),
        says="Line chart: rank of the distillation token's features after every block, on images of few classes.",
        caption="The number of directions that hold 99 % of the variance of the distillation token, over "
        f"{rank['images']} images of few classes ({rank['unseen']} of validation). A teacher that was trained towards "
        f"a flat minimum should give features of lower rank, that transfer to rare classes.{few}",
        keys=keys,
        table=Table(["block", "rank"], [[number(k, "d"), number(value, "d")] for k, value in enumerate(values, 1)]),
        height="20rem",
    )


def judged(found: Mapping[str, Any]) -> Table:
    """How the trained student and its teacher see images that are more and more augmented."""
    rows = [
        [text(name), percent(own["teacher_accuracy"]), number(own["teacher_entropy"], ".3f"),
         number(own.get("token_distance"), ".3f")]
        for name, own in found["views"].items()
    ]  # fmt: skip
    return Table(["training images", "teacher: accuracy %", "teacher: entropy (nats)", "distance of the tokens"], rows)
