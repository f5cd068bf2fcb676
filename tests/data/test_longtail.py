import numpy as np
import pytest

from rayltr.data import PROFILES, long_tail_counts
from rayltr.data.longtail import shuffled

TEN = {
    10: "5000 3871 2997 2320 1796 1391 1077 834 645 500",
    20: "5000 3584 2569 1842 1320 946 678 486 348 250",
    50: "5000 3237 2096 1357 878 568 368 238 154 100",
    100: "5000 2997 1796 1077 645 387 232 139 83 50",
    200: "5000 2775 1540 854 474 263 146 81 45 25",
}
HUNDRED = {
    10: """
        500 488 477 466 455 445 434 424 415 405 396 387 378 369 361 352 344 336 328 321 314 306 299 292 286
        279 273 266 260 254 248 243 237 232 226 221 216 211 206 201 197 192 188 183 179 175 171 167 163 159
        156 152 149 145 142 139 135 132 129 126 123 121 118 115 112 110 107 105 102 100 98 95 93 91 89 87 85
        83 81 79 77 75 74 72 70 69 67 66 64 63 61 60 58 57 56 54 53 52 51 50
    """,
    50: """
        500 480 462 444 426 410 394 379 364 350 336 323 311 299 287 276 265 255 245 235 226 218 209 201 193
        186 178 172 165 158 152 146 141 135 130 125 120 115 111 107 102 98 95 91 87 84 81 78 75 72 69 66 64
        61 59 56 54 52 50 48 46 44 43 41 39 38 36 35 34 32 31 30 29 27 26 25 24 23 22 22 21 20 19 18 18 17
        16 16 15 14 14 13 13 12 12 11 11 10 10 10
    """,
    100: """
        500 477 455 434 415 396 378 361 344 328 314 299 286 273 260 248 237 226 216 206 197 188 179 171 163
        156 149 142 135 129 123 118 112 107 102 98 93 89 85 81 77 74 70 67 64 61 58 56 53 51 48 46 44 42 40
        38 36 35 33 32 30 29 27 26 25 24 23 22 21 20 19 18 17 16 15 15 14 13 13 12 12 11 11 10 10 9 9 8 8 7
        7 7 6 6 6 6 5 5 5 5
    """,
    200: """
        500 473 449 425 403 382 362 343 325 308 292 277 263 249 236 224 212 201 190 180 171 162 154 146 138
        131 124 117 111 105 100 95 90 85 81 76 72 69 65 62 58 55 52 50 47 44 42 40 38 36 34 32 30 29 27 26
        24 23 22 21 20 19 18 17 16 15 14 13 13 12 11 11 10 10 9 9 8 8 7 7 6 6 6 5 5 5 5 4 4 4 4 3 3 3 3 3 2
        2 2 2
    """,
}
HUNDRED_TOTALS = {10: 19573, 20: 15907, 50: 12608, 100: 10847, 200: 9502}
HUNDRED_SHOTS = {10: (69, 31, 0), 20: (53, 47, 0), 50: (41, 41, 18), 100: (35, 35, 30), 200: (30, 31, 39)}
TEN_TOTALS = {10: 20431, 20: 17023, 50: 13996, 100: 12406, 200: 11203}


@pytest.mark.parametrize("ratio", TEN)
def test_published_counts_of_cifar10(ratio):
    counts = long_tail_counts(5000, 10, ratio)
    assert counts == [int(n) for n in TEN[ratio].split()]
    assert sum(counts) == TEN_TOTALS[ratio]


@pytest.mark.parametrize("ratio", HUNDRED)
def test_published_counts_of_cifar100(ratio):
    assert long_tail_counts(500, 100, ratio) == [int(n) for n in HUNDRED[ratio].split()]


@pytest.mark.parametrize("ratio", HUNDRED_TOTALS)
def test_published_totals_and_shots_of_cifar100(ratio):
    counts = np.array(long_tail_counts(500, 100, ratio))
    assert counts.sum() == HUNDRED_TOTALS[ratio]
    few = int((counts < 20).sum())
    many = int((counts > 100).sum())
    assert (many, 100 - many - few, few) == HUNDRED_SHOTS[ratio]


def test_step_keeps_the_first_half():
    assert long_tail_counts(500, 10, 100, "step") == [500] * 5 + [5] * 5
    assert long_tail_counts(100, 5, 3, "step") == [100, 100, 33, 33, 33]


def test_pareto_has_the_shape_of_imagenet_lt():
    counts = np.array(long_tail_counts(1280, 1000, 256, "pareto"))
    assert (counts[0], counts[-1]) == (1280, 5)
    assert abs((counts > 100).sum() - 385) < 25  # the published groups: 385, 479 and 136 classes
    assert abs((counts < 20).sum() - 136) < 15
    assert abs(counts.mean() - 115.8) < 10


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("ratio", [1, 3, 49, 107])
def test_every_profile_falls_from_n_max_to_n_max_over_ratio(profile, ratio):
    counts = long_tail_counts(ratio * 7, 13, ratio, profile)
    assert (counts[0], counts[-1]) == (7 * ratio, 7)  # 49 * (1 / 49) is below 1 in floating point
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((500, 100, 0.01), r"ratio is largest/smallest class: did you mean 100\?"),
        ((500, 100, -2), "ratio -2 is below 1"),
        ((500, 100, float("nan")), "ratio nan is below 1"),
        ((5, 10, 100), "leaves no image in the smallest class, with 5 in the largest"),
        ((5, 1, 2), "at least 2 classes"),
        ((5, 10, 2, "linear"), "no profile 'linear'; profiles: exponential, step, pareto"),
    ],
)
def test_impossible_tails_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        long_tail_counts(*arguments)


def test_ranks_are_those_of_the_published_code():
    target = np.random.default_rng(0).integers(0, 4, 200)
    np.random.seed(3)
    published = []
    for c in range(4):
        found = np.where(target == c)[0]
        np.random.shuffle(found)
        published.append(found)
    ours = shuffled([np.flatnonzero(target == c) for c in range(4)], 3)
    for mine, theirs in zip(ours, published, strict=True):
        np.testing.assert_array_equal(mine, theirs)
