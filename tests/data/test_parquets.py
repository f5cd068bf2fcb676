from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayltr.data import images, load, long_tail_counts
from rayltr.data.parquets import parquet, shards_of
from rayltr.spec import fn
from tests.data.image_files import encoded, noise, png, write_folder, write_parquet

NAMES = ["ant", "bee", "cat"]
TRAIN, TEST = noise((30, 4, 4, 3), 0), noise((9, 4, 4, 3), 1)
TRAIN_TARGET, TEST_TARGET = np.arange(30) % 3, np.arange(9) % 3
CIFAR = Path(__file__).parents[2].parent / "shared" / "data" / "cifar100"


def everything(split):
    return split.take(np.arange(len(split)))


@pytest.fixture
def root(tmp_path):
    """Two shards of training images and one of test images, with class names."""
    for number, rows in enumerate((slice(0, 20), slice(20, 30))):
        columns = {"label": TRAIN_TARGET[rows].tolist()}
        path = tmp_path / "data" / f"train-0000{number}-of-00002.parquet"
        write_parquet(path, encoded(TRAIN[rows]), columns, {"label": NAMES})
    columns = {"label": TEST_TARGET.tolist()}
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", encoded(TEST), columns, {"label": NAMES})
    return tmp_path


def test_shards_names_and_order(root):
    pool = parquet(root=str(root))
    assert pool.classes == tuple(NAMES)
    np.testing.assert_array_equal(pool.parts["train"].images, TRAIN)
    np.testing.assert_array_equal(pool.parts["train"].target, TRAIN_TARGET)
    np.testing.assert_array_equal(pool.parts["test"].images, TEST)


@pytest.mark.parametrize("keywords", [{}, {"ratio": 1.5}, {"validation": "holdout", "split_seed": 3}, {"size": 7}])
def test_the_same_images_as_folder_and_parquet_are_the_same_data(root, tmp_path_factory, keywords):
    place = tmp_path_factory.mktemp("folder")
    write_folder(place, TRAIN[::-1], TRAIN_TARGET[::-1], NAMES)
    write_folder(place, TEST, TEST_TARGET, NAMES, "test")
    one, two = load(fn("parquet", root=str(root), **keywords)), load(fn("folder", root=str(place), **keywords))
    assert one.digest == two.digest
    assert one.manifest["hashes"] == two.manifest["hashes"]
    for a, b in ((one.train, two.train), (one.val, two.val), (one.unseal(), two.unseal())):
        np.testing.assert_array_equal(everything(a), everything(b))
        np.testing.assert_array_equal(a.target, b.target)


def test_lazy_images_equal_those_in_memory(root, monkeypatch):
    eager, lazy = (load(fn("parquet", root=str(root), in_memory_gb=gb)) for gb in (8.0, 0.0))
    assert lazy.train.lazy and lazy.digest == eager.digest
    np.testing.assert_array_equal(everything(lazy.train), everything(eager.train))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)  # single images come from a flat copy
    again = load(fn("parquet", root=str(root), in_memory_gb=0.0))
    np.testing.assert_array_equal(everything(again.unseal()), everything(eager.unseal()))


