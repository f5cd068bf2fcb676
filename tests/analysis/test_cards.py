from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import cards, estimates, report, resample
from analysis.cards import LOSS, export
from analysis.evidence import Evidence
from analysis.load import load
from analysis.merging import merged
from analysis.sections import decide, trade
from rayltr import metrics, records
from rayltr.metrics import GROUPS
from tests.analysis.conftest import change, disagreeing, make_run


@pytest.fixture(scope="module")
def evidence(shared: Path) -> Evidence:
    return Evidence(load(shared))


@pytest.fixture(scope="module")
def deck(evidence: Evidence) -> list[cards.Card]:
    return cards.cards(evidence, evidence.ensembles)


def claims(deck: list[cards.Card]) -> dict[str, tuple[cards.Card, cards.Claim]]:
    return {claim.question: (card, claim) for card in deck for claim in card.claims}


def test_there_are_at_most_five_cards_and_every_question_has_one_answer(deck):
    asked = [claim.question for card in deck for claim in card.claims]
    assert len(deck) <= 5 and len(asked) == len(set(asked)) == 5
    assert asked[0] == "Best on balance" and asked[-1] == "Best ensemble"


def test_the_choices_are_those_that_the_questions_ask_for(evidence, deck):
    found, points, c = claims(deck), evidence.points, evidence.control
    assert evidence.trials[c].control
    name = {question.split(",")[0]: card.name for question, (card, _) in found.items()}
    ids = [trial.id for trial in evidence.trials]
    assert name["Best on balance"] == evidence.run.chosen["balanced"].id
    tail = points["few"] * (points["many"] >= points["many"][c] - LOSS)
    assert points["few"][ids.index(name["Best tail"])] == tail.max()
    head = points["many"] * (points["few"] >= points["few"][c])
    assert points["many"][ids.index(name["Best head"])] == head.max()


def test_the_cheapest_of_the_equivalent_is_within_the_noise_of_the_best(evidence, deck):
    card, claim = claims(deck)["Cheapest that cannot be told from the best"]
    i, best = [trial.id for trial in evidence.trials].index(card.name), evidence.best
    gap = evidence.points["balanced"][best] - evidence.points["balanced"][i]
    near = evidence.points["balanced"] >= evidence.points["balanced"][best] - 1.96 * evidence.spread()[best]
    assert gap <= 1.96 * evidence.spread()[best, i] and evidence.costs[i] == evidence.costs[near].min()
    assert near.sum() > 1 and claim.rivals == 0, "others are told to be as good as this one"


def test_being_chosen_flatters_and_the_correction_takes_it_off(deck):
    for card, claim in claims(deck).values():
        assert claim.corrected is not None
        assert claim.corrected.low < claim.corrected.value < claim.corrected.high or claim.score == "many"
        if "ensemble" not in claim.question.lower():
            assert card.scores[claim.score].value == claim.raw
    _, best = claims(deck)["Best on balance"]
    assert 0 < best.optimism < 0.05


def test_a_card_compares_with_the_control_image_by_image(evidence, deck):
    card, _ = claims(deck)["Best on balance"]
    gain = card.beyond["balanced"]
    i = [trial.id for trial in evidence.trials].index(card.name)
    expected = evidence.points["balanced"][i] - evidence.points["balanced"][evidence.control]
    assert gain is not None and gain.value == pytest.approx(expected) and gain.low < expected < gain.high
    apart = card.scores["balanced"].high - card.scores["balanced"].low
    assert gain.high - gain.low < 1.5 * apart, "pairs share their images"


def test_what_cannot_be_told_apart_is_said_and_the_cheapest_named(evidence, deck):
    card, claim = claims(deck)["Best on balance"]
    assert claim.rivals and claim.cheapest
    (note,) = [note for note in card.notes if "balanced" in note]
    assert f"not distinguishable from {claim.rivals} other trial" in note and claim.cheapest in note


def test_who_is_named_as_cheaper_meets_what_the_question_demands(evidence):
    at, ids = evidence.control, [trial.id for trial in evidence.trials]
    alike = Evidence(evidence.run)
    alike.__dict__["samples"] = {name: np.zeros_like(drawn) for name, drawn in evidence.samples.items()}
    floors = {"many": ("few", evidence.points["few"][at]), "few": ("many", evidence.points["many"][at] - LOSS)}
    for question, score, choose, allowed in cards.questions(evidence):
        i = choose(evidence.points)
        assert i is None or allowed[i], question
        if score in floors and i is not None:
            other, least = floors[score]
            np.testing.assert_array_equal(allowed, evidence.points[other] >= least)
            claim = cards._claim(alike, question, score, choose, i, allowed)
            assert claim.rivals == allowed.sum() - 1
            assert not claim.cheapest or allowed[ids.index(claim.cheapest)]


