"""What Ray costs: how the numbers are formed and judged; no test here measures time."""

import json

import pytest

from benchmarks import overhead
from rayltr import studies
from rayltr.catalogue import USER
from rayltr.spec import RandomTrial, chain, dump
from rayltr.studies import Plan

NOTES = {f"{process}-{stage}": 100.0 + 3 * stage + process / 100 for process in (7, 8) for stage in (1, 2, 3)}

ONE = {stage: {"7", "8"} for stage in ("1", "2", "3")}


def test_what_comes_after_the_first_trial_is_counted():
    assert overhead.after_first([10.0, 10.5, 11.0, 13.0]) == pytest.approx(1.0)


def test_the_first_step_is_that_of_the_first_worker_after_the_proposal():
    found = overhead.steps(NOTES, 98.0)
    assert found.first_step_s == pytest.approx(5.07) and found.one_run
    rehearsed = overhead.steps({**NOTES, "5-1": 90.0}, 98.0)
    assert rehearsed == found, "a call before the proposal is no step of the trial"


@pytest.mark.parametrize(
    "notes",
    [
        {**NOTES, "9-3": 120.0},
        {name: at for name, at in NOTES.items() if not name.endswith("-3")},
        {name: at for name, at in NOTES.items() if not name.startswith("8")},
    ],
    ids=["another process", "a stage is missing", "one worker"],
)
def test_a_chain_in_one_run_has_the_same_processes_in_every_stage(notes):
    assert not overhead.steps(notes, 98.0).one_run


@pytest.mark.parametrize(
    ("by_search", "first_step", "broken"), [(0.3, 5.0, 0), (0.3, 15.5, 1), (0.41, 5.0, 1), (0.2, 5.0, 0)]
)
def test_a_broken_limit_is_a_failure(by_search, first_step, broken, capsys):
    assert overhead.judged(by_search, 0.25, [overhead.Chain(12.0, ONE), overhead.Chain(first_step, ONE)]) == broken
    said = capsys.readouterr().out
    assert f"{by_search:.3f} by the search   0.250 directly" in said and f"{by_search / 0.25:.2f} times" in said
    assert f"first step on 2 workers {first_step:11.3f} s" in said and "12.000 s" in said
    assert "one Train run" in said and "more than" not in said


def test_a_second_run_is_a_failure(capsys):
    split = overhead.Chain(5.0, {**ONE, "3": {"9", "8"}})
    assert overhead.judged(0.3, 0.25, [overhead.Chain(5.0, ONE), split]) == 1
    assert "more than one Train run" in capsys.readouterr().out


def test_a_slow_first_trial_is_a_failure(capsys):
    assert overhead.judged(0.3, 0.25, [overhead.Chain(15.5, ONE), overhead.Chain(5.0, ONE)]) == 1


def test_the_steps_of_the_next_trial_do_not_count():
    later = {f"{process}-{stage}": 200.0 + stage for process in (10, 11) for stage in (1, 2, 3)}
    assert overhead.steps({**NOTES, **later}, 98.0, 150.0) == overhead.steps(NOTES, 98.0)


def test_recipes_run_directly(tmp_path, monkeypatch):
    monkeypatch.setattr("rayltr.catalogue.USER", {**USER})
    path = tmp_path / "own_study.py"
    path.write_text(overhead.TRIVIAL)
    study = studies.find(str(path))
    recipes = [Plan(str(path), epochs=1).changed(study.point("study", RandomTrial(seed))) for seed in range(2)]
    ends = overhead.directly([{"recipe": json.dumps(dump(stage))} for stage in recipes], tmp_path / "store")
    assert ends == sorted(ends) and len(ends) == 2
    assert len([*(tmp_path / "store").rglob("*.safetensors")]) == 2, "nothing of trivial trials is shared"


def test_the_chain_notes_the_first_call_of_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("rayltr.catalogue.USER", {**USER})
    notes, path = tmp_path / "notes", tmp_path / "own_study.py"
    notes.mkdir()
    path.write_text(overhead.CHAIN.format(notes=str(notes)))
    stage = Plan(str(path), epochs=overhead.STAGES).changed(studies.find(str(path)).point("study", RandomTrial(0)))
    assert len(chain(stage)) == overhead.STAGES
    overhead.directly([{"recipe": json.dumps(dump(stage))}], tmp_path / "store")
    times = {note.name: float(note.read_text()) for note in notes.iterdir()}
    assert sorted(name.split("-")[1] for name in times) == ["1", "2", "3"]
    assert sorted(overhead.steps(times, 0.0).processes) == ["1", "2", "3"]


@pytest.mark.slow
def test_a_search_beside_the_loop_and_a_chain_on_two_workers(capfd):
    overhead.main(["--trials", "4"])
    said = capfd.readouterr().out
    assert "seconds per trivial trial" in said and "one Train run" in said
