"""The recorded table is whole, can be made again, and its data set is what it says."""

import numpy as np
import pyarrow as pa
import pytest
from torch import nn

from benchmarks import recorded_features, recording
from rayltr import catalogue, studies
from rayltr.data import load
from rayltr.metrics import TAUS
from rayltr.spec import Stage, fn
from rayltr.store import Store
from rayltr.studies import CONTROL, STUDY, Plan, rungs
from tests.benchmarks.test_search_benchmark import SPACE
from tests.data.image_files import encoded, noise


@pytest.fixture(autouse=True)
def no_user_functions(monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})


def test_the_recorded_table_is_complete():
    table = recording.read()
    points = recording.everything(studies.find(recording.PLAN.study))
    assert len(points) == 1500
    assert set(table) == {(recording.key(point), epochs) for point in points for epochs in (9, 81)}
    for one in table.values():
        assert one.objective > 0 and 0 <= one.error <= 1
        assert one.curve.shape == (len(TAUS), 2) and ((one.curve >= 0) & (one.curve <= 1)).all()
    assert recording.TABLE.stat().st_size < 2_000_000


def test_longer_training_pays_in_the_recorded_study_and_short_training_tells():
    table = recording.read()
    short, whole = ([one.objective for (_, epochs), one in table.items() if epochs == wanted] for wanted in (9, 81))
    assert np.median(whole) < np.median(short)
    assert np.corrcoef(np.argsort(np.argsort(short)), np.argsort(np.argsort(whole)))[0, 1] > 0.5


def test_points_are_all_paths_through_a_conditional_space():
    def space(trial):
        if trial.suggest_categorical("a", [1, 2]) == 2:
            trial.suggest_int("b", 1, 5, step=4)
        return Stage(source=fn("digits"), epochs=1)

    points = recording.points(space, {"arm": "study"})
    assert [tuple(point.values()) for point in points] == [("study", 1), ("study", 2, 1), ("study", 2, 5)]


def test_every_point_of_the_study_is_a_chain_on_every_rung():
    study = studies.find(recording.PLAN.study)
    for plan in rungs(recording.PLAN, recording.FIDELITY):
        for point in recording.everything(study)[::37]:
            assert plan.stage(study, point).precision == "fp32"


def test_recording_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny_space.py").write_text(SPACE)
    monkeypatch.setattr(recording, "PLAN", Plan(str(tmp_path / "tiny_space.py"), epochs=27, seed=0))
    points = [{"arm": STUDY, "lr": 0.1, "gamma": 1.0}, {"arm": CONTROL, "lr": 0.1}]
    monkeypatch.setattr(recording, "everything", lambda study: points)
    path = tmp_path / "table.parquet"
    recording.record(path, Store(tmp_path / "store"))
    first = recording.read(path)
    assert {epochs for _, epochs in first} == {3, 27} and len(first) == 4
    capsys.readouterr()
    recording.record(path, Store(tmp_path / "store"))
    assert "2 of 2 points, 0 epochs trained" in capsys.readouterr().out
    again = recording.read(path)
    assert all(np.array_equal(one.curve, again[name].curve) for name, one in first.items())


def test_features_become_images_that_load_as_they_were(tmp_path):
    values = np.linspace(0, 1, 4 * 64 * 3).reshape(4, 64, 3)
    for name in ("train", "val", "test"):
        recorded_features.write(tmp_path / f"{name}.parquet", values, np.array([0, 1, 0, 1]))
    data = load(fn("parquet", root=str(tmp_path)))
    assert (len(data.train), len(data.val), data.size) == (4, 4, (8, 8))
    found = data.train.take(np.arange(4)).reshape(4, 64, 3)
    rounded = np.round(255 * values).astype(np.uint8)
    assert sorted(map(bytes, found)) == sorted(map(bytes, rounded))


def test_splits_share_no_row_and_have_their_counts():
    target = np.random.default_rng(0).integers(0, 20, 30_000)
    drawn = recorded_features.drawn(target)
    assert len(np.unique(np.concatenate(drawn))) == sum(map(sum, recorded_features.COUNTS.values()))
    for rows, counts in zip(drawn, recorded_features.COUNTS.values(), strict=True):
        assert np.bincount(target[rows], minlength=20).tolist() == list(counts)


def test_the_data_set_is_made_once_of_what_the_network_has_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded_features, "LEARNT", 8)
    monkeypatch.setattr(recorded_features, "COUNTS", {"train": [3, 1], "val": [1, 1], "test": [1, 1]})
    monkeypatch.setattr(recorded_features, "trained", lambda stage, store: seen.append(stage) or Still())
    seen, classes = [], [row % 2 for row in range(24)]
    columns = {"img": encoded(noise((24, 8, 8, 3))), "fine_label": classes, "coarse_label": classes}
    recorded_features.pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    for _ in range(2):
        made = recorded_features.make(tmp_path, tmp_path / "home", Store(tmp_path / "store"))
    assert len(seen) == 1 and len(load(seen[0].source).train) < 8
    data = load(fn("parquet", root=str(made)))
    assert data.counts.tolist() == [3, 1] and len(data.val) == 2 and data.size == (8, 8)


class Still(nn.Module):
    """64 features: the pixels of the first colour."""

    def forward(self, images):
        return images[:, 0].flatten(1)