def test_lazy_images_come_from_row_groups_where_there_is_no_cache(root, tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("RAYLTR_CACHE", str(tmp_path / "blocked"))
    with pytest.warns(RuntimeWarning, match="data stay in memory"):
        lazy = load(fn("parquet", root=str(root), in_memory_gb=0.0))
    rows = np.random.default_rng(0).permutation(len(lazy.train))
    np.testing.assert_array_equal(lazy.train.take(rows), TRAIN[lazy.train.rows[rows]])


def test_the_second_load_decodes_nothing(root, monkeypatch):
    one = load(fn("parquet", root=str(root)))
    monkeypatch.setattr(images, "decode", None)
    two = load(fn("parquet", root=str(root)))
    assert one.manifest == two.manifest and isinstance(two.train.images, np.memmap)


# Files and splits.


def test_a_single_file_is_all_training(root):
    pool = parquet(root=str(root / "data" / "test-00000-of-00001.parquet"))
    assert list(pool.parts) == ["train"] and len(pool.parts["train"].target) == 9


def test_folders_may_name_the_split(tmp_path):
    for split, images_, target in (("train", TRAIN, TRAIN_TARGET), ("validation", TEST, TEST_TARGET)):
        write_parquet(tmp_path / "default" / split / "0000.parquet", encoded(images_), {"label": target.tolist()})
    data = load(fn("parquet", root=str(tmp_path)))
    assert data.manifest["images"] == {"train": 24, "val": 6, "test": 9}
    assert "the only other split, val, is the test" in data.manifest["warnings"]
    assert data.classes == ("0", "1", "2")


def test_nameless_files_are_all_training_but_do_not_mix_with_named_ones(tmp_path):
    for name in ("0000", "0001"):
        write_parquet(tmp_path / f"{name}.parquet", encoded(TRAIN), {"label": TRAIN_TARGET.tolist()})
    assert len(parquet(root=str(tmp_path)).parts["train"].target) == 60
    (tmp_path / "0000.parquet").rename(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="0001.parquet: neither name nor folder tells its split"):
        parquet(root=str(tmp_path))


def test_a_split_without_targets_is_not_used(root):
    write_parquet(root / "validation.parquet", encoded(TEST), {"label": TEST_TARGET.tolist()})
    write_parquet(root / "data" / "test-00000-of-00001.parquet", encoded(TEST), {"label": [-1] * 9})
    data = load(fn("parquet", root=str(root)))
    assert data.manifest["images"]["test"] == 9
    assert "all targets of test are -1: it is not used" in data.manifest["warnings"]


def test_no_training_files(root, tmp_path_factory):
    for path in (root / "data").glob("train*"):
        path.rename(path.with_name(path.name.replace("train", "val")))
    for place in (root, tmp_path_factory.mktemp("empty")):
        with pytest.raises(ValueError, match="no Parquet file of a training split"):
            parquet(root=str(place))


def test_a_file_that_is_not_parquet(root):
    path = root / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet is not a readable Parquet file"):
        parquet(root=str(root))


# Columns.


def one_file(tmp_path, images_, columns, names=None):
    write_parquet(tmp_path / "train.parquet", images_, columns, names)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("columns", "names", "chosen"),
    [
        ({"id": 9, "label": 0}, {}, "label"),
        ({"coarse_label": 9, "fine_label": 0}, {"coarse_label": NAMES * 2}, "fine_label"),
        ({"kind": 0, "genus": 9}, {"kind": NAMES, "genus": NAMES[:2]}, "kind"),
        ({"year": 9, "species": 0}, {"species": NAMES}, "species"),
        ({"anything": 0}, {}, "anything"),
    ],
)
def test_the_target_column(tmp_path, columns, names, chosen):
    table = {name: (TRAIN_TARGET + shift).tolist() for name, shift in columns.items()}
    pool = parquet(root=one_file(tmp_path, encoded(TRAIN), table, names))
    np.testing.assert_array_equal(pool.parts["train"].target, TRAIN_TARGET)
    assert columns[chosen] == 0


def test_the_keywords_choose_columns(tmp_path):
    columns = {"label": [0] * 30, "other": TRAIN_TARGET.tolist(), "mask": encoded(TRAIN[::-1])}
    pool = parquet(root=one_file(tmp_path, encoded(TRAIN), columns), target="other", image="mask")
    np.testing.assert_array_equal(pool.parts["train"].target, TRAIN_TARGET)
    np.testing.assert_array_equal(pool.parts["train"].images, TRAIN[::-1])


def test_a_binary_column_holds_images_too(tmp_path):
    pool = parquet(root=one_file(tmp_path, [png(image) for image in TRAIN], {"label": TRAIN_TARGET.tolist()}))
    np.testing.assert_array_equal(pool.parts["train"].images, TRAIN)


def test_a_struct_without_paths(tmp_path):
    rows = [{"bytes": png(image)} for image in TRAIN]
    rows[3] = {"bytes": None}
    root = one_file(tmp_path, rows, {"label": TRAIN_TARGET.tolist()})
    assert parquet(root=root, skip_corrupt=True).skipped == (f"{root}/train.parquet, row 3",)


def test_the_images_of_one_file_without_targets(tmp_path):
    shards = shards_of(Path(one_file(tmp_path, encoded(TRAIN), {"name": ["x"] * 30})) / "train.parquet")
    assert len(shards) == 30
    assert shards.read(np.array([29, 0, 7])) == [png(TRAIN[29]), png(TRAIN[0]), png(TRAIN[7])]


def test_a_struct_of_bytes_goes_before_a_binary_column(tmp_path):
    columns = {"label": TRAIN_TARGET.tolist(), "hash": [b"x"] * 30}
    np.testing.assert_array_equal(
        parquet(root=one_file(tmp_path, encoded(TRAIN), columns)).parts["train"].images, TRAIN
    )


