"""A run made small: what would be shipped, its front and its best stay; records and predictions stay for all."""

import json
import os
import shutil
import socket
import time
from argparse import Namespace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from analysis import ensembles
from rayltr import catalogue, claims, command, ensemble, export, prune, recipe, records
from rayltr import trial as trials
from rayltr.command import PREFLIGHT, USAGE
from rayltr.data import load
from rayltr.evaluate import evaluate
from rayltr.interface import Resources, State
from rayltr.prune import leading, on_front
from rayltr.shipping import opened
from rayltr.spec import chain, dump, fn, parse
from rayltr.store import Store
from rayltr.trial import Trial
from tests.conftest import tiny

ONE = Resources(device="cpu", threads=1)
SOURCE = tiny().source
FIRST = tiny(epochs=1, horizon=2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})


def did(*words, program=prune):
    return command.run(program.main, [*map(str, words)])


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with one line on standard error; returns the code and the line."""

    def check(*words, program=prune):
        code = did(*words, program=program)
        error = capsys.readouterr().err
        assert error.startswith("rayltr: ") and error.count("\n") == 1, error
        return code, error

    return check


def begun(run, asked):
    """The run.json of a search for `asked` trials."""
    options = Namespace(trials=asked, cpus_per_trial=1, seed=0, imbalance_seed=0)
    settled = {"objectives": ["balanced_nll"]}
    command.begin(run, "mine", load(SOURCE), options, {"command": "rayltr search mine", "settled": settled})
    (run / "optuna.journal").write_text("{}")


def recorded(run, number, stage, path, found, **changes):
    """Writes the row of a complete trial."""
    now = datetime.now(UTC)
    row = {"study": "mine", "trial": f"{number:04d}", "number": number, "state": "complete", "seed": 0, "classes": 4,
           "epochs_asked": 2, "epochs_trained": 2, "wall_s": 1.0, "objective": found["fitted_nll"], "started": now,
           "ended": now, "address": "a@2", "recipe": json.dumps(dump(stage)), "predictions_val": trials.inside(path),
           "p.arm": "control" if number == 0 else "study"}  # fmt: skip
    records.append_trial(run, {**row, **{f"m.val.{name}": value for name, value in found.items()}, **changes})


def files(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def weights(run):
    return {name for name in files(run) if name.endswith(".safetensors")}


def of(run, *names):
    """The weights of the last stages of trials."""
    rows = {row["trial"]: row for row in records.read_trials(run).to_pylist()}
    return {rows[name]["predictions_val"].replace(".val.parquet", ".safetensors") for name in names}


# --- a run made up

POINTS = {
    # number: right of the 10 images of each of the classes 0 (many), 1, 2 (medium) and 3 (few)
    0: (7, 7, 7, 7),  # the control
    1: (10, 8, 8, 2),  # ships for many; on the front
    2: (6, 7, 8, 9),  # ships for few; on the front
    3: (8, 9, 9, 8),  # ships as balanced; on the front
    4: (9, 2, 2, 5),  # on the front only: it is worse than the control on balance
    5: (7, 6, 6, 7),  # nothing but, perhaps, a good objective
    6: (5, 5, 5, 5),  # nothing
    7: (10, 8, 8, 1),  # nothing
}


def predictions(right):
    """Logits float [40, 4] and target [40]: so sure of themselves that no tau changes a prediction."""
    target = np.repeat(np.arange(4), 10)
    said = np.where(np.arange(40) % 10 < np.array(right)[target], target, (target + 1) % 4)
    return 3000.0 * np.eye(4)[said], target


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A search whose trials share a first stage; their weights and predictions are made up."""
    run = tmp_path_factory.mktemp("made") / "run"
    begun(run, len(POINTS))
    data, store = load(SOURCE), Store(run / "store")
    content = FIRST.but(source=fn("content", digest="d"))
    state = State({"w": torch.zeros(2)}, {"0.m": torch.zeros(2)}, 1, ("w",), [])
    store.put(content, state)
    for number, right in POINTS.items():
        stage = content.but(epochs=1, resume=content, seed=number)
        store.put(stage, State(state.model, state.optimiser, 2, ("w",), []))
        z, target = predictions(right)
        path = store.predictions(stage, "val")
        about = {"counts": data.counts, "classes": data.classes, "split": "val", "digest": "d"}
        records.write_predictions(path, row=np.arange(40), target=target, logits={"main": z}, **about)
        found = evaluate({"main": z}, target, data.counts)
        recorded(run, number, stage, path, found, objective=[0.7, 0.6, 0.8, 0.9, 1.0, 0.2, None, 1.1][number])
    recorded(run, 8, FIRST, "/store/none", {"fitted_nll": 0.0}, state="failed", predictions_val=None, error="boom")
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def test_shipped_front_and_best_keep_their_weights(run, capsys):
    assert did(run, "--keep", 2) == 0
    said = capsys.readouterr().out.splitlines()
    assert weights(run) == of(run, "0000", "0001", "0002", "0003", "0004", "0005")
    assert said[:7] == [
        "kept: weights of 6 trials, 0.0 MB",
        "  0000    control",
        "  0001    many, ensemble, front, top 2 by balanced_nll",
        "  0002    few, front",
        "  0003    balanced, ensemble, front",
        "  0004    front",
        "  0005    top 2 by balanced_nll",
    ]
    assert said[7] == "removed: 0.0 MB (earlier stages: 1, last stages: 2)"
    assert f"python -m rayltr.train {run} --trial ID" in said[8] and len(said) == 9


