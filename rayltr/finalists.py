"""The best recipes of a search, trained again with other seeds: what a seed is worth, and who wins without luck.

The search's own seed chose them, so it is not among theirs; they choose nothing.  The ablation, too, compares the
winner with what is left of it on a fresh seed.
"""

from collections.abc import Sequence
from dataclasses import replace

from rayltr import records
from rayltr.ablation import set_back, winner
from rayltr.agenda import Agenda, Job
from rayltr.choice import SEEDS, WHOLE, finalists, rung_of
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


def ablation(proposals: Proposals, seed: int) -> list[Job]:
    """The winner, and the winner with each of its choices set back, with the first fresh seed; over or not."""
    row = winner(ended(proposals.run))
    if row is None:
        return []
    params = proposals.params(row, proposals.drawn())
    made = []
    for name, point in {WHOLE: params, **set_back(proposals.space, params)}.items():
        plain = proposals.job(row["number"], rung_of(row), point, -1)
        made.append(replace(plain, seed=1, without=name, stage=plain.stage and reseeded(plain.stage, seed + 1)))
    return made


def left(proposals: Proposals, seed: int, most: int, ablate: bool) -> list[Job]:
    """What is still to be trained of what the search has chosen; run.json is told what the ablation consists of."""
    found = jobs(proposals, most, seed)
    if ablate:
        parts = ablation(proposals, seed)
        records.write_run(proposals.run, {**records.read_run(proposals.run), "ablation": [job.trial for job in parts]})
        over = {row["trial"] for row in ended(proposals.run)}
        found += [job for job in parts if job.trial not in over]
    return [*{job.trial: job for job in found}.values()]


def reseeded(stage: Stage, seed: int) -> Stage:
    return mapped(stage, lambda own: own.but(seed=seed))


def agenda(waiting: Sequence[Job]) -> Agenda:
    """An agenda of these jobs, in their order."""
    left = iter(waiting)
    return Agenda(lambda: next(left, None))
