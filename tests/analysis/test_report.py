import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from analysis import report
from analysis.__main__ import main
from analysis.load import load
from rayltr import records

SECTIONS = ["Best configurations", "Head against tail", "All trials", "Accuracy by class frequency"]
ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """What a page holds: headings, tables by caption as rows of cells, attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.headings: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.path: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.path.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.path and self.path.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"script", "style"} & set(self.path):
            return
        self.text += data
        if "caption" in self.path:
            self.rows = self.tables.setdefault(data, [])
        elif {"td", "th"} & set(self.path):
            self.rows[-1][-1] += data
        elif self.path and self.path[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data


def page(folder: Path) -> Page:
    path = report.write(folder)
    assert isinstance(path, Path)
    found = Page(path.read_text())
    for section in SECTIONS:
        assert section in found.headings
    return found


def replace(folder: Path, number: int, **changes: object) -> None:
    row = records.read_trials(folder).to_pylist()[number]
    records.append_trial(folder, {**row, **changes})


def test_the_sections_come_in_order(run: Path):
    found = page(run)
    assert found.headings[0] == "bag_of_tricks"
    assert [heading for heading in found.headings if heading in SECTIONS] == SECTIONS


def test_the_head_of_the_page_says_what_was_run(run: Path):
    text = page(run).text.replace("\u202f", " ")
    chosen = load(run).chosen
    best, control = (chosen[name].val["fitted_balanced"] for name in ("balanced", "control"))
    for fact in ("cifar100", "10 847 train, 2 000 val, 10 000 test", "500 : 5 images", "surplus", "once"):
        assert fact in text
    assert "9 of 10 trials finished" in text and "10 (9 complete, 1 failed)" in text
    assert "1 803 trained of 2 000 asked" in text
    assert f"{100 * best:.1f} % of each class" in text and f"{100 * (best - control):.1f} points more" in text
    assert "class 0 gave 20 of its training images to validation" in text
    assert "--ratio 100 --trials 10" in text


def test_the_best_configurations_have_test_scores_and_an_export(run: Path):
    found, chosen = page(run), load(run).chosen
    rows = {row[0]: row[1:] for row in found.tables["Best configurations"]}
    control = chosen["control"]
    expected = [control.val[f"fitted_{name}"] for name in report.SCORES] + [
        control.test[name] for name in report.SCORES
    ]
    assert rows["control"] == ["0004", f"{control.val['tau']:.1f}", *(f"{100 * value:.1f}" for value in expected)]
    for name in ("balanced", "many", "few"):
        trial = chosen[name].id
        assert rows[f"best {name}"][0] == trial
        assert f"python -m rayltr.export {run} --trial {trial} --out export-{trial}" in found.text


def test_without_test_predictions_there_are_no_test_columns(run: Path):
    for number in (3, 4):
        replace(run, number, predictions_test=None)
    header = page(run).tables["Best configurations"][1]
    assert header == ["choice", "trial", "τ", "many", "medium", "few", "balanced"]


def test_every_trial_is_in_the_table(run: Path):
    header, *rows = page(run).tables["All trials"]
    assert [row[0] for row in rows] == [f"{number:04d}" for number in range(10)]
    assert {"loss", "lr", "mixup.alpha", "deferred", "NLL", "raw few"} <= set(header)
    assert rows[0][header.index("mixup.alpha")] == "–" and rows[0][header.index("loss")] == "cross_entropy"
    assert rows[9][header.index("epochs")] == "3 of 200"


def test_recorded_metrics_of_other_names_are_shown(run: Path):
    replace(run, 1, **{"m.val.soft.few": 0.25, "m.test.fitted_few": 0.5})
    header, *rows = page(run).tables["All trials"]
    assert [row[header.index("val.soft.few")] for row in rows[:2]] == ["–", "0.25"]
    assert not [name for name in header if name.startswith("test.") or name == "val.few"]


def test_a_failed_trial_shows_the_last_line_of_its_error(run: Path):
    assert page(run).tables["Failed trials"][1:] == [["0009", "Diverged: the loss is nan at epoch 3 <lr 0.1>"]]


def test_the_figures_are_described_and_have_their_numbers(run: Path):
    found, loaded = page(run), load(run)
    assert found.attributes.count(("div", "role", "img")) == 2
    captions = [name for name in found.tables if name.startswith("Scatter plot")]
    front, classes = (found.tables[name] for name in captions)
    assert [("div", "aria-label", name) in found.attributes for name in captions] == [True, True]
    kinds = [row[0] for row in front[1:]]
    assert kinds.count("fitted") == kinds.count("raw") == 9 and kinds.count("control's τ curve") == 31
    best, control = (loaded.chosen[name].per_class for name in ("balanced", "control"))
    assert best is not None and control is not None
    assert classes[0] == ["class", "group", "images", "best %", "control %", "difference"]
    assert classes[100][:5] == ["class 99", "few", "5", *(f"{100 * values[99]:.1f}" for values in (best, control))]


def test_the_front_of_the_table_is_not_dominated(run: Path):
    found, loaded = page(run), load(run)
    front = next(rows for name, rows in found.tables.items() if "many-shot against few-shot" in name)
    drawn = np.array([[float(value) for value in row[3:]] for row in front if row[0] == "front"]) / 100
    points = np.concatenate([trial.points()[:, 1:] for trial in loaded.finished])
    assert len(drawn) > 3
    for many, few in drawn:
        assert not ((points[:, 0] > many + 0.001) & (points[:, 1] > few + 0.001)).any()


def test_the_page_fetches_nothing(run: Path):
    html = Path(report.write(run)).read_text()
    assert html.count("Plotly.newPlot(") >= 2 and html.count("<script src") == 0
    outside = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""(src|href|srcset|action)\s*=|url\(|@import""", outside)
    assert "default-src 'none'" in outside


