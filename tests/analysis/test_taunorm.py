"""Tau-norm from stored logits and the classifier's weights is that of the classifier on features."""

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import taunorm
from analysis.evidence import Evidence
from analysis.figures import taus
from analysis.load import load
from analysis.sections import trade
from rayltr import heads, metrics, records
from rayltr.interface import State
from rayltr.spec import Stage, digest, end, fn
from rayltr.store import Store
from tests.analysis.conftest import change, long_tail, make_run, predictions

CLASSES, DIM, EACH = 12, 6, 30
NOISE = 4.0, 0.2
"""What is added to the features that the control and the other trial see."""


def features(seed: int, classes: int = CLASSES, dim: int = DIM) -> tuple[torch.Tensor, np.ndarray]:
    """Features [N, dim] as a network with a rectifier gives them, and target [N]."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(classes), EACH)
    centres = rng.normal(size=(classes, dim))
    return torch.tensor(np.maximum(2 * centres[target] + rng.normal(size=(len(target), dim)), 0)).float(), target


def head(name: str, seed: int, classes: int = CLASSES, dim: int = DIM) -> torch.nn.Module:
    """A head whose weights are the shorter the rarer a class is."""
    torch.manual_seed(seed)
    made = heads.HEADS[name](dim, classes)
    with torch.no_grad():
        made.weight.normal_().mul_(torch.linspace(2.0, 0.3, classes)[:, None])
        if getattr(made, "bias", None) is not None:
            made.bias.normal_()
    return made


def put(run: Path, number: int, made: torch.nn.Module, f: torch.Tensor, target: np.ndarray) -> None:
    """Makes a trial of the run one with this head: its logits and its weights."""
    stage = Stage(source=fn("synthetic"), epochs=3, seed=number)
    counts = long_tail(len(made.weight))
    with torch.no_grad():
        z = made(f).numpy()
    model = {f"head.{name}": value.detach().clone() for name, value in made.state_dict().items()}
    Store(run / "store").put(stage, State(model | {"backbone.x": torch.ones(2)}, {}, end(stage), (), []))
    predictions(run, f"store/{number:04d}/val.parquet", counts, {"main": z}, target)
    found = metrics.summary(z, target, counts, metrics.groups(counts)[0])
    change(run, number, address=digest(stage), **{f"m.val.{name}": value for name, value in found.items()})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A control, and a better trial, with linear heads of fewer features than classes."""
    folder = make_run(tmp_path / "run", trials=2, classes=CLASSES, each=EACH, failed=0)
    f, target = features(0)
    for number, noise in enumerate(NOISE):
        made = head("linear", number)
        with torch.no_grad():
            made.weight += torch.stack([f[target == c].mean(0) for c in range(CLASSES)])
            rough = f + noise * torch.randn(f.shape, generator=torch.Generator().manual_seed(number))
        put(folder, number, made, rough, target)
    return folder


def normalised(made: torch.nn.Module, f: torch.Tensor, power: float) -> np.ndarray:
    """What the head of that name in `rayltr.heads` says, without its bias, as published."""
    other = heads.tau_normalised(DIM, CLASSES, tau=power, bias=False)
    other.load_state_dict(made.state_dict())
    with torch.no_grad():
        return other(f).numpy()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5])
def test_logits_up_to_a_constant_per_row_give_those_of_the_normalised_head(power: float):
    made, (f, _) = head("linear", 3).double(), features(1)
    f = f.double()
    with torch.no_grad():
        z, weight = made(f).numpy(), made.weight.numpy()
        other = heads.tau_normalised(DIM, CLASSES, tau=power, bias=False).double()
        other.load_state_dict(made.state_dict())
        expected = other(f).numpy()
    free = taunorm.whole(z - z.max(1, keepdims=True) - made.bias.detach().numpy(), weight)
    assert free is not None
    np.testing.assert_allclose(free / np.linalg.norm(weight, axis=1) ** power, expected, atol=1e-9)


def test_the_scores_of_a_run_are_those_of_the_normalised_head_on_its_features(run: Path):
    found = Evidence(load(run))
    norms, why = found.normed
    assert why == "" and set(norms) == set(found.shown) == {"control", "best"}
    f, target = features(0)
    for kind, own in norms.items():
        number = found.shown[kind].row["number"]
        made = heads.linear(DIM, CLASSES)
        weight, bias = taunorm.classifier(found.shown[kind])
        made.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        rough = f + NOISE[number] * torch.randn(f.shape, generator=torch.Generator().manual_seed(number))
        for k in (0, 7, 15):
            z = normalised(made, rough, taunorm.POWERS[k])
            expected = metrics.scores(z, target, found.run.counts, found.run.groups)
            assert {name: own.scores[name][k] for name in expected} == pytest.approx(expected, abs=0.01)
            nll = metrics.balanced_nll(z, target, CLASSES, own.temperature[k])
            assert own.nll[k] == pytest.approx(nll, abs=0.01), "logits are stored in half precision"
            assert own.nll[k] == pytest.approx(metrics.fit(z, target, np.ones(CLASSES))[2], abs=0.01)
        assert own.nll[own.at] == own.nll.min()


