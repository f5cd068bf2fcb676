from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.ensembles import Ensembles, group_bias, studied, study
from analysis.experts import Panel
from rayltr import metrics
from tests.analysis.panels import noisy, panel

FAST = {"times": 200}


@pytest.mark.parametrize("seed", range(2))
def test_noise_does_not_join_a_good_expert(seed: int):
    found = studied(noisy(1, 50, seed), **FAST)
    assert found.recommended == "single" and found.best is not None and found.best.trial == "0000"
    assert found.ensemble is None or found.ensemble.gain_nll.low <= 0


@pytest.mark.parametrize("seed", range(2))
def test_of_two_good_experts_among_noise_the_two_are_chosen(seed: int):
    found = studied(noisy(2, 50, seed), **FAST)
    assert found.recommended == "ensemble" and found.ensemble is not None
    assert {expert.trial for expert in found.members} == {"0000", "0001"}
    assert found.ensemble.gain_nll.low > 0 and found.ensemble.gain_balanced.low > 0


def test_good_experts_with_errors_of_their_own_are_all_wanted_up_to_the_limit():
    found = studied(noisy(6, 3, seed=0, each=40), limit=3, **FAST)
    assert found.recommended == "ensemble" and len(found.members) == 3
    assert {expert.trial for expert in found.members} <= {f"{n:04d}" for n in range(6)}
    assert found.single is not None and found.ensemble is not None
    assert [len(score.members) for score in found.growth] == [1, 2, 3]
    out = [score.nll.value for score in found.growth]
    assert out == sorted(out, reverse=True) and found.ensemble.whole["nll"] < found.single.whole["nll"]
    assert found.ladder[0].name == "equal" and found.ladder[0].accepted and not found.ladder[-1].accepted
    assert (
        set(found.modes) == {"logit", "prob"} and found.modes["logit"].whole["nll"] < found.modes["prob"].whole["nll"]
    )


def test_the_mixture_of_the_members_is_what_was_scored():
    given = noisy(3, 3, seed=2)
    found = studied(given, **FAST)
    assert found.mixture is not None and found.ensemble is not None and found.differences is not None
    z = found.mixture.of([expert.logits for expert in found.members])
    assert metrics.balanced_nll(z, given.target, 10) == found.ensemble.whole["nll"]
    right = metrics.class_accuracy(z.argmax(1), given.target, 10)
    assert np.mean(right) == found.ensemble.whole["balanced"]
    assert found.ensemble.whole.items() >= metrics.group_means(right, given.groups).items()
    number = len(found.members)
    assert found.differences.rescue["few"].shape == (number, number) and found.kl is not None
    assert found.kl.shape == (number, 10) and (found.kl > 0).all()


def test_copies_of_one_expert_are_worth_nothing():
    one = noisy(1, 0, seed=3)
    found = studied(replace(one, experts=one.experts * 6), **FAST)
    assert found.recommended == "single" and found.ensemble is None and "no combination" in found.reason


def test_a_price_per_member_makes_ensembles_smaller():
    given = noisy(6, 0, seed=4)
    sizes = [len(studied(given, penalty=penalty, **FAST).members) for penalty in (0.0, 0.1, 5.0)]
    assert sizes[0] > sizes[1] > sizes[2] == 0


