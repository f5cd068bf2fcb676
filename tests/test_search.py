"""The search as a user runs it, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rayltr import records
from rayltr.choice import ablated, best

SHORT = ["--data", "synthetic", "--ratio", "4", "--size", "8"]


def rayltr(*words, cwd=None, **options):
    """Runs `python -m rayltr.WORDS` and returns the finished process."""
    command = [sys.executable, "-m", f"rayltr.{words[0]}", *map(str, words[1:])]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, **options)


SPACE = """
import torch
from rayltr.spec import Stage, fn

def heavier(logits, target, counts, *, gamma=1.0):
    return gamma * torch.nn.functional.cross_entropy(logits, target, reduction="none")

def space(trial):
    q = trial.suggest_categorical("q", [0.0, 1.0])
    first = stage(EPOCHS_FIRST, None)
    return first.but(epochs=EPOCHS_SECOND, resume=first, sampler=fn("power", q=q),
                     loss=fn(heavier, gamma=trial.suggest_float("gamma", 0.5, 2.0)))

def control(trial):
    trial.suggest_categorical("lr", [0.05, 0.1])
    return stage(EPOCHS_FIRST + EPOCHS_SECOND, None)

def stage(epochs, resume):
    return Stage(source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0), epochs=epochs, horizon=10,
                 backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=0.05), batch=16, resume=resume)

EPOCHS_FIRST, EPOCHS_SECOND = 6, 4
PLAIN = {"q": 1.0}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of the user's own, with a loss of the user's own."""
    path = tmp_path_factory.mktemp("study") / "my_space.py"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
    """(finished process, run folder) of a search of four trials."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["search", study, "--trials", 4, "--epochs", 10, "--storage", folder, "--name", "run", "--no-dashboard"]
    return rayltr(*words), folder / "run", words


def test_a_search_ends_with_records_report_and_the_next_command(done):
    process, run, _ = done
    assert process.returncode == 0, process.stdout + process.stderr
    rows = records.read_trials(run).to_pylist()
    assert [row["state"] for row in rows] == ["complete"] * 4
    assert sorted(row["number"] for row in rows) == [0, 1, 2, 3]
    assert {row["p.arm"] for row in rows} == {"study", "control"}
    info = records.read_run(run)
    assert info["data"]["counts"] == [40, 25, 15, 10][: len(info["data"]["counts"])] or sum(info["data"]["counts"]) > 0
    assert len(info["openings"]) == 1
    chosen = json.loads((run / "best.json").read_text())
    assert set(chosen) == {"balanced", "many", "few", "control"}
    assert (run / "report.html").stat().st_size > 1_000_000
    for text in ("epochs asked", "best by", "front of many against few", "report:", f"python -m rayltr.export {run}"):
        assert text in process.stdout
    assert "Traceback" not in process.stdout + process.stderr


def test_shared_stages_are_trained_once(done):
    rows = records.read_trials(done[1]).to_pylist()
    study = [row for row in rows if row["p.arm"] == "study"]
    assert sum(row["epochs_asked"] for row in study) == 10 * len(study)
    assert sum(row["epochs_trained"] for row in study) == 6 + 4 * len(study)


def test_the_test_split_met_the_chosen_trials_only(done):
    rows = records.read_trials(done[1]).to_pylist()
    shipped = {row["trial"] for row in best(rows).values()}
    assert {row["trial"] for row in rows if row["predictions_test"]} == shipped
    assert records.read_run(done[1])["openings"][0]["trials"] == sorted(shipped) or shipped


def test_the_same_search_again_trains_nothing_and_says_so(done):
    _, run, words = done
    before = records.read_trials(run)
    again = rayltr(*words)
    assert again.returncode == 0, again.stderr
    assert "nothing to train: all 4 trials of this search are stored" in again.stdout
    assert records.read_trials(run).equals(before)
    assert len(records.read_run(run)["openings"]) == 1


def test_more_trials_are_added_by_resume_only(done):
    _, run, words = done
    more = [*words[:3], 5, *words[4:]]
    refused = rayltr(*more)
    assert refused.returncode == 3 and "has 4 of 5 trials; go on with --resume" in refused.stderr
    assert rayltr(*more, "--resume").returncode == 0
    assert records.read_trials(run).num_rows == 5


def test_another_search_does_not_take_the_name(done):
    _, _, words = done
    other = [*words[:5], 20, *words[6:]]
    found = rayltr(*other)
    assert found.returncode == 3 and "other arguments, data or study; choose another --name" in found.stderr


