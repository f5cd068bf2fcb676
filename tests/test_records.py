import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayltr import metrics, records

ROW = {"study": "toy", "trial": "a", "number": 0, "state": "complete", "classes": 3, "wall_s": 1.5}


def predictions(path: Path, images: int = 50, classes: int = 7, scale: float = 10.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    heads = {name: (scale * rng.normal(size=(images, classes))).astype(np.float32) for name in ("main", "tail.2")}
    records.write_predictions(
        path,
        row=np.arange(images)[::-1],
        target=np.arange(images) % classes,
        logits=heads,
        counts=np.arange(classes, 0, -1),
        classes=[f"class {c}" for c in range(classes)],
        split="val",
        digest="d1",
    )
    return heads


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_trials_come_back_as_they_were_written(tmp_path: Path):
    row = {
        **ROW,
        "seed": 2**40,
        "started": datetime(2025, 1, 2, 3, 4, 5, 678000, tzinfo=UTC),
        "p.lr": 0.1,
        "m.few": 0.5,
    }
    records.write_trials(tmp_path, [row])
    table = records.read_trials(tmp_path)
    back = table.to_pylist()[0]
    assert {name: back[name] for name in row} == row
    assert back["objective"] is None and back["error"] is None
    assert table.schema.field("number").type == pa.int32()
    assert table.schema.field("started").type == pa.timestamp("ms", "UTC")


def test_a_run_without_records_has_no_rows(tmp_path: Path):
    assert records.read_trials(tmp_path).num_rows == 0
    assert records.read_epochs(tmp_path).schema == records.EPOCHS


def test_columns_grow_with_the_trials(tmp_path: Path):
    records.append_trial(tmp_path, {**ROW, "trial": "a", "m.few": 0.1, "p.lr": 0.1})
    records.append_trial(tmp_path, {**ROW, "trial": "b", "p.loss": "ldam", "m.ece": 0.2})
    table = records.read_trials(tmp_path)
    assert table.column_names[len(records.TRIALS) :] == ["p.lr", "p.loss", "m.few", "m.ece"]
    assert table["p.loss"].to_pylist() == [None, "ldam"]
    assert table["m.few"].to_pylist() == [0.1, None]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 2], pa.int64(), [1, None, 2]),
        ([1, 0.5], pa.float64(), [1.0, 0.5]),
        ([True, None], pa.bool_(), [True, None]),
        ([True, 1], pa.string(), ["True", "1"]),
        ([0.5, "auto"], pa.string(), ["0.5", "auto"]),
        ([np.float64(0.5), np.int64(2)], pa.float64(), [0.5, 2.0]),
        ([None, None], pa.string(), [None, None]),
    ],
)
def test_the_type_of_a_parameter_follows_its_values(tmp_path: Path, values: list, kind: pa.DataType, expected: list):
    records.write_trials(tmp_path, [{**ROW, "trial": str(i), "p.x": value} for i, value in enumerate(values)])
    table = records.read_trials(tmp_path)
    assert table.schema.field("p.x").type == kind
    assert table["p.x"].to_pylist() == expected


def test_a_parameter_widens_when_a_later_trial_needs_it(tmp_path: Path):
    for trial, value in (("a", None), ("b", 3), ("c", 0.5)):
        records.append_trial(tmp_path, {**ROW, "trial": trial, "p.x": value})
    assert records.read_trials(tmp_path)["p.x"].to_pylist() == [None, 3.0, 0.5]


def test_appending_a_known_trial_replaces_it_in_place(tmp_path: Path):
    records.write_trials(tmp_path, [{**ROW, "trial": t, "state": "interrupted", "m.few": 0.1} for t in "abc"])
    records.append_trial(tmp_path, {**ROW, "trial": "b", "state": "complete"})
    table = records.read_trials(tmp_path)
    assert table["trial"].to_pylist() == ["a", "b", "c"]
    assert table["state"].to_pylist() == ["interrupted", "complete", "interrupted"]
    assert table["m.few"].to_pylist() == [0.1, None, 0.1]


def test_nan_and_missing_metrics_stay_apart(tmp_path: Path):
    records.write_trials(tmp_path, [{**ROW, "trial": "a", "m.few": np.nan}, {**ROW, "trial": "b"}])
    first, second = records.read_trials(tmp_path)["m.few"].to_pylist()
    assert np.isnan(first) and second is None


