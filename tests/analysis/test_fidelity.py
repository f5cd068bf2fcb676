import math
from itertools import combinations

import numpy as np
import pytest

from analysis import fidelity
from analysis.fidelity import agreement, costs, curves, effort, families, stopped
from rayltr import records


def row(trial: str, **fields) -> dict:
    """A row of the trials table: complete, of the length of its rung of three (a ninth, a third, all)."""
    number, rung = (int(part) for part in (*trial.split("."), "0")[:2])
    share = fields.pop("share", (1 / 9, 1 / 3, 1.0)[rung])
    asked = round(180 * (share or 1))
    return {
        **{"trial": trial, "number": number, "state": "complete", "share": share, "objective": 0.0},
        **{"epochs_asked": asked, "epochs_trained": asked, "epochs_resumed": 0, "wall_s": 2.0 * asked},
        **fields,
    }


def slow_tau_b(x: list[float], y: list[float]) -> float:
    up = down = tied_x = tied_y = 0
    for i, j in combinations(range(len(x)), 2):
        sign = (x[i] - x[j]) * (y[i] - y[j])
        up, down = up + (sign > 0), down + (sign < 0)
        tied_x, tied_y = tied_x + (x[i] != x[j]), tied_y + (y[i] != y[j])
    return (up - down) / math.sqrt(tied_x * tied_y)


def two_rungs(seed: int = 0, n: int = 30) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        late = bool(number % 2)
        short, full = rng.integers(0, 12), rng.integers(0, 12)  # with ties
        params = {"p.loss": ["ldam", "focal"][late], "p.late": late, "p.lr": 0.1, "p.arm": "study"}
        rows += [row(f"{number:04d}", share=1 / 9, objective=float(short), **params)]
        if number < n - 10:
            rows += [row(f"{number:04d}.1", share=1.0, objective=float(full if late else short), **params)]
    return rows


def test_agreement_against_a_count_of_pairs():
    rows = two_rungs()
    values = {r["trial"]: r["objective"] for r in rows}
    found = {a.family: a for a in agreement(rows)}
    assert set(found) == {None, ("loss", "ldam"), ("loss", "focal"), ("late", False), ("late", True)}
    for family, numbers in ((None, range(20)), (("loss", "focal"), range(1, 20, 2)), (("late", True), range(1, 20, 2))):
        low, high = ([values[f"{n:04d}{rung}"] for n in numbers] for rung in ("", ".1"))
        assert found[family].tau == pytest.approx(slow_tau_b(low, high), abs=1e-9)
        assert found[family].recipes == len(numbers)
        assert (found[family].low, found[family].high) == (pytest.approx(1 / 9), 1)


def test_the_family_that_gains_late_gets_the_warning():
    found = {a.family: a for a in agreement(two_rungs())}
    assert found["loss", "ldam"].tau == 1 and not found["loss", "ldam"].poor
    assert found["loss", "focal"].poor


def test_known_taus_and_their_warnings():
    for values, tau, poor in (([1, 2, 3, 4], 1, False), ([4, 3, 2, 1], -1, True), ([2, 1, 3, 4], 2 / 3, False)):
        rows = [row(f"{n}", objective=float(n)) for n in range(4)]
        rows += [row(f"{n}.1", objective=float(value)) for n, value in enumerate(values)]
        assert [(a.tau, a.poor) for a in agreement(rows)] == [(pytest.approx(tau), poor)]


def test_every_rung_is_held_against_every_longer_one():
    rows = [row(f"{n}{rung}", objective=float(n)) for n in range(4) for rung in ("", ".1", ".2")]
    lengths = [(a.low, a.high) for a in agreement(rows)]
    assert lengths == [(1 / 9, 1 / 3), (1 / 9, 1.0), (1 / 3, 1.0)]


@pytest.mark.filterwarnings("error")
def test_what_has_no_rank_correlation_has_none():
    assert agreement([]) == [] and agreement([row("0")]) == []
    assert agreement([row("0", share=None), row("1")]) == []  # a run without rungs
    rows = [row(f"{n}{rung}", objective=float(n)) for n in range(2) for rung in ("", ".1")]
    rows += [row("2", objective=math.nan), row("2.1"), row("3", objective=None), row("3.1"), row("4", state="failed")]
    (found,) = agreement(rows)
    assert (found.recipes, found.poor) == (2, False) and math.isnan(found.tau)
    (tied,) = agreement([row(f"{n}{rung}") for n in range(4) for rung in ("", ".1")])
    assert tied.recipes == 4 and math.isnan(tied.tau)


def test_families_are_named_choices_with_alternatives():
    rows = [
        {"number": 0, "p.loss": "ldam", "p.cam": True, "p.lr": 0.1, "p.arm": "study", "m.val.few": 0.5},
        {"number": 1, "p.loss": "focal", "p.cam": None, "p.lr": 0.2, "p.arm": "study"},
        {"number": 1, "p.loss": "focal", "p.cam": False},
    ]
    assert families(rows) == {("cam", False): {1}, ("cam", True): {0}, ("loss", "focal"): {1}, ("loss", "ldam"): {0}}


