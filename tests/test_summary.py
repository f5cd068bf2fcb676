import json
from pathlib import Path

import pytest

from analysis import cards
from analysis.evidence import Evidence
from analysis.load import load
from rayltr import export, records
from rayltr.choice import ENOUGH, finalists
from rayltr.progress import Progress
from rayltr.summary import finished
from rayltr.unsealing import sealed
from tests.analysis.conftest import disagreeing, forget


def shipped(run: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The best on balance, and that of the control arm, by everything that names them."""
    finished(run, Progress(), ())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found, kept = load(run), json.loads((run / "best.json").read_text())
    evidence, rows = Evidence(found), records.read_trials(run).to_pylist()
    deck = {claim.question: card.name for card in cards.cards(evidence) for claim in card.claims}
    said = []
    for name, at in (("balanced", evidence.best), ("control", evidence.control)):
        assert at is not None
        said.append({
            next(words[1] for words in lines if words[:1] == [name]), kept[name]["trial"],
            export.chosen(run, name)["trial"], found.chosen[name].id, evidence.trials[at].id,
        })  # fmt: skip
    (winner,), (control,) = said
    assert deck["Best on balance"] == winner and [row["trial"] for row in finalists(rows, 1)] == [winner, control]
    assert {winner, control} - {"0003", "0004"} <= {row["trial"] for row in sealed(str(run))}
    return {winner, control}


@pytest.mark.parametrize(("each", "by"), [(8, "nll"), (ENOUGH - 1, "nll"), (ENOUGH, "balanced")])
def test_the_summary_the_cards_the_export_and_the_finalists_name_the_same_trials(each, by, tmp_path, capsys):
    run = disagreeing(tmp_path / "run", each)
    rows = records.read_trials(run).to_pylist()
    accurate, likely = (max(rows, key=lambda row: row["m.val.fitted_balanced"]),
                        min(rows, key=lambda row: row["m.val.fitted_nll"]))  # fmt: skip
    assert accurate["trial"] != likely["trial"]
    found = shipped(run, capsys)
    assert (likely["trial"] in found, accurate["trial"] in found) == (by == "nll", by == "balanced")


def test_the_summary_says_that_the_nll_chose_and_why(tmp_path, capsys):
    finished(disagreeing(tmp_path / "run", 8), Progress(), ())
    assert "the best are chosen by NLL: some classes have only 8 validation images" in capsys.readouterr().out


def test_runs_of_older_versions_which_hold_no_nll_of_groups_go_by_accuracy_everywhere(tmp_path, capsys):
    run = disagreeing(tmp_path / "run", 8)
    rows = records.read_trials(run).to_pylist()
    for row in rows:
        forget(run, row["number"], "m.val.fewest_images", *(f"m.val.fitted_{g}_nll" for g in ("many", "medium", "few")))
    assert max(rows, key=lambda row: row["m.val.fitted_balanced"])["trial"] in shipped(run, capsys)
    assert Evidence(load(run)).likelihood is None
