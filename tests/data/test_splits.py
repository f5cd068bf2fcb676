import dataclasses
import json

import numpy as np
import pytest

from rayltr.data import long_tail_counts, subset
from rayltr.data.pool import Part, Pool
from tests.data.image_files import part_of, pool_of


def per_class(split, classes):
    return np.bincount(split.target, minlength=classes).tolist()


def rows_of(data):
    return {name: set(found) for name, found in data.manifest["rows"].items()}


def test_splits_do_not_overlap_and_images_follow_their_targets():
    pool = pool_of([30] * 4, test=0)
    data = subset(pool, ratio=5)
    rows = rows_of(data)
    assert data.manifest["taken_from"] == {"train": "train", "val": "train", "test": "train"}
    assert len(rows["train"] | rows["val"] | rows["test"]) == sum(data.manifest["images"].values())
    part = pool.parts["train"]
    for name, split in {"train": data.train, "val": data.val, "test": data.unseal()}.items():
        chosen = np.array(data.manifest["rows"][name])
        np.testing.assert_array_equal(split.take(np.arange(len(split))), part.images[chosen])
        np.testing.assert_array_equal(split.target, part.target[chosen])
        assert split.target.dtype == np.int64


def test_take_gives_the_images_asked_for_in_that_order():
    data = subset(pool_of([9] * 3))
    everything = data.train.take(np.arange(len(data.train)))
    np.testing.assert_array_equal(data.train.take(np.array([5, 0, 5])), everything[[5, 0, 5]])
    assert everything.dtype == np.uint8
    assert data.train.take(np.array([], np.int64)).shape == (0, 2, 2, 3)


def test_the_test_split_is_reachable_through_unseal_alone():
    data = subset(pool_of([9] * 3))
    public = [field.name for field in dataclasses.fields(data) if not field.name.startswith("_")]
    assert not any(getattr(data, name) is data.unseal() for name in public)
    assert per_class(data.unseal(), 3) == [2, 2, 2]


# The size of the draw and of the surplus.


def test_surplus_takes_from_what_the_draw_left_and_reduces_the_head():
    data = subset(pool_of([50] * 10), ratio=10)
    wanted = 10  # 2000 / 10 within 20 .. 200, but at most a fifth of 50
    drawn = long_tail_counts(50, 10, 10)
    assert per_class(data.val, 10) == [wanted] * 10
    assert data.counts.tolist() == [min(n, 50 - wanted) for n in drawn]
    assert data.counts.dtype == np.int64
    assert data.manifest["reduced"] == {"c0": 10}
    assert (
        "training images given up so that every class has 10 for validation: class c0 gave 10"
        in data.manifest["warnings"]
    )


def test_paper_split_keeps_the_draw_and_leaves_the_head_unvalidated():
    data = subset(pool_of([50] * 10), ratio=10, paper_split=True)
    assert data.counts.tolist() == long_tail_counts(50, 10, 10)
    assert per_class(data.val, 10) == [0, *[10] * 9]
    assert data.manifest["unmeasured"] == ["c0"]
    assert data.manifest["reduced"] == {}
    assert "fewer than 10 validation images: c0 (0)" in data.manifest["warnings"]


def test_reduced_training_set_lies_in_the_published_one():
    pool = pool_of([50] * 10)
    assert rows_of(subset(pool, ratio=10))["train"] < rows_of(subset(pool, ratio=10, paper_split=True))["train"]


@pytest.mark.parametrize(("classes", "each", "wanted"), [(4, 1500, 200), (100, 150, 20), (20, 600, 100), (4, 50, 10)])
def test_surplus_size(classes, each, wanted):
    assert per_class(subset(pool_of([each] * classes), ratio=5).val, classes) == [wanted] * classes


@pytest.mark.parametrize("in_order", [True, False])
def test_draws_nest_and_follow_the_seed(in_order):
    pool = pool_of([200] * 5, in_order=in_order)
    rows = {ratio: rows_of(subset(pool, ratio=ratio, paper_split=True))["train"] for ratio in (2, 10, 50)}
    assert rows[50] < rows[10] < rows[2]
    other = subset(pool, ratio=10, paper_split=True, imbalance_seed=1)
    assert rows_of(other)["train"] != rows[10]
    assert other.counts.tolist() == long_tail_counts(200, 5, 10)


def test_an_ordered_source_gives_the_published_images():
    pool = pool_of([40] * 5, in_order=True)
    target, published = pool.parts["train"].target, set()
    np.random.seed(0)
    for c, count in enumerate(long_tail_counts(40, 5, 8)):
        found = np.where(target == c)[0]
        np.random.shuffle(found)
        published |= set(found[:count].tolist())
    assert rows_of(subset(pool, ratio=8, paper_split=True))["train"] == published


