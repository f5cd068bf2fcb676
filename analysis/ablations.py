"""The recipe of best balance without one of its choices: what each of them is worth on the same seed and images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.estimates import Estimate
from analysis.evidence import Evidence
from analysis.load import Trial
from analysis.tables import gained
from rayltr import choice


@dataclass(frozen=True)
class Part:
    """A choice: its value in the winner, the one it is set back to, and what that changes in each score, in [-1, 1]."""

    name: str
    value: Any
    plain: Any
    changes: dict[str, Estimate | None]

    @property
    def spare(self) -> bool:
        """Whether the recipe is more often right without it, with its whole interval."""
        change = self.changes["balanced"]
        return change is not None and change.low > 0


def spare(parts: Sequence[Part]) -> str:
    """Those without which the recipe is better, with what that brings; empty for none."""
    return ", ".join(f"{own.name} ({gained(own.changes['balanced']).text} points)" for own in parts if own.spare)


def parts(evidence: Evidence) -> tuple[str, list[Part]]:
    """The trial that was trained again without its choices, and these, the largest loss first; of the last ablation."""
    if not (pairs := evidence.run.ablated):
        return "", []
    whole = max((one for one, _ in pairs), key=lambda trial: trial.row["ended"])
    found = [part(evidence, whole, other) for one, other in pairs if one is whole]
    found.sort(key=lambda own: change.value if (change := own.changes["balanced"]) else 0.0)
    return whole.id.removesuffix(f"-{choice.WHOLE}"), found


def part(evidence: Evidence, whole: Trial, other: Trial) -> Part:
    name = choice.ablated(other.row)
    return Part(name, whole.params.get(name), other.params.get(name), evidence.changed(whole, other))
