"""All recipes as lines."""

import numpy as np
import pytest

from analysis.figures import parallel
from analysis.figures.parallel import ABSENT, AXES, LINES, axis


def test_numbers_lie_by_their_size():
    heights, ticks = axis([1.0, 2.0, 5.0])
    assert heights == pytest.approx([0, 0.25, 1]) and list(ticks.values()) == ["1", "2", "5"]


def test_numbers_that_span_much_lie_by_their_logarithm():
    heights, ticks = axis([1e-4, 1e-3, 1e-2])
    assert heights == pytest.approx([0, 0.5, 1]) and list(ticks.values()) == ["0.0001", "0.001", "0.01"]


def test_an_axis_of_many_numbers_has_few_ticks():
    heights, ticks = axis(list(np.linspace(3, 4, 50)))
    assert len(ticks) == parallel.TICKS and min(ticks) == 0 and max(ticks) == pytest.approx(1) and len(heights) == 50


def test_values_of_any_kind_lie_above_each_other_and_absent_ones_at_the_bottom():
    heights, ticks = axis(["ldam", None, "ce", "ldam"])
    assert heights == [1.0, 0.0, 0.5, 1.0] and ticks == {0.0: ABSENT, 0.5: "ce", 1.0: "ldam"}
    assert axis([True, False])[1] == {0.0: "False", 1.0: "True"}


def test_numbers_that_some_trials_lack_keep_their_scale_above_these():
    heights, ticks = axis([0.5, None, 0.1, 0.3])
    assert heights == pytest.approx([1, 0, parallel.FLOOR, (1 + parallel.FLOOR) / 2])
    assert ticks[0.0] == ABSENT and list(ticks.values())[1:] == ["0.1", "0.3", "0.5"]


def test_the_best_lines_and_the_first_axes_are_drawn_and_the_table_has_all():
    names = [f"p{i}" for i in range(AXES + 3)]
    params = [{name: i % (2 + place) for place, name in enumerate(names)} for i in range(LINES + 9)]
    figure = parallel.recipes([f"{i:04d}" for i in range(len(params))], params, np.linspace(0, 1, len(params)), names)
    assert len(figure.table.rows) == LINES + 9 and len(figure.table.columns) == AXES + 5
    assert (
        figure.html.count("lines+markers") == LINES
        and "0000: " not in figure.html
        and f"{LINES + 8:04d}: " in figure.html
    )
    assert f"the best {LINES} trials and the {AXES} parameters" in figure.caption


def test_one_trial_and_one_value_are_a_figure_too():
    figure = parallel.recipes(["0000"], [{"lr": 0.1}], [0.5], ["lr"])
    assert figure.html.count("lines+markers") == 1 and "Drawn" not in figure.caption