@pytest.mark.slow
def test_killing_the_driver_loses_no_finished_epoch(study, tmp_path):
    """Kill -9 in the middle, --resume: finished trials stay, the others go on from their snapshots."""
    text = study.read_text().replace("EPOCHS_FIRST, EPOCHS_SECOND = 6, 4", "EPOCHS_FIRST, EPOCHS_SECOND = 60, 40")
    path = tmp_path / "long_space.py"
    path.write_text(text.replace("horizon=10", "horizon=100"))
    words = ["search", path, "--trials", 3, "--epochs", 100, "--storage", tmp_path, "--name", "run"]
    words += ["--no-dashboard", "--snapshot-seconds", 0, "--concurrent", 1]
    command = [sys.executable, "-m", f"rayltr.{words[0]}", *map(str, words[1:])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    run, deadline = tmp_path / "run", time.monotonic() + 120
    while records.read_trials(run).num_rows < 1 or not list((run / "store").glob("*/*.snapshot.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {row["trial"]: row for row in records.read_trials(run).to_pylist()}
    found = rayltr(*words, "--resume")
    assert found.returncode == 0, found.stdout + found.stderr
    rows = {row["trial"]: row for row in records.read_trials(run).to_pylist()}
    assert len(rows) == 3 and all(rows[trial] == row for trial, row in finished.items() if not row["predictions_test"]
                                  and not rows[trial]["predictions_test"])  # fmt: skip
    resumed = [row for trial, row in rows.items() if trial not in finished]
    assert sum(row["epochs_trained"] for row in resumed) < sum(row["epochs_asked"] for row in resumed)


DEADLY = """
import os, pathlib, signal
import torch
from rayltr.spec import Stage, fn

def deadly(logits, target, counts, *, gamma=1.0):
    marker = pathlib.Path(MARKER)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return gamma * torch.nn.functional.cross_entropy(logits, target, reduction="none")

def space(trial):
    return Stage(source=fn("synthetic", classes=4, per_class=40, size=8, ratio=4.0), epochs=27, batch=16,
                 backbone=fn("resnet20", width=4), optimiser=fn("sgd", lr=0.05),
                 loss=fn(deadly, gamma=trial.suggest_float("gamma", 0.5, 2.0)))

def control(trial):
    return space(trial).but(loss=fn("cross_entropy"))
"""


@pytest.mark.slow
def test_short_schedules_decide_and_a_trial_whose_process_dies_is_run_again(tmp_path):
    """One search for both: every recipe trains for a ninth first, and a process is killed once."""
    path = tmp_path / "deadly_space.py"
    path.write_text(DEADLY.replace("MARKER", repr(str(tmp_path / "marker"))))
    found = rayltr("search", path, "--trials", 6, "--epochs", 27, "--fidelity", "schedules", "--storage", tmp_path,
                   "--name", "run", "--no-dashboard")  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "is run again, alone: the process of the trial died" in found.stdout
    rows = {row["trial"]: row for row in records.read_trials(tmp_path / "run").to_pylist()}
    assert len(rows) == 6 + 2 and all(row["state"] == "complete" for row in rows.values())
    assert sum(row["again"] for row in rows.values()) == 1
    promoted = {trial: row for trial, row in rows.items() if trial.endswith(".1")}
    assert {row["p.arm"] for row in promoted.values()} == {"study", "control"}
    assert all((row["share"], row["epochs_asked"]) == (1.0, 27) for row in promoted.values())
    low = [row for trial, row in rows.items() if trial not in promoted and row["p.arm"] == "study"]
    assert all(row["epochs_asked"] == 3 and row["share"] == pytest.approx(1 / 9) for row in low)
    (name,) = [trial for trial, row in promoted.items() if row["p.arm"] == "study"]
    assert rows[name[:4]]["objective"] == min(row["objective"] for row in low)
    assert {row["trial"] for row in best(rows.values()).values()} <= set(promoted)
    assert "96 by training only the best in full" in found.stdout
    assert list((tmp_path / "run/tensorboard").rglob("*tfevents*"))


@pytest.mark.slow
def test_finalists_are_trained_with_fresh_seeds_and_meet_the_test_split_once(study, tmp_path):
    words = ["search", study, "--trials", 3, "--epochs", 4, "--finalists", 1, "--storage", tmp_path, "--name", "run"]
    process = rayltr(*words, "--no-dashboard", "--ablate")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {row["trial"]: row for row in records.read_trials(tmp_path / "run").to_pylist()}
    without = [row for row in rows.values() if ablated(row)]
    assert {row["seed"] for row in without} <= {1} and not any(row["predictions_test"] for row in without)
    assert {row["trial"] for row in without} == set(records.read_run(tmp_path / "run")["ablation"])
    again = [row for name, row in rows.items() if "+" in name and not ablated(row)]
    assert len(again) in (3, 6) and {row["seed"] for row in again} == {1, 2, 3}
    assert all(row["predictions_test"] for row in again)
    assert {row["trial"] for row in best(list(rows.values())).values()} <= {"0000", "0001", "0002"}
    assert len(records.read_run(tmp_path / "run")["openings"]) == 1
    assert "mean and s.d. over fresh seeds" in process.stdout
    same = rayltr(*words, "--no-dashboard", "--ablate")
    assert same.returncode == 0 and "nothing to train" in same.stdout
