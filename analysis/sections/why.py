"""What mattered: effects of the tricks on every score that counts."""

import numpy as np

from analysis import ablations
from analysis.effects import FEWEST, Effects, effects
from analysis.evidence import Evidence
from analysis.figures import ablated, parallel, tricks
from analysis.figures.draw import Figure
from analysis.page import Block, Missing, Note, Section, blocks
from analysis.tables import counted
from rayltr.metrics import GROUPS

TITLE = "What mattered"
DRAWS = 500


def section(evidence: Evidence) -> Section:
    """Main effects, interactions, and parameters inside their branch."""
    found = by_score(evidence)
    balanced, dropped = found["balanced"], ablation(evidence)
    if balanced.reason:
        none = Missing(_too_few(balanced) if balanced.trials < FEWEST else
                       f"What single choices add cannot be estimated: {balanced.reason}.")  # fmt: skip
        return Section("tricks", TITLE, "Tricks", blocks(none, dropped, drawn(evidence, balanced)))
    laid = f", {balanced.designed} of them laid out in advance so that all values meet" if balanced.designed else ""
    note = Note(
        f"Estimated from {balanced.trials} trials of the study's own arm{laid}, all at full length; trials weigh less "
        "where the sampler repeated itself. Effects are associations within this search, not proofs: an ablation "
        f"trains the best recipe with one choice less{'' if dropped else ' (--ablate of the search)'}.",
    )
    parts = blocks(
        tricks.shares(balanced) if balanced.shares else None, tricks.forest(found), dropped,
        tricks.interactions(balanced), tricks.branches(found), drawn(evidence, balanced), note,
    )  # fmt: skip
    return Section("tricks", TITLE, "Tricks", parts)


def _too_few(found: Effects) -> str:
    have = counted(found.trials, "finished trial") if found.trials else "none"
    return (
        f"From {FEWEST} finished trials with tricks on (plain cross-entropy does not count), this section shows how "
        f"many points each choice adds. There {'is' if found.trials < 2 else 'are'} {have}: a larger --trials with "
        "--resume adds to this search."
    )


def ablation(evidence: Evidence) -> list[Block]:
    """The best recipe trained again with its choices set back one at a time; empty without."""
    name, parts = ablations.parts(evidence)
    if not parts:
        return []
    spare = ablations.spare(parts)
    note = Note(f"Better without: {spare}. On this seed the recipe is more often right with that set back, "
                "by the whole 95 % interval.")  # fmt: skip
    return blocks(ablated.ablation(name, parts, evidence.paired), note if spare else None)


def drawn(evidence: Evidence, found: Effects) -> Figure | None:
    """All recipes as lines, the parameters that explain most first; None where nothing was varied."""
    trials = evidence.trials
    params = [{name: value for name, value in trial.params.items() if name != "arm"} for trial in trials]
    names = dict.fromkeys([*found.shares, *found.conditional, *(name for own in params for name in own)])
    varied = [name for name in names if len({own.get(name) for own in params}) > 1]
    if len(trials) < 2 or not varied:
        return None
    balanced = [trial.val["fitted_balanced"] for trial in trials]
    return parallel.recipes([trial.id for trial in trials], params, balanced, varied)


def by_score(evidence: Evidence) -> dict[str, Effects]:
    """The effects on every score: at the fitted tau, and on balance as trained."""
    trials = [trial for trial in evidence.trials if not trial.control]
    params = [{name: value for name, value in trial.params.items() if name != "arm"} for trial in trials]
    scores = {name: np.array([trial.val[f"fitted_{name}"] for trial in trials]) for name in ("balanced", *GROUPS)}
    scores["balanced, raw"] = np.array([trial.val["balanced"] for trial in trials])
    laid = [evidence.run.designed(trial) for trial in trials]
    found = {name: effects(params, values, laid, DRAWS) for name, values in scores.items()}
    return {name: own for name, own in found.items() if name == "balanced" or not own.reason}
