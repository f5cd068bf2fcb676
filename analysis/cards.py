"""The decision cards: which trials a practitioner would ship, what is known of each, and what can not be told apart."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from analysis import estimates
from analysis.ensembles import Ensembles
from analysis.estimates import Estimate
from analysis.evidence import SCORES, Evidence, Floats
from analysis.load import Trial
from analysis.tables import anything, duration, percent, thousands
from rayltr.choice import NLL

LOSS = 0.02
"""Head accuracy that may be given up for the tail, as a fraction."""

CHEAPEST = "Cheapest that cannot be told from the best"
MAXIMUM = 5
TIMES = 300
"""Bootstrap draws of a correction, in each of which the choice is made again."""

Choose = Callable[[Mapping[str, Floats]], int | None]
"""From what `resample.graded` says of all trials, each [M], to the position of the one chosen; None if none can be."""


@dataclass(frozen=True)
class Claim:
    """What a trial is chosen for: a question, the score that is asked for, and that score before and after correction.

    by: what decided (`Criterion.by`).  raw: as measured on the images that chose it.  corrected: of the choice itself,
    on images that did not choose; None where that cannot be said.  fresh: of a finalist, the score over its fresh
    seeds, which says more than both.  rivals: how many others it cannot be told from; cheapest: of all these.
    """

    question: str
    score: str
    by: str
    raw: float
    corrected: Estimate | None = None
    fresh: Estimate | None = None
    rivals: int = 0
    cheapest: str = ""

    @property
    def shown(self) -> Estimate | None:
        """The estimate that counts."""
        return self.fresh or self.corrected

    @property
    def optimism(self) -> float:
        return self.raw - self.corrected.value if self.corrected else float("nan")


@dataclass(frozen=True)
class Card:
    """A model that may be shipped.  scores: with their intervals, of no width where nothing is known of them.

    how: where the scores are from, "as measured", "fresh seeds" or "cross-fitted".
    beyond: what it has more than `than`.  facts: cost and the like, by name.  test: scores on the test split.
    """

    name: str
    claims: list[Claim]
    scores: dict[str, Estimate]
    beyond: dict[str, Estimate | None]
    facts: dict[str, str]
    params: dict[str, str]
    command: str
    how: str = "as measured"
    than: str = "the control"
    test: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def cards(evidence: Evidence, ensembles: Ensembles | None = None, most: float | None = None) -> list[Card]:
    """At most five cards, one for each model that some question chooses, in the order of the questions.

    most: weights that a small model may have; by default half of what the best balanced one has.
    """
    claims: dict[int, list[Claim]] = {}
    for question, score, choose, allowed in questions(evidence, most):
        i = choose(evidence.points)
        if i is not None:
            claims.setdefault(i, []).append(_claim(evidence, question, score, choose, i, allowed))
    found = [_card(evidence, i, made) for i, made in claims.items()]
    together = ensemble_card(evidence, ensembles) if ensembles and ensembles.members else None
    return [*found[: MAXIMUM - bool(together)], *([together] if together else [])]


def questions(evidence: Evidence, most: float | None = None) -> list[tuple[str, str, Choose, NDArray[np.bool_]]]:
    """(question, score, how to choose, the trials that may be by their measured scores).

    The control is the measure, or the best trial without one.  The best is what decides by the score; what a
    question demands besides is in accuracies.
    """
    if evidence.best is None:
        return []
    balanced, many, few = map(evidence.deciding, ("balanced", "many", "few"))
    everyone = np.ones(len(evidence.trials), bool)
    at = evidence.best if evidence.control is None else evidence.control
    than = "the best balanced model" if evidence.control is None else "the control"

    def with_head(scores: Mapping[str, Floats]) -> NDArray[np.bool_]:
        return scores["many"] >= scores["many"][at] - LOSS

    def with_tail(scores: Mapping[str, Floats]) -> NDArray[np.bool_]:
        return scores["few"] >= scores["few"][at]

    found: list[tuple[str, str, Choose, NDArray[np.bool_]]] = [
        ("Best on balance", "balanced", lambda scores: _most(scores[balanced], everyone), everyone),
        (f"Best tail, at most {100 * LOSS:.0f} points of head below {than}", "few",
         lambda scores: _most(scores[few], with_head(scores)), with_head(evidence.points)),
        (f"Best head, tail no worse than {than}", "many",
         lambda scores: _most(scores[many], with_tail(scores)), with_tail(evidence.points)),
    ]  # fmt: skip
    limit = evidence.sizes[evidence.best] / 2 if most is None else most
    small = (evidence.sizes <= limit) & np.isfinite(evidence.sizes)
    if most is not None and not small.any():
        raise ValueError(f"no trial has at most {most:,.0f} weights: the smallest has {evidence.sizes.min():,.0f}")
    if small.any():
        found.append((f"Best of at most {thousands(limit)} weights", "balanced",
                      lambda scores: _most(scores[balanced], small), small))  # fmt: skip
    if evidence.paired:
        found.append((CHEAPEST, "balanced", _cheapest(evidence), everyone))
    return found


def _most(score: Floats, allowed: NDArray[np.bool_]) -> int | None:
    """The position of the largest score that is allowed; the first of equals."""
    values = np.where(~allowed | np.isnan(score), -np.inf, score)
    return int(values.argmax()) if len(values) and np.isfinite(values.max()) else None


def _cheapest(evidence: Evidence) -> Choose:
    """The cheapest of those that are within the noise of the best on balance (1.96 paired deviations)."""
    name, costs = evidence.deciding("balanced"), evidence.costs
    spread = evidence.spread(name)

    def choose(scores: Mapping[str, Floats]) -> int | None:
        own = scores[name]
        top = _most(own, np.ones(len(costs), bool))
        if top is None:
            return None
        near = own >= own[top] - 1.96 * spread[top]
        return int(np.where(near, costs, np.inf).argmin()) if np.isfinite(costs[near]).any() else top

    return choose


def _claim(evidence: Evidence, question: str, score: str, choose: Choose, i: int, allowed: NDArray[np.bool_]) -> Claim:
    """allowed: the trials that the question may choose, by their measured scores."""
    by, raw = evidence.run.criterion.by, float(evidence.points[score][i])
    if not evidence.paired:
        return Claim(question, score, by, raw)
    fresh = evidence.estimate(i, score) if i in evidence.fresh else None
    if question == CHEAPEST:  # it is the one that others are told to be as good as
        return Claim(question, score, by, raw, _corrected(evidence, choose, score), fresh)
    alike = estimates.equivalents(evidence.samples[evidence.deciding(score)], i) & allowed
    cheapest = np.where(alike, evidence.costs, np.inf).argmin()
    told = evidence.trials[int(cheapest)].id if np.isfinite(evidence.costs[cheapest]) and cheapest != i else ""
    return Claim(question, score, by, raw, _corrected(evidence, choose, score), fresh, int(alike.sum()) - 1, told)


def _corrected(evidence: Evidence, choose: Choose, score: str) -> Estimate | None:
    """The score of whatever the question chooses, on images that did not choose it."""
    if not evidence.reliable:
        return None
    found = estimates.corrected(
        evidence.hits, evidence.target, evidence.run.groups, choose, name=score, times=TIMES, seed=evidence.seed,
        likelihood=evidence.likelihood,
    )  # fmt: skip
    return found.corrected


def _card(evidence: Evidence, i: int, claims: list[Claim]) -> Card:
    trial = evidence.trials[i]
    plain = {name: float(evidence.points[name][i]) for name in SCORES}
    measured = {name: evidence.estimate(i, name) for name in SCORES}
    scores = {name: measured[name] or Estimate(value, value, value) for name, value in plain.items()}
    own, again = evidence.control is not None and evidence.control != i, evidence.fresh.get(i, [])
    beyond = {name: evidence.beyond(i, evidence.control, name) if own else None for name in SCORES}  # type: ignore[arg-type]
    facts = {"Trial": trial.id, "Training": duration(trial.cost).text, "τ": f"{trial.val['tau']:.1f}",
             "Temperature": f"{trial.val['temperature']:.2g}"}  # fmt: skip
    if np.isfinite(evidence.sizes[i]):
        facts["Weights"] = thousands(evidence.sizes[i])
    return Card(
        name=trial.id,
        claims=claims,
        scores=scores,
        beyond=beyond,
        facts=facts | ({"Fresh seeds": str(len(again))} if again else {}),
        params={name: anything(value).text for name, value in trial.params.items()},
        command=export(trial),
        how="fresh seeds" if again else "as measured",
        test=averaged([one.test for one in again]) or trial.test,
        notes=[note for claim in claims if (note := told_apart(claim))],
    )


def averaged(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of scores that all have; none without any."""
    names = set.intersection(*map(set, scores)) if scores else set()
    return {name: float(np.mean([own[name] for own in scores])) for name in sorted(names)}


