import numpy as np

from rayltr import evaluate
from rayltr.progress import by_head


def test_every_head_has_a_line_and_the_one_that_ships_comes_first():
    counts, target = np.array([200, 50, 5]), np.arange(3).repeat(4)
    right = 9.0 * np.eye(3, dtype=np.float32)[target]
    head_only = right * (target[:, None] == 0) + (target[:, None] > 0) * np.array([9.0, 0.0, 0.0], np.float32)
    logits = {"main": right, "dist": right, "cls": head_only}
    scores = evaluate.tested(logits, target, logits, target, counts)
    first, cls, dist = by_head("test", scores)
    assert first == "test: balanced 100.0, many 100.0, medium 100.0, few 100.0; uncorrected: balanced 100.0"
    assert cls.startswith("  cls: balanced 33.3") and cls.endswith("uncorrected: balanced 33.3")
    assert dist == first.replace("test", "  dist")
