"""Two tokens: a student's class token and distillation token, beside each other."""

import shlex
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from analysis import tokens
from analysis.evidence import Evidence
from analysis.figures import tokens as figures
from analysis.load import Trial
from analysis.page import Block, Code, Listing, Missing, Note, Section, blocks
from analysis.tables import gained
from rayltr.metrics import RANGES, groups

TITLE, SHORT = "Two tokens", "Tokens"
LEAD = (
    "A class token learns from the targets, a distillation token from a teacher; the mean of their logits is the "
    "prediction. The second is worth its price where the two become experts for different classes."
)
DRAWN = 40
"""So many students are drawn: the best on balance."""


def section(evidence: Evidence) -> Section | None:
    """What is known of the best student with two tokens; None where no trial is one."""
    found = tokens.students(evidence)
    if not found:
        return None
    trial = found[0]
    hits = tokens.hits(evidence, trial)
    judged = tokens.judged(evidence, hits, evidence.run.groups)
    curves = figures.training(tokens.epochs(found[:DRAWN]), trial.id)
    none = Missing("This run did not record the distance of the tokens, or the teacher's accuracy, by epoch.")
    parts = blocks(
        Note(_verdict(judged, trial)), figures.heads(judged.accuracies(), trial.id), _published(evidence, hits),
        curves or none, _inspected(trial),
    )  # fmt: skip
    return Section("tokens", TITLE, SHORT, parts, LEAD)


def _verdict(judged: tokens.Judged, trial: Trial) -> str:
    gap = judged.apart()
    said = ", ".join(f"{gained(own).text} on {name} classes" for name, own in gap.items() if own.value == own.value)
    experts = gap["many"].high < 0 < gap["few"].low
    return (
        f"Shown is trial {trial.id}, the best student on balance. Accuracy of its distillation token minus that of its "
        f"class token, in points with 95 % intervals: {said}. "
        + ("The two are experts for different classes." if experts else
           "These images do not show that the two are experts for different classes.")
    )  # fmt: skip


def _published(evidence: Evidence, hits: Mapping[str, NDArray[np.bool_]]) -> Listing | None:
    """The same by the groups of the paper, for data of as many classes as its own."""
    counts = evidence.run.counts
    if len(counts) not in RANGES:
        return None
    own, _ = groups(counts, "deit_lt")
    many, medium, few = (len(classes) for classes in own.values())
    table = figures.scored(tokens.judged(evidence, hits, own).accuracies())
    return Listing("token-heads-published", "By the groups of the paper", table, f"The {many} most frequent classes, "
                   f"the next {medium} and the {few} rarest, whatever their counts: to be compared with published "
                   "numbers of DeiT-LT, and with no other table here.", folded=True)  # fmt: skip


def _inspected(trial: Trial) -> list[Block]:
    found = tokens.inspected(trial)
    if found is None:
        command = f"python -m rayltr.inspect {shlex.quote(trial.folder)} --trial {trial.row['trial']}"
        return [Code("How far its heads look, how rich its features are, how its teacher sees augmented images: this "
                     "command measures it, the next report shows it", command)]  # fmt: skip
    table = figures.judged(found)
    seen = Listing("token-views", "How images are seen", table, f"Of {found['images']} training images, "
                   "after training. The stronger the augmentation, the less should the teacher know; a mixed image "
                   "counts as right where the larger part is named.")  # fmt: skip
    return [figures.attention(found), figures.ranks(found), seen]
