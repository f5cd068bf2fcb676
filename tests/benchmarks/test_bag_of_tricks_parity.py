"""The table beside the published one: what is run, what is kept, what is judged."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import bag_of_tricks_parity as parity
from rayltr import command, studies, trial
from rayltr.data import load
from rayltr.interface import Diverged, Resources
from rayltr.records import read_predictions
from rayltr.spec import chain, fn
from rayltr.store import Store
from rayltr.trial import Trial, identified
from tests.conftest import CIFAR100

ROOT = Path(__file__).parents[2]
ONE = Resources(device="cpu", threads=1)
SOURCE = fn("synthetic", classes=4, per_class=20, size=8, ratio=4.0)
DRAW = {"device": "cpu", "date": "2026-01-02", "state": "complete", "reason": ""}


def bench(out: Path, changes: str = "none", table: str = "cifar100_100") -> parity.Bench:
    plan = studies.Plan("bag_of_tricks", SOURCE, epochs=5, batch=16, precision="fp32")
    settings = {"table": table, "source": "synthetic", "images": load(SOURCE).digest, "precision": "fp32"}
    return parity.Bench(out, plan, {}, settings | {"changes": changes})


def columns(out: Path, name: str, *columns: str) -> list[tuple]:
    return [tuple(row[column] for column in columns) for row in pq.read_table(out / f"{name}.parquet").to_pylist()]


def run(seed: int, error: float, **more) -> dict:
    numbers = dict.fromkeys((*parity.SCORES, "epochs", "seconds"), 1.0) | {"error": error}
    return {"seed": seed, **numbers, **DRAW, **more}


def test_shared_stages_are_trained_once_and_a_second_call_only_adds(tmp_path, capsys):
    ours = bench(tmp_path, changes="epochs=5")
    assert parity.compare(ours, ["ce", "drw_bsce", "tau_norm"], [0], ONE) == 0
    said = capsys.readouterr().out
    assert "drw_bsce seed 0, stage 1, epoch 4/4" in said and "; 2 epochs of all runs left" in said
    assert "  ce seed 0, stage 1, epoch 5/5" in said and "  ce seed 0, stage 1, epoch 1/" not in said, (
        "the shorter is first"
    )
    assert "tau_norm seed 0, " not in said, "its only trained stage is that of ce"
    first = columns(tmp_path, "runs", "preset", "seed", "error")

    assert parity.compare(ours, ["ce", "bsce"], [0, 1], ONE) == 0
    assert columns(tmp_path, "runs", "preset", "seed", "error")[:3] == first
    assert columns(tmp_path, "results", "preset", "seeds") == [
        ("ce", "0, 1"),
        ("bsce", "0, 1"),
        ("drw_bsce", "0"),
        ("tau_norm", "0"),
    ], "in the published order"
    capsys.readouterr()
    assert parity.compare(ours, ["ce"], [0, 1], ONE) == 0
    assert capsys.readouterr().out == ""


def test_the_errors_are_those_of_the_plain_arg_max_on_the_test_split(tmp_path):
    ours = bench(tmp_path)
    parity.compare(ours, ["drw_bsce"], [3], ONE)
    path = Trial(ours.stage("drw_bsce", 3), Store(tmp_path / "store"), resources=ONE).predictions("test")
    found = read_predictions(path)
    assert found.split == "test"
    (pred,) = found.pred.values()
    wrong = [100 * float((pred[found.target == c] != c).mean()) for c in range(4)]
    ((error, balanced, many, medium, few),) = columns(tmp_path, "results", *parity.SCORES)
    assert error == pytest.approx(100 * (pred != found.target).mean()) == pytest.approx(balanced)
    assert (many, medium, few) == pytest.approx((wrong[0], (wrong[1] + wrong[2]) / 2, wrong[3]))
    assert columns(tmp_path, "results", "epochs", "published") == [(5.0, 58.18)]


def test_a_failed_run_is_kept_the_others_go_on_and_a_further_call_tries_again(tmp_path, monkeypatch, capsys):
    def train(stage, *arguments, **more):
        if stage.seed == 1:
            raise Diverged("the term 'loss' became nan in epoch 1")
        return whole(stage, *arguments, **more)

    whole, ours = trial.train, bench(tmp_path, changes="epochs=5")
    monkeypatch.setattr(trial, "train", train)
    assert parity.compare(ours, ["ce"], [0, 1, 2], ONE) == 1
    assert "Diverged" in capsys.readouterr().err
    assert columns(tmp_path, "runs", "seed", "state") == [(0, "complete"), (1, "failed"), (2, "complete")]
    (row,) = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| ce ")]
    assert "| 0, 2 (failed: 1) |" in row and "Diverged: the term 'loss' became nan in epoch 1" in row
    monkeypatch.undo()
    assert parity.compare(ours, ["ce"], [0, 1, 2], ONE) == 0
    assert columns(tmp_path, "results", "seeds", "failed", "note") == [("0, 1, 2", "", "")]


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    class Cut(KeyboardInterrupt):
        pass

    def cut(self, record):
        if record["epoch"] == 4:
            raise Cut

    ours, often = bench(tmp_path), Resources(device="cpu", threads=1, snapshot_s=0)
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(parity.Progress, "__call__", cut)
        parity.compare(ours, ["ce"], [0], often)
    name = identified(ours.stage("ce", 0), lambda source: ours.settings["images"])
    assert parity.epochs_left([name], Store(tmp_path / "store")) == 1
    parity.compare(ours, ["ce"], [0], often)
    parity.compare(replace(ours, out=tmp_path / "whole"), ["ce"], [0], ONE)
    assert columns(tmp_path, "runs", *parity.SCORES) == columns(tmp_path / "whole", "runs", *parity.SCORES)


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    parity.compare(bench(tmp_path), ["ce"], [0], ONE)
    with pytest.raises(command.Refused, match=r"other table \(cifar100_100\), changes \(none\): choose another --out"):
        parity.compare(bench(tmp_path, changes="lr=0.05", table="cifar10_50"), ["ce"], [0], ONE)


def test_calls_at_once_keep_each_others_runs(tmp_path):
    ours = bench(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: parity.tabulate(ours, [run(seed, 60.0, preset="ce", **ours.settings)]), range(12)))
    assert sorted(columns(tmp_path, "runs", "seed")) == [(seed,) for seed in range(12)]


def test_epochs_left_counts_shared_stages_once(tmp_path):
    ours, store = bench(tmp_path), Store(tmp_path / "store")

    def left(*presets: str) -> int:
        stages = [ours.stage(preset, 0) for preset in presets]
        return parity.epochs_left([identified(stage, lambda source: "0") for stage in stages], store)

    assert left("ce") == left("ce", "ce", "tau_norm") == 5
    assert left("drw_bsce", "drs_balance") == 6 and left("ce", "drw_bsce", "cam_balance") == 7


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([63.27], "within"),
        ([63.28], "outside"),
        ([63.0, 63.5], "within"),
        ([62.27, 62.87, 63.47], "within"),
        ([62.27, 62.88, 63.50], "outside"),
        ([40.0], "within"),
    ],
)
def test_the_band_narrows_with_three_seeds(tmp_path, errors, expected):
    runs = [run(seed, error) for seed, error in enumerate(errors)]
    found = parity.result(bench(tmp_path), "ce", runs)
    assert found["verdict"] == expected and found["published"] == 62.27
    assert found["difference"] == pytest.approx(sum(errors) / len(errors) - 62.27)
    assert parity.result(bench(tmp_path, changes="epochs=5"), "ce", runs)["verdict"] == "not judged"


def test_the_table_shows_spread_notes_and_what_is_not_published(tmp_path):
    ours = bench(tmp_path, table="cifar10_100")
    rows = [
        parity.result(ours, "ce", [run(0, 28.0), run(1, 29.0, device="cuda", date="2026-03-04"), run(2, 30.0)]),
        parity.result(ours, "seql", [run(0, 25.0)]),
        parity.result(ours, "remix_bsce", [run(0, 0.0, state="failed", reason="Diverged: a|b")]),
    ]
    text = parity.markdown(ours, rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("| ")]
    assert text[0] == "# Bag of Tricks on CIFAR-10-LT, ratio 100: test error in %"
    assert {len(row) for row in cells} == {15}
    assert cells[2][:5] == ["ce", "0, 1, 2", "29.00 ± 1.00", "28.05", "+0.95"]
    assert cells[2][10:14] == ["outside", "cpu, cuda", "2026-03-04", "fp32"]
    assert cells[3][:5] == ["seql", "0", "25.00", "-", "-"] and cells[3][10] == "not judged"
    assert cells[4][:5] == ["remix_bsce", "(failed: 0)", "-", "18.94", "-"] and cells[4][10] == "failed"
    assert cells[4][14] == "on another draw of the images; Diverged: a/b"
    assert "best epoch on the test set" in "\n".join(text)


def test_the_authors_choice_for_the_data_is_preferred(tmp_path):
    weights = [bench(tmp_path, table=table).stage("cb_ce", 0).weight for table in ("cifar100_100", "cifar10_50")]
    assert [weight.get("beta") for weight in weights] == [pytest.approx(0.9), pytest.approx(0.9999)]


def test_a_stage_that_cannot_be_names_its_preset(tmp_path):
    ours = replace(bench(tmp_path), change={"lr": 0.3})
    with pytest.raises(ValueError, match="ce: .*lr = 0.3 is not one of"):
        ours.stage("ce", 0)


@pytest.mark.parametrize("files", [["train.parquet"], []])
def test_a_root_with_parquet_files_is_read_as_such(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    kind = "parquet" if files else "cifar10"
    found = parity.source_of("cifar10", "50", str(tmp_path))
    assert found == fn(kind, root=str(tmp_path), ratio=50.0, paper_split=True)
    assert parity.source_of("cifar10", "none", str(tmp_path)).get("ratio") is None
    assert parity.source_of("cifar100", "100", None) == fn("cifar100", ratio=100.0, paper_split=True)


def test_data_and_changes_become_the_settings_of_the_folder(tmp_path, monkeypatch):
    data = load(fn("synthetic", classes=10, per_class=100, size=4, ratio=50.0, paper_split=True))
    monkeypatch.setattr(command, "opened", lambda source: data)
    words = ["--data", "cifar10", "--ratio", "none", "--set", "lr=0.05", "flip=0", "--batch", "32", "--out", "x"]
    found = parity.bench_of(parity.parser().parse_args(words))
    assert found.settings == {
        "table": "cifar10_50",
        "source": "cifar10",
        "images": data.digest,
        "precision": "fp32",
        "changes": "batch=32 flip=0.0 lr=0.05",
    }
    stage = found.stage("ce", 2)
    assert (stage.batch, stage.seed, stage.optimiser.get("lr"), stage.epochs) == (32, 2, 0.05, 200)
    with pytest.raises(command.Refused, match="not cifar100 with a ratio of 100 or 50"):
        parity.bench_of(parity.parser().parse_args(["--data", "cifar100", "--ratio", "none"]))


def test_the_list_shows_the_published_errors_of_the_data(capsys):
    assert parity.main(["--data", "cifar10", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ce                        28.05 (ratio 100)  23.55 (ratio 50)" in lines
    assert len(lines) == len(parity.STUDY.published) and lines[-1].endswith("on another draw of the images")


def test_a_misspelt_preset_lists_what_there_is(capsys):
    assert command.run(parity.main, ["drw_bcse", "--out", "x"]) == command.USAGE
    assert "drw_bsce? known: bag_of_tricks, bbn" in capsys.readouterr().err


def test_every_published_row_is_a_preset(tmp_path):
    for preset in parity.STUDY.published:
        assert len(chain(bench(tmp_path).stage(preset, 0))) <= 3


@pytest.mark.slow
def test_it_runs_without_ray_optuna_plotly_and_rich(tmp_path):
    code = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys(("ray", "optuna", "plotly", "rich", "timm")))  # their import fails now
        from pathlib import Path
        from tests.benchmarks import test_bag_of_tricks_parity as tests
        tests.parity.compare(tests.bench(Path({str(tmp_path)!r})), ["drw_bsce"], [0], tests.ONE)
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert columns(tmp_path, "runs", "preset", "state") == [("drw_bsce", "complete")]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not CIFAR100.exists(), reason="no CIFAR-100 here")
def test_an_epoch_of_the_real_data(tmp_path):
    words = ["bsce", "--root", str(CIFAR100), "--seeds", "0", "--epochs", "1", "--threads", "1", "--out", str(tmp_path)]
    assert command.run(parity.main, words) == 0
    ((preset, error, published, verdict, source),) = columns(
        tmp_path, "results", "preset", "error", "published", "verdict", "source"
    )
    assert (preset, published, verdict, source) == ("bsce", 57.01, "not judged", "parquet") and 60 < error < 99
