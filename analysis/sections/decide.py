"""Which model to ship, and how far to trust that."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis import fidelity
from analysis.cards import Card
from analysis.estimates import ENOUGH as SPARSE
from analysis.evidence import Evidence
from analysis.load import Run
from analysis.page import Deck, Light, Listing, Missing, Note, Section, Strip, blocks
from analysis.tables import Table, counted, gained, number, percent, ranged, signed, text, thousands
from rayltr import records
from rayltr.choice import ENOUGH
from rayltr.metrics import GROUPS, HOTTEST, TAUS

TRIALS = 30
"""With fewer finished trials the search is a sample, and effects of single tricks are guesses."""

BRINK = 0.01
"""A temperature this close to the end of its range, in logarithms, would go on if it could."""


def section(evidence: Evidence, cards: Sequence[Card]) -> Section:
    """The decision cards."""
    if not cards:
        return Section("ship", "Which model to ship", "Ship", [Missing("No finished trial has validation scores.")])
    corrected = evidence.reliable
    lead = (
        "Estimates are corrected for having been chosen: picked again and again on part of the validation images, "
        "scored on the rest."
        if corrected
        else "The scores are those that chose the models, so they flatter them; they could not be corrected here."
    )
    lead += ranked(evidence)
    if evidence.fresh:
        lead += " Of finalists the fresh seeds are shown, which had no part in the choice."
    parts = blocks(Deck(cards), finalists(evidence), Note(sizes(evidence.run)))
    return Section("ship", "Which model to ship", "Ship", parts, lead)


def ranked(evidence: Evidence) -> str:
    """By what the cards choose, and why."""
    found = evidence.run.criterion
    return f" Models are ranked by {found.by}, at their fitted τ and temperature: {found.why}."


def finalists(evidence: Evidence) -> Listing | None:
    """What fresh seeds say of the recipes that did best; None where there are none."""
    if not evidence.fresh or not evidence.paired:
        return None
    c = evidence.control if evidence.control in evidence.fresh else None
    merit = evidence.run.criterion.merit
    worth = {i: np.mean([merit(one.judged, "balanced") for one in again]) for i, again in evidence.fresh.items()}
    rows = []
    for i in sorted(worth, key=lambda i: -worth[i]):
        trial = evidence.trials[i]
        test = [again.test["balanced"] for again in evidence.fresh[i] if "balanced" in again.test]
        rows.append([text(f"{trial.id} (control)" if trial.control else trial.id), number(len(evidence.fresh[i]), "d"),
                     *(ranged(evidence.estimate(i, name)) for name in ("balanced", "many", "few")),
                     gained(None if c in (None, i) else evidence.beyond(i, c, "balanced")),
                     percent(float(np.mean(test)) if test else None),
                     percent(float(np.std(test, ddof=1)) if len(test) > 1 else None)])  # fmt: skip
    columns = ["finalist", "seeds", "balanced %", "many %", "few %", "over the control", "test %", "s.d."]
    caption = (
        "Means over the fresh seeds, with 95 % intervals over images and seeds. Balanced accuracy over the control in "
        "points, on the same images; balanced accuracy on the test split, and its standard deviation over seeds. "
        "An interval that contains zero: the search's own seed may have been lucky."
    )
    return Listing("finalists", "Finalists, trained again", Table(columns, rows), caption)


def sizes(run: Run) -> str:
    """What many, medium and few mean here."""
    n = {name: len(run.groups[name]) for name in GROUPS}
    if run.rule == "shots":
        return (
            f"Many: classes with more than 100 training images ({n['many']}); medium: 20 to 100 ({n['medium']}); "
            f"few: fewer than 20 ({n['few']}). A group's score is the mean over its classes, the balanced score that "
            "over all classes. Every model is shown at its fitted τ and temperature: no weight is touched by that."
        )
    return (
        f"Many, medium and few are thirds of the classes by number of training images ({n['many']}, {n['medium']}, "
        f"{n['few']}), because the usual limits of 20 and 100 would leave a group empty. A group's score is the mean "
        "over its classes. Every model is shown at its fitted τ and temperature: no weight is touched by that."
    )


def trust(evidence: Evidence, cards: Sequence[Card]) -> Section:
    """The honesty strip."""
    return Section("trust", "How far to trust this", "Trust", [Strip(facts(evidence, cards), lights(evidence))])


def facts(evidence: Evidence, cards: Sequence[Card]) -> list[tuple[str, str]]:
    """What was run, on what, and what is known of its noise: names and values."""
    run = evidence.run
    data, parts = run.info["data"], run.parts or (run,)
    found = {
        "Data": named(data.get("source"), "root", "fn"),
        "Classes": thousands(len(run.counts)),
        "Images": ", ".join(f"{thousands(n)} {split}" for split, n in (data.get("images") or {}).items()),
        "Imbalance": f"{thousands(run.counts.max())} : {thousands(run.counts.min())} images per class",
        "Trials": _states(run),
        "Seeds": ", ".join(map(str, sorted({s for t in run.trials if (s := t.row["seed"]) is not None}))),
        "Validation protocol": named(data.get("protocol"), "validation"),
        "Validation images per class": _images(run),
        "Models ranked by": f"{run.criterion.by}: {run.criterion.why}" if evidence.trials else "",
        "Optimism of the best balanced": _optimism(cards),
        "Smallest difference that shows": _resolution(evidence),
        "Test split opened": _openings([one for part in parts for one in part.info.get("openings") or []]),
        "Draw of the images": str(data.get("digest") or "")[:12],
        "Training": _effort(run),
    }
    return [(name, value) for name, value in found.items() if value]


def _states(run: Run) -> str:
    states = Counter(trial.row["state"] for trial in run.searched)
    ended = ", ".join(f"{states[state]} {state}" for state in records.STATES if state in states)
    again = len(run.trials) - len(run.searched)
    return f"{len(run.searched)} ({ended})" + (f", and {again} with fresh seeds" if again else "")


def _images(run: Run) -> str:
    if run.items is None:
        return ""
    by_group = {name: run.items.images[members] for name, members in run.groups.items() if len(members)}
    return ", ".join(f"{_span(images)} {name}" for name, images in by_group.items())


def _span(images: Any) -> str:
    low, high = int(images.min()), int(images.max())
    return thousands(low) if low == high else f"{thousands(low)}–{thousands(high)}"


def _optimism(cards: Sequence[Card]) -> str:
    claim = next((claim for card in cards for claim in card.claims if claim.score == "balanced"), None)
    if claim is None or math.isnan(claim.optimism):
        return ""
    return f"{signed(claim.optimism)} points"


def _resolution(evidence: Evidence) -> str:
    """Twice the usual paired deviation from the best."""
    if not evidence.paired or evidence.best is None or len(evidence.trials) < 2:
        return ""
    others = np.delete(evidence.spread()[evidence.best], evidence.best)
    return f"about {100 * 1.96 * float(np.median(others)):.1f} points balanced"


def _effort(run: Run) -> str:
    done = fidelity.effort(run.rows)
    return f"{thousands(done.trained)} of {thousands(done.asked)} epochs asked" if done.asked else ""


def lights(evidence: Evidence) -> list[Light]:
    """What a reader must know before believing the numbers, the worst first."""
    run = evidence.run
    found = _images_missing(run) + _search(evidence) + _rungs(run) + _edges(evidence)
    parts = run.parts or (run,)
    found += [Light("amber", str(text)) for text in dict.fromkeys(
        text for part in parts for text in part.info["data"].get("warnings") or [])]  # fmt: skip
    found += [Light("amber", trial.problem) for trial in run.trials if trial.problem]
    return sorted(found, key=lambda light: light.level != "red")


def _edges(evidence: Evidence) -> list[Light]:
    """What makes a number mean less than it seems."""
    run, found = evidence.run, []
    alone = [name for name in GROUPS if len(run.groups[name]) == 1]
    if alone and len(run.counts) > 2:
        found.append(Light("amber", f"One class alone makes up: {', '.join(alone)}. Its accuracy is that of a few "
                           "images of one kind."))  # fmt: skip
    best = {} if evidence.best is None else evidence.trials[evidence.best].val
    if best and not TAUS[0] < best["tau"] < TAUS[-1]:
        found.append(Light("amber", f"The fitted τ of the best trial, {best['tau']:.1f}, is the last one that was "
                           "looked at: its recipe leans too far to one side."))  # fmt: skip
    if best and abs(math.log(best["temperature"])) > math.log(HOTTEST) - BRINK:
        found.append(Light("amber", f"The fitted temperature of the best trial, {best['temperature']:.3g}, is the last "
                           "one that was looked at: its logits are far too "
                           + ("large." if best["temperature"] > 1 else "small.")))  # fmt: skip
    lengths = {(part.info.get("settled") or {}).get("epochs") or 0 for part in run.parts}
    if len(lengths) > 1:
        found.append(Light("amber", f"The runs trained for different lengths ({', '.join(map(str, sorted(lengths)))} "
                           "epochs): their trials are not alike in cost."))  # fmt: skip
    return found


def _images_missing(run: Run) -> list[Light]:
    found = []
    if empty := [name for name in GROUPS if not len(run.groups[name])]:
        found.append(Light("amber", f"No class belongs to: {', '.join(empty)}. Scores of such a group are left empty."))
    if run.items is None:
        return [*found, Light("red", "No predictions are stored: there are no intervals and no corrections.")]
    images = run.items.images
    if len(run.unmeasured):
        found.append(Light("red", f"{len(run.unmeasured)} of {len(images)} classes have no validation images: they are "
                           "unmeasured, and every mean is over the others."))  # fmt: skip
    sparse = int(((images < SPARSE) & (images > 0)).sum())
    if sparse:
        found.append(Light("red", f"{sparse} classes have fewer than {SPARSE} validation images: what is said of the "
                           "tail is unreliable."))  # fmt: skip
    rare = images[run.groups["few"]]
    if not sparse and len(rare) and rare[rare > 0].min(initial=ENOUGH) < ENOUGH:
        least = int(rare[rare > 0].min())
        found.append(Light("amber", f"Rare classes have as few as {least} validation images; with fewer than {ENOUGH}, "
                           "differences of some points between trials are noise."))  # fmt: skip
    return found


def _search(evidence: Evidence) -> list[Light]:
    run, found = evidence.run, []
    if "control" not in run.chosen:
        found.append(Light("red", "No control arm finished: without plain cross-entropy, nothing here shows what the "
                           "tricks add."))  # fmt: skip
    if evidence.trials and not evidence.fresh:
        found.append(Light("amber", "No recipe was trained with more than one seed: the intervals are of the "
                           "validation images alone, another seed may rank close trials differently."))  # fmt: skip
    if 0 < len(run.finished) < TRIALS:
        few = counted(len(run.finished), "trial")
        found.append(Light("amber", f"Only {few} finished; below {TRIALS} the best may be far from what the search "
                           "could find, and effects of tricks are guesses."))  # fmt: skip
    missing = len(run.finished) - len(run.measured)
    if run.measured and missing:
        found.append(Light("amber", f"{missing} finished trials have no usable predictions: they are in the table of "
                           "all trials, and nowhere else."))  # fmt: skip
    return found


def _rungs(run: Run) -> list[Light]:
    """Of several runs each by itself: a recipe's number means something within its run only."""
    return [
        Light("amber", f"Short schedules{' of ' + part.trials[0].run if run.parts else ''} "
              f"({percent(one.low, 0).text} % of the full length) ranked recipes poorly: Kendall's τ {one.tau:.2f} "
              f"over {one.recipes} recipes. Good ones may have been dropped.")
        for part in run.parts or (run,)
        for one in fidelity.agreement(part.rows)
        if one.family is None and one.poor
    ]  # fmt: skip


def named(value: Any, *keys: str) -> str:
    """A value that is written as a name, or as a mapping with its name under one of the keys."""
    if isinstance(value, dict):
        value = next((value[key] for key in keys if key in value), None)
    return "" if value is None else str(value)


def _openings(openings: Sequence[dict[str, Any]]) -> str:
    if not openings:
        return "never"
    models = len({trial for opening in openings for trial in opening.get("trials") or []})
    often = "once" if len(openings) == 1 else f"{len(openings)} times"
    return f"{often}, for {counted(models, 'trial')}"
