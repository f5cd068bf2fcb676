import pytest

from rayltr import catalogue, studies
from rayltr.ablation import Mended, set_back
from rayltr.search import ablatable
from rayltr.spec import FixedTrial, RandomTrial, Stage, fn
from rayltr.studies import STUDY, Plan, Study

PLAIN = Stage(source=fn("synthetic"), epochs=9)


@pytest.fixture(autouse=True)
def user(monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})


def space(trial):
    stage = PLAIN
    if trial.suggest_categorical("mixing", ["none", "mixup"]) == "mixup":
        stage = stage.but(mixing=fn("mixup", alpha=trial.suggest_float("alpha", 0.1, 1.0)))
    if trial.suggest_categorical("loss", ["focal", "ldam"]) == "focal":
        return stage.but(loss=fn("focal", gamma=trial.suggest_float("gamma", 1.0, 4.0, log=True)))
    repeats = trial.suggest_int("repeats", 1, 4)
    return stage.but(loss=fn("ldam", max_margin=trial.suggest_float("margin", 0.1, 0.5, step=0.1)), seed=repeats)


def study(plain, own=space):
    return Study("mine", own, own, {}, {}, {}, None, plain=plain)


def test_one_choice_is_set_back_and_what_it_decides_goes_with_it():
    params = {"arm": STUDY, "mixing": "mixup", "alpha": 0.4, "loss": "ldam", "margin": 0.3, "repeats": 2}
    found = set_back(study({"mixing": "none", "loss": "focal", "repeats": 2, "unknown": 1}), params)
    assert found == {
        "mixing": {"arm": STUDY, "mixing": "none", "loss": "ldam", "margin": 0.3, "repeats": 2},
        "loss": {"arm": STUDY, "mixing": "mixup", "alpha": 0.4, "loss": "focal", "gamma": 2.0},
    }, "gamma is asked for anew: the middle of its range"


def test_what_is_asked_anew_is_plain_or_else_in_the_middle():
    trial = Mended({}, {"loss": "ldam", "mixing": "what it never was"})
    stage = space(trial)
    assert trial.asked == {"mixing": "none", "loss": "ldam", "repeats": 3, "margin": pytest.approx(0.3)}
    assert space(FixedTrial(trial.asked)) == stage


def test_a_winner_without_tricks_and_a_value_that_is_out_of_place_have_nothing_to_set_back():
    params = {"arm": STUDY, "mixing": "none", "loss": "focal", "gamma": 2.0}
    assert set_back(study({"mixing": "none"}), params) == {}
    assert set_back(study({}), params) == {}

    def forced(trial):
        return PLAIN.but(seed=trial.suggest_categorical("depth", [2]))

    assert set_back(study({"depth": 1}, forced), {"arm": STUDY, "depth": 2}) == {}


@pytest.mark.parametrize("name", studies.names())
def test_every_choice_of_every_study_can_be_set_back(name):
    own, plan = studies.find(name), Plan(name, source=fn("synthetic"), epochs=54, seed=0)
    ablatable(own, plan)
    for seed in range(40):
        trial = RandomTrial(seed)
        own.space(trial)
        params = {"arm": STUDY, **trial.asked}
        for choice, changed in set_back(own, params).items():
            assert changed[choice] == own.plain[choice] != params[choice]
            assert plan.stage(own, changed) != plan.stage(own, params)


@pytest.mark.parametrize(
    ("plain", "says"), [({}, "PLAIN = "), ({"mixng": "none"}, "has 'mixng', for which its space never asks")]
)
def test_a_study_that_cannot_be_ablated_says_so_before_anything_is_trained(plain, says):
    with pytest.raises(ValueError, match=says):
        ablatable(study(plain), Plan("mine", epochs=9))