def test_the_members_of_the_best_ensemble_keep_their_weights(run, monkeypatch):
    monkeypatch.setattr(prune, "best", lambda rows: {})
    monkeypatch.setattr(prune, "on_front", lambda trials: [])
    members = {member.trial for member in ensembles.study(run).members}
    assert did(run, "--keep", 0) == 0
    assert len(members) == 2 and weights(run) == of(run, *members)


@pytest.mark.parametrize("keep, more", [(0, ()), (1, ("0005",)), (99, ("0005", "0007"))])
def test_as_many_of_the_best_as_asked_for(run, keep, more):
    assert did(run, "--keep", keep) == 0
    assert weights(run) == of(run, "0000", "0001", "0002", "0003", "0004", *more)


def test_an_objective_to_maximise(run):
    info = records.read_run(run)
    records.write_run(run, {**info, "settled": {"objectives": ["few", "many"]}})
    assert did(run, "--keep", 1) == 0
    assert weights(run) == of(run, "0000", "0001", "0002", "0003", "0004", "0007")


def test_trials_that_were_only_tried_at_short_length_do_not_count(run):
    row = next(row for row in records.read_trials(run).to_pylist() if row["trial"] == "0005")
    records.append_trial(run, {**row, "share": 0.25})
    assert did(run, "--keep", 1) == 0
    assert weights(run) == of(run, "0000", "0001", "0002", "0003", "0004")


class Curve:
    """A trial of `analysis.load` as far as the front is concerned."""

    def __init__(self, id, points):
        self.id, self.many_few = id, np.array(points, float)

    def points(self):
        return np.column_stack([np.zeros(len(self.many_few)), self.many_few])


def test_the_front_is_that_of_all_trials_and_taus():
    rng = np.random.default_rng(0)
    curves = [Curve(f"{number:04d}", rng.integers(0, 12, (5, 2)) / 12) for number in range(12)]
    every = [(*point, curve.id) for curve in curves for point in curve.many_few]
    best = {(m, f) for m, f, _ in every if not any(a >= m and b >= f and (a, b) != (m, f) for a, b, _ in every)}
    found = on_front([*curves, Curve("nan", [[np.nan, 1.0]])])
    assert {(m, f) for m, f, name in every if name in found} >= best
    assert all(any((m, f) in best for m, f, name in every if name == kept) for kept in found)
    assert found == sorted(set(found)) and on_front([]) == []


def test_the_best_by_the_objective():
    class Row:
        def __init__(self, id, value):
            self.id, self.row = id, {"objective": value}

    rows = [Row("a", 0.5), Row("b", None), Row("c", 0.2), Row("d", float("nan")), Row("e", 0.5), Row("f", 0.9)]
    assert leading(rows, "min") == ["c", "a", "e", "f"] and leading(rows, "max") == ["f", "a", "e", "c"]


def crashed(run):
    """What crashes leave: files that were being written, a snapshot, weights without their note, a dead claim."""
    line = (run / next(iter(of(run, "0006")))).parent
    code = "0123456789abcdef" * 2
    for path in (run / f"run.json.{code}.part", run / "records" / f"trials.parquet.{code}.part",
                 run / "store" / f".probe-{code}", line / f"000002.safetensors.{code}.part",
                 line / f"claim.{code}.tmp", line / f"claim.{code}.stale", line / "000001.snapshot.safetensors",
                 line / "000001.snapshot.json", line / "000001.snapshot.rows1.safetensors",
                 line / "000001.safetensors"):  # fmt: skip
        path.write_bytes(b"x" * 1000)
    (line / "claim").write_text(json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "time": 0}))


