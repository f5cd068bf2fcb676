"""The study of self-supervision to distillation: presets, what is shared, and the four stages by one command."""

import json

import pytest

from rayltr import command, recipe, records, studies
from rayltr.catalogue import complete
from rayltr.interface import Resources
from rayltr.rehearsal import rehearse
from rayltr.spec import FixedTrial, RandomTrial, chain, fn, line, parse
from rayltr.store import Store
from rayltr.studies import STUDY as ARM
from rayltr.studies import Plan
from rayltr.trial import run
from tests.test_search import rayltr

STUDY = studies.find("ssd")
PAPER = STUDY.presets["paper"]
TOY = Plan(
    study="ssd",
    source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0),
    epochs=8,
    batch=16,
    backbone=fn("resnet20", width=4),
)


def preset(name):
    return complete(STUDY.chains[name] if name in STUDY.chains else STUDY.space(FixedTrial(STUDY.presets[name])))


def point(**changes):
    params = {**PAPER, **changes}
    return {name: value for name, value in params.items() if value is not None}


def asked(choice, *names):
    return tuple(choice.get(name) for name in names)


def test_every_published_error_belongs_to_a_preset():
    assert set(STUDY.published) <= set(STUDY.named)
    assert STUDY.published["imagenet_lt_release"]["imagenet_lt"] == "44.0"


def test_the_four_stages():
    first, teacher, student, last = chain(preset("paper"))
    assert (first.init, teacher.init, student.init, last.init) == (None, first, None, student)
    assert (student.teacher, last.teacher) == (teacher, None)
    assert [stage.method.name for stage in chain(last)] == ["rotation", "supervised", "distil", "student"]
    assert [stage.epochs for stage in chain(last)] == [200, 10, 200, 10]
    assert [stage.head.name for stage in chain(last)] == ["linear", "lws", "linear", "lws"]
    assert [stage.sampler.name for stage in chain(last)] == ["power", "class_aware", "power", "class_aware"]
    assert {len(stage.views) for stage in chain(last)} == {1}
    assert asked(teacher.method, "frozen", "drift", "fresh_head") == (True, False, False)
    assert asked(student.method, "temperature", "distil", "teacher_bn") == (2.0, 1.0, "running")
    assert asked(last.method, "chosen", "frozen", "drift") == ("soft", True, False)


def test_the_release_on_imagenet_lt():
    first, teacher, student, last = chain(preset("imagenet_lt_release"))
    wanted = {
        "contrast": 1.0,
        "rotation": 0.0,
        "temperature": 0.2,
        "momentum": 0.999,
        "queue_label_init": 0,
        "out": 128,
    }
    assert {name: first.method.get(name) for name in wanted} == wanted and first.method.get("queue") is None
    assert [(s.epochs, s.batch) for s in chain(last)] == [(135, 256), (5, 512), (135, 256), (5, 512)]
    assert [asked(s.optimiser, "lr", "weight_decay") for s in chain(last)] == [(0.1, 5e-4), (0.2, 5e-4)] * 2
    assert all(asked(s.optimiser, "momentum", "nesterov") == (0.9, False) for s in chain(last))
    assert all(s.schedule == fn("cosine", warmup=0.0, final=0.0) for s in chain(last))
    query, key = first.views
    assert asked(query, "scale", "jitter", "hue", "grayscale", "blur") == ((0.08, 1.0), 1.0, 0.0, 0.0, 0.0)
    assert asked(key, "scale", "jitter", "hue", "grayscale", "blur") == ((0.2, 1.0), 0.8, 0.1, 0.2, 0.5)
    assert all(s.views == (query,) for s in (teacher, student, last))
    assert [asked(s.sampler, "each", "walks") for s in (teacher, last)] == [(2, 8)] * 2
    assert teacher.method.get("drift") and preset("imagenet_lt").sampler.get("walks") == 1
    assert asked(student.method, "temperature", "distil", "teacher_bn") == (2.0, 1.0, "batch")
    assert asked(last.method, "chosen", "drift") == ("hard", True)
    assert first.backbone.get("model") == "resnext50_32x4d"
    assert preset("imagenet_lt_release_student") == student


def test_inaturalist():
    first, teacher, student, last = chain(preset("inaturalist"))
    assert (first.epochs, first.batch, first.method.get("queue")) == (90, 512, 65536)
    assert [asked(s.optimiser, "lr", "weight_decay") for s in chain(last)] == [(0.2, 1e-4)] * 4
    assert first.backbone.get("model") == "resnet50" and (teacher.epochs, last.epochs) == (5, 5)


def test_every_task_classifier_and_end_is_reached():
    found = [complete(STUDY.space(RandomTrial(seed))) for seed in range(200)]
    firsts = [chain(stage)[0] for stage in found]
    tasks = {(s.method.name, bool(s.method.get("rotation"))) for s in firsts}
    assert tasks == {("rotation", True), ("instance", False), ("instance", True)}
    assert all(len(s.views) == (2 if s.method.name == "instance" else 1) for s in firsts)
    assert {chain(stage)[1].head.name for stage in found} == {"lws", "linear"}
    assert {stage.method.get("chosen") for stage in found} == {None, "soft", "hard", "sum"}
    assert {len(chain(stage)) for stage in found} == {3, 4}


