"""The best recipes of a search, trained again with other seeds: what a seed is worth, and who wins without luck.

The search's own seed chose them, so it is not among theirs; they choose nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

from rayltr.agenda import Agenda, Job
from rayltr.choice import SEEDS, finalists, rung_of
from rayltr.proposals import Proposals, ended
from rayltr.spec import Stage, mapped


def jobs(proposals: Proposals, most: int, seed: int) -> list[Job]:
    """The trainings of the finalists that are not over yet.  seed: the search's."""
    rows = ended(proposals.run)
    over = {row["trial"] for row in rows}
    made, drawn = [], proposals.drawn()
    for row in finalists(rows, most):
        plain = proposals.job(row["number"], rung_of(row), proposals.params(row, drawn), -1)
        for again in range(1, SEEDS + 1):
            made.append(replace(plain, seed=again, stage=plain.stage and reseeded(plain.stage, seed + again)))
    return [job for job in made if job.trial not in over]


def reseeded(stage: Stage, seed: int) -> Stage:
    return mapped(stage, lambda own: own.but(seed=seed))


def agenda(waiting: Sequence[Job]) -> Agenda:
    """An agenda of these jobs, in their order."""
    left = iter(waiting)
    return Agenda(lambda: next(left, None))