def test_the_commands_export_what_the_card_shows(evidence, deck):
    for card in deck[:-1]:
        assert (
            card.command
            == f"python -m rayltr.export {evidence.run.folder} --trial {card.name} --out export-{card.name}"
        )
    assert deck[-1].command.endswith("--ensemble --out export-ensemble")
    trial = evidence.trials[0]
    spaced = type(trial)(**{**vars(trial), "folder": "/a b/run"})
    assert "'/a b/run'" in export(spaced)


def test_the_ensemble_is_never_below_its_best_member_on_all_images(evidence, deck):
    card, claim = claims(deck)["Best ensemble"]
    assert evidence.ensembles.single is not None and evidence.ensembles.ensemble is not None
    own = evidence.ensembles.ensemble
    assert own.whole["nll"] <= evidence.ensembles.single.whole["nll"]
    assert claim.raw == own.whole["balanced"]
    assert ("Recommended" in card.notes[0]) == (evidence.ensembles.recommended == "ensemble")


def test_without_a_control_the_best_trial_is_the_measure(small: Path):
    for number in (0, 4):
        change(small, number, **{"p.arm": "study"})
    evidence = Evidence(load(small))
    asked = [claim.question for card in cards.cards(evidence) for claim in card.claims]
    assert any("below the best balanced model" in question for question in asked)
    assert all(gain is None for card in cards.cards(evidence) for gain in card.beyond.values())


