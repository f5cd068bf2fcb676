import numpy as np
import pytest

from analysis.pareto import front, hypervolume


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
