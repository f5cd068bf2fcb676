import numpy as np
import pytest

from analysis.diversity import divergence, diversity

TARGET = np.array([0, 0, 0, 0, 1, 1])
ONE = np.array([0, 0, 1, 1, 1, 0])
OTHER = np.array([0, 1, 0, 1, 1, 1])
GROUPS = {"many": np.array([0]), "medium": np.array([], np.int64), "few": np.array([1])}


def test_pairs_by_hand():
    found = diversity(np.stack([ONE, OTHER]), TARGET, GROUPS)
    for name, differ, rescue in (("many", 1 / 2, 1 / 2), ("few", 1 / 2, 1.0), ("all", 1 / 2, 3 / 4)):
        np.testing.assert_allclose(found.disagreement[name], [[0, differ], [differ, 0]], atol=1e-12)
        assert found.rescue[name][0, 1] == pytest.approx(rescue)
    assert found.correlation["many"][0, 1] == pytest.approx(0.0)
    assert np.isnan(found.correlation["few"][0, 1]), "the other makes no errors there"
    assert np.isnan(found.rescue["few"][1, 0])


def test_classes_count_the_same_and_the_correlation_is_that_of_the_errors():
    rng = np.random.default_rng(0)
    target = np.repeat([0, 1, 2], [40, 40, 40])
    pred = rng.integers(0, 3, (4, 120))
    found = diversity(pred, target, {})
    np.testing.assert_allclose(found.correlation["all"], np.corrcoef(pred != target), atol=1e-12)
    repeated = np.concatenate([np.arange(120), np.arange(40), np.arange(40)])
    again = diversity(pred[:, repeated], target[repeated], {})
    for name in ("disagreement", "correlation", "rescue"):
        np.testing.assert_allclose(getattr(again, name)["all"], getattr(found, name)["all"], atol=1e-12)


def test_a_group_without_images_is_not_measured():
    found = diversity(np.stack([ONE, OTHER]), TARGET, GROUPS)
    assert np.isnan(found.disagreement["medium"]).all() and found.rescue["medium"].shape == (2, 2)


def test_divergence_per_class():
    member = np.log([[0.5, 0.5, 0.0 + 1e-30], [0.2, 0.3, 0.5], [0.2, 0.2, 0.6]])
    ensemble = np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5], [0.4, 0.2, 0.4]])
    found = divergence([member, ensemble], ensemble, np.array([0, 0, 2]))
    far = 0.2 * np.log(0.5) + 0.6 * np.log(1.5)
    np.testing.assert_allclose(found, [[0.25 * np.log(2), np.nan, far], [0, np.nan, 0]], atol=1e-9)
