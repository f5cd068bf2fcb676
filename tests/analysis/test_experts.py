import json
from pathlib import Path

import numpy as np
import pytest

from analysis.experts import experts, seedless
from rayltr import metrics, records


def change(folder: Path, number: int, **columns) -> None:
    row = records.read_trials(folder).to_pylist()[number]
    records.append_trial(folder, {**row, **columns})


def rewrite(folder: Path, number: int, **changes) -> None:
    """Store other predictions for a trial."""
    row = records.read_trials(folder).to_pylist()[number]
    old = records.read_predictions(folder / row["predictions_val"])
    new = {**{name: getattr(old, name) for name in ("row", "target", "logits", "counts", "classes", "split", "digest")},
           **changes}  # fmt: skip
    records.write_predictions(folder / row["predictions_val"], **new)


def test_every_finished_trial_is_an_expert_at_its_own_tau_and_temperature(run: Path):
    panel = experts(run)
    assert [expert.trial for expert in panel.experts] == [f"{number:04d}" for number in range(9)]
    assert panel.target.shape == (2000,) and len(panel.counts) == 100 and not panel.left_out
    rows = {row["trial"]: row for row in records.read_trials(run).to_pylist()}
    for expert in panel.experts[:3]:
        row = rows[expert.trial]
        assert (expert.tau, expert.temperature) == (row["m.val.tau"], row["m.val.temperature"])
        assert expert.logits.dtype == np.float32 and expert.cost == row["wall_s"]
        np.testing.assert_allclose(np.exp(expert.logits).sum(1), 1, atol=1e-4)
        nll = metrics.balanced_nll(expert.logits, panel.target, 100)
        assert nll == pytest.approx(row["m.val.fitted_nll"], abs=1e-4), "up to the rounding of the stored logits"
        right = metrics.class_accuracy(expert.logits.argmax(1), panel.target, 100)
        assert np.mean(right) == pytest.approx(row["m.val.fitted_balanced"], abs=0.002)


def test_tau_and_temperature_are_fitted_where_the_records_are_silent(run: Path):
    told = experts(run).experts[2]
    change(run, 2, **{"m.val.tau": None, "m.val.temperature": None})
    found = experts(run).experts[2]
    assert (found.tau, found.temperature) == (told.tau, pytest.approx(told.temperature, abs=0.01))


def test_every_head_is_an_expert(run: Path):
    z = np.random.default_rng(0).normal(size=(2000, 100)).astype(np.float32)
    rewrite(run, 3, logits={"soft": z, "hard": 2 * z})
    change(run, 3, **{"m.val.hard.tau": 0.5, "m.val.hard.temperature": 3.0, "m.val.hard.fitted_nll": 4.5})
    found = [expert for expert in experts(run).experts if expert.trial == "0003"]
    assert [(expert.head, expert.name) for expert in found] == [("soft", "0003 soft"), ("hard", "0003 hard")]
    assert (found[1].tau, found[1].temperature) == (0.5, 3.0)


def test_shorter_trials_and_others_are_no_experts(run: Path):
    change(run, 1, share=0.25)
    change(run, 2, state="pruned")
    change(run, 3, predictions_val=None)
    assert [expert.trial for expert in experts(run).experts] == ["0000", "0004", "0005", "0006", "0007", "0008"]
    assert [expert.trial for expert in experts(run, only="0005").experts] == ["0005"]


def test_of_many_trials_the_best_ones(run: Path):
    rows = [row for row in records.read_trials(run).to_pylist() if row["state"] == "complete"]
    best = sorted(rows, key=lambda row: row["m.val.fitted_nll"])[:3]
    assert [expert.trial for expert in experts(run, most=3).experts] == sorted(row["trial"] for row in best)


def test_heads_that_say_nothing_are_left_out_and_named(run: Path):
    z = np.zeros((2000, 100), np.float32)
    z[7, 3] = np.nan
    rewrite(run, 1, logits={"main": z})
    rewrite(run, 2, target=np.zeros(2000, np.int32))
    (run / records.read_trials(run).to_pylist()[3]["predictions_val"]).write_bytes(b"PAR1")
    panel = experts(run)
    assert [expert.trial for expert in panel.experts] == ["0000", "0004", "0005", "0006", "0007", "0008"]
    reasons = {line.partition(":")[0]: line for line in panel.left_out}
    assert "are not finite" in reasons["trial 0001"] and "cannot read" in reasons["trial 0003"]
    assert "measured on other validation images" in reasons["trial 0002"]


def test_a_recipe_is_the_same_for_every_seed(run: Path):
    recipe = {"epochs": 2, "seed": 3, "init": {"seed": 4, "views": [{"fn": "x", "p": 1}]}, "source": {"split_seed": 0}}
    assert seedless(recipe) == {"epochs": 2, "init": {"views": [{"fn": "x", "p": 1}]}, "source": {"split_seed": 0}}
    for number, seed in ((0, 1), (1, 2)):
        change(run, number, recipe=json.dumps({**recipe, "seed": seed}))
    change(run, 2, recipe=json.dumps({**recipe, "epochs": 3}))
    change(run, 3, recipe=None)
    one, other, third, fourth = experts(run).experts[:4]
    assert one.recipe == other.recipe != third.recipe and fourth.recipe == ""


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a run folder"):
        experts(tmp_path)
