"""A greedy ensemble chosen again in bootstrap draws: the same choices as one by one, no bias, no reward for noise."""

from dataclasses import replace

import numpy as np
import pytest

from analysis import outofbag, resample
from analysis.ensembles import studied
from analysis.experts import Expert, Panel, normalised
from analysis.greedy import SHORT, Condensed, condensed, greedy
from analysis.outofbag import climbs, rechosen
from analysis.routing import plain
from tests.analysis.panels import logs, noisy


def weights(target: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The weights of the items of every draw, class-balanced, by loops."""
    found = np.zeros(drawn.shape)
    for b, own in enumerate(drawn):
        for c in np.unique(target):
            found[b, target == c] = own[target == c] / own[target == c].sum() / len(np.unique(target))
    return found


@pytest.mark.parametrize("mode", ["logit", "prob"])
@pytest.mark.parametrize(("limit", "penalty"), [(5, 0.0), (2, 0.02)])
def test_every_draw_is_chosen_in_as_if_it_were_alone(mode: str, limit: int, penalty: float):
    experts, target = logs(9, 6, [8] * 6, seed=1, skill=2.0)
    view = condensed(experts, target, [np.arange(6)])
    drawn = resample.draws(target, 12, 3)
    found = climbs(view, weights(target, drawn), mode=mode, rounds=10, limit=limit, penalty=penalty)
    for path, own in zip(found, drawn, strict=True):
        alone = greedy(view.at(np.repeat(np.arange(48), own)), mode=mode, rounds=10, limit=limit, penalty=penalty)
        assert path.picks == alone.picks
        np.testing.assert_allclose(path.losses, alone.losses, atol=1e-9)
    assert len({tuple(path.picks) for path in found}) > 3


def test_every_draw_has_a_short_list_of_its_own():
    experts, target = logs(SHORT + 6, 5, [6] * 5, seed=2, skill=1.0)
    view = condensed(experts, target, [np.arange(5)])
    drawn = resample.draws(target, 8, 0)
    w = weights(target, drawn)
    lists = set()
    for path, own, weight in zip(climbs(view, w, mode="logit", rounds=12), drawn, w, strict=True):
        short = np.argsort(-view.logs[:, 0] @ weight, kind="stable")[:SHORT]
        alone = greedy(view.of(short).at(np.repeat(np.arange(30), own)), rounds=12)
        assert path.picks == [short[pick] for pick in alone.picks]
        lists.add(tuple(np.sort(short)))
    assert len(lists) > 1


CLASSES = 40


def crowd(seed: int, each: int) -> Panel:
    """Twelve experts of unlike skill that share the difficulty of the items, as they are."""
    rng, skills = np.random.default_rng((seed, each)), np.random.default_rng(7).uniform(1.4, 1.9, (12, CLASSES))
    target = np.repeat(np.arange(CLASSES), each)
    shared = rng.normal(size=(len(target), CLASSES)).astype(np.float32)
    found = []
    for number, skill in enumerate(skills):
        z = 1.3 * (shared + 1.1 * rng.normal(size=shared.shape).astype(np.float32))
        z[np.arange(len(target)), target] += 1.3 * skill[target]
        found.append(Expert(f"{number:04d}", "main", normalised(z), 0.0, 1.0))
    return Panel(found, target, np.full(CLASSES, 9), {"many": np.arange(CLASSES)})


def balanced(z: np.ndarray, target: np.ndarray) -> float:
    return float(np.mean([(z[target == c].argmax(1) == c).mean() for c in np.unique(target)]))


def condensed_of(given: Panel) -> Condensed:
    return condensed(given.logits, given.target, list(given.groups.values()))


def test_the_correction_has_little_bias_at_twenty_images_per_class():
    endless, errors, raw = crowd(1, 150), [], []
    for seed in range(30):
        given = crowd(100 + seed, 20)
        view = condensed_of(given)
        chosen = plain(greedy(view).best(5), CLASSES)
        seen, truth = (
            balanced(chosen.of([own.logits[m] for m in chosen.members]), own.target) for own in (given, endless)
        )
        raw.append(seen - truth)
        errors.append(rechosen(given, view, times=20, seed=seed).ensemble.value - truth)
    assert np.mean(raw) > 0.006
    assert abs(np.mean(errors)) < 0.005


@pytest.mark.parametrize("seed", range(2))
def test_noise_beside_a_good_expert_is_not_rewarded(seed: int):
    given = noisy(1, 50, seed)
    found = rechosen(given, condensed_of(given), times=60, seed=seed)
    assert found.gain.low <= 0 and found.gain.value < 0.002 and found.gain_nll.value < 0.005
    assert found.ensemble.value == pytest.approx(found.single.value, abs=0.02)


def test_of_fifty_that_know_nothing_the_best_is_worth_chance():
    given = noisy(0, 50, 3)
    measured = max(balanced(own.logits, given.target) for own in given.experts)
    found = rechosen(given, condensed_of(given), times=60)
    assert measured > 0.14, "the best of fifty, as measured"
    assert found.single.value == pytest.approx(0.1, abs=0.025) and found.ensemble.value == pytest.approx(0.1, abs=0.025)


def test_too_few_images_cannot_be_corrected():
    given = noisy(3, 2, 0, each=3)
    assert rechosen(given, condensed_of(given), times=10) is None


def test_experts_of_fresh_seeds_are_not_chosen():
    given = noisy(3, 0, 0)
    best = replace(given.experts[0], trial="0000+1", logits=given.experts[0].logits * 3)
    more = replace(given, experts=[*given.experts, best])
    one, other = (rechosen(own, condensed_of(own), times=10) for own in (given, more))
    assert one.ensemble.value == pytest.approx(other.ensemble.value, abs=1e-6)


def test_a_study_chooses_again_only_if_it_is_asked_to():
    given = noisy(3, 2, seed=2)
    assert studied(given, times=50).rechosen is None
    found = studied(given, times=50, again=True).rechosen
    assert found.draws == outofbag.DRAWS[1] and found.gain.low < found.gain.value < found.gain.high
    assert found.gain.value == pytest.approx(found.ensemble.value - found.single.value)


def test_many_images_allow_fewer_draws():
    assert [outofbag.draws(n) for n in (0, 270, 10_000, 20_000, 1_000_000)] == [100, 100, 100, 50, 20]
