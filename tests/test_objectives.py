import pytest

from rayltr import records
from rayltr.metrics import SUMMARY
from rayltr.objectives import OBJECTIVES, direction, parse, values


def test_every_objective_is_something_a_trial_measures():
    assert set(OBJECTIVES.values()) <= {*SUMMARY, "cost_s"}


def test_the_trials_table_takes_every_objective(tmp_path):
    row = {"trial": "0000", "state": "complete", **{f"m.val.{name}": 0.25 for name in OBJECTIVES.values()}}
    records.append_trial(tmp_path, row)
    (found,) = records.read_trials(tmp_path).to_pylist()
    assert {found[f"m.val.{name}"] for name in OBJECTIVES.values()} == {0.25}


def test_up_to_three_are_taken():
    assert parse("balanced_nll") == ("balanced_nll",)
    assert parse("many, few,cost") == ("many", "few", "cost")
    with pytest.raises(ValueError, match="at most three objectives, not 4"):
        parse("many,few,cost,ece")
    with pytest.raises(ValueError, match="named twice"):
        parse("many,many")
    with pytest.raises(ValueError, match="unknown objective 'raw_cost'"):
        parse("raw_cost")


def test_raw_is_the_classifier_as_it_was_trained():
    metrics = {"many": 0.9, "fitted_many": 0.8, "cost_s": 3.0}
    assert values(metrics, ("raw_many", "many", "cost")) == {"raw_many": 0.9, "many": 0.8, "cost": 3.0}


def test_less_is_better_for_what_is_lost_and_spent():
    fewer = {name for name in OBJECTIVES if direction(name) == "min"}
    assert fewer == {"balanced_nll", "raw_balanced_nll", "ece", "raw_ece", "cost"}
