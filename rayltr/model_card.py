"""The README.md of an exported model: what it is, what was measured and how it was chosen."""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rayltr.choice import SCORES, Criterion, finalist, score

MODES = {
    "logit": "The log-probabilities of its members are averaged.",
    "prob": "The probabilities of its members are averaged.",
}
LIMITS = """## Limits

Accuracies hold for images like those of the training set. Classes with few training images are estimated from few
validation images. Probabilities mean a class-balanced use, not the training frequencies; their temperature is
fitted on the validation images alone.
"""


def of_trial(info: Mapping[str, Any], row: Mapping[str, Any], how: str, price: Mapping[str, Any]) -> str:
    """The card of one trial.  how: sentences that say how it was chosen; price: `rayltr.shipping.price`."""
    cells = [(score(row, f"fitted_{name}"), row.get(f"m.test.fitted_{name}")) for name in SCORES]
    table = [f"| {name} | {percent(val)} | {percent(test)} |" for name, (val, test) in zip(SCORES, cells, strict=True)]
    params = [f"- {key[2:]}: {value}" for key, value in row.items() if key[:2] == "p." and value is not None]
    return f"""# {info["study"]}, trial {row["trial"]}

{purpose(info)} Backbone: {backbone(row)}. {cost(price)}

| accuracy, % | validation | test |
|---|---|---|
{lines(table)}

Measured at tau = {score(row, "tau"):.1f} and temperature {score(row, "temperature"):.2f}, fitted on validation and
folded into the classifier: the logits are already corrected for the class prior. {how}
{opened(info)}

## Recipe

{lines(params) or "see config.json"}

The whole recipe is the field `recipe` of `config.json`; `python -m rayltr.train config.json` trains it again.

{LIMITS}"""


def of_ensemble(
    info: Mapping[str, Any], note: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], price: Mapping[str, Any]
) -> str:
    """The card of an ensemble.

    note: its ensemble.json; rows: of the trials table, one for each member; price: `rayltr.shipping.price`.
    """
    validation = [f"| {name} | {percent(note['validation'].get(name))} |" for name in SCORES]
    members = [
        f"| {entry['folder']} | {backbone(row)} | {entry['tau']:.1f} | {entry['temperature']:.2f} "
        f"| {told(entry['weight'])} |"
        for entry, row in zip(note["members"], rows, strict=True)
    ]
    return f"""# {info["study"]}, ensemble of {len(rows)}

{purpose(info)} {MODES[note["mode"]]} {cost(price)}

| accuracy, % | validation |
|---|---|
{lines(validation)}

These are the validation images that chose the members, as `rayltr.predict` finds them again, up to the rounding of
the stored logits. On images that did not choose: {doubt(note)}. {opened(info)}

| member | backbone | tau | temperature | weight |
|---|---|---|---|---|
{lines(members)}

Every member is a model of its own, corrected for the class prior at its own tau and temperature; the recipe is the
field `recipe` of its `config.json`. The card of a single trial says more; `ensemble.json` has all numbers.

{LIMITS}"""


def chosen(trials: int, trial: str | None, best: str, by: Criterion) -> str:
    """How one of the complete trials of a run was chosen, as a sentence."""
    if trials < 2:
        return "It is the only complete trial of its run: nothing was chosen."
    if trial:
        return f"It was named by hand, one of {trials} complete trials."
    return f"It was chosen on validation, for the best `{best}` of {trials} complete trials, by {by.by}: {by.why}."


def seeds(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """How often the recipe was trained: with one seed, or with others, too, and what these found."""
    origin = row["trial"].partition("+")[0]
    again = [other for other in rows if other["trial"].startswith(f"{origin}+") and finalist(other)]
    own = [other for other in again if other["state"] == "complete"]
    found = [score(other, "fitted_balanced") for other in own]
    if not found:
        return f"One seed ({row['seed']})."
    spread = f" (standard deviation {100 * stdev(found):.1f})" if len(found) > 1 else ""
    return (
        f"Its seed is {row['seed']}; {len(found)} fresh seeds of its recipe reach {percent(fmean(found))} % "
        f"balanced{spread} on validation."
    )


def cost(price: Mapping[str, Any]) -> str:
    machine = f"{price['processor']}, {price['threads']} thread{'s' if price['threads'] > 1 else ''}"
    return (
        f"It has {price['weights']:,} weights; an image alone takes {price['ms_per_image']:.3g} ms where this was "
        f"written ({machine})."
    )


def doubt(note: Mapping[str, Any]) -> str:
    """What the ensemble gains where it was not chosen."""
    gain, nll = note["gain"]["balanced"], note["gain"]["nll"]
    told = [f"{100 * gain[part]:+.1f}" for part in ("value", "low", "high")]
    sure = "the single model is recommended" if note["recommended"] == "single" else "the ensemble is recommended"
    return (f"the gain over the best single trial ({note['single']['trial']}) is {told[0]} points of balanced accuracy "
            f"(95 %: {told[1]} to {told[2]}) and {nll['value']:.3f} nats ({nll['low']:.3f} to {nll['high']:.3f}); "
            f"{sure}")  # fmt: skip


def purpose(info: Mapping[str, Any]) -> str:
    counts, size = info["data"]["counts"], info["data"]["size"]
    return f"""An image classifier for {len(counts)} classes, trained on {sum(counts)} images,
{max(counts)} to {min(counts)} of each class. Input: RGB, {size[0]} x {size[1]} pixels, values in
[0, 1]."""


def backbone(row: Mapping[str, Any]) -> str:
    """`resnet32 (width 16)`, from the recipe of a trial."""
    choice = json.loads(row["recipe"])["backbone"]
    keywords = ", ".join(f"{name} {value}" for name, value in choice.items() if name not in ("fn", "code"))
    return choice["fn"] + (f" ({keywords})" if keywords else "")


def opened(info: Mapping[str, Any]) -> str:
    return f"The test split had been opened {len(info['openings'])} time(s) when this was written."


def percent(value: float | None) -> str:
    return "n/a" if value is None or value != value else f"{100 * value:.1f}"


def told(weight: Any) -> str:
    """A weight as a table shows it."""
    if isinstance(weight, Mapping):
        return ", ".join(f"{name} {value:.2f}" for name, value in weight.items())
    return f"{weight:.2f}" if isinstance(weight, float) else "per class"


def lines(rows: Sequence[str]) -> str:
    return "\n".join(rows)
