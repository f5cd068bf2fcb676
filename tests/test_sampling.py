import pickle
from collections import Counter
from datetime import UTC, datetime

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rayltr import catalogue, records, studies
from rayltr.sampling import (
    RECIPE,
    RESULT,
    SAMPLERS,
    Design,
    Phased,
    designed,
    distributions,
    number,
    propose,
    sampler,
    starts,
    warm,
)
from rayltr.studies import CONTROL, STUDY

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


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


def test_a_design_meets_every_stratum_of_every_kind_of_numbers():
    study = study_of(Design(0))
    asked = [
        lambda trial: trial.suggest_float("step", 0.0, 0.6, step=0.2),  # four values: each twice in a block of eight
        lambda trial: trial.suggest_int("many", 1, 16),  # two to a stratum
        lambda trial: trial.suggest_int("logs", 1, 220, log=True),
        lambda trial: trial.suggest_int("odd", 1, 5, step=2),
    ]
    found = [[suggest(trial) for suggest in asked] for trial in (study.ask() for _ in range(24))]
    for block in range(3):
        step, many, logs, _ = zip(*found[8 * block : 8 * block + 8], strict=True)
        assert Counter(round(value, 9) for value in step) == {0.0: 2, 0.2: 2, 0.4: 2, 0.6: 2}
        assert sorted((value - 1) // 2 for value in many) == list(range(8))
        assert sum(value <= 10 for value in logs) == 4, "the middle of 0.5 to 220.5, in logarithms, is 10.5"
    assert Counter(odd for *_, odd in found) == {1: 8, 3: 8, 5: 8}
    assert all(type(value) is int for _, *whole in found for value in whole)


def test_what_is_fixed_is_no_draw_of_the_design():
    study, plain = study_of(Design(0)), drawn(study_of(Design(0)), 7)
    study.enqueue_trial({"kind": "a"})
    points = drawn(study, 7)
    assert [point["kind"] for point in points] == ["a", *(point["kind"] for point in plain[:6])]
    assert [point["y"] for point in points] == [point["y"] for point in plain]


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


@pytest.mark.parametrize("name", ["random", "quasi", "tpe"])
def test_a_resumed_search_draws_what_an_undisturbed_one_would_have(name):
    plain, study = study_of(sampler(name, 5, 3)), study_of(sampler(name, 5, 3))
    for count in range(18):
        study.sampler = sampler(name, 5, 3)
        for one in (plain, study):
            trial = one.ask()
            one.tell(trial, space(trial) + count % 2)
    points = [[trial.params for trial in one.trials] for one in (plain, study)]
    assert points[0] == points[1] and len({point["y"] for point in points[0]}) == 18


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
    assert [designed(n) for n in (1, 10, 20, 45)] == [1, 4, 8, 18], "every fifth is the control arm's"
    assert [designed(n, 2) for n in (1, 10, 20, 45)] == [1, 7, 10, 20]
    design = drawn(study_of(Design(0)), 6)
    phased = drawn(study_of(Phased("random", 0, 4)), 6)
    assert phased[:4] == design[:4] and phased[4:] != design[4:]
    assert drawn(study_of(sampler("quasi", 0, 0)), 6) == design
    assert drawn(study_of(sampler("random", 0, 6)), 6)[:4] != design[:4]


def test_a_sampler_can_be_pickled_in_the_middle_of_trials():
    study = study_of(sampler("tpe", 0, 1))
    drawn(study, 3)
    copy = pickle.loads(pickle.dumps(study.sampler))
    assert set(copy.open) == {1, 2}


def test_results_of_others_do_not_count_as_trials():
    study = study_of(sampler("tpe", 0, 2))
    plain = drawn(study_of(Design(0)), 2)
    result = optuna.trial.create_trial(
        value=0.5,
        params={"y": 0.5},
        distributions={"y": optuna.distributions.FloatDistribution(0.0, 1.0)},
        user_attrs={RESULT: "elsewhere:0000"},
    )
    points = []
    for own in range(4):
        study.add_trial(result)
        trial = study.ask()
        space(trial)
        points.append(trial.params)
        assert (trial.number, number(study, trial)) == (2 * own + 1, own)
    assert points[:2] == plain
    assert [number(study, trial) for trial in study.trials if RESULT not in trial.user_attrs] == [0, 1, 2, 3]


def test_every_parameter_of_both_arms_has_its_distribution():
    found = distributions(studies.find("bag_of_tricks"))
    assert {"arm", "when", "loss", "mixing", "kd_alpha", "seql_gamma", "cam", "switch", "tau"} <= set(found)
    assert found["lr"].choices == (0.05, 0.1) and found["ib_alpha"].log
    asked = study_of(optuna.samplers.RandomSampler(seed=99))
    seen = {}
    for _ in range(1500):
        trial = asked.ask()
        studies.find("bag_of_tricks")(trial)
        seen |= trial.distributions
    assert found == seen


def test_a_point_takes_the_next_free_place_of_its_arm_once():
    study = study_of(Design(0))
    for arm in (CONTROL, STUDY, STUDY, CONTROL):
        study.enqueue_trial({"arm": arm})
    running = study.ask()
    assert propose(study, {"kind": "b"}, origin="x") and not propose(study, {"arm": STUDY, "kind": "b"})
    assert propose(study, {"arm": CONTROL, "kind": "c"})
    assert propose(study, {"kind": "a"}) and not propose(study, {"kind": "c"}), "no place is left"
    fixed = [trial.system_attrs["fixed_params"] for trial in study.trials]
    assert fixed == [{"arm": CONTROL}, {"arm": STUDY, "kind": "b"}, {"arm": STUDY, "kind": "a"},
                     {"arm": CONTROL, "kind": "c"}]  # fmt: skip
    assert study.trials[1].user_attrs == {"origin": "x"} and running.number == 0
    assert drawn(study, 3)[0]["kind"] == "b"


def test_a_trial_that_was_begun_is_no_free_place():
    study = study_of(Design(0))
    study.enqueue_trial({"arm": STUDY})
    begun = study.ask()
    begun.suggest_categorical("arm", [STUDY, CONTROL])
    study._storage.set_trial_state_values(begun._trial_id, TrialState.WAITING)
    assert not propose(study, {"kind": "b"})


def test_presets_to_begin_with():
    study = studies.find("bag_of_tricks")
    first = [{"arm": STUDY, **study.presets[name]} for name in ("bag_of_tricks", "input_mixup_drw_bsce")]
    assert starts(study, 20, None) == first
    (point,) = starts(study, 20, ["bag_of_tricks"])
    assert point == {"arm": STUDY, **study.presets["bag_of_tricks"]}
    with pytest.raises(ValueError, match="no preset 'bag_of_trick'; did you mean bag_of_tricks"):
        starts(study, 20, ["bag_of_trick"])
    same = ["cels", "drw_cels"]
    assert study.presets[same[0]] == study.presets[same[1]] and len(starts(study, 20, same)) == 1
    assert starts(study, 20, []) == []


def test_a_preset_outside_of_its_space_is_refused(tmp_path):
    path = tmp_path / "outside.py"
    path.write_text(OWN.replace('"gamma": 2.0', '"gamma": 7.0'))
    with pytest.raises(ValueError, match="gamma = 7.0 is not between"):
        starts(studies.find(str(path)), 10, ["paper"])


OWN = """
from rayltr.spec import Stage, fn

PAPER = {"gamma": 2.0, "size": 32, "last": True}

def space(trial):
    gamma = trial.suggest_float("gamma", 0.5, 3)
    trial.suggest_int("size", 16, 64, step=16)
    trial.suggest_categorical("last", [False, True])
    return Stage(source=fn("digits"), epochs=4, loss=fn("focal", gamma=gamma))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return studies.find(str(path))


def rows(run, *given):
    """A run with these rows of trials."""
    records.write_run(run, {})
    for place, row in enumerate(given):
        records.append_trial(run, {"trial": f"{place:04d}", "number": place, "state": "complete", **row})
    return run


def test_results_are_those_that_are_whole_and_within_the_space(own, tmp_path):
    good = {"m.val.fitted_many": 0.5, "m.val.cost_s": 3.0}
    run = rows(
        tmp_path / "run",
        {**good, "p.arm": STUDY, "p.gamma": 1.0, "p.size": 32.0, "p.last": 1},
        {**good, "p.arm": STUDY, "p.gamma": 9.0, "p.size": 33, "p.last": 0},
        {**good, "p.gamma": 1.5, "m.val.cost_s": None},
        {**good, "p.gamma": 1.5, "m.val.fitted_many": float("nan")},
        {**good, "p.gamma": 1.5, "state": "failed"},
        {**good, "p.gamma": 1.5, "trial": "0000.1", "share": 1.0},
        {**good, "p.arm": STUDY, "p.unknown": 3},
    )
    study = study_of(Design(0), ("maximize", "minimize"))
    assert warm(study, own, [run], ["many", "cost"], lambda info: True) == f"warm start: 2 results of {run}"
    assert [trial.params for trial in study.trials] == [
        {"arm": STUDY, "gamma": 1.0, "size": 32, "last": True},
        {"arm": STUDY, "last": False},
    ]
    assert type(study.trials[0].params["size"]) is int and study.trials[0].params["last"] is True
    assert study.trials[0].values == [0.5, 3.0]


def test_the_five_best_recipes_at_full_length_are_tried_first(own, tmp_path):
    scored = [(0.1 * place, 0.5 + 0.25 * (place // 2)) for place in range(9)]  # pairs are the same recipe
    full = [{"p.arm": STUDY, "p.gamma": gamma, "m.val.fitted_few": few, "share": 1.0} for few, gamma in scored]
    short = {"p.arm": STUDY, "p.gamma": 2.75, "m.val.fitted_few": 0.99, "share": 1 / 9}
    run = rows(tmp_path / "run", short, *full, {**full[0], "p.gamma": 3.0, "m.val.fitted_few": 0.0})
    study = study_of(sampler("nsga2", 0, 2), ("maximize",))
    for arm in [CONTROL, *[STUDY] * 7]:
        study.enqueue_trial({"arm": arm})
    told = warm(study, own, [run], ["few"], lambda info: False)
    assert told == f"warm start: 5 recipes of {run} to try first"
    fixed = [trial.system_attrs["fixed_params"] for trial in study.trials]
    assert [point.get("gamma") for point in fixed] == [None, 1.5, 1.25, 1.0, 0.75, 0.5, None, None]
    assert study.trials[1].user_attrs == {RECIPE: f"{run}:0009"}
    assert warm(study, own, [run], ["few"], lambda info: False) == f"warm start: nothing new in {run}"
    assert [trial.system_attrs["fixed_params"] for trial in study.trials] == fixed


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
