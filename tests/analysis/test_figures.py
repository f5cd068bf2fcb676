from pathlib import Path

import numpy as np
import pytest

from analysis.estimates import Estimate
from analysis.evidence import SCORES, Evidence
from analysis.figures import classes, draw, fronts, taus, tricks
from analysis.load import load
from analysis.sections import why
from rayltr import records, summary
from rayltr.metrics import TAUS
from tests.analysis.conftest import change, make_run

ENSEMBLE = {"many": Estimate(0.8, 0.78, 0.82), "medium": Estimate(0.7, 0.6, 0.8), "few": Estimate(0.6, 0.5, 0.7)}


@pytest.fixture(scope="module")
def evidence(shared: Path) -> Evidence:
    return Evidence(load(shared))


def values(table, column: str) -> np.ndarray:
    at = table.columns.index(column)
    return np.array([row[at].value for row in table.rows], float)


def test_the_front_listed_is_not_dominated_and_has_shares_and_intervals(evidence: Evidence):
    points = np.concatenate([trial.points()[:, 1:] for trial in evidence.both])
    assert len(evidence.front) > 3
    for spot in evidence.front:
        many, few = spot.scores["many"], spot.scores["few"]
        assert not ((points[:, 0] > many.value + 1e-9) & (points[:, 1] > few.value + 1e-9)).any()
        assert 0 < spot.share <= 1 and many.low <= many.value <= many.high
        k = int(np.abs(spot.trial.curve["tau"] - spot.tau).argmin())
        assert spot.trial.curve["few"][k] == pytest.approx(few.value)


def test_the_front_figure_lists_front_fitted_and_raw(evidence: Evidence):
    figure = fronts.head_tail(evidence, ENSEMBLE)
    assert figure is not None
    kinds = [row[0].text for row in figure.table.rows]
    assert kinds.count("fitted") == kinds.count("raw") == 15 and kinds.count("front") == len(evidence.front)
    (row,) = [row for row in figure.table.rows if row[0].text == "best ensemble, cross-fitted"]
    assert [(cell.value, cell.low, cell.high) for cell in row[3:6]] == [
        (own.value, own.low, own.high) for own in ENSEMBLE.values()
    ]
    assert any("best ensemble, cross-fitted" in key.text for key in figure.keys)
    alone = fronts.head_tail(evidence, None)
    assert alone is not None and "ensemble" not in alone.caption + str(alone.keys) + str(alone.table)


def test_the_area_grows_with_the_trials_and_exceeds_that_of_the_control(evidence: Evidence):
    figure = fronts.growth(evidence)
    assert figure is not None
    area = values(figure.table, "area %")
    assert area[-2] > area[0] and area[-2] > area[-1], "the last row is the control arm"
    assert evidence.area([]) is None


def test_the_envelope_is_the_best_that_any_point_reaches():
    rng = np.random.default_rng(0)
    curve, at = rng.uniform(size=(50, 2)), np.linspace(0, 1.1, 23)
    expected = [max((y for x, y in curve if x >= level), default=np.nan) for level in at]
    np.testing.assert_array_equal(taus.envelope(curve, at), expected)


def test_tau_curves_are_compared_with_the_control_arm_at_every_tau(evidence: Evidence):
    figure = taus.along_tau(evidence)
    assert figure is not None and len(figure.table.rows) == len(TAUS)
    for kind, trials in (
        ("all trials %", evidence.trials),
        ("control arm %", [t for t in evidence.trials if t.control]),
    ):
        best = np.max([trial.curve["balanced"] for trial in trials if trial.curve], axis=0)
        np.testing.assert_allclose(values(figure.table, kind), best)
    gain = taus.beyond(evidence)
    assert gain is not None and (values(gain.table, "difference, points") >= 0).all()


def test_a_trial_that_slides_along_the_control_adds_nothing(small: Path):
    loaded = load(small)
    control, twin = loaded.trials[4], loaded.trials[1]
    change(small, 1, predictions_val=control.row["predictions_val"],
           **{f"m.val.{name}": value for name, value in control.val.items()})  # fmt: skip
    table = taus.areas(Evidence(load(small)))
    rows = {row[0].text: row[-1].value for row in table.rows}
    assert rows[twin.id] == rows[control.id] == 0 and max(rows.values()) > 0  # type: ignore[type-var]


def test_the_class_figures_show_best_and_control(evidence: Evidence):
    figure, gap = classes.by_frequency(evidence), classes.difference(evidence)
    assert figure is not None and gap is not None
    best, control = (evidence.shown[kind].per_class for kind in ("best", "control"))
    np.testing.assert_array_equal(values(figure.table, "best %"), best)
    np.testing.assert_allclose(values(figure.table, "difference, points"), best - control)
    assert values(gap.table, "difference, points").mean() == pytest.approx((best - control).mean(), abs=0.01)