def test_the_smallest_class_is_the_head_of_a_draw():
    assert subset(pool_of([30, 60, 30, 45]), ratio=3, paper_split=True).counts.tolist() == long_tail_counts(30, 4, 3)


def test_the_split_seed_moves_validation_but_not_training():
    pool = pool_of([50] * 4)
    one, two = (rows_of(subset(pool, ratio=10, paper_split=True, split_seed=seed)) for seed in (0, 1))
    assert one["train"] == two["train"]
    assert one["val"] != two["val"]


# Protocols that take validation images from the training images.


def test_cross_validation_folds_cover_every_image_of_small_classes_once():
    sizes = [1, 2, 4, 5, 7, 8, 53]
    folds = [subset(pool_of(sizes), validation="cv", fold=fold) for fold in range(5)]
    val = np.array([per_class(data.val, 7) for data in folds])
    assert val[:, 0].sum() == 0  # a single image stays in training
    assert (val[0, 1:] >= 1).all()
    assert (val <= np.clip(np.round(np.array(sizes) / 5), 1, 20)).all()
    assert val.sum(0).tolist() == [0, 2, 4, 5, 5, 8, 53]  # 7: five folds of one image
    seen = [row for data in folds for row in data.manifest["rows"]["val"]]
    assert len(seen) == len(set(seen))
    for data in folds:
        assert (data.counts + per_class(data.val, 7)).tolist() == sizes
    assert folds[0].manifest["unmeasured"] == ["c0"]
    assert folds[4].manifest["unmeasured"] == ["c0", "c1", "c2"]


def test_cross_validation_takes_at_most_twenty_images():
    assert per_class(subset(pool_of([300, 40]), validation="cv").val, 2) == [20, 8]


def test_holdout_leaves_small_classes_alone_and_says_so():
    data = subset(pool_of([4, 5, 7, 53, 300]), validation="holdout")
    assert per_class(data.val, 5) == [0, 1, 1, 11, 20]
    assert data.manifest["unmeasured"] == ["c0"]
    assert any(line.startswith("tail estimate unreliable") for line in data.manifest["warnings"])


def test_official_uses_the_val_split_of_the_source():
    data = subset(pool_of([5, 9, 30], val=3))
    assert data.manifest["protocol"]["validation"] == "official"
    assert data.counts.tolist() == [5, 9, 30]
    assert per_class(data.val, 3) == [3, 3, 3]


@pytest.mark.parametrize(
    ("pool", "keywords", "protocol"),
    [
        (pool_of([40] * 3), {}, "cv"),
        (pool_of([40] * 3), {"ratio": 4}, "surplus"),
        (pool_of([40] * 3, val=2), {}, "official"),
        (pool_of([40] * 3, val=2), {"ratio": 4}, "official"),
        (pool_of([40] * 3, val=2), {"ratio": 4, "validation": "surplus"}, "surplus"),
        (pool_of([40] * 3), {"ratio": 4, "validation": "cv"}, "cv"),
    ],
)
def test_automatic_protocol(pool, keywords, protocol):
    data = subset(pool, **keywords)
    assert data.manifest["protocol"]["validation"] == protocol
    unused = "the val split of the source is not used"
    assert (unused in data.manifest["warnings"]) == ("val" in pool.parts and protocol != "official")


# Test splits that have to be made.


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [([2, 3, 4, 10, 43], 0.2, [0, 1, 1, 2, 9]), ([10, 20], 0.5, [5, 10]), ([3, 5, 20], 0.9, [2, 4, 18])],
)
def test_a_missing_test_split_is_held_out(sizes, fraction, expected):
    data = subset(pool_of(sizes, test=0), test_fraction=fraction, validation="cv")
    assert per_class(data.unseal(), len(sizes)) == expected
    assert "the source has no test split: one was held out of its training images" in data.manifest["warnings"]


def test_a_test_split_held_out_for_a_draw_is_balanced():
    assert per_class(subset(pool_of([40, 60, 50], test=0), ratio=4).unseal(), 3) == [8, 8, 8]


def test_classes_without_test_images_are_named():
    data = subset(pool_of([2, 10, 10], test=0))
    assert "no test image of c0" in data.manifest["warnings"]


# Identity.


def shuffled_pool(pool: Pool, seed: int) -> Pool:
    def mixed(part: Part) -> Part:
        order = np.random.default_rng(seed).permutation(len(part.target))
        return Part(part.images[order], part.target[order], part.digests[order])

    return dataclasses.replace(pool, parts={name: mixed(part) for name, part in pool.parts.items()})


