"""What it cost, and whether short schedules were fair."""

from collections.abc import Sequence

from analysis import fidelity
from analysis.evidence import Evidence
from analysis.fidelity import Agreement, Curve, Stopped
from analysis.figures import costs
from analysis.load import Run
from analysis.page import Block, Listing, Missing, Note, Section, blocks
from analysis.tables import Table, anything, duration, number, percent, text, thousands
from rayltr import records

DRAWN = 40
"""So many learning curves are drawn: of the best trials, and of the control."""


def section(evidence: Evidence) -> Section:
    """Quality against time, learning curves, and the rungs of the search."""
    run = evidence.run
    figure = costs.quality(evidence)
    alone = run.parts or (run,)
    tables = [listing for part in alone for listing in _rungs(part, part.trials[0].run if run.parts else "")]
    rungs: list[Block] = [*tables] or [
        Note("Every trial was trained at full length at once: no short schedules decided anything.")
    ]
    control = None if evidence.control is None else evidence.trials[evidence.control]
    best = None if evidence.best is None else evidence.trials[evidence.best]
    parts = blocks(
        figure or Missing("No training times are recorded."), [Note(_spent(part)) for part in alone],
        costs.learning(_curves(evidence), best, control) or Missing("No learning curves are recorded."), rungs,
    )  # fmt: skip
    return Section("cost", "What it cost", "Cost", parts)


def _spent(run: Run) -> str:
    done = fidelity.effort(run.rows)
    return (
        f"{run.folder}: {duration(done.seconds).text} of trials; {thousands(done.asked)} epochs asked, "
        f"{thousands(done.trained)} trained. Saved: {thousands(done.shared)} by sharing stages, "
        f"{thousands(done.resumed)} by resuming, {thousands(done.early)} by training only the best in full."
    )


def _curves(evidence: Evidence) -> dict[str, Sequence[Curve]]:
    """The learning curves of the best trials and of the control, by trial id."""
    keep = evidence.trials[:DRAWN]
    keep += [evidence.trials[i] for i in (evidence.best, evidence.control) if i is not None]
    found: dict[str, list[Curve]] = {}
    for part in evidence.run.parts or (evidence.run,):
        ids = {trial.row["trial"]: trial.id for trial in keep if trial.folder == part.folder}
        for curve in fidelity.curves(records.read_epochs(part.folder)):
            if curve.trial in ids:
                found.setdefault(ids[curve.trial], []).append(curve)
    return {trial.id: found[trial.id] for trial in keep if trial.id in found}


def _rungs(run: Run, prefix: str) -> list[Listing]:
    """How rungs ranked, and what they dropped."""
    agreed, stopped = fidelity.agreement(run.rows), fidelity.stopped(run.rows)
    end = f" ({prefix})" if prefix else ""
    tag = f"-{prefix}" if prefix else ""
    found = []
    if agreed:
        found.append(Listing(f"rungs{tag}", f"Do short schedules rank fairly?{end}", _agreement(agreed), "Kendall's τ "
                             "between the objective on a short and a longer schedule, over the recipes that had both; "
                             "1 is the same order. Below 0.5, above all for a single trick, the short schedule "
                             "misjudges."))  # fmt: skip
    if stopped:
        found.append(Listing(f"stopped{tag}", f"What early stopping dropped{end}", _stopped(stopped), "A trick that is "
                             "often trained and never promoted was dropped by the short schedules, rightly or not.",
                             folded=True))  # fmt: skip
    return found


def _agreement(agreed: Sequence[Agreement]) -> Table:
    rows = [
        [percent(one.low, 0), percent(one.high, 0), text(one.family[0] if one.family else "all recipes"),
         anything(one.family[1]) if one.family else text(None), number(one.recipes, "d"), number(one.tau, ".2f"),
         text("poor" if one.poor else None)]
        for one in agreed
    ]  # fmt: skip
    return Table(["short length %", "long length %", "trick", "value", "recipes", "Kendall's τ", ""], rows)


def _stopped(stopped: Sequence[Stopped]) -> Table:
    rows = []
    for rung in stopped:
        whole = [("all recipes", None, rung.trained, rung.promoted)]
        families = [(name, value, trained, promoted) for (name, value), (trained, promoted) in rung.families.items()]
        for name, value, trained, promoted in [*whole, *families]:
            share = promoted / trained if trained else None
            rows.append([percent(rung.share, 0), text(name), text(None) if value is None else anything(value),
                         number(trained, "d"), number(promoted, "d"), percent(share, 0)])  # fmt: skip
    return Table(["length %", "trick", "value", "trained", "promoted", "promoted %"], rows)