def test_first_stages_are_few_and_shared():
    found = [chain(complete(STUDY.space(RandomTrial(seed))))[0] for seed in range(800)]
    turning = [line(stage) for stage in found if stage.method.name == "rotation"]
    discriminating = [line(stage) for stage in found if not stage.method.get("rotation")]
    assert len(set(turning)) <= 16 < len(turning) and len(set(discriminating)) <= 96 < 2 * len(discriminating)
    same = [
        STUDY.space(FixedTrial(point(kd_temperature=t, teacher_bn=b))) for t, b in ((1.5, "batch"), (3.0, "running"))
    ]
    firsts, teachers, students, _ = (
        {line(complete(s)) for s in stages} for stages in zip(*map(chain, same), strict=True)
    )
    assert (len(firsts), len(teachers), len(students)) == (1, 1, 2)


@pytest.mark.parametrize("name", STUDY.chains)
def test_recipes_for_photographs_can_be_trained(name):
    rehearse(TOY.changed(STUDY.chains[name]), Resources(device="cpu", threads=1))


def rows(result):
    """The epochs that a trial's training curve has, by stage."""
    return sorted({(row["stage"], row["epoch"]) for row in result.epochs})


def test_another_distillation_trains_only_what_follows(tmp_path):
    store = Store(tmp_path / "store")
    told = []
    whole = run(TOY.stage(STUDY, {"arm": ARM, **PAPER}), store, report=told.append)
    assert whole.trained == whole.asked == 8 and {record["stage"] for record in told} == {0, 1, 2, 3}
    told.clear()
    other = run(TOY.stage(STUDY, {"arm": ARM, **point(kd_temperature=3.0, w_kd=0.5)}), store, report=told.append)
    assert {record["stage"] for record in told} == {2, 3} and other.trained == len(told)
    assert rows(other) == rows(whole), "the curve is that of the whole chain, whoever trained it"
    before = [row for row in whole.epochs if row["stage"] < 2]
    assert [row for row in other.epochs if row["stage"] < 2] == before
    told.clear()
    last = run(TOY.stage(STUDY, {"arm": ARM, **point(stage4_head="hard")}), store, report=told.append)
    assert {record["stage"] for record in told} == {3}
    student = run(TOY.stage(STUDY, {"arm": ARM, **point(stage4=False, stage4_head=None)}), Store(tmp_path / "other"))
    assert {"hard.balanced", "both.balanced", "balanced"} <= set(student.metrics) and last.metrics["balanced"] > 0


@pytest.mark.parametrize("task", ["instance", "both"])
def test_other_tasks_train_and_train_nothing_twice(task, tmp_path):
    more = {"w_con": 1.0, "temperature": 0.2, "groups": 4, "w_rot": 1.0 if task == "both" else None}
    stage = TOY.stage(STUDY, {"arm": ARM, **point(self_task=task, rebalance="crt", **more)})
    store = Store(tmp_path / "store")
    found, again = run(stage, store), run(stage, store)
    assert (found.trained, again.trained) == (8, 0) and again.metrics == found.metrics


def test_one_command_trains_the_four_stages(tmp_path, capsys):
    words = ["ssd", "--preset", "paper", "--data", "digits", "--ratio", "20", "--epochs", "4", "--name", "run"]
    words += ["--backbone", "resnet20", "--threads", "1", "--storage", str(tmp_path)]
    assert command.run(recipe.main, words) == 0
    said = capsys.readouterr().out
    assert "4 stage(s), 4 epochs" in said and "stage 4, epoch 1/1: loss" in said and "test: balanced" in said
    (row,) = records.read_trials(tmp_path / "run").to_pylist()
    assert (row["epochs_asked"], row["epochs_trained"]) == (4, 4)
    curve = records.read_epochs(tmp_path / "run").to_pylist()
    terms = {(entry["stage"], entry["metric"]) for entry in curve}
    assert terms == {(0, "loss"), (0, "rotation"), (1, "loss"), (2, "loss"), (2, "distilled"), (3, "loss")}


SPACE = """
from rayltr.spec import FixedTrial
from search_spaces import ssd

def space(trial):
    chosen = {"kd_temperature": trial.suggest_categorical("kd_temperature", [1.5, 3.0])}
    return ssd.space(FixedTrial({**ssd.PAPER["paper"], **chosen}))
"""


@pytest.mark.slow
def test_a_search_over_the_distillation_trains_the_first_two_stages_once(tmp_path):
    (study := tmp_path / "distilled.py").write_text(SPACE)
    words = [study, "--storage", tmp_path, "--name", "run", "--data", "digits", "--trials", "3", "--epochs", "8"]
    words += ["--sampler", "quasi", "--backbone", "resnet20", "--no-dashboard"]
    process = rayltr("search", *words)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = [row for row in records.read_trials(tmp_path / "run").to_pylist() if row["p.arm"] == ARM]
    lengths = [[own.epochs for own in chain(parse(json.loads(row["recipe"])))] for row in rows]
    assert lengths[0] == lengths[1] and [row["epochs_asked"] for row in rows] == [8, 8]
    assert sorted(row["epochs_trained"] for row in rows) == [sum(lengths[0][2:]), 8]
