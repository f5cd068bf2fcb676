import numpy as np
import pytest
from PIL import Image

from rayltr.data import cache, images, load
from rayltr.data.folders import folder
from rayltr.spec import fn
from tests.data.image_files import noise, png, write_folder

TARGET = np.repeat([0, 1, 2], 6)


def everything(split):
    return split.take(np.arange(len(split)))


@pytest.fixture
def root(tmp_path):
    write_folder(tmp_path, noise((18, 4, 5, 3), 0), TARGET, ["ant", "bee", "Cat"])
    write_folder(tmp_path, noise((18, 4, 5, 3), 1), TARGET, ["ant", "bee", "Cat"], "test")
    return tmp_path


def test_classes_are_sorted_and_sizes_kept(root):
    data = load(fn("folder", root=str(root)))
    assert data.classes == ("Cat", "ant", "bee")
    assert data.size == (4, 5)
    assert data.counts.tolist() == [5, 5, 5]
    assert data.manifest["images"] == {"train": 15, "val": 3, "test": 18}
    expected = {bytes(image) for image in noise((18, 4, 5, 3), 1)}
    assert {bytes(image) for image in everything(data.unseal())} == expected


def test_a_folder_of_class_folders_is_all_training(root):
    pool = folder(root=str(root / "train"))
    assert pool.classes == ("Cat", "ant", "bee")
    assert list(pool.parts) == ["train"]


def test_train_may_be_a_class_beside_others(tmp_path):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(noise((3, 3, 3))))
    assert folder(root=str(tmp_path)).classes == ("car", "train")


def test_extensions_hidden_files_and_nested_folders(tmp_path):
    for place in ("a/deep/er", "b", "b/.hidden", ".git"):
        (tmp_path / place).mkdir(parents=True)
    for seed, name in enumerate(["a/deep/er/1.PNG", "a/2.png", "b/3.png", "b/.4.png", "b/.hidden/5.png", ".git/6.png"]):
        (tmp_path / name).write_bytes(png(noise((3, 3, 3), seed)))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    Image.fromarray(noise((3, 3, 3), 9)).save(tmp_path / "b" / "7.JpEg")
    pool = folder(root=str(tmp_path))
    assert pool.classes == ("a", "b")
    assert pool.parts["train"].target.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
def test_a_lone_val_is_the_test(root, name):
    (root / "test").rename(root / name)
    data = load(fn("folder", root=str(root)))
    assert len(data.unseal()) == 18
    assert "the only other split, val, is the test" in data.manifest["warnings"]


def test_val_beside_test_is_official(root):
    write_folder(root, noise((3, 4, 5, 3), 2), np.arange(3), ["ant", "bee", "Cat"], "validation")
    data = load(fn("folder", root=str(root)))
    assert data.manifest["protocol"]["validation"] == "official"
    assert data.manifest["images"] == {"train": 18, "val": 3, "test": 18}


def test_a_split_without_images_is_left_out_with_a_note(root):
    (root / "val").mkdir()
    assert "val has no images and is not used" in load(fn("folder", root=str(root))).manifest["warnings"]


# Sizes.


def test_mixed_sizes_become_64_with_a_warning(root):
    (root / "train" / "ant" / "tall.png").write_bytes(png(noise((50, 20, 3))))
    data = load(fn("folder", root=str(root)))
    assert data.size == (64, 64)
    line = "images are larger than 64 px or differ in size; resized to 64 px; use size= for more"
    assert line in data.manifest["warnings"]


def test_a_shared_size_above_64_is_reduced(tmp_path):
    write_folder(tmp_path, noise((18, 65, 65, 3)), TARGET, ["a", "b", "c"])
    assert load(fn("folder", root=str(tmp_path))).size == (64, 64)


def test_size_is_obeyed_without_a_warning(root):
    data = load(fn("folder", root=str(root), size=8))
    assert everything(data.train).shape == (15, 8, 8, 3)
    assert data.manifest["warnings"] == []
    with pytest.raises(ValueError, match="at least 1, not 0"):
        load(fn("folder", root=str(root), size=0))


# Unreadable images.