@pytest.mark.parametrize(
    ("columns", "keywords", "message"),
    [
        ({"name": ["a"] * 30}, {}, "no integer column can be the target; columns: image, name"),
        ({"a": [0] * 30, "b": [0] * 30}, {}, "several integer columns; choose the target with target=: a, b"),
        ({"label": [0] * 30}, {"target": "lable"}, "target='lable' is no column .* possible: label"),
        ({"name": ["a"] * 30}, {"target": "name"}, "possible: none of image, name"),
        ({"label": [0] * 30, "more": encoded(TRAIN)}, {}, "several columns hold images; .* image=: image, more"),
        ({"label": [0] * 30}, {"image": "label"}, "image='label' is no column that can be the image; possible: image"),
        ({"label": [0] * 29 + [None]}, {}, "train.parquet has 1 rows without a value in 'label'"),
    ],
)
def test_unclear_columns(tmp_path, columns, keywords, message):
    with pytest.raises(ValueError, match=message):
        parquet(root=one_file(tmp_path, encoded(TRAIN), columns), **keywords)


def test_no_image_column(tmp_path):
    pq.write_table(pa.table({"path": ["a.png"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column holds images .* columns: path, label"):
        parquet(root=str(tmp_path))


def test_a_shard_that_lacks_a_column(root):
    write_parquet(root / "data" / "train-00002-of-00003.parquet", encoded(TRAIN), {"other": TRAIN_TARGET.tolist()})
    with pytest.raises(ValueError, match="train-00002-of-00003.parquet lacks the column 'label'"):
        parquet(root=str(root))


def test_targets_outside_the_classes(root):
    write_parquet(root / "data" / "test-00000-of-00001.parquet", encoded(TEST), {"label": [3, *[0] * 8]})
    with pytest.raises(ValueError, match="test: .*test-.*, row 0 has target 3, outside the training classes 0 to 2"):
        parquet(root=str(root))


def test_a_class_without_rows(tmp_path):
    columns, names = {"label": TRAIN_TARGET.tolist()}, {"label": [*NAMES, "dog"]}
    with pytest.raises(ValueError, match="no training image in class dog$"):
        load(fn("parquet", root=one_file(tmp_path, encoded(TRAIN), columns, names)))


# Images.


def test_corrupt_rows_are_named_or_skipped(root):
    broken = encoded(TRAIN[20:])
    broken[8]["bytes"] = b"broken"
    broken[9] = None
    columns = {"label": TRAIN_TARGET[20:].tolist()}
    write_parquet(root / "data" / "train-00001-of-00002.parquet", broken, columns, {"label": NAMES})
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet, row 8 cannot be read as an image"):
        load(fn("parquet", root=str(root)))
    for gb in (8.0, 0.0):
        data = load(fn("parquet", root=str(root), skip_corrupt=True, in_memory_gb=gb))
        assert data.manifest["skipped"]["count"] == 2
        assert data.counts.sum() + len(data.val) == 28
        np.testing.assert_array_equal(everything(data.train), TRAIN[data.train.rows])


@pytest.mark.parametrize("gb", [8.0, 0.0])
def test_paths_are_read_beside_the_file_where_bytes_are_missing(tmp_path, gb):
    (tmp_path / "png").mkdir()
    rows = encoded(TRAIN)
    for number in range(0, 30, 2):
        (tmp_path / "png" / f"{number}.png").write_bytes(rows[number]["bytes"])
        rows[number] = {"bytes": None, "path": f"png/{number}.png"}
    source = fn("parquet", root=one_file(tmp_path, rows, {"label": TRAIN_TARGET.tolist()}), in_memory_gb=gb)
    one = load(source)
    np.testing.assert_array_equal(everything(one.train), TRAIN[one.train.rows])
    (tmp_path / "png" / "0.png").write_bytes(png(noise((4, 4, 3), 99)))
    assert load(source).digest != one.digest
    (tmp_path / "png" / "0.png").unlink()
    with pytest.raises(ValueError, match="train.parquet, row 0 cannot be read"):
        load(source)


@pytest.mark.data
@pytest.mark.skipif(not CIFAR.is_dir(), reason="the real CIFAR-100 is not here")
def test_long_tailed_cifar100_has_the_published_counts():
    data = load(fn("parquet", root=str(CIFAR), ratio=100, paper_split=True))
    assert len(data.train) == 10_847
    assert data.counts.tolist() == long_tail_counts(500, 100, 100)
    assert data.manifest["images"] == {"train": 10_847, "val": 1_980, "test": 10_000}
    assert (data.classes[0], data.classes[99], data.size) == ("apple", "worm", (32, 32))
    reduced = load(fn("parquet", root=str(CIFAR), ratio=100))
    assert reduced.manifest["images"] == {"train": 10_827, "val": 2_000, "test": 10_000}
    assert reduced.manifest["reduced"] == {"apple": 20}
