"""The command line under a hostile and clumsy user: one clear line, the right exit code, nothing started or lost."""

import html
import importlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayltr import catalogue, command, export, predict, recipe, records, search
from rayltr.command import FAILED, INTERRUPTED, PREFLIGHT, USAGE
from tests.data.image_files import noise, png, write_folder

ROOT = Path(__file__).parents[1]


class Shortage(ValueError):
    """Stands for what the real tuning raises."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No functions of earlier studies, a working directory of its own, and nothing heavy that could be started."""

    def nothing(name):
        raise AssertionError(f"{name} was started")

    monkeypatch.setattr(catalogue, "USER", {})
    monkeypatch.chdir(tmp_path)
    for main in (search, recipe, export, predict, command):
        monkeypatch.setattr(main, "import_module", nothing)
    monkeypatch.setattr(recipe, "rehearsed", lambda *_: None)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with one line on standard error and leave no run; returns the code and the line."""

    def check(program, *words, storage="runs"):
        more = ["--storage", storage] if program in (search, recipe) else []
        code = command.run(program.main, [*map(str, words), *map(str, more)])
        error = capsys.readouterr().err
        assert error.startswith("rayltr: ") and error.count("\n") == 1 and "Traceback" not in error, error
        return code, error

    return check


@pytest.fixture
def tuned(monkeypatch):
    """Puts a function in the place of the search proper: it gets the settings and may write records."""

    def put(found):
        fake = SimpleNamespace(Settings=SimpleNamespace, Shortage=Shortage, search=lambda settings, _: found(settings))
        modules = {"rayltr.tuning": fake}
        monkeypatch.setattr(search, "import_module", lambda name: modules.get(name) or importlib.import_module(name))

    return put


def ended(settings, **changes):
    """Writes the rows of a search whose trials have all ended, as the changes say."""
    now = datetime.now(UTC)
    for number in range(settings.trials):
        row = {"study": "s", "trial": f"{number:04d}", "number": number, "state": "complete", "started": now,
               "ended": now, "epochs_asked": 4, "epochs_trained": 3, "recipe": "{}"}  # fmt: skip
        records.append_trial(settings.run, {**row, **changes})
    return True


# ----------------------------------------------------------------------------------------------- speed of the start

LIGHT = [
    ("rayltr", "--help"),
    ("rayltr", "search", "--help"),
    ("rayltr.search", "--help"),
    ("rayltr.search", "--list"),
    ("rayltr.train", "--help"),
    ("rayltr.train", "--list"),
    ("rayltr.export", "--help"),
    ("rayltr.predict", "--help"),
    ("analysis", "--help"),
    ("rayltr.search", "bag_of_trick"),
    ("rayltr.search", "bag_of_tricks", "--data", "cifar"),
    ("rayltr.search", "bag_of_tricks", "--sampler", "tpee"),
    ("rayltr.search", "bag_of_tricks", "--data", "synthetic", "--workers", "999"),
    ("rayltr.search", "bag_of_tricks", "--data", "synthetic", "--resume"),
    ("rayltr.train", "bag_of_tricks", "--preset", "bsc"),
    ("rayltr.train", "nowhere.json"),
    ("rayltr.export", "nowhere", "--out", "model"),
    ("rayltr.predict", "nowhere", "nowhere"),
]

START = """
import contextlib, io, json, runpy, sys
results = []
for module, *words in json.loads(sys.argv[1]):
    sys.argv = [module, *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    heavy = sorted({"torch", "ray", "optuna", "plotly"} & set(sys.modules))
    results.append([[module, *words], heavy, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def test_help_lists_and_refusals_import_nothing_heavy():
    words = [sys.executable, "-W", "ignore", "-c", START, json.dumps(LIGHT)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert len(found) == len(LIGHT)
    for line, heavy, out, err in found:
        assert not heavy, f"{line} imports {heavy}"
        if line[-1] in ("--help", "--list"):
            assert out.strip() and not err
        else:
            assert err.startswith("rayltr: ") and err.count("\n") == 1 and not out


def test_an_unknown_command_is_answered_with_those_that_exist():
    words = [sys.executable, "-m", "rayltr", "serach"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert process.returncode == USAGE
    assert "Traceback" not in process.stderr
    assert all(name in process.stdout + process.stderr for name in ("search", "train", "export", "predict", "report"))


# ------------------------------------------------------------------------------------------------ arguments of a search

SYNTHETIC = ("bag_of_tricks", "--data", "synthetic")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which study? bag_of_tricks"),
        (["bag_of_trick"], "unknown study 'bag_of_trick': did you mean bag_of_tricks?"),
        (["nowhere.py"], "there is no study file"),
        (["some/where"], "there is no study file some/where"),
        (["bag_of_tricks", "--data", "cifar"], "unknown source 'cifar', and no such path: did you mean cifar10"),
        (["bag_of_tricks", "--data", "/no/such/folder"], "unknown source '/no/such/folder', and no such path"),
        (["bag_of_tricks", "--size", "32"], "source digits has no keyword 'size': known: "),
        (["bag_of_tricks", "--objective", "manny"], "unknown objective 'manny': did you mean many"),
        (["bag_of_tricks", "--objective", "many,many"], "named twice"),
        (["bag_of_tricks", "--objective", ""], "unknown objective ''"),
        (["bag_of_tricks", "--sampler", "tpee"], "invalid choice: 'tpee' (choose from 'tpe', 'nsga2'"),
        (["bag_of_tricks", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["bag_of_tricks", "--trials", "many"], "argument --trials: invalid int value: 'many'"),
        (["bag_of_tricks", "--ratio", "0.01"], "--ratio must be at least 1, not 0.01: did you mean 100?"),
        (["bag_of_tricks", "--ratio", "-100"], "--ratio must be at least 1, not -100.0\n"),
        (["bag_of_tricks", "--ratio", "nan"], "--ratio must be at least 1, not nan"),
        (["bag_of_tricks", "--backbone", "resnet99"], "unknown backbone 'resnet99': did you mean resnet32"),
        (["bag_of_tricks", "--backbone", "timm"], "backbone timm needs the keyword 'model'"),
        (["bag_of_tricks", "--epochs", "1"], "1 epochs are too few for a chain of "),
        (["bag_of_tricks", "--warm-start", "nowhere"], "nowhere"),
        (["bag_of_tricks", "--workers", "2", "--gpus-per-trial", "0.5"], "need a whole GPU each"),
        (["bag_of_tricks", "--workers", "2", "--stack", "2"], "choose one"),
        (["bag_of_tricks", "--stack", "2", "--compile"], "choose one"),
    ],
)
def test_bad_arguments(refused, tmp_path, words, message):
    code, error = refused(search, *words)
    assert code == USAGE and message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["trials", "epochs", "batch", "ratio", "size", "workers", "stack", "cpus-per-trial"])
@pytest.mark.parametrize("value", ["0", "-4"])
def test_what_counts_something_is_at_least_one(refused, tmp_path, option, value):
    code, error = refused(search, *SYNTHETIC, f"--{option}", value)
    assert code == USAGE and f"--{option} must be at least 1" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["concurrent", "seed", "imbalance-seed", "gpus-per-trial", "snapshot-seconds"])
def test_what_may_be_none_is_not_negative(refused, option):
    code, error = refused(search, *SYNTHETIC, f"--{option}", "-1")
    assert code == USAGE and f"--{option} must be at least 0, not -1" in error


@pytest.mark.parametrize("name", ["a/b", "..", ".", "../other", "/absolute", "folder/"])
@pytest.mark.parametrize("program", [search, recipe], ids=["search", "train"])
def test_a_name_is_that_of_one_folder(refused, tmp_path, program, name):
    code, error = refused(program, *SYNTHETIC, f"--name={name}")
    assert code == USAGE and "is no name of a folder" in error
    assert not list(tmp_path.iterdir())


def test_more_workers_or_trials_than_the_machine_has(refused, tmp_path):
    code, error = refused(search, *SYNTHETIC, "--workers", 300, "--cpus-per-trial", 2)
    assert code == PREFLIGHT and "a trial needs 600 CPUs (300 workers x 2), this machine has" in error
    code, error = refused(search, *SYNTHETIC, "--concurrent", 500)
    assert code == PREFLIGHT and "500 trials at once need 500 CPUs" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_nothing_listens_at_the_address(refused, tmp_path, address):
    code, error = refused(search, *SYNTHETIC, "--address", address)
    assert code == PREFLIGHT and f"no Ray cluster answers at {address}" in error
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ studies of the user's

HEAD = """
import sys
from rayltr.spec import Stage, fn

def heavier(logits, target, counts, *, gamma=1.0):
    return logits.sum(1) * gamma

def stage(**changes):
    return Stage(source=fn("synthetic", classes=3, per_class=20, size=8), epochs=4).but(**changes)

"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('first line\\nsecond')", "cannot be loaded: RuntimeError: first line second"),
        ("sys.exit('good bye')", "cannot be loaded: SystemExit: good bye"),
        ("def space(trial:\n    pass", "cannot be loaded: SyntaxError"),
        ("import nothing_like_this", "cannot be loaded: ModuleNotFoundError"),
        ("x = 1", "the study mine has no function space(trial) -> Stage"),
        ("space = 3", "the study mine has no function space(trial) -> Stage"),
        ("PAPER = [1]\ndef space(trial): return stage()", "PAPER of the study mine is a dict"),
        ("def space(trial): pass", "the study mine gives None, which is no Stage"),
        ("def space(trial): return {'epochs': 3}", "the study mine gives {'epochs': 3}, which is no Stage"),
        ("def space(): return stage()", "the study mine fails: TypeError: space() takes 0 positional arguments"),
        ("def space(trial): return stage(loss='focal')", "the loss of a stage is fn(...), not 'focal'"),
        ("def space(trial): return stage(source='digits')", "the source of a stage is fn(...), not 'digits'"),
        ("def space(trial): return stage(views=fn('flip_crop'))", "the views of a stage are a tuple of fn(...)"),
        ("def space(trial): return stage(views=[fn('flip_crop')])", "the views of a stage are a tuple of fn(...)"),
        ("def space(trial): return stage(epochs=4.5)", "the epochs of a stage is a whole number, not 4.5"),
        ("def space(trial): return stage(resume=4)", "the study mine gives 4, which is no Stage"),
        ("def space(trial): return stage(los=fn('focal'))", "unexpected keyword argument 'los'"),
        ("def space(trial): return stage(loss=fn('focl'))", "unknown loss 'focl': did you mean focal?"),
        ("def space(trial): return stage(loss=fn('focal', gama=2))", "focal has no keyword 'gama': did you mean gamma"),
        ("def space(trial): return stage(loss=fn(heavier, gama=2))", "heavier has no keyword 'gama': did you mean"),
        ("def space(trial): return stage(views=(fn('flip'),))", "unknown view 'flip': "),
        ("def space(trial): return stage(batch=0)", "batch is a whole number, not 0"),
        ("def space(trial): return stage(loss=fn('focal', gamma={}))", "a keyword of fn() is a number"),
        ("def space(trial):\n    trial.suggest_int('number', 0, 1)\n    return stage()", "has a parameter 'number'"),
        ("def space(trial):\n    trial.suggest_int('a/b', 0, 1)\n    return stage()", "has a parameter 'a/b'"),
        ("def space(trial):\n    trial.suggest_int('arm', 0, 1)\n    return stage()", "has a parameter 'arm'"),
        ("def space(trial): return stage()\ndef control(trial): return 1 / 0", "the study mine fails: ZeroDivision"),
        ("PAPER = {'q': 1}\ndef space(trial): return stage()", "no use for the parameter 'q'"),
        ("PAPER = {}\ndef space(trial): return stage(loss=fn(lambda z, t, n: z))", "unknown loss '<lambda>'"),
        (
            "def space(trial):\n    if trial.suggest_int('n', 0, 3) == 2:\n        raise KeyError('no such thing')\n"
            "    return stage()",
            "the study mine fails at {'n': 2}: KeyError: 'no such thing'",
        ),
    ],
)  # fmt: skip
def test_studies_that_cannot_be_searched(refused, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(HEAD + text)
    code, error = refused(search, "mine.py", "--name", "run")
    assert code == USAGE and message in error
    assert not (tmp_path / "runs").exists()


def test_what_is_no_python_file_is_no_study(refused, tmp_path):
    (tmp_path / "notes").write_text("def space(trial): pass")
    for place in (tmp_path / "notes", tmp_path):
        code, error = refused(search, place)
        assert code == USAGE and error.startswith(f"rayltr: there is no study file {place}; studies that come with ")
        assert "bag_of_tricks" in error and error.count("\n") == 1


INFORMATION = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 0\nGPU UUID: \t GPU-1\n"


def test_a_run_knows_the_machine_that_it_was_begun_on(tuned, tmp_path, monkeypatch):
    for slot in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "nvidia/gpus" / slot).mkdir(parents=True)
        (tmp_path / "nvidia/gpus" / slot / "information").write_text(INFORMATION)
    monkeypatch.setattr(command, "NVIDIA", tmp_path / "nvidia")
    (tmp_path / "mine.py").write_text(HEAD + "def space(trial): return stage()")
    tuned(lambda settings: False)
    command.run(search.main, ["mine.py", "--storage", "runs", "--name", "run"])
    machine = records.read_run("runs/run")["machine"]
    assert machine == {"processor": command.processor(), "gpus": ["NVIDIA H100 80GB HBM3"] * 2}
    assert machine["processor"]


def test_the_data_are_those_of_the_study_not_of_the_control(tuned, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(HEAD + "def space(trial): return stage()")
    tuned(lambda settings: False)
    assert command.run(search.main, ["mine.py", "--storage", "runs", "--name", "run"]) == INTERRUPTED
    assert records.read_run("runs/run")["data"]["classes"] == ["class 0", "class 1", "class 2"]
    again = capsys.readouterr().out.strip().splitlines()[-1].strip()
    assert again == "python -m rayltr.search mine.py --storage runs --name run --resume"


# ------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def images(tmp_path):
    """A folder of class folders: ten images in each of two classes."""
    target = np.arange(20) % 2
    write_folder(tmp_path / "images", noise((20, 4, 4, 3)), target, ["cat", "dog"])
    return tmp_path / "images"


SEARCH = ("bag_of_tricks", "--name", "run", "--data")


def test_a_class_without_images(refused, images, tmp_path):
    (images / "train" / "empty").mkdir()
    code, error = refused(search, *SEARCH, images)
    assert code == PREFLIGHT and "no training image in class empty" in error
    assert not (tmp_path / "runs").exists()


def test_a_corrupt_image_is_named_or_skipped_and_counted(refused, tuned, images, tmp_path):
    bad = images / "train" / "cat" / "0000.png"
    bad.write_bytes(png(noise((4, 4, 3)))[:30])
    code, error = refused(search, *SEARCH, images)
    assert code == PREFLIGHT and str(bad) in error and "--skip-corrupt" in error
    assert not (tmp_path / "runs").exists()
    tuned(lambda settings: False)
    words = [*map(str, (*SEARCH, images)), "--skip-corrupt", "--storage", "runs"]
    assert command.run(search.main, words) == INTERRUPTED
    assert records.read_run("runs/run")["data"]["skipped"] == {"count": 1, "first": [str(bad)]}


def test_parquet_without_a_target(refused, tmp_path):
    pq.write_table(pa.table({"image": [png(noise((4, 4, 3)))], "label": ["cat"]}), tmp_path / "train.parquet")
    code, error = refused(search, *SEARCH, tmp_path / "train.parquet")
    assert code == PREFLIGHT and "no integer column can be the target; columns: image, label" in error
    assert not (tmp_path / "runs").exists()


def test_what_is_no_data(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.parquet").write_text("PAR0")
    for place, message in (("empty", "is no data set that is known here"), ("train.parquet", "not a readable Parquet")):
        code, error = refused(search, *SEARCH, place)
        assert code in (USAGE, PREFLIGHT) and message in error
    assert refused(search, *SEARCH, "synthetic", "--ratio", "1e9")[0] == PREFLIGHT
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------------- folders of runs


@pytest.mark.parametrize("program", [search, recipe], ids=["search", "train"])
def test_storage_that_cannot_be_written(refused, tmp_path, program):
    (tmp_path / "file").write_text("mine")
    words = (*SYNTHETIC, *(("--preset", "ce", "--epochs", 2) if program is recipe else ()))
    for storage in ("file", "file/deep"):
        code, error = refused(program, *words, storage=storage)
        assert code == PREFLIGHT and f"{storage} cannot be written" in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("program", [search, recipe], ids=["search", "train"])
def test_a_folder_of_something_else_is_left_alone(refused, tmp_path, program):
    (tmp_path / "runs" / "thesis").mkdir(parents=True)
    (tmp_path / "runs" / "thesis" / "chapter.txt").write_text("precious")
    words = (*SYNTHETIC, *(("--preset", "ce", "--epochs", 2) if program is recipe else ()))
    code, error = refused(program, *words, "--name", "thesis")
    assert code == PREFLIGHT and "thesis exists and is no run; choose another --name" in error
    assert [path.name for path in (tmp_path / "runs" / "thesis").iterdir()] == ["chapter.txt"]


def test_a_name_too_long_for_the_file_system(refused):
    code, error = refused(search, *SYNTHETIC, "--name", "x" * 400)
    assert code == PREFLIGHT and "File name too long" in error


def test_resume_needs_a_run(refused, tmp_path):
    code, error = refused(search, *SYNTHETIC, "--name", "run", "--resume")
    assert code == PREFLIGHT and "there is no run" in error and "run to resume" in error
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def run(tuned, capsys, tmp_path):
    """The folder of a search that was interrupted before its first trial ended."""
    tuned(lambda settings: False)
    assert command.run(search.main, [*SYNTHETIC, "--storage", "runs", "--name", "run"]) == INTERRUPTED
    capsys.readouterr()
    return tmp_path / "runs" / "run"


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (lambda text: text.replace('"schema": 1', '"schema": 99'), USAGE, "incompatible version (schema 99"),
        (lambda text: text[:40], USAGE, "cannot read"),
        (lambda text: "", USAGE, "cannot read"),
        (lambda text: text.replace('"settled"', '"unsettled"'), PREFLIGHT, "a run with other arguments"),
        (lambda text: text, PREFLIGHT, "has 0 of 20 trials; go on with --resume, or choose another --name"),
    ],
    ids=["version", "cut", "empty", "edited", "same"],
)
def test_the_run_that_is_there(refused, run, edit, code, message):
    (run / "run.json").write_text(edit((run / "run.json").read_text()))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found, error = refused(search, *SYNTHETIC, "--name", "run")
    assert found == code and message in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("more", [("--seed", 1), ("--epochs", 7), ("--ratio", 3), ("--sampler", "random")])
def test_another_search_does_not_take_the_run(refused, run, more):
    code, error = refused(search, *SYNTHETIC, "--name", "run", *more, "--resume")
    assert code == PREFLIGHT and "other arguments, data or study; choose another --name" in error


def test_a_run_that_goes_on_keeps_what_the_machine_and_the_number_of_trials_decided(tuned, run, monkeypatch, capsys):
    """Another machine computes in another precision, and more trials would make short schedules the default."""
    asked = []
    tuned(lambda settings: asked.append(settings) or False)
    now = records.read_run(run)["settled"]
    monkeypatch.setattr(command, "native_precision", lambda: "fp32" if now["precision"] == "bf16" else "bf16")
    words = [*SYNTHETIC, "--storage", "runs", "--name", "run", "--trials", "60"]
    assert command.run(search.main, words) == PREFLIGHT
    assert "has 0 of 60 trials; go on with --resume" in capsys.readouterr().err
    words += ["--resume"]
    assert command.run(search.main, words) == INTERRUPTED
    (settings,) = asked
    assert (settings.plan.precision, settings.fidelity, settings.trials) == (now["precision"], now["fidelity"], 60)
    assert command.run(search.main, [*words, "--seed", "1", "--sampler", "random"]) == PREFLIGHT
    assert "what differs: seed, sampler" in capsys.readouterr().err


def test_a_refusal_by_the_machines_leaves_no_new_run(refused, tuned, run, tmp_path):
    def short(settings):
        raise Shortage("a trial needs 1 GPU, but the cluster has 0")

    tuned(short)
    code, error = refused(search, *SYNTHETIC, "--name", "new", "--gpus-per-trial", 1)
    assert code == PREFLIGHT and "a trial needs 1 GPU" in error
    assert refused(search, *SYNTHETIC, "--name", "run", "--gpus-per-trial", 1, "--resume")[0] == PREFLIGHT
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------------- trials that fail


def test_a_search_whose_trials_all_fail_says_where_the_errors_are(tuned, capsys, tmp_path):
    tuned(lambda settings: ended(settings, state="failed", error="KeyError: 'my own mistake'"))
    words = [*SYNTHETIC, "--trials", "2", "--storage", "runs", "--name", "run"]
    assert command.run(search.main, words) == FAILED
    said = capsys.readouterr().out
    assert "2 of 2 trials failed; the report lists them with their errors" in said
    assert "rayltr.export" not in said
    assert "my own mistake" in (tmp_path / "runs/run/report.html").read_text()


def test_of_a_failed_trial_the_epochs_count_that_it_trained(tuned, capsys):
    tuned(lambda settings: ended(settings) and ended(settings, state="failed", trial="0001", number=1))
    assert command.run(search.main, [*SYNTHETIC, "--trials", "2", "--storage", "runs", "--name", "run"]) == FAILED
    assert "7 epochs asked, 6 trained; saved: 1 by sharing" in capsys.readouterr().out


def test_a_search_ends_well_when_the_few_classes_cannot_be_validated(tuned, capsys, tmp_path):
    scores = {f"m.val.{name}": 0.5 for name in ("fitted_balanced", "fitted_many", "fitted_medium", "fitted_nll")}
    tuned(lambda settings: ended(settings, **scores, **{"m.val.fitted_few": float("nan")}))
    assert command.run(search.main, [*SYNTHETIC, "--trials", "2", "--storage", "runs", "--name", "run"]) == 0
    assert "no front: the many or the few classes have no validation images" in capsys.readouterr().out
    assert (tmp_path / "runs/run/report.html").exists()
    assert set(json.loads((tmp_path / "runs/run/best.json").read_text())) == {"balanced", "many"}


BROKEN = """
from rayltr.spec import Stage, fn

def broken(logits, target, counts, *, how="nan"):
    if how == "raise":
        raise KeyError("my own mistake")
    return logits.sum(1) * float("nan")

def space(trial):
    return stage(loss=fn(broken, how=HOW))

def control(trial):
    trial.suggest_categorical("lr", [0.05, 0.1])
    return stage()

def stage(**changes):
    whole = Stage(source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0), epochs=2, batch=16,
                  backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=0.05))
    return whole.but(**changes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "error"), [("nan", "the term 'loss' became nan in epoch 1"),
                                            ("raise", "KeyError: 'my own mistake'")])  # fmt: skip