def test_what_the_short_schedules_dropped():
    score = [0.3, 0.9, math.nan, 0.5, 0.7, None]
    rows = [
        row(f"{n}", **{"p.when": "late" if n > 2 else "whole", "m.val.fitted_balanced": value})
        for n, value in enumerate(score)
    ]
    rows += [row("1.1", **{"p.when": "whole"}), row("4.1", **{"p.when": "late"}), row("4.2", **{"p.when": "late"})]
    rows += [row("6", state="failed", **{"p.when": "late"}), row("7.2", state="pruned", epochs_trained=9)]
    short, middle, full = stopped(rows)
    assert (short.share, short.trained, short.promoted) == (pytest.approx(1 / 9), 6, 2)
    assert short.dropped == ["3", "0", "2", "5"]
    assert short.families == {("when", "late"): (3, 1), ("when", "whole"): (3, 1)}
    assert (middle.share, middle.trained, middle.promoted, middle.dropped) == (pytest.approx(1 / 3), 2, 1, ["1.1"])
    assert (full.share, full.trained, full.promoted, full.dropped) == (1, 1, 0, ["7.2"])
    assert stopped([row("0", share=1.0), row("1", share=None)]) == []
    sparse = [{**own, "m.val.fitted_nll": float(own["number"]), "m.val.fewest_images": 8.0} for own in rows]
    assert stopped(sparse)[0].dropped == ["0", "2", "3", "5"], "on few images the NLL tells the best"


def test_curves_of_every_stage(tmp_path):
    def epoch(trial, stage, epoch, metric="loss", value=0.5, wall_s=1.5):
        where = {"trial": trial, "stage": stage, "epoch": epoch, "split": "train"}
        return {**where, "metric": metric, "value": value, "wall_s": wall_s}

    rows = [epoch("0001", 1, e, value=10.0 - e) for e in (6, 4, 5)]  # a resumed stage: its clock goes on
    rows += [epoch("0001", 0, e, metric, wall_s=None) for e in (1, 2, 3) for metric in ("loss", "grad")]
    rows += [epoch("0001", 2, 1), epoch("0000", 0, 1)]
    records.append_epochs(tmp_path, rows)
    found = curves(records.read_epochs(tmp_path))
    assert [(c.trial, c.stage, c.metric, c.begun) for c in found] == [
        ("0000", 0, "loss", 0),
        ("0001", 0, "grad", 0),
        ("0001", 0, "loss", 0),
        ("0001", 1, "loss", 3),
        ("0001", 2, "loss", 6),
    ]
    assert found[3].epoch.tolist() == [4, 5, 6] and found[3].value.tolist() == [6, 5, 4]
    assert found[3].seconds.tolist() == [1.5] * 3 and np.isnan(found[2].seconds).all() and found[2].split == "train"


def test_a_run_without_epochs_has_no_curves(tmp_path):
    assert curves(records.read_epochs(tmp_path)) == []


def cost_row(trial: str, seconds: float | None, balanced: float | None, **fields) -> dict:
    scores = {"m.val.cost_s": seconds, "m.val.fitted_balanced": balanced, "m.val.fitted_nll": 2.0}
    return row(trial, share=1.0, **scores, **fields)


def test_costs_and_their_front():
    rows = [
        cost_row("0", 100.0, 0.4),
        cost_row("1", 200.0, 0.6),
        cost_row("2", 150.0, 0.4),  # beaten by 0
        cost_row("3", 300.0, 0.5),  # beaten by 1
        cost_row("4", 400.0, math.nan),
        cost_row("5", None, 0.9, epochs_trained=20, wall_s=10.0),  # shared stages of unknown cost
        cost_row("6", None, 0.7, wall_s=500.0),
        row("7", share=1 / 9, **{"m.val.fitted_balanced": 0.99}),
        cost_row("8", 1.0, 0.99, state="failed"),
    ]
    found = costs(rows)
    assert [c.trial for c in found] == list("0123456")
    assert [c.trial for c in found if c.front] == ["0", "1", "6"]
    assert [c.seconds for c in found[:5]] == [100, 200, 150, 300, 400]
    assert math.isnan(found[5].seconds) and found[6].seconds == 500 and found[5].wall == 10
    assert (found[5].asked, found[5].trained, found[1].quality) == (180, 20, 0.6)


def test_of_a_loss_less_is_better():
    rows = [{**cost_row("0", 100.0, 0.1), "m.val.fitted_nll": 1.0}, cost_row("1", 200.0, 0.9)]
    assert [(c.quality, c.front) for c in costs(rows, "fitted_nll")] == [(1.0, True), (2.0, False)]


def test_one_trial_and_none():
    assert costs([]) == [] and stopped([]) == []
    (only,) = costs([cost_row("0", 10.0, 0.5)])
    assert only.front
    assert effort([]) == fidelity.Effort(0, 0, 0, 0, 0, 0.0)


def test_effort_by_hand():
    rows = [
        row("0", epochs_trained=12, epochs_resumed=3, wall_s=7.0),  # 20 asked, 5 shared
        row("0.2", epochs_trained=180),
        row("1", wall_s=None),  # 20 of 180 epochs: dropped, 160 never asked for
        row("2", state="failed", epochs_trained=4, wall_s=99.0),
    ]
    assert effort(rows) == fidelity.Effort(
        asked=224, trained=216, resumed=3, shared=5, early=160, seconds=pytest.approx(367.0)
    )


def test_a_run_without_the_newest_columns_can_be_read():
    old = {k: v for k, v in cost_row("0", 10.0, 0.5).items() if k not in ("share", "epochs_resumed", "m.val.cost_s")}
    assert effort([old]) == fidelity.Effort(180, 180, 0, 0, 0, 360.0)
    assert [c.seconds for c in costs([old])] == [360.0] and agreement([old]) == stopped([old]) == []
