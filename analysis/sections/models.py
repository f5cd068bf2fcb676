"""The models themselves: can their confidence be believed, are several better than one, do they stand other priors."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from analysis import calibration, shift
from analysis.calibration import Calibration
from analysis.crossfit import Score
from analysis.ensembles import Ensembles
from analysis.estimates import Estimate
from analysis.evidence import Evidence
from analysis.figures import calibrated, costs, ensembled
from analysis.load import Trial
from analysis.page import Block, Listing, Missing, Note, Section, blocks
from analysis.tables import Cell, Table, gained, number, percent, ranged, text
from rayltr import metrics

MODES = {"logit": "log-probabilities", "prob": "probabilities"}
NONE = "No finished trial has stored predictions."


def calibrations(evidence: Evidence) -> Section:
    """Calibration of the best trial (or the control), raw and fitted, and whether a temperature helps."""
    title = "Can its confidence be believed?"
    trials, run = evidence.shown, evidence.run
    trial = trials.get("best", trials.get("control"))
    if trial is None:
        return Section("calibration", title, "Calibration", [Missing(NONE)])
    z, about = run.logits(trial), (evidence.target, run.counts, run.groups)
    states = {
        "raw": calibration.measured(z, *about),
        "fitted": calibration.measured(corrected(z, trial, evidence), *about),
    }
    scale = trial.val["tau"] * trial.val["temperature"]
    worth = calibration.worthwhile(metrics.adjust(z, run.counts, scale), *about)
    found = "Dividing the logits by a temperature is recommended only where it lowers the error and the NLL of images "
    found += f"that were not used to fit it. {sentence(worth.reason)}".rstrip()
    parts = blocks(
        Note(_verdict(states["fitted"])), calibrated.reliability(states, trial.id),
        calibrated.by_group(states["fitted"], trial.id),
        Listing("calibration", "Calibration by group", calibrated.errors(states), "By the predicted group: errors of "
                "what a user sees. Gap by the true group, confidence minus accuracy: who is flattered (positive) or "
                "sold short; a perfectly calibrated model has such gaps, too."),
        Listing("temperatures", "Is a temperature worth it?", calibrated.temperatures(worth), found),
    )  # fmt: skip
    return Section("calibration", title, "Calibration", parts)


def sentence(words: str) -> str:
    """With a capital and a full stop; nothing stays nothing."""
    return words[:1].upper() + words[1:].removesuffix(".") + "." if words else ""


def corrected(z: NDArray[np.float32], trial: Trial, evidence: Evidence) -> NDArray[np.float32]:
    """Logits at the fitted tau and temperature."""
    return metrics.adjust(z / np.float32(trial.val["temperature"]), evidence.run.counts, trial.val["tau"])


def _verdict(found: Calibration) -> str:
    whole = found.overall
    gap = float(whole.share @ (whole.confidence - whole.accuracy)) if len(whole.share) else float("nan")
    if np.isnan(gap):
        return "Calibration could not be measured."
    kind = "too sure of itself" if gap > 0 else "less sure of itself than it could be"
    return (
        f"At its fitted τ and temperature the model is off by {percent(whole.ece).text} points on average (ECE; "
        f"{percent(whole.debiased).text} without what noise alone adds), and {kind} by {percent(abs(gap)).text} points."
    )


def ensembles(evidence: Evidence) -> Section:
    """The best ensemble of the experts of a run, and whether it is worth its price."""
    found, title = evidence.ensembles, "Are several models better than one?"
    if not found.experts or found.single is None:
        why = found.reason or "there are no experts"
        return Section("ensembles", title, "Ensembles", [Missing(f"No ensemble: {why}.")])
    parts = blocks(
        Note(_advice(found)), ensembled.growth(found), ensembled.gains(found), _twice(found), _members(found),
        _rivals(found), _ladder(found), ensembled.differences(found), _left_out(found),
    )  # fmt: skip
    return Section("ensembles", title, "Ensembles", parts)


def _advice(found: Ensembles) -> str:
    assert found.best is not None
    if found.ensemble is None:
        return f"No: {found.reason}. {found.experts} experts were tried (every head of every trial is one)."
    gain = found.ensemble.gain_balanced
    said = (
        f"{found.experts} experts were tried (every head of every trial is one). The best ensemble has "
        f"{len(found.members)} members and is {gained(gain).text} points better than {found.best.name} alone."
    )
    return said + (" Ship it where its price can be paid." if found.recommended == "ensemble" else
                   " That is not certain enough to recommend it: ship the single model.")  # fmt: skip


def _twice(found: Ensembles) -> Listing | None:
    """The gain by both ways not to be flattered by the choice."""
    again, own, single = found.rechosen, found.ensemble, found.single
    if again is None or own is None or single is None:
        return None
    rows = [
        [text("cross-fitted"), ranged(single.balanced), ranged(own.balanced), gained(own.gain_balanced),
         _nats(own.gain_nll)],
        [text("chosen again"), ranged(again.single), ranged(again.ensemble), gained(again.gain), _nats(again.gain_nll)],
    ]  # fmt: skip
    table = Table(["judged", "best single %", "ensemble %", "gain, points", "gain (NLL)"], rows)
    caption = (
        "Cross-fitted: chosen on one half of the images, judged on the other. Chosen again: a greedy ensemble in each "
        f"of {again.draws} bootstrap draws, judged on the images left out."
    )
    return Listing("ensemble-corrected", "The gain on images that did not choose", table, caption)


def _members(found: Ensembles) -> Listing | None:
    if found.mixture is None:
        return None
    weights = found.mixture.weights.mean(1)
    rows = [
        [text(member.name), percent(weights[i]), number(member.tau, ".1f"), number(member.temperature, ".3g"),
         number(None if found.kl is None else float(np.nanmean(found.kl[i])), ".3f")]
        for i, member in enumerate(found.members)
    ]  # fmt: skip
    averaged = MODES[found.mixture.mode]
    return Listing("ensemble-members", "Members", Table(["expert", "weight %", "τ", "T", "KL to the ensemble"], rows),
                   f"Averaged are {averaged}, after each member's own τ and temperature.")  # fmt: skip


def _rivals(found: Ensembles) -> Listing:
    ways = [score for score in (found.single, found.ensemble, *found.baselines, *_modes(found)) if score]
    caption = (
        "Gains are over the best single model and cross-fitted. The columns “on all images” are what an export "
        "reproduces; they flatter. The NLL chooses, so another way may be right a little more often."
    )
    return Listing("ensemble-rivals", "Beside simpler ways", ensembled.scores(ways), caption)


def _modes(found: Ensembles) -> list[Score]:
    return [replace(score, name=f"greedy, averaging {MODES[name]}") for name, score in found.modes.items()]


def _ladder(found: Ensembles) -> Listing | None:
    if not found.ladder:
        return None
    rows = [
        [text(rung.name), number(rung.score.nll.value, ".3f"), _nats(rung.gain),
         text("yes" if rung.accepted else "no")]
        for rung in found.ladder
    ]  # fmt: skip
    table = Table(["weights", "NLL", "gain over the step before (NLL)", "taken"], rows)
    caption = (
        "Equal weights, one weight per member, one per member and group, one per member and class: the first step that "
        "does not pay ends the ladder."
    )
    return Listing("ensemble-ladder", "How finely to weight", table, caption)


def _nats(gain: Estimate | None) -> Cell:
    if gain is None:
        return number(None)
    shown = f"{gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}]".replace("-", "−")
    return Cell(shown, gain.value, gain.low, gain.high)


def _left_out(found: Ensembles) -> Note | None:
    if not found.left_out:
        return None
    shown = "; ".join(found.left_out[:5]) + ("; …" if len(found.left_out) > 5 else "")
    return Note(f"Not among the experts: {shown}.")


def priors(evidence: Evidence) -> Section:
    """Accuracy under other test priors."""
    title, trials = "If the classes come in other frequencies", evidence.shown
    found: dict[str, list[shift.Shift]] = {}
    about: Mapping = {"counts": evidence.run.counts, "groups": evidence.run.groups}
    for kind in ("best", "control"):
        if kind in trials:
            z = corrected(evidence.run.logits(trials[kind]), trials[kind], evidence)
            found[kind] = shift.under_priors(z, evidence.target, **about)
    figure = costs.shifted(found) if found else None
    body: list[Block] = [figure] if figure else [Missing(NONE)]
    return Section("shift", title, "Prior shift", body)
