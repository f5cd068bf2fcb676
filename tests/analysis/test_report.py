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
from tests.analysis.conftest import change, forget, make_run, predictions

SECTIONS = [
    "Which model to ship",
    "How far to trust this",
    "Head against tail",
    "What τ alone gives",
    "Accuracy by class frequency",
    "What mattered",
    "Can its confidence be believed?",
    "Are several models better than one?",
    "What it cost",
    "If the classes come in other frequencies",
    "Appendix",
]
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
        elif tag in ("h1", "h2"):
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
        elif self.path and self.path[-1] in ("h1", "h2"):
            self.headings[-1] += data


def page(folder: Path) -> Page:
    path = report.write(folder)
    assert isinstance(path, Path)
    found = Page(path.read_text())
    assert [heading for heading in found.headings if heading in SECTIONS] == SECTIONS
    return found


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return written.read_text()


@pytest.fixture(scope="module")
def found(html: str) -> Page:
    return Page(html)


def test_the_sections_come_in_the_order_of_the_decision(found: Page):
    assert found.headings == ["bag_of_tricks", *SECTIONS]


def test_the_head_of_the_page_says_what_was_run_and_found(found: Page, shared: Path):
    text = found.text.replace("\u202f", " ")
    best = load(shared).chosen["balanced"].id
    images, noise = "20 many, 20 medium, 20 few", ("Optimism of the best balanced", "Smallest difference that shows")
    states, draw = "16 (15 complete, 1 failed)", "5f2d5f2d5f2d"
    for fact in ("cifar100", "500 : 5 images", "surplus", "once", states, draw, images, *noise):
        assert fact in text, fact
    assert f"15 of 16 trials finished. The best on balance, {best}, predicts" in text
    assert "class 0 gave 20 of its training images to validation" in text
    assert "No recipe was trained with more than one seed" in text and "Only 15 trials finished" in text
    assert "python -m rayltr.search bag_of_tricks --data cifar100 --ratio 100 --trials 10" in text


def test_every_trial_is_in_the_table_and_every_head_is_an_expert(found: Page):
    header, *rows = found.tables["All trials"]
    assert [row[0] for row in rows] == [f"{number:04d}" for number in range(16)]
    assert {"loss", "lr", "mixup.alpha", "deferred", "NLL", "raw few %", "test few %", "seed"} <= set(header)
    assert rows[0][header.index("mixup.alpha")] == "–" and rows[0][header.index("loss")] == "cross_entropy"
    assert rows[15][header.index("epochs")] == "3 of 200"
    assert any(
        "soft" in cell for name, rows in found.tables.items() if name == "Members" for row in rows for cell in row
    )


def test_a_failed_trial_shows_the_last_line_of_its_error(found: Page):
    assert found.tables["Failed trials"][1:] == [["0015", "Diverged: the loss is nan at epoch 3 <lr 0.1>"]]


def test_every_figure_has_a_caption_a_description_and_its_numbers(html: str, found: Page):
    figures = re.findall(r"<figure id=\"figure-(.*?)\">(.*?)</figure>", html, flags=re.S)
    assert len(figures) >= 15
    for name, figure in figures:
        says = re.search(r'role="img" aria-label="([^"]+)"', figure)
        caption = re.search(r"<figcaption>(.+?)</figcaption>", figure, flags=re.S)
        assert says and caption and len(caption[1]) > 40, name
        assert "<details><summary>The numbers of this figure" in figure and "<tbody>" in figure, name
        assert f'id="plot-{name}"' in figure, name


def test_the_page_fetches_nothing(html: str):
    assert html.count("Plotly.newPlot(") >= 15 and html.count("<script src") == 0
    outside = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""\s(src|srcset|action)\s*=|url\(|@import|href="(?!#)|://""", outside)
    assert "default-src 'none'" in outside


def test_recorded_metrics_of_other_names_are_shown(small: Path):
    change(small, 1, **{"m.val.soft.few": 0.25, "m.test.fitted_few": 0.5})
    header, *rows = page(small).tables["All trials"]
    assert [row[header.index("val.soft.few")] for row in rows[:2]] == ["–", "0.25"]
    assert not [name for name in header if name.startswith("test.") or name == "val.few"]


def test_names_cannot_break_out_of_the_page(make: Callable[..., Path]):
    folder = make(trials=4, classes=6)
    info = records.read_run(folder)
    info["study"] = "<script>alert(1)</script>"
    info["data"]["classes"][0] = "</script><script>alert(2)</script>"
    records.write_run(folder, info)
    change(folder, 1, **{"p.loss": "<img src=x onerror=alert(3)>"})
    html = Path(report.write(folder)).read_text()
    for number in (1, 2, 3):
        assert not re.search(rf"<(script|img[^>]*=)[^&]{{0,12}}alert\({number}\)", html)


