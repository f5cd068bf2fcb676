import numpy as np
import pytest

from analysis.criterion import ACCURACY, NLL, criterion

GROUPS = {"many": np.arange(3), "medium": np.array([], int), "few": np.arange(3, 6)}


@pytest.mark.parametrize(
    ("images", "by"),
    [
        ([20] * 6, ACCURACY),
        ([200, 20, 20, 20, 20, 20], ACCURACY),
        ([20, 20, 20, 20, 20, 19], NLL),
        ([19, 20, 20, 20, 20, 20], NLL),
        ([0, 20, 20, 20, 20, 20], ACCURACY),
        ([0] * 6, ACCURACY),
        ([500, 500, 500, 500, 500, 1], NLL),
    ],
)
def test_accuracy_decides_where_every_measured_class_has_twenty_images(images, by):
    assert criterion(images, GROUPS).by == by


def test_the_reason_names_the_group_and_its_rarest_class():
    assert "“few” have only 7 validation images" in criterion([9, 30, 30, 30, 7, 30], GROUPS).why
    assert "“many” have only 1 validation image;" in criterion([1, 30, 30, 30, 7, 30], GROUPS).why
    assert "every measured class" in criterion([0, 30, 30, 30, 30, 30], GROUPS).why


def test_what_decides_has_a_name_among_the_graded_scores():
    assert criterion([20] * 6, GROUPS).of("few") == "few"
    assert criterion([5] * 6, GROUPS).of("few") == "few likelihood"


def test_without_predictions_accuracy_decides():
    assert criterion(None, GROUPS).by == ACCURACY