def test_what_does_not_fit_the_table_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no column 'lr'"):
        records.write_trials(tmp_path, [{**ROW, "lr": 0.1}])
    with pytest.raises(ValueError, match=r"unknown state of a trial: 'done' \(one of complete, pruned"):
        records.write_trials(tmp_path, [{**ROW, "state": "done"}])


def test_epochs_are_appended(tmp_path: Path):
    rows = [{"trial": t, "stage": 0, "epoch": e, "split": "train", "metric": "loss", "value": 1.0}
            for e, t in enumerate("aab")]  # fmt: skip
    records.append_epochs(tmp_path, rows[:2])
    records.append_epochs(tmp_path, rows[2:])
    table = records.read_epochs(tmp_path)
    assert table.schema == records.EPOCHS
    assert table["epoch"].to_pylist() == [0, 1, 2] and table["wall_s"].to_pylist() == [None] * 3


def test_predictions_come_back(tmp_path: Path):
    path = tmp_path / "store" / "ab" / "val.predictions"
    heads = predictions(path)
    back = records.read_predictions(path)
    assert (back.split, back.digest, back.classes[1]) == ("val", "d1", "class 1")
    assert list(back.counts) == [7, 6, 5, 4, 3, 2, 1] and list(back.row[:2]) == [49, 48]
    assert list(back.target) == [i % 7 for i in range(50)] and list(back.logits) == ["main", "tail.2"]
    for head, z in heads.items():
        assert back.logits[head].dtype == np.float32
        np.testing.assert_array_equal(back.pred[head], z.argmax(1))
        np.testing.assert_allclose(back.logits[head], z - z.max(1, keepdims=True), rtol=1e-3, atol=1e-3)


def test_no_images_and_huge_logits_are_stored_too(tmp_path: Path):
    predictions(tmp_path / "none", images=0)
    assert records.read_predictions(tmp_path / "none").logits["main"].shape == (0, 7)
    predictions(tmp_path / "huge", scale=1e6)
    lowest = records.read_predictions(tmp_path / "huge").logits["main"].min()
    assert lowest == np.finfo(np.float16).min