def test_a_search_goes_on_when_an_arm_fails(tmp_path, how, error):
    (tmp_path / "broken.py").write_text(BROKEN.replace("HOW", repr(how)))
    words = [sys.executable, "-m", "rayltr.search", tmp_path / "broken.py", "--trials", "3", "--epochs", "2"]
    words += ["--storage", tmp_path, "--name", "run", "--no-dashboard"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert process.returncode == FAILED, process.stdout + process.stderr
    rows = {row["p.arm"]: row for row in records.read_trials(tmp_path / "run").to_pylist()}
    states = [row["state"] for row in records.read_trials(tmp_path / "run").to_pylist()]
    assert sorted(states) == ["complete", "failed", "failed"]
    assert rows["control"]["state"] == "complete" and rows["control"]["predictions_test"]
    assert error in rows["study"]["error"] and rows["study"]["objective"] is None
    assert "2 of 3 trials failed" in process.stdout and "Traceback" not in process.stdout + process.stderr
    assert error in html.unescape((tmp_path / "run" / "report.html").read_text())


# ---------------------------------------------------------------------------------------------------- one recipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which recipe?"),
        (["bag_of_tricks"], "which --preset? bag_of_tricks has "),
        (["bsce"], "unknown study 'bsce': it is a preset: bag_of_tricks --preset bsce"),
        (["bag_of_tricks", "--preset", "bsc"], "no such preset; did you mean bsce"),
        (["bag_of_tricks", "--preset", "drw_bsce", "--epochs", "1"], "too few for a chain of 2 training stages"),
        (["bag_of_tricks", "--preset", "ce", "--trial", "0001"], "--trial 0001 is of which run?"),
        (["bag_of_tricks", "--preset", "ce", "--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["bag_of_tricks", "--preset", "ce", "--batch", "-1"], "--batch must be at least 1, not -1"),
        (["bag_of_tricks", "--preset", "ce", "--threads", "0"], "--threads must be at least 1, not 0"),
        (["bag_of_tricks", "--preset", "ce", "--ratio", "0.1"], "did you mean 10?"),
        (["nowhere.json"], "there is no recipe in nowhere.json"),
        (["nowhere"], "unknown study 'nowhere'"),
    ],
)
def test_recipes_that_cannot_be_trained(refused, tmp_path, words, message):
    code, error = refused(recipe, *words)
    assert code == USAGE and message in error
    assert not (tmp_path / "runs").exists()


SOURCE = '"source": {"fn": "synthetic"}, "epochs": 3'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "there is no recipe in config.json: JSONDecodeError"),
        ("[]", "there is no recipe in config.json"),
        ("3", "there is no recipe in config.json"),
        ("{}", "a stage needs the field 'epochs'"),
        ('{"recipe": 3}', "there is no recipe in config.json"),
        ('{"architecture": "resnet18", "num_classes": 3}', "a stage has no field 'architecture'"),
        ('{"source": "digits", "epochs": 3}', "the source of a stage is fn(...), not 'digits'"),
        ('{"source": {"name": "digits"}, "epochs": 3}', "there is no recipe in config.json: KeyError: 'fn'"),
        (f'{{{SOURCE}, "loss": "focal"}}', "the loss of a stage is fn(...), not 'focal'"),
        (f'{{{SOURCE}, "views": {{"fn": "flip_crop"}}}}', "the views of a stage are a tuple"),
        (f'{{{SOURCE}, "resume": 4}}', "there is no recipe in config.json"),
        (f'{{{SOURCE}, "loss": {{"fn": "foccal"}}}}', "unknown loss 'foccal': did you mean focal?"),
        (f'{{{SOURCE}, "loss": {{"fn": "focal", "gama": 1}}}}', "loss focal has no keyword 'gama': did you mean gamma"),
        (f'{{{SOURCE}, "batch": "16"}}', "a stage's batch is a whole number, not '16'"),
        (f"{{{SOURCE.replace('3', '-3')}}}", "the epochs of a stage is a whole number, not -3"),
    ],
)
def test_files_that_hold_no_recipe(refused, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    code, error = refused(recipe, "config.json")
    assert code == USAGE and message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("program", [recipe, export], ids=["train", "export"])
def test_runs_of_others_are_not_read(refused, run, program):
    (run / "run.json").write_text((run / "run.json").read_text().replace('"schema": 1', '"schema": 99'))
    words = (run, *(("--out", "model") if program is export else ("--trial", "0000")))
    code, error = refused(program, *words)
    assert code == USAGE and "incompatible version (schema 99" in error


def test_a_run_without_the_trial_that_is_asked_for(refused, run, tmp_path):
    for program, words in ((recipe, ()), (export, ("--out", "model"))):
        code, error = refused(program, run, "--trial", "0007", *words)
        assert code == USAGE and "run has no trials" in error
    code, error = refused(export, run, "--out", "model")
    assert code == USAGE and "no complete trial for --best balanced; it has none at all" in error
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (export, ["nowhere", "--out", "model"], "nowhere is not a run folder: it has no run.json"),
        (export, ["nowhere"], "the following arguments are required: --out"),
        (export, ["run", "--out", "m", "--best", "x"], "invalid choice: 'x' (choose from 'balanced', 'many', 'few'"),
        (export, ["run", "--out", "m", "--best", "few", "--trial", "1"], "not allowed with argument"),
        (predict, ["nowhere", "image.png"], "nowhere is no exported model: it has no config.json"),
        (predict, ["nowhere"], "the following arguments are required: IMAGE|FOLDER|FILE.parquet"),
    ],
)
def test_exports_and_predictions_of_nothing(refused, program, words, message):
    code, error = refused(program, *words)
    assert code == USAGE and message in error


def test_a_run_has_one_writer(tmp_path):
    """A second terminal with --resume must not disturb a search that is running."""
    with command.locked(tmp_path), pytest.raises(command.Refused, match=f"in use: process {os.getpid()} on"):
        command.locked(tmp_path)
    command.locked(tmp_path).close()