def test_what_crashes_left_goes_too_and_nothing_else(run, capsys):
    before = files(run)
    crashed(run)
    (run / "store" / "mine.safetensors").write_text("a file of somebody else")
    (run / "notes.part").write_text("this, too")
    assert did(run) == 0
    kinds = "(earlier stages: 2, files that a crash left: 7, last stages: 2, snapshots: 1)"
    assert kinds in capsys.readouterr().out
    after = files(run)
    assert set(after) - set(before) == {"store/mine.safetensors", "notes.part", "lock"}
    gone = {name for name in before if name not in after}
    assert gone and all(name.endswith((".safetensors", ".json")) and name.startswith("store/") for name in gone)
    assert all(after[name] == before[name] for name in after if name in before)
    assert all(any(folder.iterdir()) for folder in (run / "store").iterdir() if folder.is_dir())


def test_a_second_time_there_is_nothing_to_remove(run, capsys):
    assert did(run) == 0
    before = files(run)
    capsys.readouterr()
    assert did(run) == 0
    assert capsys.readouterr().out.endswith("nothing to remove\n")
    assert files(run) == before


def test_a_dry_run_removes_nothing(run, capsys):
    crashed(run)
    before = files(run)
    assert did(run, "--keep", 0, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert files(run).keys() - before.keys() <= {"lock"} and before.items() <= files(run).items()
    assert did(run, "--keep", 0) == 0
    assert capsys.readouterr().out == dry.replace("to be removed:", "removed:")


def test_weights_that_are_gone_are_said_to_be(run, capsys):
    assert did(run, "--keep", 0) == 0
    capsys.readouterr()
    assert did(run, "--keep", 1) == 0
    said = capsys.readouterr().out
    assert "gone before: 0005 (top 1 by balanced_nll)" in said and "kept: weights of 5 trials" in said


def test_no_note_counts_without_its_weights_when_it_is_interrupted(run, monkeypatch):
    class Killed(Exception):
        pass

    unlink, left = type(run).unlink, [4]

    def dies(path, **how):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        unlink(path, **how)

    monkeypatch.setattr(type(run), "unlink", dies)
    with pytest.raises(Killed):
        did(run, "--keep", 0)
    names = set(files(run))
    assert all(name.replace(".json", ".safetensors") in names for name in names if name[-5:] == ".json" and "/" in name)


# --- refusals


def test_a_run_that_is_in_use_is_left_alone(refused, run):
    before = files(run)
    with command.locked(run):
        code, error = refused(run)
    assert code == PREFLIGHT and f"in use: process {os.getpid()} on" in error
    claim = run / next(iter(of(run, "0006"))).rpartition("/")[0] / "claim"
    here, there = {"host": socket.gethostname(), "pid": os.getppid()}, {"host": "elsewhere", "pid": 7}
    for held in (here, {**there, "time": time.time()}):
        claim.write_text(json.dumps(held))
        code, error = refused(run, "--unfinished")
        assert code == PREFLIGHT and f"in use: process {held['pid']} on {held['host']} trains in it" in error
    claim.write_text(json.dumps({**there, "time": time.time() - claims.EXPIRY_S - 1}))
    assert before.items() <= files(run).items()
    assert did(run) == 0 and not claim.exists()


def more_asked(run):
    info = records.read_run(run)
    records.write_run(run, {**info, "arguments": {**info["arguments"], "trials": 10}})


def one_interrupted(run):
    row = records.read_trials(run).to_pylist()[-1]
    records.append_trial(run, {**row, "state": "interrupted"})
    info = records.read_run(run)
    records.write_run(run, {**info, "arguments": {**info["arguments"], "trials": 9}})


UNFINISHED = {
    "fewer trials than asked for": more_asked,
    "an interrupted one": one_interrupted,
    "resumed with more trials": lambda run: (run / "ray").mkdir(),
}


@pytest.mark.parametrize("how", UNFINISHED)
def test_a_search_that_has_not_ended_is_refused(refused, run, how):
    UNFINISHED[how](run)
    before = files(run)
    code, error = refused(run)
    assert code == PREFLIGHT and "is not finished" in error and "--resume" in error and "--unfinished" in error
    assert before.items() <= files(run).items()
    assert did(run, "--unfinished") == 0
    assert weights(run) < {name for name in before if name.endswith(".safetensors")}


def test_what_is_no_run_or_no_number(refused, run, tmp_path):
    code, error = refused(tmp_path)
    assert code == USAGE and "is not a run folder" in error and not (tmp_path / "lock").exists()
    code, error = refused(run, "--keep", -1)
    assert code == USAGE and "--keep must be at least 0, not -1" in error
    records.write_trials(run, [])
    code, error = refused(run, "--unfinished")
    assert code == USAGE and "has no trials yet" in error


# --- a run for real


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A search of three trials with a common first stage; the last one needs its teacher to predict."""
    run = tmp_path_factory.mktemp("trained") / "run"
    begun(run, 3)
    store = Store(run / "store")
    stages = [FIRST.but(epochs=1, resume=FIRST), FIRST.but(epochs=1, resume=FIRST, weight=fn("inverse_frequency")),
              tiny(epochs=1, method=fn("dive"), teacher=FIRST)]  # fmt: skip
    for number, stage in enumerate(stages):
        found = trials.run(stage, store, resources=ONE)
        # what is measured of so short trainings is luck: trial 2 is to be the best, trial 1 to be of no interest
        scores = {name: 0.9 if number == 2 else 0.5 for name in found.metrics}
        scores |= {"fitted_nll": 1.0, "fewest_images": 20.0}
        recorded(run, number, stage, found.predictions, scores)
        records.append_epochs(run, [{"trial": f"{number:04d}", **epoch} for epoch in found.epochs])
    return run


@pytest.fixture
def pruned(trained, tmp_path, monkeypatch):
    """The same, pruned; front and ensemble are left out, because they are luck, too."""
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(prune, "on_front", lambda trials: [])
    monkeypatch.setattr(prune, "together", lambda run: [])
    assert did(run, "--keep", 0) == 0
    return run


def test_a_kept_trial_keeps_its_teacher_and_can_predict(trained, pruned):
    rows = {row["trial"]: row for row in records.read_trials(pruned).to_pylist()}
    store = Store(pruned / "store")
    last = Trial(parse(json.loads(rows["0002"]["recipe"])), store, resources=ONE)
    teacher = store.path(last.names[chain(last.stage)[0]], "safetensors")
    assert weights(pruned) == {f"store/{teacher}"} | of(pruned, "0000", "0002")
    path, scores = last.test()
    again = Trial(last.stage, Store(trained / "store"), resources=ONE)
    assert last.trained == 0 and scores == again.test()[1] and os.path.exists(path)
    assert store.longest(last.names[last.stage]).optimiser, "training can go on"


def test_a_kept_trial_is_exported_as_before(trained, pruned, tmp_path):
    for name, run in (("before", trained), ("after", pruned)):
        assert did(run, "--trial", "0002", "--out", tmp_path / name, program=export) == 0
    images = torch.rand(5, 3, 8, 8)
    one, other = (opened(tmp_path / name, torch.device("cpu"))[0](images) for name in ("before", "after"))
    assert torch.equal(one, other)


def test_the_best_ensemble_is_exported_as_before(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(prune, "best", lambda rows: {})
    monkeypatch.setattr(prune, "on_front", lambda trials: [])
    assert did(run, "--keep", 0) == 0
    for name, folder in (("before", trained), ("after", run)):
        assert did(folder, "--ensemble", "--out", tmp_path / name, program=export) == 0
    images = torch.rand(5, 3, 8, 8)
    one, other = (ensemble.opened(tmp_path / name, torch.device("cpu"))[0](images) for name in ("before", "after"))
    assert torch.equal(one, other)


def test_the_export_of_another_trial_says_how_to_get_it(refused, pruned, tmp_path, monkeypatch):
    code, error = refused(pruned, "--trial", "0001", "--out", tmp_path / "model", program=export)
    assert code == USAGE and "the weights of trial 0001 are not in" in error
    assert f"python -m rayltr.train {pruned} --trial 0001" in error and not (tmp_path / "model").exists()
    assert did(pruned, "--trial", "0001", "--storage", tmp_path, "--name", "again", program=recipe) == 0
    assert did(tmp_path / "again", "--out", tmp_path / "model", program=export) == 0


def test_records_and_predictions_stay(trained, pruned):
    before, after = files(trained), files(pruned)
    lost = {name for name in before if name not in after}
    assert lost and all(name.endswith((".safetensors", ".json")) for name in lost)
    assert {name for name in before if name.endswith(".parquet")} <= set(after)
    assert all(after[name] == before[name] for name in after if name in before)


def test_a_pruned_training_keeps_its_curves_when_its_command_is_given_again(tmp_path, monkeypatch):
    """`rayltr.train` writes its records anew, but the stored stages have taken their history with them."""
    (tmp_path / "config.json").write_text(json.dumps(dump(FIRST.but(epochs=1, resume=FIRST))))
    command_line = (tmp_path / "config.json", "--storage", tmp_path, "--name", "run")
    assert did(*command_line, program=recipe) == 0
    before = records.read_epochs(tmp_path / "run").to_pylist()
    assert {row["stage"] for row in before} == {0, 1}
    assert did(tmp_path / "run") == 0 and len(weights(tmp_path / "run")) == 1
    assert did(*command_line, program=recipe) == 0
    assert records.read_epochs(tmp_path / "run").to_pylist() == before