def specialists(seed: int) -> Panel:
    """Two experts that doubt everything outside their own classes, of which the first has more."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(12), 40)
    logits = []
    for own in (np.arange(12) < 8, np.arange(12) >= 8):
        z = rng.normal(size=(480, 12)) * np.where(own, 1.0, 0.1)
        z[np.arange(480), target] += np.where(own, 3.0, 0.0)[target]
        logits.append(z)
    given = panel(logits, target, np.full(12, 40))
    return replace(given, groups={"many": np.arange(8), "medium": np.array([], np.int64), "few": np.arange(8, 12)})


def test_specialists_climb_the_ladder_and_equals_do_not():
    found = studied(specialists(0), **FAST)
    accepted = [rung.name for rung in found.ladder if rung.accepted]
    assert accepted[:3] == ["equal", "global", "groups"]
    assert found.mixture is not None and found.mixture.rung == accepted[-1] and found.ensemble is not None
    assert found.mixture.weights[0, 0] > found.mixture.weights[0, 11]
    assert found.ensemble.nll.value < found.modes["logit"].nll.value - 0.02
    alike = studied(noisy(2, 0, seed=5), **FAST)
    assert [rung.name for rung in alike.ladder if rung.accepted] == ["equal"]


def test_baselines_of_the_same_size():
    given = noisy(5, 5, seed=6)
    experts = [replace(expert, recipe="same" if n in (1, 2, 7) else f"{n}") for n, expert in enumerate(given.experts)]
    found = studied(replace(given, experts=experts), limit=2, **FAST)
    best, seeds = found.baselines
    assert len(best.members) == 2 and best.members != seeds.members
    assert set(seeds.members) == {"0001", "0002"} and seeds.name == "one recipe, several seeds"
    assert len(studied(given, limit=2, **FAST).baselines) == 1, "every recipe has one seed"


def test_without_two_experts_there_is_a_reason():
    one = noisy(1, 0, seed=7)
    for experts in ([], one.experts):
        found = studied(replace(one, experts=experts, left_out=["trial 0004: it is gone"]), **FAST)
        assert found.reason == f"an ensemble needs two experts; there are {len(experts)}"
        assert found.ensemble is None and found.left_out == ["trial 0004: it is gone"]


def test_an_ensemble_of_one_is_no_ensemble():
    with pytest.raises(ValueError, match="at least 2"):
        studied(noisy(2, 0, seed=8), limit=1)


SHAPES = {
    "two classes": {"classes": 2, "each": 30},
    "a thousand classes": {"classes": 1000, "each": 2},
    "one image per class": {"classes": 6, "each": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sets_of_other_shapes(shape: dict):
    found = studied(noisy(3, 1, seed=9, **shape), times=50)
    assert isinstance(found, Ensembles) and found.single is not None
    assert all(np.isfinite(score.whole["nll"]) and np.isfinite(score.nll.value) for score in found.growth)


def test_empty_groups_and_classes_without_images_are_unmeasured():
    given = noisy(3, 2, seed=10, classes=8)
    kept = np.flatnonzero(given.target != 7)
    experts = [replace(expert, logits=expert.logits[kept]) for expert in given.experts]
    groups = {"many": np.arange(4), "medium": np.array([], np.int64), "few": np.arange(4, 8)}
    found = studied(replace(given, experts=experts, target=given.target[kept], groups=groups), **FAST)
    assert found.ensemble is not None and found.differences is not None and found.kl is not None
    assert np.isnan(found.ensemble.groups["medium"].value) and np.isnan(found.ensemble.gain_groups["medium"].value)
    assert np.isfinite(found.ensemble.groups["few"].value) and np.isnan(found.kl[:, 7]).all()
    assert "classes" not in [rung.name for rung in found.ladder]


def test_a_bias_per_group_has_to_earn_its_place():
    given = noisy(1, 0, seed=11, classes=12, each=60)
    assert group_bias(given, times=200)[0].rung == "equal"
    off = given.experts[0].logits - np.where(np.isin(np.arange(12), given.groups["few"]), 1.5, 0).astype(np.float32)
    off -= np.log(np.exp(off).sum(1, keepdims=True))
    mixture, gain = group_bias(replace(given, experts=[replace(given.experts[0], logits=off)]), times=200)
    assert mixture.rung == "groups" and gain.low > 0
    few, many = (mixture.bias[given.groups[name]] for name in ("few", "many"))
    assert few[0] - many[0] == pytest.approx(1.5, abs=0.4) and np.ptp(few) == 0


def test_a_run_folder(make: Callable[..., Path]):
    found = study(make(trials=6, classes=12, each=20, failed=1), **FAST)
    assert found.experts == 5 and found.recommended == "ensemble" and found.ensemble is not None
    assert found.ensemble.cost > 0 and found.ensemble.passes == len(found.members)
    again = study(make(trials=6, classes=12, each=20, failed=1), **FAST)
    assert again.ensemble == found.ensemble, "every number comes from the seed"
