"""Two tokens in the report: what is said of them is what the logits, the epochs and `rayltr.inspect` say."""

from pathlib import Path

import numpy as np
import pytest

from analysis import report, tokens
from analysis.evidence import Evidence
from analysis.figures import tokens as figures
from analysis.load import load
from analysis.merging import merged
from analysis.sections import tokens as section
from rayltr import metrics, records
from tests.analysis.conftest import make_run
from tests.analysis.test_report import SECTIONS, Page

HEADS = ("main", "cls", "dist", "cls25", "cls75")
MEASURED = {
    "images": 60,
    "views": {
        "as they are": {"teacher_accuracy": 0.9, "teacher_entropy": 1.1, "token_distance": 0.4},
        "augmented for the teacher": {"teacher_accuracy": 0.7, "teacher_entropy": 1.3},
    },
    "attention": {"blocks": [[4.0, 9.5, 11.0], [8.0, 9.0, 12.0]], "uniform": 12.5},
    "rank": {"blocks": [9, 12, 7], "images": 20, "unseen": 5, "width": 64},
}


def measured(trial: str, stage: int, epochs: int, value: float) -> list[dict]:
    """What a student measures in the epochs of one stage."""
    return [
        {"trial": trial, "stage": stage, "epoch": epoch, "split": "measured", "metric": name, "wall_s": 1.0,
         "value": value + share * epoch}
        for name, share in ((tokens.DISTANCE, 0.01), (tokens.ACCURACY, 0.0), (tokens.ENTROPY, -0.001))
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of students on ten classes: the first has measured itself in two stages, after one of its teacher."""
    folder = make_run(tmp_path_factory.mktemp("students") / "run", trials=5, classes=10, failed=1, heads=HEADS)
    rows = [row for row in records.read_epochs(folder).to_pylist() if (row["trial"], row["stage"]) != ("0000", 1)]
    rows += measured("0000", 1, 30, 0.1) + measured("0000", 2, 8, 0.5)
    records.append_epochs(folder, rows)
    return folder


@pytest.fixture(scope="module")
def evidence(students: Path) -> Evidence:
    return Evidence(load(students))


def test_every_head_has_its_own_accuracy_on_every_group(evidence: Evidence):
    trial = tokens.students(evidence)[0]
    assert trial.id == evidence.trials[int(np.argmax(evidence.points["balanced"]))].id
    for groups in (evidence.run.groups, metrics.groups(evidence.run.counts, "deit_lt")[0]):
        found = tokens.judged(evidence, tokens.hits(evidence, trial), groups).accuracies()
        assert list(found) == list(HEADS)
        for head, scores in found.items():
            pred = evidence.run.logits(trial, head).argmax(1)
            right = [np.mean(pred[evidence.target == c] == c) for c in range(10)]
            for name, classes in {"balanced": range(10), **groups}.items():
                own = scores[name]
                assert own.value == pytest.approx(np.mean([right[c] for c in classes])) and own.low < own.high
    judged = tokens.judged(evidence, tokens.hits(evidence, trial), evidence.run.groups)
    gap, found = judged.apart(), judged.accuracies()
    for name, own in gap.items():
        assert own.value == pytest.approx(found["dist"][name].value - found["cls"][name].value)


def test_heads_are_listed_by_the_share_of_the_class_token(evidence: Evidence):
    found = tokens.judged(evidence, tokens.hits(evidence, evidence.trials[0]), evidence.run.groups).accuracies()
    assert [row[0].text for row in figures.scored(found).rows] == ["cls", "cls75", "main", "cls25", "dist"]


def test_epochs_are_those_of_the_student(evidence: Evidence):
    found = tokens.epochs(evidence.trials)
    assert set(found) == {"0000"}
    first, second = found["0000"][tokens.DISTANCE]
    np.testing.assert_array_equal(first[:, 0], np.arange(1, 31))
    np.testing.assert_array_equal(second[:, 0], np.arange(31, 39))
    assert first[-1, 1] == pytest.approx(0.4) and second[-1, 1] == pytest.approx(0.58)
    figure = figures.training(found, "0000")
    assert figure is not None and [row[0].text for row in figure.table.rows][-2:] == ["37", "38"]
    assert "another stage begins" in [key.text for key in figure.keys]
    assert figures.training(found, "0001") is None


def test_a_long_training_is_listed_in_part_with_the_ends_of_its_stages():
    stages = [np.stack([np.arange(a, b), np.linspace(0, 1, b - a)], 1) for a, b in ((1, 1101), (1101, 1201))]
    figure = figures.training(
        {"one": dict.fromkeys(figures.PANELS, stages), "two": dict.fromkeys(figures.PANELS, stages)}, "one"
    )
    assert figure is not None
    shown = [int(row[0].text) for row in figure.table.rows]
    assert len(shown) <= figures.ROWS + 4 and {1, 1100, 1101, 1200} <= set(shown)
    assert "other students" in [key.text for key in figure.keys]


def test_the_page_has_the_section_only_with_two_tokens(students: Path, small: Path):
    assert "Two tokens" not in Page(report.render(report.build(load(small)))).headings
    found = Page(report.render(report.build(load(students))))
    at = SECTIONS.index("Accuracy by class frequency") + 1
    assert found.headings[1:] == [*SECTIONS[:at], "Two tokens", *SECTIONS[at:]]
    best = load(students).chosen["balanced"].id
    assert f"python -m rayltr.inspect {students} --trial {best}" in found.text
    header, *rows = found.tables["By the groups of the paper"]
    assert len(rows) == len(HEADS) and "3 most frequent classes, the next 4 and the 3 rarest" in found.text


def test_what_inspect_measured_is_shown_unless_it_is_of_another_training(students: Path, evidence: Evidence):
    trial = tokens.students(evidence)[0]
    records.write_note(students, "inspected", trial.id, {"address": "another", **MEASURED})
    assert tokens.inspected(trial) is None
    records.write_note(students, "inspected", trial.id, {"address": trial.row["address"], **MEASURED})
    found = Page(report.render(report.build(load(students))))
    assert "rayltr.inspect" not in found.text
    assert found.tables["How images are seen"][1:] == [
        ["as they are", "90.0", "1.100", "0.400"], ["augmented for the teacher", "70.0", "1.300", "–"]]  # fmt: skip
    assert "Only 20 such images are known" in found.text and "(5 of validation)" in found.text
    rows = next(rows for name, rows in found.tables.items() if name.startswith("Line chart: mean attention"))
    assert rows[1] == ["1", "1", "4.0", "0.32"] and len(rows) == 7
    rows = next(rows for name, rows in found.tables.items() if name.startswith("Line chart: rank"))
    assert rows[1:] == [["1", "9"], ["2", "12"], ["3", "7"]]


def test_students_of_several_runs_keep_their_names(students: Path, tmp_path: Path):
    other = make_run(tmp_path / "other", trials=4, classes=10, failed=0)
    found = section.section(Evidence(merged([load(other), load(students)])))
    assert found is not None and "run/000" in found.blocks[0].text


def test_predictions_are_read_once(evidence: Evidence, monkeypatch: pytest.MonkeyPatch):
    read, original = [], records.read_predictions
    monkeypatch.setattr(records, "read_predictions", lambda path: read.append(path) or original(path))
    assert section.section(evidence) is not None and len(read) == 1