def test_with_few_images_per_class_nothing_is_corrected(tmp_path: Path):
    evidence = Evidence(load(make_run(tmp_path / "run", trials=6, classes=12, each=3)))
    assert not evidence.reliable
    for card in cards.cards(evidence):
        assert all(claim.corrected is None and np.isnan(claim.optimism) for claim in card.claims)


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """A run whose best trial and control were trained again with two fresh seeds each; these choose nothing."""
    run = make_run(tmp_path / "run", trials=13, classes=12, failed=1)
    rows, chosen = {row["trial"]: row for row in records.read_trials(run).to_pylist()}, load(run).chosen
    finalists = [chosen[name].id for name in ("balanced", "control")]
    spare = [number for number in rows if number not in finalists and rows[number]["state"] == "complete"][-4:]
    for again, number in enumerate(spare):
        origin = rows[finalists[again % 2]]
        scores = {name: value for name, value in rows[number].items() if name.startswith(("m.", "predictions"))}
        rows[number] = {**origin, **scores, "trial": f"{origin['trial']}+{again // 2 + 1}", "seed": again // 2 + 1}
    records.write_trials(run, list(rows.values()))
    return run


def test_fresh_seeds_choose_nothing_and_say_what_finalists_are_worth(repeated: Path):
    found = Evidence(load(repeated))
    assert len(found.trials) == 8 and len(found.run.trials) == 13 and len(found.fresh) == 2
    best, control = found.run.chosen["balanced"].id, found.run.chosen["control"].id
    at = [trial.id for trial in found.trials].index(best)
    drawn = [resample.grouped(one.hits()[None], found.target, found.run.groups, found.draws) for one in found.fresh[at]]
    expected, own = estimates.seeds([one["balanced"][:, 0] for one in drawn]), found.estimate(at, "balanced")
    assert (own.low, own.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert own.value == pytest.approx(np.mean([one.val["fitted_balanced"] for one in found.fresh[at]]))
    assert found.beyond(at, found.control, "balanced").value == pytest.approx(
        found.estimate(at, "balanced").value - found.estimate(found.control, "balanced").value
    )
    card, claim = claims(cards.cards(found))["Best on balance"]
    assert card.name == best and claim.fresh == claim.shown == found.estimate(at, "balanced")
    assert card.facts["Fresh seeds"] == "2" and card.scores["balanced"] == claim.fresh
    listing = decide.finalists(found)
    assert {row[0].text for row in listing.table.rows} == {best, f"{control} (control)"}
    assert not any("+" in name for expert in found.ensembles.members for name in [expert.name])


@pytest.mark.parametrize(("images", "first"), [(20, False), (8, True)])
def test_finalists_are_ordered_by_what_decides(repeated: Path, images, first):
    rows, control = records.read_trials(repeated).to_pylist(), load(repeated).chosen["control"].id
    sure = {"m.val.fitted_nll": 0.01, "m.val.fitted_balanced": 0.1}
    again = [row["trial"].startswith(f"{control}+") for row in rows]
    rows = [
        {**row, "m.val.fewest_images": images, **(sure if own else {})} for row, own in zip(rows, again, strict=True)
    ]
    records.write_trials(repeated, rows)
    listing = decide.finalists(Evidence(load(repeated)))
    assert [("control" in row[0].text) for row in listing.table.rows] == [first, not first]


def test_short_schedules_of_several_runs_are_judged_run_by_run(tmp_path: Path):
    runs = []
    for name, sign in (("fair", 1), ("unfair", -1)):
        run = make_run(tmp_path / name, trials=4, classes=12, failed=0)
        short = [
            {**row, "share": 0.3, "objective": float(row["number"])} for row in records.read_trials(run).to_pylist()
        ]
        long = [
            {**row, "trial": f"{row['trial']}.1", "share": 1.0, "objective": sign * row["objective"]} for row in short
        ]
        records.write_trials(run, [*short, *long])
        runs.append(load(run))
    found = [light.text for light in decide.lights(Evidence(merged(runs))) if "hort schedules" in light.text]
    assert len(found) == 1 and found[0].startswith("Short schedules of unfair (30 % of the full length)")


def test_what_half_of_the_fresh_seeds_reach(repeated: Path):
    found = Evidence(load(repeated))
    seeds = [[one for again in found.fresh.values() for one in again if one.row["seed"] == seed] for seed in (1, 2)]
    assert [len(own) for own in seeds] == [2, 2] and len(found.attained) > 1
    for many, few in found.attained:
        reached = [any(((one.points()[:, 1:] >= [many, few]).all(1)).any() for one in own) for own in seeds]
        assert any(reached), "one of two seeds is half of them"
        higher = [any(((one.points()[:, 1:] >= [many, few + 1e-9]).all(1)).any() for one in own) for own in seeds]
        assert not any(higher)


def test_without_fresh_seeds_there_are_no_finalists(evidence):
    assert evidence.fresh == {} and decide.finalists(evidence) is None and not len(evidence.attained)


def test_nothing_finished_is_no_card(tmp_path: Path):
    assert cards.cards(Evidence(load(make_run(tmp_path / "run", trials=2, classes=12, failed=2)))) == []


@pytest.fixture
def sized(small: Path) -> Path:
    """Trials of 100 and 1000 weights in turn; the best has 1000."""
    best = int(load(small).chosen["balanced"].row["number"])
    for number in range(8):
        change(small, number, **{"m.val.weights": 1000.0 if number % 2 == best % 2 else 100.0})
    return small


def test_a_small_model_is_chosen_beside_the_best(sized: Path):
    evidence = Evidence(load(sized))
    card, claim = claims(cards.cards(evidence))["Best of at most 500 weights"]
    small = evidence.sizes == 100
    i = [trial.id for trial in evidence.trials].index(card.name)
    assert small[i] and evidence.points["balanced"][i] == evidence.points["balanced"][small].max()
    assert card.facts["Weights"] == "100" and claim.corrected is not None


def test_the_limit_can_be_named_and_must_leave_a_model(sized: Path):
    evidence = Evidence(load(sized))
    assert "Best of at most 1\u202f000 weights" in claims(cards.cards(evidence, most=1000))
    with pytest.raises(ValueError, match="no trial has at most 99 weights: the smallest has 100"):
        cards.cards(evidence, most=99)


def test_models_of_one_size_have_no_card_for_small_ones(evidence):
    assert not any("weights" in question for question, *_ in cards.questions(evidence))


def test_a_rival_of_the_ensemble_that_is_more_often_right_is_named(evidence):
    found = evidence.ensembles
    better = replace(found.ensemble, name="best 2 averaged", balanced=estimates.Estimate(0.987, 0.9, 1.0))
    card = cards.ensemble_card(evidence, replace(found, baselines=[better]))
    assert "The NLL chose it" in card.notes[0] and "best 2 averaged reaches 98.7 %" in card.notes[0]
    worse = replace(better, balanced=estimates.Estimate(0.0, 0.0, 0.0))
    assert "The NLL chose it" not in cards.ensemble_card(evidence, replace(found, baselines=[worse])).notes[0]


def test_all_scores_of_the_ensemble_are_cross_fitted_and_those_of_its_export_are_told(evidence, deck):
    card, claim = claims(deck)["Best ensemble"]
    own = evidence.ensembles.ensemble
    assert card.facts["Members"] == str(len(own.members))
    assert card.how == "cross-fitted" and claim.corrected == card.scores["balanced"]
    sizes = {name: len(evidence.run.groups[name]) for name in GROUPS}
    mean = sum(card.scores[name].value * n for name, n in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(claim.corrected.value, abs=1e-6)
    assert all(found.low < found.value < found.high for found in card.scores.values())
    assert any(card.scores[name].value != own.whole[name] for name in GROUPS)
    star = trade.head_tail(evidence).blocks[0].table.rows[len(evidence.front)]
    assert star[0].text == "best ensemble, cross-fitted"
    assert [cell.value for cell in star[3:6]] == [card.scores[name].value for name in GROUPS]
    told = ", ".join(f"{name} {100 * own.whole[name]:.1f}" for name in ("balanced", *GROUPS))
    assert any(told in note and "as an export reproduces" in note for note in card.notes)
    assert {other.how for other in deck} == {"as measured", "cross-fitted"}


@pytest.fixture
def sparse(tmp_path: Path) -> Evidence:
    """A run with 8 validation images per class, of which accuracy and NLL choose another trial."""
    return Evidence(load(disagreeing(tmp_path / "run", 8)))


def group_nll(evidence: Evidence, classes: np.ndarray) -> np.ndarray:
    """The class-balanced NLL of some classes, by the definition."""
    found = []
    for trial in evidence.trials:
        z = metrics.adjust(evidence.run.logits(trial) / trial.val["temperature"], evidence.run.counts, trial.val["tau"])
        z = z - np.log(np.exp(z.astype(float)).sum(1, keepdims=True))
        loss = -z[np.arange(len(z)), evidence.target]
        found.append(np.mean([loss[evidence.target == c].mean() for c in classes]))
    return np.array(found)


def test_with_few_images_per_class_the_nll_chooses(sparse: Evidence):
    assert sparse.run.criterion.by == "NLL"
    whole, few = group_nll(sparse, np.arange(12)), group_nll(sparse, sparse.run.groups["few"])
    points, c = sparse.points, sparse.control
    assert sparse.best == whole.argmin() and whole.min() == pytest.approx(sparse.trials[0].val["fitted_nll"], abs=1e-3)
    assert sparse.trials[c].control
    assert whole[c] == min(own for own, trial in zip(whole, sparse.trials, strict=True) if trial.control)
    found = {question.split(",")[0]: card for question, (card, _) in claims(cards.cards(sparse)).items()}
    assert found["Best on balance"].name == sparse.trials[whole.argmin()].id
    allowed = points["many"] >= points["many"][c] - LOSS
    assert found["Best tail"].name == sparse.trials[np.where(allowed, few, np.inf).argmin()].id
    assert points["balanced"][whole.argmin()] < points["balanced"].max(), "accuracy would have chosen another"
    near = whole <= whole.min() + 1.96 * sparse.spread("balanced likelihood")[whole.argmin()]
    assert sparse.costs[near].min() == next(
        trial.cost for trial in sparse.trials if trial.id == found["Cheapest that cannot be told from the best"].name
    )


def test_the_correction_chooses_by_the_nll_in_every_draw(sparse: Evidence):
    _, claim = claims(cards.cards(sparse))["Best on balance"]
    drawn = resample.draws(sparse.target, cards.TIMES, sparse.seed)
    inside = resample.grouped(sparse.likelihood, sparse.target, sparse.run.groups, drawn)["balanced"]
    picked = inside.argmax(1)
    outside = resample.grouped(sparse.hits, sparse.target, sparse.run.groups, drawn == 0)["balanced"]
    assert claim.by == "NLL" and claim.score == "balanced"
    assert claim.corrected.value == pytest.approx(outside[np.arange(cards.TIMES), picked].mean(), abs=1e-5)


def test_the_page_says_what_ranks_models_and_why(sparse: Evidence, evidence: Evidence):
    section = decide.section(sparse, cards.cards(sparse))
    assert "ranked by NLL" in section.lead and "have only 8 validation images; below 20" in section.lead
    assert ("NLL: " + sparse.run.criterion.why) in dict(decide.facts(sparse, [])).values()
    html = report.render(report.build(sparse.run))
    assert "chosen by NLL;" in html and "The best on balance by NLL, " in html
    assert any(note.startswith("By balanced NLL") for card in cards.cards(sparse) for note in card.notes)
    section = decide.section(evidence, cards.cards(evidence))
    assert "ranked by accuracy" in section.lead and "every measured class has at least 20" in section.lead


def test_the_best_on_the_edge_of_its_temperatures_is_warned_of(small: Path):
    for number in range(9):
        change(small, number, predictions_val=None)
    best = int(load(small).chosen["balanced"].row["number"])
    for temperature, size in ((99.95, "large"), (0.01, "small"), (60.0, "")):
        change(small, best, **{"m.val.temperature": temperature})
        found = [
            light.text for light in decide.lights(Evidence(load(small))) if "temperature of the best" in light.text
        ]
        assert [size in text for text in found] == ([True] if size else [])