def test_a_corrupt_image_is_named(root):
    (root / "train" / "bee" / "0007.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"train/bee/0007.png cannot be read as an image; --skip-corrupt goes on"):
        load(fn("folder", root=str(root)))


def test_corrupt_images_can_be_skipped(root):
    for number in (6, 7):
        (root / "train" / "bee" / f"{number:04d}.png").write_bytes(png(noise((4, 5, 3)))[:40])
    (root / "test" / "ant" / "0000.png").write_bytes(b"")
    for _ in range(2):
        data = load(fn("folder", root=str(root), skip_corrupt=True))
        assert data.counts.tolist() == [5, 5, 3]
        assert data.manifest["images"] == {"train": 13, "val": 3, "test": 17}
        assert data.manifest["skipped"]["count"] == 3
        assert data.manifest["skipped"]["first"][0].endswith("train/bee/0006.png")
        assert "3 images cannot be read and are left out" in data.manifest["warnings"]
    with pytest.raises(ValueError, match="0006.png cannot be read"):
        load(fn("folder", root=str(root)))


def test_a_class_that_loses_all_its_images_is_named(root):
    for path in (root / "train" / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no training image in class bee$"):
        load(fn("folder", root=str(root), skip_corrupt=True))


# The cache.


def test_the_second_load_is_identical_and_decodes_nothing(root, monkeypatch):
    one = load(fn("folder", root=str(root)))
    monkeypatch.setattr(images, "decode", None)
    two = load(fn("folder", root=str(root)))
    assert one.digest == two.digest and one.manifest == two.manifest
    np.testing.assert_array_equal(everything(one.train), everything(two.train))
    assert isinstance(two.train.images, np.memmap)


def test_a_changed_file_or_class_is_noticed(root):
    found = [load(fn("folder", root=str(root)))]
    (root / "train" / "bee" / "0007.png").write_bytes(png(noise((4, 5, 3), 77)))
    found.append(load(fn("folder", root=str(root))))
    for split in ("train", "test"):
        (root / split / "bee").rename(root / split / "wasp")
    found.append(load(fn("folder", root=str(root))))
    assert len({data.digest for data in found}) == 3
    assert found[2].classes == ("Cat", "ant", "wasp")


def test_the_place_does_not_matter(root, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "data"
    one = load(fn("folder", root=str(root), ratio=1.5, validation="holdout"))
    root.rename(moved)
    two = load(fn("folder", root=str(moved), ratio=1.5, validation="holdout"))
    assert one.digest == two.digest


def test_lazy_images_equal_those_in_memory(root):
    eager, lazy = (load(fn("folder", root=str(root), in_memory_gb=gb)) for gb in (8.0, 0.0))
    assert lazy.train.lazy and not eager.train.lazy
    assert lazy.digest == eager.digest
    for a, b in ((eager.train, lazy.train), (eager.val, lazy.val), (eager.unseal(), lazy.unseal())):
        np.testing.assert_array_equal(everything(a), everything(b))
    rows = np.array([7, 1, 7, 0])
    np.testing.assert_array_equal(eager.train.take(rows), lazy.train.take(rows))


def test_statistics_of_lazy_images_are_kept(root, monkeypatch):
    one = load(fn("folder", root=str(root), in_memory_gb=0.0))
    monkeypatch.setattr(images, "decode", None)
    two = load(fn("folder", root=str(root), in_memory_gb=0.0))
    assert (one.mean, one.std) == (two.mean, two.std)


def test_without_a_cache_everything_works_in_memory(root, tmp_path, monkeypatch):
    expected = load(fn("folder", root=str(root)))
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("RAYLTR_CACHE", str(tmp_path / "blocked"))
    for gb in (8.0, 0.0):
        with pytest.warns(RuntimeWarning, match="data stay in memory"):
            assert load(fn("folder", root=str(root), in_memory_gb=gb)).digest == expected.digest


def test_the_limit_is_on_decoded_pixels(root):
    decoded = 36 * 4 * 5 * 3 / 1e9
    assert load(fn("folder", root=str(root), in_memory_gb=decoded * 0.99)).train.lazy
    assert not load(fn("folder", root=str(root), in_memory_gb=decoded * 1.01)).train.lazy
    assert cache.home().is_dir()


# Errors.


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load(fn("folder", root=str(tmp_path / "nowhere")))


def test_a_folder_without_class_folders(tmp_path):
    (tmp_path / "1.png").write_bytes(png(noise((3, 3, 3))))
    for root in (tmp_path, tmp_path / "1.png"):
        with pytest.raises(ValueError, match="has no class folders"):
            load(fn("folder", root=str(root)))


def test_class_folders_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="has no training images"):
        load(fn("folder", root=str(tmp_path)))


def test_an_empty_class_folder(root):
    (root / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="no training image in class dog$"):
        load(fn("folder", root=str(root)))


def test_a_class_of_the_test_that_train_lacks(root):
    (root / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="test/dog is a class that the training images do not have"):
        load(fn("folder", root=str(root)))


@pytest.mark.parametrize("other", ["annotations", "training"])
def test_folders_beside_the_splits(root, other):
    (root / other).mkdir()
    with pytest.raises(ValueError, match=f"a folder per split alone; it holds .*{other}"):
        load(fn("folder", root=str(root)))