def test_the_worst_classes_are_the_worst_in_order(evidence: Evidence):
    worst = values(classes.worst(evidence, 5), "best %")
    np.testing.assert_array_equal(worst, np.sort(evidence.shown["best"].per_class)[:5])
    share = values(classes.confused(evidence), "share of its images %")
    assert len(share) and (np.diff(share) <= 0).all()


def test_effects_are_listed_for_every_score(evidence: Evidence):
    found = why.by_score(evidence)
    assert list(found) == ["balanced", "many", "medium", "few", "balanced, raw"]
    figure = tricks.forest(found)
    assert figure is not None
    assert {"balanced, points", "few, points", "balanced, raw, points"} <= set(figure.table.columns)
    names = {row[0].text for row in figure.table.rows}
    assert "loss" in names and "arm" not in names


def test_colours_and_marks_tell_kinds_apart_on_their_own(evidence: Evidence):
    figure = fronts.head_tail(evidence, ENSEMBLE)
    assert figure is not None
    marks = [(key.symbol, key.line > 0, key.dash) for key in figure.keys]
    assert len(set(marks)) == len(marks), "without any colour"


def test_log_ticks_are_round_and_cover_the_range():
    ticks = draw.log_ticks(5, 500)
    assert ticks["tickvals"] == [5, 10, 20, 50, 100, 200, 500, 1000] and ticks["ticktext"][-1] == "1\u2009000"
    assert draw.log_ticks(5, 20) == {}


@pytest.fixture
def ablated(tmp_path):
    """A run whose best trial was trained again on a fresh seed, whole and without two of its choices."""
    run = make_run(tmp_path / "run", trials=10, classes=12, failed=1)
    rows = records.read_trials(run).to_pylist()
    origin = max(rows[1:4], key=lambda row: row["m.val.fitted_balanced"])
    without = {"-nothing": {}, "-loss": {"p.loss": "plain"}, "-deferred": {"p.deferred": False}}
    for row, (name, other) in zip(rows[5:8], without.items(), strict=True):
        scores = {key: value for key, value in row.items() if key.startswith(("m.", "predictions"))}
        records.append_trial(run, {**origin, **other, **scores, "trial": f"{origin['trial']}+1{name}", "seed": 1})
    return run, origin["trial"]


def test_the_ablation_compares_the_winner_with_itself_image_by_image(ablated):
    run, origin = ablated
    found = Evidence(load(run))
    figure = why.ablation(found)[0]
    by_id = {trial.id: trial for trial in found.run.trials}
    whole, table = by_id[f"{origin}+1-nothing"], {row[0].text: row for row in figure.table.rows}
    assert set(table) == {"loss", "deferred"} and table["loss"][2].text == "plain"
    for name, row in table.items():
        other = by_id[f"{origin}+1-{name}"]
        assert row[3].value == pytest.approx(other.val["fitted_balanced"] - whole.val["fitted_balanced"])
        assert row[3].low <= row[3].value <= row[3].high
    changes = [row[3].value for row in figure.table.rows]
    assert changes == sorted(changes), "the largest loss first"
    assert {trial.id for trial in found.trials} == {f"{number:04d}" for number in range(9)}, "they choose nothing"
    assert found.fresh == {}, "nor are they finalists"


def test_without_an_ablation_nothing_is_drawn(shared):
    assert why.ablation(Evidence(load(shared))) == []


def test_a_choice_that_the_recipe_is_better_without_is_named(ablated, monkeypatch):
    run, origin = ablated
    found = Evidence(load(run))
    assert len(why.ablation(found)) == 1 and summary.spare(found.run) == ""
    sure = {name: Estimate(0.021, 0.004, 0.038) for name in SCORES}
    monkeypatch.setattr(Evidence, "changed", lambda self, whole, other: dict.fromkeys(SCORES) if
                        other.id.endswith("-loss") else sure)  # fmt: skip
    note = why.ablation(found)[1].text
    assert note.startswith("Better without: deferred (+2.1 [+0.4, +3.8] points). ") and "loss" not in note
    assert summary.spare(found.run) == f"{origin}+1 is better without deferred (+2.1 [+0.4, +3.8] points)"


def test_with_few_trials_the_section_says_what_it_needs(small: Path, tmp_path: Path):
    text = why.section(Evidence(load(small))).blocks[0].text
    assert "From 8 finished trials with tricks on" in text and "There are 6 finished trials:" in text
    none = make_run(tmp_path / "none", trials=2, classes=12, failed=2)
    assert "There is none:" in why.section(Evidence(load(none))).blocks[0].text
