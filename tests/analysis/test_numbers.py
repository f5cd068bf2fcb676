import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis import numbers
from analysis.estimates import Estimate
from analysis.load import load
from analysis.tables import Cell, Table, gained, number, percent, ranged, text


@pytest.fixture
def folder(shared: Path, written: Path) -> Path:
    return shared / "report"


def test_every_table_of_the_page_is_a_parquet_and_a_csv_file_with_the_same_numbers(folder: Path):
    names = {path.stem for path in folder.glob("*.parquet")}
    assert names == {path.stem for path in folder.glob("*.csv")}
    assert {"front", "front-points", "taus", "classes", "effects", "trials", "shift"} <= names
    for name in names:
        table = pq.read_table(folder / f"{name}.parquet")
        with (folder / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == table.column_names and len(rows) == table.num_rows > 0
        for column, cells in zip(table.columns, zip(*rows, strict=True), strict=True):
            for value, cell in zip(column.to_pylist(), cells, strict=True):
                said = None if cell == "" else cell if isinstance(value, str) else float(cell)
                assert said == value


def test_accuracies_are_fractions_with_the_ends_of_their_intervals(folder: Path, shared: Path):
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["balanced"] for row in rows[:3]] == [trial.val["fitted_balanced"] for trial in load(shared).trials[:3]]
    for row in pq.read_table(folder / "front-points.parquet").to_pylist():
        assert 0 <= row["few_low"] <= row["few"] <= row["few_high"] <= 1


def test_the_curves_of_every_trial_are_there(folder: Path, shared: Path):
    table = pq.read_table(folder / "tau-curves.parquet")
    assert table.column_names == ["trial", "tau", "accuracy", "balanced", "many", "medium", "few"]
    assert table.num_rows == 31 * len(load(shared).measured)


def test_the_json_holds_cards_facts_lights_and_tables(folder: Path):
    found = json.loads((folder / "report.json").read_text())
    claim = found["cards"][0]["claims"][0]
    assert claim["question"] == "Best on balance" and claim["corrected"]["low"] < claim["corrected"]["high"]
    assert claim["optimism"] == pytest.approx(claim["raw"] - claim["corrected"]["value"])
    assert found["facts"]["Test split opened"] == "once, for 2 trials"
    assert found["lights"][0]["level"] in ("red", "amber")
    assert len(found["tables"]["trials"]) == 16 and "\\u" not in found["title"]


def test_headings_become_names():
    table = Table(
        ["what", "few %", "gain, points", "τ", "mixup.alpha", "", "few %"],
        [
            [text("a"), ranged(Estimate(0.5, 0.4, 0.6)), gained(Estimate(-0.1, -0.2, 0.0)), number(0.1), text(None),
             Cell("x", "x"), percent(float("nan"))],
        ],
    )  # fmt: skip
    names, rows = numbers.flat(table)
    assert names == ["what", "few", "few_low", "few_high", "gain", "gain_low", "gain_high", "tau", "mixup.alpha",
                     "note", "few_"]  # fmt: skip
    assert rows == [["a", 0.5, 0.4, 0.6, -0.1, -0.2, 0.0, 0.1, None, "x", None]]
