import numpy as np
import pytest

from analysis import resample
from tests.analysis import synthetic

RAGGED = np.repeat(np.arange(7), [6, 1, 0, 3, 5, 2, 4])  # class 2 has no image
GROUPS = {"many": np.array([0, 1]), "medium": np.array([2, 3, 8]), "few": np.array([5, 6]), "none": np.array([], int)}


def slow(hits: np.ndarray, target: np.ndarray, groups: dict, weights: np.ndarray) -> dict[str, np.ndarray]:
    everything = {"balanced": np.unique(np.concatenate([target, *groups.values()]).astype(int)), **groups}
    scores = {name: np.full((len(weights), len(hits)), np.nan) for name in everything}
    for name, classes in everything.items():
        for b, weight in enumerate(weights.astype(float)):
            for m, hit in enumerate(hits.astype(float)):
                own = [(target == c) & (weight > 0) for c in classes]
                means = [(weight[k] * hit[k]).sum() / weight[k].sum() for k in own if k.any()]
                scores[name][b, m] = np.mean(means) if means else np.nan
    return scores


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=tolerance, rtol=0, err_msg=name)


def test_a_draw_takes_one_image_less_than_a_class_has():
    drawn = resample.draws(RAGGED, 50)
    assert drawn.shape == (50, len(RAGGED)) and drawn.dtype == np.uint16
    for c, images in enumerate(np.bincount(RAGGED)):
        assert (drawn[:, c == RAGGED].sum(1) == (max(images - 1, 1) if images else 0)).all()


def test_the_same_seed_draws_the_same_and_another_does_not():
    assert (resample.draws(RAGGED, 20, 3) == resample.draws(RAGGED, 20, 3)).all()
    assert (resample.draws(RAGGED, 20, 3) != resample.draws(RAGGED, 20, 4)).any()


def test_images_of_a_class_may_lie_anywhere():
    order = np.random.default_rng(0).permutation(len(RAGGED))
    drawn = resample.draws(RAGGED[order], 4000)
    assert (drawn[:, RAGGED[order] == 0].sum(1) == 5).all()
    np.testing.assert_allclose(drawn[:, RAGGED[order] == 0].mean(0), 5 / 6, atol=0.06)


@pytest.mark.parametrize("images", [2, 3, 5, 20])
def test_the_variance_over_draws_is_the_sampling_variance_of_a_class_mean(images: int):
    hits = np.arange(images) < (images + 1) // 2
    target = np.zeros(images, int)
    scores = resample.grouped(hits[None], target, {"few": [0]}, resample.draws(target, 40_000))
    assert scores["few"].var() == pytest.approx(hits.var(ddof=1) / images, rel=0.04)


def test_scores_against_a_slow_reference():
    random = np.random.default_rng(0)
    hits = random.random((9, len(RAGGED))) < 0.6
    drawn = resample.draws(RAGGED, 30)
    same(resample.grouped(hits, RAGGED, GROUPS, drawn), slow(hits, RAGGED, GROUPS, drawn), 1e-6)
    same(resample.grouped(hits, RAGGED, GROUPS, drawn == 0), slow(hits, RAGGED, GROUPS, drawn == 0), 1e-6)


def test_scores_as_measured_are_exact():
    hits = np.random.default_rng(1).random((9, len(RAGGED))) < 0.6
    same(resample.grouped(hits, RAGGED, GROUPS), slow(hits, RAGGED, GROUPS, np.ones((1, len(RAGGED)))), 1e-12)


def test_classes_of_no_group_count_in_the_balanced_score():
    scores = resample.grouped([[True, True, False]], [0, 1, 2], {"many": np.array([0])})
    assert scores["balanced"].item() == pytest.approx(2 / 3) and scores["many"].item() == 1


def test_an_image_that_no_draw_left_out_leaves_its_group_unmeasured():
    target = np.array([0, 0, 1])
    drawn = np.array([[1, 0, 1], [0, 1, 1]])
    scores = resample.grouped([[True, False, True]], target, {"many": [0], "few": [1]}, drawn == 0)
    assert np.isnan(scores["few"]).all()
    assert scores["balanced"][:, 0].tolist() == scores["many"][:, 0].tolist() == [0, 1]


def test_a_trial_of_nan_stays_nan_and_spoils_no_other():
    hits = (np.random.default_rng(2).random((3, len(RAGGED))) < 0.5).astype(float)
    drawn = resample.draws(RAGGED, 10)
    alone = resample.grouped(hits[[0, 2]], RAGGED, GROUPS, drawn)
    hits[1] = np.nan
    scores = resample.grouped(hits, RAGGED, GROUPS, drawn)
    assert np.isnan(scores["balanced"][:, 1]).all()
    same({name: score[:, [0, 2]] for name, score in scores.items()}, alone, 0)


def test_trials_that_hit_the_same_images_score_the_same():
    hits = np.random.default_rng(3).random((40, 600)) < 0.5
    target = np.repeat(np.arange(30), 20)
    scores = resample.grouped(hits[np.r_[:40, 7, 7]], target, synthetic.thirds(30), resample.draws(target, 50))
    for score in scores.values():
        assert (score[:, 40:] == score[:, [7]]).all()


def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    made = synthetic.sample(0, trials=11, classes=9, each=4)
    drawn = resample.draws(made.target, 12)
    whole = resample.grouped(made.hits, made.target, made.groups, drawn)
    monkeypatch.setattr(resample, "CHUNK", 40)
    same(resample.grouped(made.hits, made.target, made.groups, drawn), whole, 2e-6)


@pytest.mark.parametrize("classes, each, trials", [(2, 20, 5), (1000, 2, 3), (100, 20, 1)])
def test_any_number_of_classes_and_trials(classes: int, each: int, trials: int):
    made = synthetic.sample(0, trials=trials, classes=classes, each=each)
    scores = resample.grouped(made.hits, made.target, made.groups, resample.draws(made.target, 20))
    assert {name: score.shape for name, score in scores.items()} == dict.fromkeys(
        ("balanced", *made.groups), (20, trials)
    )
    empty = [name for name, classes in made.groups.items() if not len(classes)]
    assert [name for name, score in scores.items() if np.isnan(score).any()] == empty


def test_no_images_and_no_trials():
    assert np.isnan(resample.grouped(np.ones((2, 0), bool), [], GROUPS)["balanced"]).all()
    assert resample.draws([], 3).shape == (3, 0)
    assert resample.grouped(np.ones((0, 2), bool), [0, 1], GROUPS)["many"].shape == (1, 0)


def test_classes_without_images_are_counted():
    assert resample.unmeasured(RAGGED, GROUPS) == {"balanced": 2, "many": 0, "medium": 2, "few": 0, "none": 0}