def test_names_cannot_break_out_of_the_page(run: Path):
    info = records.read_run(run)
    info["study"] = "<script>alert(1)</script>"
    info["data"]["classes"][0] = "</script><script>alert(2)</script>"
    records.write_run(run, info)
    replace(run, 1, **{"p.loss": "<img src=x onerror=alert(3)>"})
    html = Path(report.write(run)).read_text()
    for number in (1, 2, 3):
        assert not re.search(rf"<(script|img[^>]*=)[^&]{{0,12}}alert\({number}\)", html)


@pytest.mark.parametrize(
    "shape",
    [
        {"trials": 1, "failed": 0},
        {"trials": 2, "failed": 2},
        {"trials": 3, "classes": 2, "failed": 0},
        {"trials": 2, "classes": 1, "failed": 0},
        {"trials": 2, "classes": 1000, "each": 1, "failed": 0},
    ],
)
def test_every_shape_of_run_has_a_page(make: Callable[..., Path], shape: dict):
    found = page(make(**shape))
    assert len(found.tables["All trials"]) == 1 + shape["trials"]


def test_two_classes_leave_medium_empty_and_say_so(make: Callable[..., Path]):
    found = page(make(trials=2, classes=2, failed=0))
    assert "No class belongs to: medium" in found.text
    assert found.tables["Best configurations"][-1][4] == "–"


def test_nan_metrics_are_gaps_and_never_the_best(run: Path):
    row = records.read_trials(run).to_pylist()[1]
    records.append_trial(run, {name: None if name.startswith("m.") else value for name, value in row.items()})
    stored = records.read_predictions(run / row["predictions_val"])
    spoilt = {"main": np.full_like(stored.logits["main"], np.nan)}
    about = {"counts": stored.counts, "classes": stored.classes, "split": "val", "digest": ""}
    records.write_predictions(
        run / row["predictions_val"], row=stored.row, target=stored.target, logits=spoilt, **about
    )
    found = page(run)
    assert found.tables["All trials"][2][2:9] == ["–"] * 7
    assert "0001" not in [row[1] for row in found.tables["Best configurations"][2:]]


def test_a_run_without_predictions_still_shows_its_scores(run: Path):
    for number in range(10):
        replace(run, number, predictions_val=None, predictions_test=None)
    found = page(run)
    assert "neither the best trial nor a control arm has stored predictions" in found.text
    assert [row[0] for row in found.tables["Best configurations"][2:]] == [
        "best balanced",
        "best many",
        "best few",
        "control",
    ]


def test_without_a_control_arm_the_page_warns(run: Path):
    for number in (0, 4):
        replace(run, number, **{"p.arm": "study"})
    assert "No control arm finished" in page(run).text


def test_the_command_prints_where_the_report_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    assert main([str(run), "--out", str(tmp_path / "there" / "r.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/there/r.html\n"
    assert (tmp_path / "there" / "r.html").read_text() == (run / "report.html").read_text()


def test_what_is_no_run_ends_in_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"analysis: {tmp_path} is not a run folder: it has no run.json\n"


def test_a_run_may_be_a_uri(run: Path):
    assert report.write(f"file://{run}") == f"file://{run}/report.html"
    assert (run / "report.html").is_file()


def test_help_waits_for_nothing_and_the_report_needs_no_torch():
    light = "import analysis.__main__, sys; assert not {'numpy', 'plotly', 'pyarrow'} & set(sys.modules)"
    whole = "import analysis.report, sys; assert not {'torch', 'ray'} & set(sys.modules)"
    for code in (light, whole):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shown = subprocess.run([sys.executable, "-m", "analysis", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--out FILE" in shown.stdout
