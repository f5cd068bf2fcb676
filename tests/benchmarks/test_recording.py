"""The recorded table of trainings is whole, and can be recorded again."""

import numpy as np

from benchmarks import recorded_space, recording
from rayltr import catalogue, studies
from rayltr.metrics import TAUS
from rayltr.spec import Stage, fn
from rayltr.studies import CONTROL, STUDY, Plan
from tests.benchmarks.test_search_benchmark import SPACE


def test_the_recorded_table_is_complete():
    table = recording.read()
    points = recording.everything(studies.find(recording.PLAN.study))
    assert len(points) == 160
    assert set(table) == {(recording.key(point), epochs) for point in points for epochs in (6, 18, 54)}
    for one in table.values():
        assert one.objective > 0 and 0 <= one.error <= 1
        assert one.curve.shape == (len(TAUS), 2) and ((one.curve >= 0) & (one.curve <= 1)).all()
    assert recording.TABLE.stat().st_size < 300_000


def test_points_are_all_paths_through_a_conditional_space():
    def space(trial):
        if trial.suggest_categorical("a", [1, 2]) == 2:
            trial.suggest_categorical("b", ["x", "y"])
        return Stage(source=fn("digits"), epochs=1)

    points = recorded_space.points(space, {"arm": "study"})
    assert [tuple(point.values()) for point in points] == [("study", 1), ("study", 2, "x"), ("study", 2, "y")]


def test_recording_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "USER", {})
    (tmp_path / "tiny_space.py").write_text(SPACE)
    monkeypatch.setattr(recording, "PLAN", Plan(str(tmp_path / "tiny_space.py"), epochs=27, seed=0))
    monkeypatch.setattr(recording, "RECORDED", "schedules")
    monkeypatch.setattr(recording, "everything", lambda study: [
        {"arm": STUDY, "lr": 0.1, "gamma": 1.0}, {"arm": CONTROL, "lr": 0.1}])  # fmt: skip
    path, store = tmp_path / "table.parquet", tmp_path / "store"
    recording.main(["--table", str(path), "--store", str(store)])
    first = recording.read(path)
    assert {epochs for _, epochs in first} == {3, 27} and len(first) == 4
    capsys.readouterr()
    recording.main(["--table", str(path), "--store", str(store)])
    assert "2 of 2 points, 0 epochs trained" in capsys.readouterr().out
    again = recording.read(path)
    assert all(np.array_equal(one.curve, again[name].curve) for name, one in first.items())
