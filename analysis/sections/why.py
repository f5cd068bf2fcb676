"""What mattered: effects of the tricks on every score that counts."""

import numpy as np

from analysis.effects import Effects, effects
from analysis.evidence import Evidence
from analysis.figures import tricks
from analysis.page import Missing, Note, Section, blocks
from rayltr.metrics import GROUPS

TITLE = "What mattered"
DRAWS = 500


def section(evidence: Evidence) -> Section:
    """Main effects, interactions, and parameters inside their branch."""
    found = by_score(evidence)
    balanced = found["balanced"]
    if balanced.reason:
        return Section("tricks", TITLE, "Tricks", [Missing(f"No effects can be estimated: {balanced.reason}.")])
    of = f"Estimated from {balanced.trials} trials of the study's own arm"
    note = Note(
        f"{of}, all at full length; trials weigh less where the sampler repeated itself. Effects are associations "
        "within this search, not proofs: an ablation trains the shipped recipe with one trick less."
    )
    if not balanced.shares and not balanced.conditional:
        return Section("tricks", TITLE, "Tricks", [Missing("No parameter took more than one value.")])
    parts = blocks(
        tricks.shares(balanced) if balanced.shares else None, tricks.forest(found), tricks.interactions(balanced),
        tricks.branches(found), note,
    )  # fmt: skip
    return Section("tricks", TITLE, "Tricks", parts)


def by_score(evidence: Evidence) -> dict[str, Effects]:
    """The effects on every score: at the fitted tau, and on balance as trained."""
    trials = [trial for trial in evidence.trials if not trial.control]
    params = [{name: value for name, value in trial.params.items() if name != "arm"} for trial in trials]
    scores = {name: np.array([trial.val[f"fitted_{name}"] for trial in trials]) for name in ("balanced", *GROUPS)}
    scores["balanced, raw"] = np.array([trial.val["balanced"] for trial in trials])
    found = {name: effects(params, values, times=DRAWS) for name, values in scores.items()}
    return {name: own for name, own in found.items() if name == "balanced" or not own.reason}
