from itertools import combinations

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume

from analysis import resample
from analysis.pareto import area, attainment, front, hypervolume, on_front, thinned
from tests.analysis import synthetic


def slow_front(points: np.ndarray) -> set[int]:
    kept = set()
    for i, p in enumerate(points):
        beaten = any((q >= p).all() and (q > p).any() for q in points)
        repeated = any((points[j] == p).all() for j in range(i))
        if not (beaten or repeated):
            kept.add(i)
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_front_against_brute_force(seed: int):
    points = np.random.default_rng(seed).integers(0, 8, (30, 2)) / 8  # many ties
    found = front(points)
    assert set(found.tolist()) == slow_front(points)
    assert (np.diff(points[found, 0]) > 0).all() and (np.diff(points[found, 1]) < 0).all()


def test_front_keeps_the_first_of_equal_points_and_drops_nan():
    assert front([[np.nan, 9], [1, 2], [1, 2], [0, np.nan], [2, 1]]).tolist() == [1, 4]
    assert front(np.empty((0, 2))).size == 0
    assert front([[np.nan, np.nan]]).size == 0


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_against_a_count_of_cells(seed: int):
    points = np.random.default_rng(seed).integers(0, 20, (12, 2))
    cells = sum(any(x < p[0] and y < p[1] for p in points) for x in range(20) for y in range(20))
    assert hypervolume(points) == pytest.approx(cells)


def test_hypervolume_of_known_fronts():
    assert hypervolume([[0.5, 0.4]]) == pytest.approx(0.2)
    assert hypervolume([[0.5, 0.4], [0.2, 0.8], [0.1, 0.1]]) == pytest.approx(0.2 * 0.8 + 0.3 * 0.4)
    assert hypervolume([[0.5, 0.4]], reference=(0.3, 0.5)) == 0
    assert hypervolume(np.empty((0, 2))) == 0


