"""Head against tail: the front, what tau alone gives, and single classes."""

import numpy as np

from analysis.evidence import Evidence
from analysis.figures import classes, fronts, taus
from analysis.page import Block, Listing, Missing, Note, Section, blocks
from analysis.pareto import front, hypervolume
from analysis.tables import Table, number, percent, ranged, text


def head_tail(evidence: Evidence) -> Section:
    """The front over all trials and tau, and how it grew."""
    together = evidence.ensembles.ensemble
    drawn = fronts.head_tail(evidence, dict(together.groups) if together else None)
    if drawn is None:
        why = "Nothing to draw: no finished trial has accuracies for both many and few classes."
        return Section("front", "Head against tail", "Front", [Missing(why)])
    parts = blocks(
        drawn, Listing("front-points", "The front", _points(evidence), _listed(evidence)), fronts.growth(evidence),
        _runs(evidence), _volume(evidence),
    )  # fmt: skip
    return Section("front", "Head against tail", "Front", parts)


def _points(evidence: Evidence) -> Table:
    rows = [
        [text(spot.trial.id), number(spot.tau, ".1f"),
         *(ranged(spot.scores[name]) if evidence.paired else percent(spot.scores[name].value)
           for name in ("many", "medium", "few", "balanced")), percent(spot.share, 0)]
        for spot in evidence.front
    ]  # fmt: skip
    return Table(["trial", "τ", "many %", "medium %", "few %", "balanced %", "on the front %"], rows)


def _listed(evidence: Evidence) -> str:
    found = "Points closer than 0.3 points are listed once."
    if evidence.paired:
        found += " The last column says in how many bootstrap draws no other point beats it; the draws are of images."
    return found


def _runs(evidence: Evidence) -> list[Block]:
    """The fronts of several runs side by side."""
    if not evidence.run.parts:
        return []
    edges, rows = {}, []
    for part in evidence.run.parts:
        name = part.trials[0].run
        own = [trial for trial in evidence.both if trial.run == name]
        points = np.concatenate([trial.points()[:, 1:] for trial in own] or [np.zeros((0, 2))])
        edges[name] = points[front(points)]
        best = part.chosen.get("balanced")
        rows.append([text(name), number(len(part.trials), "d"), number(len(part.finished), "d"),
                     text(best.id if best else None), percent(best.val["fitted_balanced"] if best else None),
                     ranged(evidence.area(own))])  # fmt: skip
    columns = ["run", "trials", "finished", "best trial", "its balanced %", "area below the front %"]
    shown = {name: points for name, points in edges.items() if len(points)}
    listing = Listing("runs-compared", "Run by run", Table(columns, rows))
    return blocks(fronts.compared(shown) if shown else None, listing)


def _volume(evidence: Evidence) -> Note | None:
    """The volume in all three groups, as a number."""
    points = np.array([[t.val[f"fitted_{name}"] for name in ("many", "medium", "few")] for t in evidence.both])
    if not len(points) or not np.isfinite(points).all():
        return None
    share = 100 * hypervolume(points)
    return Note(
        f"In all three groups (many, medium, few) the trials at their fitted τ cover {share:.1f} % of the cube, as "
        "measured."
    )


def tau(evidence: Evidence) -> Section:
    """What tau alone gives, and what tricks add beyond it."""
    along = taus.along_tau(evidence)
    if along is None:
        why = "Nothing to draw: no finished trial has stored predictions."
        return Section("tau", "What τ alone gives", "τ curves", [Missing(why)])
    gained = taus.beyond(evidence) or Missing("What tricks add cannot be drawn without trials of the control arm and "
                                              "others.")  # fmt: skip
    listing = Listing("areas", "Trial by trial", taus.areas(evidence), "The area below a trial's own τ curve, and what "
                      "it adds to that of the control arm: zero for a trick that only slides along the control's "
                      "curve.", folded=True)  # fmt: skip
    beside, why = taus.corrections(evidence), evidence.normed[1]
    caption = (
        "Logit adjustment subtracts τ times the log prior; tau-norm divides each class's weights by the power t of "
        "their length, without the bias. Each at the τ or t and temperature of its lowest NLL; last, where its "
        "balanced accuracy has its peak."
    )
    normed = Listing("corrections", "Two corrections", beside, caption)
    parts = blocks(along, normed if beside.rows else None, Note(why) if why else None, gained, listing)
    return Section("tau", "What τ alone gives", "τ curves", parts)


def frequency(evidence: Evidence) -> Section:
    """Accuracy of single classes."""
    drawn = classes.by_frequency(evidence)
    title = "Accuracy by class frequency"
    if drawn is None:
        why = "Nothing to draw: neither the best trial nor a control arm has stored predictions."
        return Section("classes", title, "Classes", [Missing(why)])
    which = "best trial" if "best" in evidence.shown else "control"
    caption = (
        f"By accuracy of the {which}. The interval borrows strength from classes of similar frequency, so it need not "
        "be centred."
    )
    low = Listing("worst", "The worst 20 classes", classes.worst(evidence), caption, folded=True)
    wrong = classes.confused(evidence)
    caption = f"The largest shares of a class that the {which} takes for a class of a more frequent group."
    taken = Listing("confusions", "Rare classes taken for frequent ones", wrong, caption, folded=True)
    none = Missing("No image of a rarer group was taken for a class of a more frequent one.")
    gap = classes.difference(evidence)
    return Section("classes", title, "Classes", blocks(drawn, gap, low, taken if wrong.rows else none))