def test_half_floats_below_the_maximum_keep_the_predictions_and_the_sweep(tmp_path: Path):
    rng = np.random.default_rng(3)
    counts = np.array([int(500 * 100 ** (-i / 99)) for i in range(100)])
    target = np.repeat(np.arange(100), 20)
    z = 3 * rng.normal(size=(2000, 100)) + np.log(counts) + 40
    z[np.arange(2000), target] += 5
    z = z.astype(np.float32)
    names = [str(c) for c in range(100)]
    about = {"counts": counts, "classes": names, "split": "val", "digest": ""}
    records.write_predictions(tmp_path / "p", row=np.arange(2000), target=target, logits={"main": z}, **about)
    stored = records.read_predictions(tmp_path / "p").logits["main"]
    groups = metrics.groups(counts)[0]
    np.testing.assert_array_equal(stored.argmax(1), z.argmax(1))
    full, half = (metrics.sweep(values, target, counts, groups) for values in (z, stored))
    for name in ("many", "medium", "few", "balanced", "accuracy"):
        np.testing.assert_allclose(half[name], full[name], atol=0.002)
    np.testing.assert_allclose(half["nll"], full["nll"], atol=0.001)
    assert metrics.fit(stored, target, counts) == pytest.approx(metrics.fit(z, target, counts), abs=2e-3)


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_predictions_are_named(tmp_path: Path, kept: float):
    path = tmp_path / "val.predictions"
    predictions(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cannot read .*val.predictions"):
        records.read_predictions(path)


def test_no_flipped_byte_of_the_data_passes_unnoticed(tmp_path: Path):
    path = tmp_path / "val.predictions"
    predictions(path)
    content, told = path.read_bytes(), records.read_predictions(path)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    noticed = 0
    for position in range(4, footer, 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            found = records.read_predictions(path)
        except ValueError:
            noticed += 1
            continue
        np.testing.assert_array_equal(found.target, told.target)
        np.testing.assert_array_equal(found.logits["main"], told.logits["main"])
    assert noticed > 100


def test_a_missing_or_foreign_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot read .*absent"):
        records.read_predictions(tmp_path / "absent")
    records.append_epochs(tmp_path, [])
    with pytest.raises(ValueError, match="epochs.parquet holds no predictions"):
        records.read_predictions(tmp_path / "records" / "epochs.parquet")


def test_a_damaged_table_is_named(tmp_path: Path):
    records.write_trials(tmp_path, [ROW])
    path = tmp_path / "records" / "trials.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot read .*trials.parquet"):
        records.read_trials(tmp_path)


def test_a_damaged_table_is_set_aside_and_written_anew(tmp_path: Path):
    records.write_trials(tmp_path, [ROW])
    records.append_epochs(tmp_path, [])
    assert records.set_aside(tmp_path) == []
    path = tmp_path / "records" / "trials.parquet"
    for damage in (b"", path.read_bytes()[:-20], bytes(len(path.read_bytes()))):
        path.write_bytes(damage)
        assert records.set_aside(tmp_path) == ["records/trials.parquet"]
        assert (tmp_path / "records" / "trials.parquet.damaged").read_bytes() == damage
        assert records.read_trials(tmp_path).num_rows == 0 and records.read_epochs(tmp_path).num_rows == 0
        records.append_trial(tmp_path, ROW)
    assert records.read_trials(tmp_path)["trial"].to_pylist() == ["a"]


def test_flipped_bits_of_a_table_are_damage_and_a_disk_that_cannot_be_read_is_none(tmp_path: Path, monkeypatch):
    rows = [{**ROW, "trial": f"{number:04d}", "error": "x" * number} for number in range(50)]
    records.write_trials(tmp_path, rows)
    path = tmp_path / "records" / "trials.parquet"

    def fails(*args, **options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(records.pq, "read_table", fails)
        assert records.set_aside(tmp_path) == [] and path.exists()
    body = path.read_bytes()
    path.write_bytes(body[:40] + bytes(byte ^ 0xFF for byte in body[40:80]) + body[80:])
    assert records.set_aside(tmp_path) == ["records/trials.parquet"]


def test_nothing_but_the_files_is_left(tmp_path: Path):
    for _ in range(2):
        records.write_run(tmp_path, {"study": "toy"})
        records.append_trial(tmp_path, ROW)
        predictions(tmp_path / "store" / "a.predictions")
    assert files(tmp_path) == ["records/trials.parquet", "run.json", "store/a.predictions"]


def test_run_json(tmp_path: Path):
    records.write_run(tmp_path, {"study": "toy", "seeds": [0]})
    assert records.read_run(tmp_path) == {"schema": records.SCHEMA, "study": "toy", "seeds": [0]}
    (tmp_path / "run.json").write_text(json.dumps({"schema": 3}))
    with pytest.raises(ValueError, match=r"made by an incompatible version \(schema 3, this rayltr reads 1\)"):
        records.read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*run.json"):
        records.read_run(tmp_path)
    with pytest.raises(ValueError, match="is not a run folder"):
        records.read_run(tmp_path / "absent")


def test_a_folder_may_be_a_uri(tmp_path: Path):
    uri = f"file://{tmp_path}/run/"
    records.write_run(uri, {"study": "toy"})
    records.append_trial(uri, ROW)
    records.append_trial(uri, {**ROW, "trial": "b"})
    assert records.read_trials(tmp_path / "run")["trial"].to_pylist() == ["a", "b"]
    assert records.read_run(uri)["study"] == "toy"


def test_epochs_of_a_trial_that_is_run_again_are_replaced(tmp_path):
    def row(trial, value):
        where = {"stage": 0, "epoch": 1, "split": "train", "metric": "loss", "wall_s": 1.0}
        return {"trial": trial, "value": value, **where}

    records.append_epochs(tmp_path, [row("0000", 1.0), row("0001", 2.0)])
    records.append_epochs(tmp_path, [row("0001", 3.0)])
    assert [(r["trial"], r["value"]) for r in records.read_epochs(tmp_path).to_pylist()] == [
        ("0000", 1.0),
        ("0001", 3.0),
    ]


def test_what_was_measured_of_a_trial_is_read_again_or_not_there(tmp_path: Path):
    assert records.read_note(tmp_path, "inspected", "0007.1") is None
    records.write_note(tmp_path, "inspected", "0007.1", {"rank": [1, 2]})
    assert records.read_note(tmp_path, "inspected", "0007.1") == {"rank": [1, 2]}
    assert files(tmp_path) == ["inspected/0007.1.json"]
    (tmp_path / "inspected/0007.1.json").write_text("{")
    assert records.read_note(tmp_path, "inspected", "0007.1") is None