@pytest.mark.parametrize("keywords", [{}, {"ratio": 5}, {"validation": "holdout"}, {"ratio": 5, "paper_split": True}])
def test_the_order_of_the_source_does_not_matter(keywords):
    pool = pool_of([30] * 4, test=0)
    one, two = subset(pool, **keywords), subset(shuffled_pool(pool, 9), **keywords)
    assert one.digest == two.digest
    assert one.manifest["hashes"] == two.manifest["hashes"]
    for a, b in ((one.train, two.train), (one.val, two.val), (one.unseal(), two.unseal())):
        np.testing.assert_array_equal(a.take(np.arange(len(a))), b.take(np.arange(len(b))))


@pytest.mark.parametrize(
    "keywords", [{"ratio": 4}, {"ratio": 5, "imbalance_seed": 1}, {"ratio": 5, "split_seed": 1}, {"validation": "cv"}]
)
def test_other_splits_have_other_digests(keywords):
    pool = pool_of([30] * 4)
    assert subset(pool, **keywords).digest != subset(pool, ratio=5).digest


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_one_pixel_of_any_split_changes_the_digest(name):
    pool = pool_of([5] * 3, val=2)
    changed = dict(pool.parts)
    digests = changed[name].digests.copy()
    digests[0, 0] ^= 1
    changed[name] = dataclasses.replace(changed[name], digests=digests)
    assert subset(pool).digest != subset(dataclasses.replace(pool, parts=changed)).digest


def test_class_names_and_published_statistics_are_part_of_the_digest():
    pool = pool_of([9] * 2)
    named = dataclasses.replace(pool, classes=("cat", "dog"))
    scaled = dataclasses.replace(pool, normal=((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))
    assert len({subset(found).digest for found in (pool, named, scaled)}) == 3
    assert subset(scaled).mean == (0.1, 0.2, 0.3)


def test_mean_and_std_are_those_of_the_training_images_in_use():
    data = subset(pool_of([40] * 3), ratio=4)
    pixels = data.train.take(np.arange(len(data.train))) / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), atol=1e-6)


def test_at_most_ten_thousand_images_are_measured():
    part = part_of([10_001, 10_001], 0)
    data = subset(Pool(("a", "b"), {"train": part, "test": part}, (2, 2)), validation="cv")
    assert len(data.train) > 19_900
    sample = data.train.take(np.arange(0, len(data.train), 2)) / 255
    np.testing.assert_allclose(data.mean, sample.mean((0, 1, 2)), atol=1e-6)


def test_a_constant_channel_is_not_scaled():
    part = Part(np.full((8, 2, 2, 3), 51, np.uint8), np.repeat([0, 1], 4), part_of([4, 4], 0).digests)
    data = subset(Pool(("a", "b"), {"train": part, "test": part}, (2, 2)))
    assert (data.mean, data.std) == ((0.2, 0.2, 0.2), (1.0, 1.0, 1.0))


def test_the_manifest_is_json_and_tells_the_draw():
    data = subset(pool_of([30] * 4), ratio=5, imbalance_seed=7)
    manifest = json.loads(json.dumps(data.manifest))
    assert manifest["imbalance_seed"] == 7
    assert manifest["counts"] == data.counts.tolist()
    assert manifest["images"] == {"train": len(data.train), "val": len(data.val), "test": 8}
    assert manifest["skipped"] == {"count": 0, "first": []}


@pytest.mark.parametrize(
    ("pool", "keywords", "message"),
    [
        (pool_of([9] * 3), {"validation": "loo"}, "no validation protocol 'loo'; protocols: official, surplus, cv"),
        (pool_of([9] * 3), {"validation": "official"}, "own val split; possible here: cv, holdout"),
        (pool_of([9] * 3), {"validation": "surplus"}, "needs a ratio, which leaves images over; possible here: cv"),
        (pool_of([9] * 3), {"paper_split": True}, "paper_split needs a ratio: validation cv takes training images"),
        (pool_of([9] * 3), {"fold": 5}, "folds are 0 to 4"),
        (pool_of([9] * 3), {"fold": -1}, "folds are 0 to 4"),
        (pool_of([50] * 3), {"ratio": 2, "fold": 1}, "only with validation cv"),
        (pool_of([50] * 3), {"ratio": 0.01}, r"did you mean 100\?"),
        (pool_of([4] * 3), {"ratio": 2}, "the smallest has 4 images: use cv or holdout"),
        (pool_of([9] * 3, test=0), {"test_fraction": 1.5}, "between 0 and 1, not 1.5"),
        (pool_of([9, 0, 9]), {}, "no training image in class c1$"),
        (pool_of([1, 1]), {}, "validation cv needs classes with more images"),
        (pool_of([4, 4]), {"validation": "holdout"}, "validation holdout needs classes with more images"),
    ],
)
def test_what_is_impossible_is_refused(pool, keywords, message):
    with pytest.raises(ValueError, match=message):
        subset(pool, **keywords)