def told_apart(claim: Claim) -> str:
    """Whether others are as good, as far as these images can tell."""
    if not claim.rivals:
        return ""
    others = f"{claim.rivals} other trial{'s' if claim.rivals > 1 else ''}"
    cheaper = f"; the cheapest of them is {claim.cheapest}" if claim.cheapest else "; it is the cheapest of them"
    return f"By {claim.score} {claim.by} not distinguishable from {others}{cheaper}."


def export(trial: Trial) -> str:
    """The command that writes the model of a trial."""
    number = trial.row["trial"]
    return f"python -m rayltr.export {shlex.quote(trial.folder)} --trial {number} --out export-{number}"


def ensemble_card(evidence: Evidence, found: Ensembles) -> Card:
    """The card of the best ensemble; judged on images that neither chose its members nor fitted its weights."""
    own, single = found.ensemble, found.best
    assert own is not None and single is not None
    gain, sharper = own.gain_balanced, own.gain_nll
    advice = "Recommended" if found.recommended == "ensemble" else "Not recommended"
    why = "is sure" if found.recommended == "ensemble" else "is not certain"
    note = (
        f"{advice}: its gain over the best single model, {single.name}, {why} (its NLL is lower by "
        f"{sharper.value:.3f}, 95 % interval {sharper.low:.3f} to {sharper.high:.3f}). "
        f"Members: {', '.join(own.members)}."
    )
    ahead = [rival for rival in found.baselines if rival.balanced.value > own.balanced.value]
    if ahead:
        rival = max(ahead, key=lambda score: score.balanced.value)
        note += (
            f" The NLL chose it: it counts confidence, too. On balanced accuracy alone, {rival.name} reaches "
            f"{percent(rival.balanced.value).text} %."
        )
    whole = ", ".join(f"{name} {percent(own.whole[name]).text}" for name in SCORES)
    promised = f"On the validation images that chose it, as an export reproduces them, its scores are {whole} %."
    return Card(
        name=" + ".join(own.members),
        claims=[Claim("Best ensemble", "balanced", NLL, own.whole["balanced"], own.balanced)],
        scores={"balanced": own.balanced, **own.groups},
        beyond={"balanced": gain, **own.gain_groups},
        facts={
            "Members": str(len(own.members)),
            "Training": duration(own.cost).text,
            "Per image": f"{own.passes} networks",
        },
        params={},
        command=f"python -m rayltr.export {shlex.quote(evidence.run.folder)} --ensemble --out export-ensemble",
        how="cross-fitted",
        than="the best single model",
        notes=[note, promised],
    )