@pytest.mark.parametrize(
    "shape",
    [
        {"trials": 1, "classes": 12, "failed": 0},
        {"trials": 2, "classes": 12, "failed": 2},
        {"trials": 3, "classes": 2, "failed": 0},
        {"trials": 2, "classes": 1, "failed": 0},
        {"trials": 2, "classes": 1000, "each": 1, "failed": 0},
        {"trials": 4, "classes": 12, "each": [20] * 8 + [0] * 4},
    ],
    ids=["one trial", "none finished", "two classes", "one class", "1000 classes", "no images of the few"],
)
def test_every_shape_of_run_has_a_page(make: Callable[..., Path], shape: dict):
    folder = make(**shape)
    with np.errstate(all="raise", under="ignore"):
        found = page(folder)
    assert len(found.tables["All trials"]) == 1 + shape["trials"]
    assert ("nothing to compare yet" in found.text) == (shape.get("failed") == shape["trials"])


def test_an_empty_group_is_said_and_left_empty(make: Callable[..., Path]):
    found = page(make(trials=2, classes=2, failed=0))
    assert "No class belongs to: medium" in found.text
    header, first, *_ = found.tables["All trials"]
    assert first[header.index("medium %")] == "–"


def test_classes_without_images_are_counted(make: Callable[..., Path]):
    found = page(make(trials=3, classes=12, each=[20] * 11 + [0], failed=0))
    assert "1 of 12 classes have no validation images: they are unmeasured" in found.text


def test_a_trial_with_nan_is_a_gap_and_never_chosen(small: Path):
    row = records.read_trials(small).to_pylist()[1]
    forget(small, 1, "m.")
    stored = records.read_predictions(small / row["predictions_val"])
    spoilt = {"main": np.full_like(stored.logits["main"], np.nan)}
    predictions(small, row["predictions_val"], stored.counts, spoilt, stored.target)
    found = page(small)
    assert found.tables["All trials"][2][2:9] == ["–"] * 7
    assert "1 finished trials have no usable predictions" in found.text
    assert "--trial 0001" not in found.text


def test_a_run_without_predictions_still_shows_its_scores(small: Path):
    for number in range(9):
        change(small, number, predictions_val=None, predictions_test=None)
    found = page(small)
    assert "neither the best trial nor a control arm has stored predictions" in found.text
    assert "there are no intervals and no corrections" in found.text
    assert f"--trial {load(small).chosen['balanced'].id}" in found.text


def test_without_a_control_arm_the_page_warns(small: Path):
    for number in (0, 4):
        change(small, number, **{"p.arm": "study"})
    assert "No control arm finished" in page(small).text


def test_rungs_that_rank_poorly_are_warned_of(small: Path):
    rows = records.read_trials(small).to_pylist()
    short = [{**row, "share": 1 / 9, "objective": row["number"]} for row in rows[:6]]
    full = [{**row, "trial": f"{row['trial']}.1", "share": 1.0, "objective": -row["number"]} for row in rows[:4]]
    records.write_trials(small, [*short, *full])
    found = page(small)
    assert "ranked recipes poorly: Kendall's τ -1.00 over 4 recipes" in found.text
    assert found.tables["Do short schedules rank fairly?"][1][-2:] == ["−1.00", "poor"]
    dropped = found.tables["What early stopping dropped"]
    assert dropped[1][1:5] == ["all recipes", "–", "6", "4"]


def test_the_command_prints_where_the_report_is(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(small)]) == 0
    assert capsys.readouterr().out == f"{small}/report.html\n"
    assert main([str(small), "--out", str(tmp_path / "there" / "r.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/there/r.html\n"
    assert (tmp_path / "there" / "r.html").read_text() == (small / "report.html").read_text()
    assert (tmp_path / "there" / "r" / "report.json").is_file() and (small / "report" / "trials.csv").is_file()


def test_several_runs_are_compared_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    one, other = (make_run(tmp_path / name, trials=3, classes=12) for name in "ab")
    assert main([str(one), str(other)]) == 0
    assert capsys.readouterr().out == f"{one}/report.html\n"
    found = Page((one / "report.html").read_text())
    assert [row[0] for row in found.tables["Run by run"][1:]] == ["a", "b"]
    assert [row[0] for row in found.tables["All trials"][1:]] == [f"{run}/{i:04d}" for run in "ab" for i in range(3)]
    info = records.read_run(other)
    info["data"]["digest"] = "0" * 64
    records.write_run(other, info)
    assert main([str(one), str(other)]) == 2
    refused = capsys.readouterr()
    assert refused.out == "" and refused.err.startswith(
        f"analysis: {other} cannot be compared with {one}: other images"
    )
    assert refused.err.count("\n") == 1


def test_what_is_no_run_ends_in_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"analysis: {tmp_path} is not a run folder: it has no run.json\n"


def test_a_run_may_be_a_uri(make: Callable[..., Path]):
    folder = make(trials=2, classes=6)
    assert report.write(f"file://{folder}") == f"file://{folder}/report.html"
    assert (folder / "report.html").is_file() and (folder / "report" / "report.json").is_file()


def test_help_waits_for_nothing():
    light = "import analysis.__main__, sys; assert not {'numpy', 'plotly', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], cwd=ROOT, check=True)
    shown = subprocess.run([sys.executable, "-m", "analysis", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--out FILE" in shown.stdout
