import math

import pytest

from rayltr.choice import ACCURACY, ENOUGH, NLL, ablated, best, criterion, finalists, ranked, repeated, rung_of


def row(trial, balanced, many, few, nll=1.0, state="complete", arm="study", **more):
    scores = {"fitted_balanced": balanced, "fitted_many": many, "fitted_few": few, "fitted_nll": nll, **more}
    return {"trial": trial, "state": state, "p.arm": arm, **{f"m.val.{name}": value for name, value in scores.items()}}


def names(rows):
    return {name: found["trial"] for name, found in best(rows).items()}


CONTROL = row("c", 0.5, 0.8, 0.2, arm="control")


def test_each_end_has_its_best():
    rows = [CONTROL, row("a", 0.7, 0.75, 0.6), row("b", 0.6, 0.9, 0.3), row("d", 0.55, 0.5, 0.65)]
    assert names(rows) == {"balanced": "a", "many": "b", "few": "d", "control": "c"}


def test_what_is_worse_than_the_control_on_balance_is_no_choice():
    assert names([CONTROL, row("a", 0.1, 0.0, 0.9)])["few"] == "c"
    assert names([row("a", 0.1, 0.0, 0.9)]) == {"balanced": "a", "many": "a", "few": "a"}


def test_ties_go_to_the_lower_nll():
    assert names([row("a", 0.5, 0.5, 0.5, nll=2.0), row("b", 0.5, 0.5, 0.5, nll=1.0)])["balanced"] == "b"


def test_failed_and_unmeasured_trials_are_no_choice():
    assert names([row("a", 0.9, 0.9, 0.9, state="failed"), row("b", math.nan, math.nan, math.nan)]) == {}


def test_what_repeats_a_trial_with_another_seed_is_no_choice():
    assert names([row("0001", 0.5, 0.5, 0.5), row("0001+1", 0.9, 0.9, 0.9)])["balanced"] == "0001"
    assert [repeated(row(name, 0, 0, 0)) for name in ("0001", "0001.1", "0001+1", "0001.1+2")] == [0, 0, 1, 1]
    assert [rung_of({"trial": name}) for name in ("0001", "0001.1", "0001+1", "0001.2+3")] == [0, 1, 0, 2]


def test_finalists_are_what_would_be_shipped_then_the_best_on_balance_and_the_control():
    rows = [CONTROL, row("a", 0.7, 0.75, 0.6), row("b", 0.6, 0.9, 0.3), row("d", 0.55, 0.5, 0.65), row("e", 0.65, 0, 0)]
    for most, expected in ((0, ""), (1, "ac"), (3, "abdc"), (4, "abdec"), (9, "abdec")):
        assert "".join(found["trial"] for found in finalists(rows, most)) == expected
    assert finalists([row("a", 0.7, 0.7, 0.7, state="failed")], 3) == []


def test_an_ablation_is_told_by_its_name_whatever_its_run_is_called():
    told = {"0007": "", "0007.1+2": "", "0007+1-mixing": "mixing", "a+b-c/0007.1+1-tau-norm": "tau-norm", "a-b/7": ""}
    assert {trial: ablated(row(trial, 0.5, 0.5, 0.5)) for trial in told} == told
    assert best([CONTROL, row("0001", 0.6, 0.6, 0.6), row("0001+1-loss", 0.9, 0.9, 0.9)])["balanced"]["trial"] == "0001"


def judged(trial, accuracy, nll, images=ENOUGH - 1, arm="study"):
    """The same accuracy in all groups; NLLs on balance, of many and of few."""
    groups = {"fitted_many_nll": nll[1], "fitted_few_nll": nll[2], "fewest_images": images}
    return row(trial, accuracy, accuracy, accuracy, nll[0], arm=arm, **groups)


@pytest.mark.parametrize(
    ("images", "by", "why"),
    [
        ([20, 20], ACCURACY, "every measured class has at least 20 validation images"),
        ([19, 19], NLL, "some classes have only 19 validation images; below 20"),
        ([1, 1], NLL, "only 1 validation image;"),
        ([19, None], ACCURACY, "do not say on how many images"),
        ([], ACCURACY, "do not say on how many images"),
    ],
)
def test_accuracy_decides_where_every_class_has_images_enough_or_older_records_do_not_say(images, by, why):
    rows = [judged(f"{i:04d}", 0.5, (1.0, 1.0, 1.0), n) for i, n in enumerate(images)]
    unmeasured = [judged("d", math.nan, (math.nan,) * 3, math.nan), row("f", None, None, None, state="failed")]
    found = criterion([*rows, *unmeasured])
    assert found.by == by and why in found.why


@pytest.mark.parametrize(
    ("images", "chosen", "order"),
    [
        (ENOUGH, {"balanced": "a", "many": "a", "few": "a", "control": "c"}, "abdc"),
        (ENOUGH - 1, {"balanced": "b", "many": "d", "few": "b", "control": "c"}, "bdca"),
    ],
)
def test_one_rule_decides_the_choices_what_is_worthy_the_order_and_the_finalists(images, chosen, order):
    rows = [
        judged("c", 0.5, (1.2, 1.0, 1.5), images, "control"),
        judged("a", 0.8, (1.3, 0.1, 0.2), images),  # on balance, the NLL puts it behind the control
        judged("b", 0.7, (1.0, 0.9, 1.1), images),
        judged("d", 0.6, (1.1, 0.8, 1.4), images),
    ]
    assert names(rows) == chosen
    assert "".join(found["trial"] for found in ranked(rows)) == order
    kept = dict.fromkeys([chosen["balanced"], chosen["many"], chosen["few"], *order])
    assert [found["trial"] for found in finalists(rows, 2)] == [*[*kept][:2], "c"]