def test_both_corrections_stand_side_by_side_and_their_curves_are_drawn(run: Path):
    found = Evidence(load(run))
    table = taus.corrections(found)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["correction"].text for row in rows] == ["logit adjustment", "tau-norm"] * 2
    best, norm = found.shown["best"], found.normed[0]["best"]
    own = {row["correction"].text: row for row in rows if row["trial"].text == f"best {best.id}"}
    assert own["logit adjustment"]["NLL"].value == best.val["fitted_nll"]
    assert own["tau-norm"]["NLL"].value == norm.nll.min() and own["tau-norm"]["τ or t"].value == taunorm.POWERS[norm.at]
    assert own["tau-norm"]["balanced %"].value == norm.scores["balanced"][norm.at]
    assert own["tau-norm"]["peak %"].value == norm.scores["balanced"].max()
    assert len(taus.normed(found).rows) == 2 * len(taunorm.POWERS)
    figure = taus.along_tau(found)
    assert f"tau-norm of {best.id}" in [key.text for key in figure.keys]
    peak = 100 * norm.scores["balanced"].max()
    assert "power t" in figure.caption and f"{peak:.1f} % ({best.id})" in figure.caption and "tau-norm" in figure.says
    at = figure.table.columns.index("tau-norm of the best %")
    shown = [row[at].value for row in figure.table.rows if row[at].value is not None]
    np.testing.assert_array_equal(shown, norm.scores["balanced"])
    assert "corrections" in [getattr(block, "name", "") for block in trade.tau(found).blocks]


def test_with_as_many_features_as_classes_the_constant_is_unknown_and_that_is_said(tmp_path: Path):
    folder = make_run(tmp_path / "run", trials=2, classes=CLASSES, each=EACH, failed=0)
    f, target = features(0, dim=CLASSES)
    for number in (0, 1):
        put(folder, number, head("linear", number, dim=CLASSES), f, target)
    found = Evidence(load(folder))
    norms, why = found.normed
    ids = " and ".join(trial.id for trial in found.shown.values())
    assert norms == {} and why.startswith(f"No tau-norm of {ids}: it needs more classes than features (12 and 12)")
    assert why in [getattr(block, "text", "") for block in trade.tau(found).blocks]
    assert taus.corrections(found).rows == [] and taus.normed(found).rows == []


@pytest.mark.parametrize("name", ["cosine", "lws"])
def test_what_is_no_linear_head_is_said_to_be_none(run: Path, name: str):
    f, target = features(0)
    for number in (0, 1):
        put(run, number, head(name, number), f, target)
    found = Evidence(load(run))
    ids = " and ".join(trial.id for trial in found.shown.values())
    assert found.normed == ({}, f"No tau-norm of {ids}: its classifier is not one linear layer with a bias.")


def test_logits_that_are_not_of_the_stored_head_are_said_to_be_others(run: Path):
    for number in (0, 1):
        row = records.read_trials(run).to_pylist()[number]
        stored = records.read_predictions(run / row["predictions_val"])
        z = stored.logits["main"] + np.random.default_rng(0).normal(size=stored.logits["main"].shape)
        predictions(run, row["predictions_val"], stored.counts, {"main": z}, stored.target)
    found = Evidence(load(run))
    ids = " and ".join(trial.id for trial in found.shown.values())
    assert found.normed == ({}, f"No tau-norm of {ids}: its logits are not those of its linear classifier alone.")
    assert found.normed[1] in [getattr(block, "text", "") for block in trade.tau(found).blocks]
    figure = taus.along_tau(found)
    assert "tau-norm" not in f"{figure.caption} {figure.says} {figure.table.columns}".lower()


def test_weights_that_are_gone_or_damaged_are_said_to_be(run: Path):
    control, best = (load(run).trials[number] for number in (0, 1))
    paths = [
        next((run / "store" / own.row["address"].partition("@")[0]).glob("*.safetensors")) for own in (control, best)
    ]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="its weights are not stored"):
        taunorm.classifier(control)
    with pytest.raises(ValueError, match="its stored weights are damaged"):
        taunorm.classifier(best)
    norms, why = Evidence(load(run)).normed
    assert norms == {} and "No tau-norm of 0000: its weights" in why and "No tau-norm of 0001: its stored" in why