def test_volume_of_known_fronts():
    assert hypervolume([[0.5, 0.4, 0.1]]) == pytest.approx(0.02)
    steps = [[1, 2, 3], [3, 2, 1], [2, 3, 2], [1, 1, 1]]
    assert hypervolume(steps) == pytest.approx(2 * 1 + 2 * 3 + (3 * 2 + 2 * 1))  # slices at 3, 2 and 1
    assert hypervolume(steps, reference=(1, 1, 1)) == pytest.approx(2)
    assert hypervolume([[1, 1, 1], [1, 1, 1], [np.nan, 2, 2]]) == pytest.approx(1)
    assert hypervolume(np.empty((0, 3))) == 0


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_hypervolume_is_that_of_optuna(dimensions: int, seed: int):
    random = np.random.default_rng(seed)
    points = random.random((40, dimensions)) if seed % 2 else random.integers(0, 6, (40, dimensions)) / 5
    reference = np.full(dimensions, 0.1)
    inside = points[(points > reference).all(1)]
    assert hypervolume(points, reference) == pytest.approx(compute_hypervolume(-inside, -reference), abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_a_thinned_front_covers_the_front_and_cannot_be_shorter(seed: int):
    points, eps = np.random.default_rng(seed).random((60, 2)), 0.08
    edge, kept = points[front(points)], thinned(points, eps)
    near = (edge[None] <= edge[:, None] + eps).all(2)  # [kept, covered]
    assert set(kept) <= set(front(points)) and (np.diff(points[kept, 0]) > 0).all()
    assert (edge[:, None] <= points[kept] + eps).all(2).any(1).all()
    shortest = next(
        k for k in range(1, 60) if any(near[list(few)].any(0).all() for few in combinations(range(len(edge)), k))
    )
    assert len(kept) == shortest


def test_thinning_nothing():
    points = [[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]
    assert thinned(points).tolist() == front(points).tolist()
    assert thinned([[np.nan, 1]]).size == thinned(np.empty((0, 2))).size == 0


@pytest.mark.parametrize("seed", range(5))
def test_probability_of_being_on_the_front_against_brute_force(seed: int):
    many, few = np.random.default_rng(seed).integers(0, 6, (2, 30, 12)) / 6
    share = np.zeros(12)
    for x, y in zip(many, few, strict=True):
        worse = (x[:, None] <= x) & (y[:, None] <= y) & ((x[:, None] < x) | (y[:, None] < y))
        share += ~worse.any(1)
    np.testing.assert_allclose(on_front(many, few), share / 30, atol=1e-12)


def test_equal_trials_are_both_on_the_front_and_unmeasured_ones_are_nan():
    share = on_front([[0.5, 0.5, np.nan, 0.4]], [[0.5, 0.5, 0.9, 0.5]])
    assert share[[0, 1, 3]].tolist() == [1, 1, 0] and np.isnan(share[2])
    assert on_front([[0.5]], [[0.5]]).tolist() == [1]
    assert np.isnan(on_front([[np.nan]], [[np.nan]])).all()


def areas(repetitions: int, **shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error of the naive and of the corrected area, and whether the interval holds what the found front covers."""
    rows = []
    for seed in range(repetitions):
        made = synthetic.sample(seed, slides=np.linspace(-0.4, 0.8, 7), **shape)
        scores = resample.grouped(made.hits, made.target, made.groups)
        points = np.stack([scores["many"][0], scores["few"][0]], 1)
        truth = hypervolume(np.stack([made.true("many"), made.true("few")], 1)[front(points)])
        found = area(made.hits, made.target, made.groups, 60, seed)
        rows.append((hypervolume(points) - truth, found.value - truth, found.low <= truth <= found.high))
    return tuple(np.array(rows).T)


def test_area_is_corrected_for_the_choice_of_its_points():
    naive, corrected, held = areas(100, classes=30, each=10, trials=20)
    assert naive.mean() > 0.03 and abs(corrected.mean()) < 0.4 * naive.mean()
    assert 0.9 <= held.mean() <= 0.98


@pytest.mark.slow
def test_area_of_full_size_studies():
    naive, corrected, held = areas(200, classes=100, each=20, trials=40)
    assert naive.mean() > 0.01 and abs(corrected.mean()) < 0.4 * naive.mean()
    assert 0.9 <= held.mean() <= 0.98


def test_area_of_one_trial_and_of_none_that_was_measured():
    made = synthetic.sample(0, trials=1)
    many, few = (resample.grouped(made.hits, made.target, made.groups)[name].item() for name in ("many", "few"))
    found = area(made.hits, made.target, made.groups, 400)
    assert found.value == pytest.approx(many * few, abs=0.003) and found.low < many * few < found.high
    assert np.isnan(area(made.hits, made.target, {"many": made.groups["many"], "few": np.array([], int)}, 10).value)
    assert np.isnan(area(np.full(made.hits.shape, np.nan), made.target, made.groups, 10).value)


def test_attainment_of_known_fronts():
    fronts = [[[1, 3], [3, 1]], [[2, 2]], [[0.5, 4], [2.5, 0.5]]]
    assert attainment(fronts, share=0).tolist() == [[0.5, 4], [1, 3], [2, 2], [3, 1]]
    assert attainment(fronts, share=0.5).tolist() == [[0.5, 3], [1, 2], [2, 1], [2.5, 0.5]]
    assert attainment(fronts, share=1).tolist() == [[0.5, 2], [2, 0.5]]
    assert attainment(fronts[:1]).tolist() == [[1, 3], [3, 1]]
    assert attainment([]).shape == attainment([np.empty((0, 2))]).shape == (0, 2)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_attainment_against_a_grid(share: float):
    random = np.random.default_rng(0)
    fronts = [random.integers(1, 9, (5, 2)).astype(float) for _ in range(7)]
    cells = np.stack(np.meshgrid(np.arange(1, 9), np.arange(1, 9)), -1).reshape(-1, 2)
    reached = np.mean([[(one >= cell).all(1).any() for cell in cells] for one in fronts], 0) >= share - 1e-9
    found = attainment(fronts, share)
    assert [(found >= cell).all(1).any() for cell in cells] == reached.tolist()
