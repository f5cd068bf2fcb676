from collections import Counter
from datetime import UTC, datetime

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rayltr import records, studies
from rayltr.sampling import RESULT, SAMPLERS, Design, Phased, designed, distributions, number, sampler, starts, warm
from rayltr.studies import CONTROL, STUDY


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def space(trial):
    """A conditional space: `x` and `n` exist for some kinds only."""
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    if kind != "c":
        trial.suggest_float("x", 1e-4, 1.0, log=True)
    if kind == "b":
        trial.suggest_int("n", 1, 4)
    return trial.suggest_float("y", 0.0, 1.0)


def study_of(own, directions=("minimize",), storage=None):
    return optuna.create_study(
        directions=list(directions), sampler=own, storage=storage, study_name="s", load_if_exists=True
    )


def drawn(study, count):
    trials = []
    for _ in range(count):
        trial = study.ask()
        space(trial)
        trials.append(trial)
    return [trial.params for trial in trials]


def test_a_design_is_balanced_in_every_parameter_that_a_trial_has():
    points = drawn(study_of(Design(0)), 48)
    assert set(Counter(point["kind"] for point in points).values()) == {16}
    numbers = [point["n"] for point in points if "n" in point]
    assert len(numbers) == 16 and set(Counter(numbers).values()) == {4}
    for block in range(6):
        ys = [point["y"] for point in points[8 * block : 8 * block + 8]]
        assert sorted(int(8 * y) for y in ys) == list(range(8))
    logs = [point["x"] for point in points if "x" in point][:8]
    assert sum(x < 1e-2 for x in logs) == 4, "half of the strata lie below the middle of the logarithmic range"


def test_a_design_depends_on_the_seed_and_on_nothing_that_was_found():
    plain = drawn(study_of(Design(3)), 12)
    study, other = study_of(Design(3)), []
    for value in range(12):
        trial = study.ask()
        space(trial)
        other.append(trial.params)
        study.tell(trial, float(value) if value % 2 else None, state=None if value % 2 else TrialState.FAIL)
    assert plain == other and drawn(study_of(Design(4)), 12) != plain


def test_a_restart_in_the_middle_of_a_trial_changes_no_point(tmp_path):
    plain = drawn(study_of(Design(0)), 8)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
    study = study_of(Design(0), storage=storage)
    drawn(study, 4)
    half = study.ask()
    half.suggest_categorical("kind", ["a", "b", "c"])
    again = study_of(Design(0), storage=JournalStorage(JournalFileBackend(str(tmp_path / "journal"))))
    again._storage.set_trial_state_values(half._trial_id, TrialState.WAITING)
    assert drawn(again, 4) == plain[4:]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("aims", [("minimize",), ("minimize", "maximize")])
def test_every_sampler_gets_along_with_conditions_failures_and_objectives(name, aims):
    study = study_of(sampler(name, 0, 5), aims)
    for count in range(14):
        trial = study.ask()
        y = space(trial)
        if count % 5 == 4:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, [y, 1 - y][: len(aims)])
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 14


def test_the_design_comes_first_and_then_what_was_asked_for():
    assert [designed(n) for n in (1, 10, 20, 45)] == [1, 3, 6, 14]
    design = drawn(study_of(Design(0)), 6)
    phased = drawn(study_of(Phased("random", 0, 4)), 6)
    assert phased[:4] == design[:4] and phased[4:] != design[4:]


def test_every_parameter_of_both_arms_has_its_distribution():
    found = distributions(studies.find("bag_of_tricks"))
    assert {"arm", "when", "loss", "mixing", "kd_alpha", "seql_gamma", "cam", "switch", "tau"} <= set(found)
    assert found["lr"].choices == (0.05, 0.1, 0.2) and found["ib_alpha"].log


def test_presets_to_begin_with():
    study = studies.find("bag_of_tricks")
    assert [point.get("loss") for point in starts(study, 20, None)] == ["cross_entropy", "cross_entropy"]
    (point,) = starts(study, 20, ["bag_of_tricks"])
    assert point == {"arm": STUDY, **study.presets["bag_of_tricks"]}
    with pytest.raises(ValueError, match="no preset 'bag_of_trick'; did you mean bag_of_tricks"):
        starts(study, 20, ["bag_of_trick"])


def recorded(run, data):
    """A run of four trials of the bag of tricks on these data."""
    records.write_run(run, {"data": data})
    now = datetime.now(UTC)
    for place, lr in enumerate((0.05, 0.1, 0.2, 0.1)):
        row = {"trial": f"{place:04d}", "number": place, "state": "complete", "started": now, "ended": now,
               "m.val.fitted_nll": 1.0 - 0.1 * place, "p.arm": STUDY, "p.lr": lr, "p.loss": "ldam",
               "p.max_margin": (0.3, 0.5)[place % 2], "p.of_another_study": 7.0}  # fmt: skip
        records.append_trial(run, row)
    return str(run)


def test_a_warm_start_takes_results_of_the_same_data_and_recipes_of_others_once(tmp_path):
    same, other = recorded(tmp_path / "same", "a"), recorded(tmp_path / "other", "b")
    study, own = study_of(sampler("tpe", 0, 2)), studies.find("bag_of_tricks")
    for arm in (CONTROL, STUDY, STUDY, STUDY):
        study.enqueue_trial({"arm": arm})
    told = warm(study, own, [same, other], ["balanced_nll"], lambda info: info["data"] == "a")
    assert "4 results of" in told and "recipes of" in told
    results = [trial for trial in study.trials if RESULT in trial.user_attrs]
    assert len(results) == 4 and all(trial.state == TrialState.COMPLETE for trial in results)
    assert results[0].params == {"arm": STUDY, "lr": 0.05, "loss": "ldam", "max_margin": 0.3}
    before = len(study.trials)
    assert "nothing new" in warm(study, own, [same, other], ["balanced_nll"], lambda info: info["data"] == "a")
    assert len(study.trials) == before
    first, second = study.ask(), study.ask()
    assert [number(study, trial) for trial in (first, second)] == [0, 1]
    assert second.suggest_categorical("lr", [0.05, 0.1, 0.2]) == 0.1, "the best of the other run comes first"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    study = study_of(Design(0))
    with pytest.raises(ValueError, match="not a run folder"):
        warm(study, studies.find("bag_of_tricks"), [str(tmp_path)], ["many"], lambda info: True)
