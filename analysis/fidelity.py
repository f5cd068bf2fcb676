"""What short schedules are worth: how they rank recipes, what they dropped, and what the trainings cost."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import kendalltau

from analysis.pareto import front
from rayltr import choice, records
from rayltr.metrics import Floats, Indices

POOR = 0.5
"""A Kendall's tau below this says that the short schedules rank recipes badly."""

FEWEST = 3
"""Of fewer recipes no rank correlation is given."""

Row = Mapping[str, Any]
Family = tuple[str, Any]
"""A trick: a parameter and the value it has, such as ("loss", "ldam") or ("deferred", True)."""


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of the objective on two rungs, over the recipes that ended on both; nan if fewer than three.

    low, high: lengths as shares of the full one.  family: None for all recipes.
    """

    low: float
    high: float
    family: Family | None
    recipes: int
    tau: float

    @property
    def poor(self) -> bool:
        """Whether a warning is due: this rung should not decide between such recipes."""
        return self.tau < POOR


@dataclass(frozen=True)
class Stopped:
    """What went no further than one length (`share` of the full one).

    trained, promoted: numbers of recipes that ended here, and of those that were then trained for longer.
    dropped: trials that were not, best on balance first.  families: (trained, promoted).
    """

    share: float
    trained: int
    promoted: int
    dropped: list[str]
    families: dict[Family, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Curve:
    """One metric along one stage of a trial: epoch int64 [K] by the clock of the stage, value and seconds [K].

    begun: epochs of the chain's earlier stages, so that begun + position along the stage runs through the chain.
    seconds: how long each epoch took.
    """

    trial: str
    stage: int
    split: str
    metric: str
    epoch: Indices
    value: Floats
    seconds: Floats
    begun: int


@dataclass(frozen=True)
class Cost:
    """What a finished trial of full length cost and reached.

    asked, trained: epochs of its chain, and those that it trained itself.  seconds: of all epochs of the chain,
    whoever trained them; nan where that was not recorded and stages were shared.  wall: of this trial alone.
    front: whether no other trial was both as cheap and as good, and better in one of the two.
    """

    trial: str
    asked: int
    trained: int
    seconds: float
    wall: float
    quality: float
    front: bool


@dataclass(frozen=True)
class Effort:
    """Epochs that finished trials asked for, and how they were come by; asked = trained + resumed + shared.

    early: epochs of the full schedules that were never asked for, because only the best were trained in full.
    seconds: wall time of the trials, summed.
    """

    asked: int
    trained: int
    resumed: int
    shared: int
    early: int
    seconds: float


def agreement(rows: Iterable[Row]) -> list[Agreement]:
    """How the objective ranks recipes on each rung against each longer one: first all of them, then each family.

    rows: of the trials table.  Only the best of a rung are promoted, so this is lower than over all recipes.  A low
    value of one family alone is the sign of tricks that gain late and that a short schedule ranks too low.
    """
    alone = (row for row in rows if row["state"] == "complete" and not choice.repeated(row))
    done = [row for row in alone if math.isfinite(_number(row["objective"]))]
    by_rung: dict[int, dict[int, Row]] = {}
    for row in done:
        by_rung.setdefault(choice.rung_of(row), {})[row["number"]] = row
    known = families(done)
    found = []
    for low, high in combinations(sorted(by_rung), 2):
        both = by_rung[low].keys() & by_rung[high].keys()
        for family, members in [(None, both), *known.items()]:
            pairs = [(by_rung[low][number], by_rung[high][number]) for number in sorted(both & members)]
            short, long = (_length(by_rung[rung].values()) for rung in (low, high))
            found.append(Agreement(short, long, family, len(pairs), _kendall(pairs)))
    return found


def families(rows: Iterable[Row]) -> dict[Family, set[int]]:
    """The numbers of the recipes by each value of each parameter that names or switches something.

    Parameters with a single value are left out, as are numbers: these are settings, not tricks.
    """
    found: dict[Family, set[int]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(records.PARAMETER) and isinstance(value, (str, bool)):
                found.setdefault((name.removeprefix(records.PARAMETER), value), set()).add(row["number"])
    names = [name for name, _ in found]
    return {family: found[family] for family in sorted(found, key=str) if names.count(family[0]) > 1}


def stopped(rows: Sequence[Row]) -> list[Stopped]:
    """What each rung below the full length dropped, shortest first; and what was pruned at full length, if anything.

    A family that is trained often and hardly ever promoted was killed by the short schedules, rightly or not.
    """
    merit, reached = partial(choice.criterion(rows).merit, name="balanced"), dict[int, int]()
    for row in rows:
        reached[row["number"]] = max(choice.rung_of(row), reached.get(row["number"], 0))
    by_rung: dict[int, list[Row]] = {}
    for row in rows:
        if row["state"] == "pruned" or row["state"] == "complete" and not choice.whole(row):
            by_rung.setdefault(choice.rung_of(row), []).append(row)
    further = {rung: {n for n, last in reached.items() if last > rung} for rung in by_rung}
    return [_stopped(by_rung[rung], further[rung], merit) for rung in sorted(by_rung)]


def _stopped(rows: list[Row], further: set[int], merit: Callable[[Row], float]) -> Stopped:
    ended = {row["number"] for row in rows}
    dropped = [row for row in rows if row["number"] not in further]
    return Stopped(
        share=_length(rows),
        trained=len(ended),
        promoted=len(ended & further),
        dropped=[row["trial"] for row in sorted(dropped, key=lambda row: _worse(merit(row)))],
        families={family: (len(own), len(own & further)) for family, own in families(rows).items()},
    )


def curves(table: pa.Table) -> list[Curve]:
    """The learning curves in the epochs table: one per trial, stage, split and metric, in this order."""
    keys = ["trial", "stage", "split", "metric"]
    ordered = table.sort_by([(name, "ascending") for name in (*keys, "epoch")])
    columns = [(name, "list") for name in ("epoch", "value", "wall_s")]
    groups = ordered.group_by(keys, use_threads=False).aggregate(columns).to_pylist()
    ends: dict[str, dict[int, int]] = {}
    for group in groups:
        stages = ends.setdefault(group["trial"], {})
        stages[group["stage"]] = max(stages.get(group["stage"], 0), len(group["epoch_list"]))
    return [
        Curve(
            **{name: group[name] for name in keys},
            epoch=np.array(group["epoch_list"], np.int64),
            value=np.array(group["value_list"], np.float64),
            seconds=np.array(group["wall_s_list"], np.float64),
            begun=sum(length for stage, length in ends[group["trial"]].items() if stage < group["stage"]),
        )
        for group in groups
    ]


def costs(rows: Iterable[Row], quality: str = "fitted_balanced") -> list[Cost]:
    """Seconds, epochs and quality of every finished trial of full length, and which are on the front of the two.

    quality: the validation score that counts, more is better (or an NLL, which then counts negatively).
    """
    done = [row for row in rows if row["state"] == "complete" and choice.whole(row)]
    points = np.array([(-_seconds(row), choice.signed(row, quality)) for row in done]).reshape(-1, 2)
    best = set(front(points).tolist())
    return [
        Cost(
            trial=row["trial"],
            asked=row["epochs_asked"] or 0,
            trained=row["epochs_trained"] or 0,
            seconds=_seconds(row),
            wall=_number(row["wall_s"]),
            quality=choice.score(row, quality),
            front=i in best,
        )
        for i, row in enumerate(done)
    ]


def effort(rows: Iterable[Row]) -> Effort:
    """What the trials in rows of the trials table took, on all rungs; of a failed one, what it had trained counts."""
    rows = list(rows)
    done = [row for row in rows if row["state"] == "complete"]
    lost = sum(row.get("epochs_trained") or 0 for row in rows if row["state"] == "failed")
    asked, trained, resumed = (
        sum(row.get(f"epochs_{kind}") or 0 for row in done) for kind in ("asked", "trained", "resumed")
    )
    asked, trained = asked + lost, trained + lost
    longest = {row["number"]: row for row in sorted(done, key=choice.share)}.values()
    full = sum(round((row["epochs_asked"] or 0) / choice.share(row)) for row in longest)
    return Effort(
        asked=asked,
        trained=trained,
        resumed=resumed,
        shared=asked - trained - resumed,
        early=full - sum(row["epochs_asked"] or 0 for row in longest),
        seconds=sum(row["wall_s"] or 0.0 for row in done),
    )


def _kendall(pairs: Sequence[tuple[Row, Row]]) -> float:
    if len(pairs) < FEWEST:
        return math.nan
    low, high = zip(*((one["objective"], other["objective"]) for one, other in pairs), strict=True)
    return float(kendalltau(low, high).statistic)


def _length(rows: Iterable[Row]) -> float:
    """The length of a rung: recipes whose stages are rounded to whole epochs differ a little."""
    return float(np.median([choice.share(row) for row in rows]))


def _seconds(row: Row) -> float:
    """Of the whole chain: as recorded, or the trial's own time where it trained every epoch itself."""
    alone = row["epochs_trained"] == row["epochs_asked"]
    return _number(row.get("m.val.cost_s"), _number(row["wall_s"]) if alone else math.nan)


def _worse(merit: float) -> float:
    """A sort key: the best first, those without a score last."""
    return math.inf if math.isnan(merit) else -merit


def _number(value: float | None, otherwise: float = math.nan) -> float:
    return otherwise if value is None else value
