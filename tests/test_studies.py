import textwrap

import pytest

from rayltr import catalogue, studies
from rayltr.search import checked
from rayltr.spec import FixedTrial, RandomTrial, Stage, chain, end, fn, line, parse
from rayltr.spec import dump as dumped
from rayltr.studies import CONTROL, STUDY, Plan, jobs, rungs

NAMES = studies.names()


@pytest.fixture(autouse=True)
def user(monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})


@pytest.mark.parametrize("name", NAMES)
def test_random_points_are_valid_chains_of_any_length(name):
    study = studies.find(name)
    for seed in range(50):
        trial = RandomTrial(seed)
        stage = study(trial)
        assert study(FixedTrial(trial.asked)) == stage, "a space is a function of its parameters"
        assert parse(dumped(stage)) == stage
        for epochs in (max(3, sum(own.epochs > 0 for own in chain(stage))), 20, 200):
            short = Plan(name, epochs=epochs).changed(stage)
            assert sum(own.epochs for own in chain(short)) == epochs
            assert all(end(own) <= own.horizon for own in chain(short))
        assert not any("/" in parameter for parameter in trial.asked)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_point_of_the_space(name):
    study = studies.find(name)
    for params in study.presets.values():
        assert isinstance(Plan(name).stage(study, {"arm": STUDY, **params}), Stage)
    assert set(study.published) <= set(study.named)


@pytest.mark.parametrize("name", NAMES)
def test_the_control_arm_is_plain_cross_entropy(name):
    study = studies.find(name)
    for seed in range(20):
        (stage,) = chain(catalogue.complete(study.control(RandomTrial(seed))))
        assert (stage.loss, stage.weight, stage.mixing) == (fn("cross_entropy"), None, None)
        assert stage.sampler == fn("power", q=1.0) and stage.head == fn("linear")


def test_trials_that_defer_at_different_epochs_share_one_line():
    begun = Stage(source=fn("digits"), epochs=120, horizon=200)
    late = [one.but(epochs=200 - one.epochs, resume=one) for one in (begun, begun.but(epochs=140))]
    changed = [Plan("", epochs=20).changed(one.but(weight=fn("inverse_frequency"))) for one in late]
    assert [one.resume.epochs for one in changed] == [12, 14]
    assert len({line(one.resume) for one in changed}) == 1


def test_the_published_schedule_of_the_bag():
    stage = studies.find("bag_of_tricks").space(FixedTrial(studies.find("bag_of_tricks").presets["ce"]))
    assert (stage.epochs, stage.batch) == (200, 128)
    assert stage.optimiser == fn("sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-4)


def test_a_plan_changes_every_stage():
    study = studies.find("bag_of_tricks")
    plan = Plan("bag_of_tricks", source=fn("cifar10"), epochs=10, batch=32, backbone=fn("resnet20"), seed=3)
    stages = chain(plan.stage(study, {"arm": STUDY, **study.presets["ldam_drw"]}))
    assert [stage.epochs for stage in stages] == [8, 2]
    assert {(s.source.name, s.batch, s.backbone.name, s.seed) for s in stages} == {("cifar10", 32, "resnet20", 3)}


def test_a_parameter_without_use_is_refused():
    study = studies.find("bag_of_tricks")
    with pytest.raises(ValueError, match="no use for the parameter 'tau_train'"):
        Plan("").stage(study, {"arm": STUDY, **study.presets["ce"], "tau_train": 1.0})


OWN = """
from rayltr.spec import Stage, fn

PAPER = {"gamma": 2.0}

def my_loss(logits, target, counts, *, gamma=1.0):
    return -logits.log_softmax(1).gather(1, target[:, None])[:, 0] * gamma

def space(trial):
    return Stage(source=fn("digits"), epochs=4, loss=fn(my_loss, gamma=trial.suggest_float("gamma", 0.5, 3)))
"""


def test_a_file_is_a_study_with_its_own_loss_and_the_default_control(tmp_path):
    path = tmp_path / "my_space.py"
    path.write_text(OWN)
    study = studies.find(str(path))
    assert study.name == "my_space" and study.presets == {"paper": {"gamma": 2.0}}
    stage = Plan(str(path)).stage(study, {"arm": STUDY, "gamma": 2.0})
    assert stage.loss.get("gamma") == 2.0 and len(stage.loss.get("code")) == 16
    plain = {"control.lr": 0.1, "control.flip": 0.5, "control.schedule": "cosine"}
    assert Plan(str(path)).stage(study, {"arm": CONTROL, **plain}), "its parameters have names of their own"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function space"),
        ("import nothing_like_this", "cannot be loaded: ModuleNotFoundError"),
        ("def space(trial:\n  pass", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_file_that_is_no_study_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(ValueError, match=message):
        studies.find(str(path))


def test_unknown_studies_are_refused_with_what_exists():
    with pytest.raises(ValueError, match="unknown study 'bag_of_trick': did you mean bag_of_tricks"):
        studies.find("bag_of_trick")
    with pytest.raises(ValueError, match="no study file missing.py"):
        studies.find("missing.py")


def test_a_broken_range_is_found_before_a_search(tmp_path):
    """Optuna wants one range per name."""
    path = tmp_path / "two_ranges.py"
    path.write_text(
        OWN
        + """
def control(trial):
    return Stage(source=fn("digits"), epochs=4, loss=fn("focal", gamma=trial.suggest_categorical("gamma", [1, 2])))
"""
    )
    study = studies.find(str(path))
    with pytest.raises(ValueError, match="draws gamma from numbers and from \\[1, 2\\]; one name has one range"):
        checked(study, Plan(str(path)))


@pytest.mark.parametrize(
    ("fidelity", "lengths"), [("none", [81]), ("schedules", [9, 81]), ("halving", [9, 27, 81]), ("curves", [9, 27, 81])]
)
def test_the_rungs_of_a_search(fidelity, lengths):
    study, preset = studies.find("bag_of_tricks"), studies.find("bag_of_tricks").presets["drw_csce"]
    chains = [plan.stage(study, {"arm": STUDY, **preset}) for plan in rungs(Plan("bag_of_tricks", epochs=81), fidelity)]
    assert [sum(own.epochs for own in chain(stage)) for stage in chains] == lengths
    whole = chains[-1]
    for stage in chains[:-1]:
        if fidelity == "curves":  # the beginning of the full schedule: what it trains is stored for the full length
            assert stage.horizon == 81 and line(stage) == line(chain(whole)[0])
        else:  # a schedule of its own, which defers too
            assert stage.horizon == end(stage) and len(chain(stage)) == 2


def test_rungs_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="a 9th of --epochs 20 first; that takes at least 27 epochs"):
        rungs(Plan("bag_of_tricks", epochs=20), "schedules")


@pytest.mark.parametrize(
    ("trials", "fidelity", "total"),
    [(20, "none", 20), (45, "schedules", 45 + 1 + 4), (45, "halving", 45 + 3 + 12 + 1 + 4)],
)
def test_how_many_trainings_a_search_has(trials, fidelity, total):
    assert jobs(trials, fidelity) == total


def test_a_name_that_is_taken_is_refused(tmp_path):
    path = tmp_path / "taken.py"
    path.write_text(OWN + "def focal(logits, target, counts):\n    return logits\n")
    with pytest.raises(ValueError, match="defines focal, which is a loss of rayltr; rename it"):
        studies.find(str(path))
