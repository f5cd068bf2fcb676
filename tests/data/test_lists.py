import json

import numpy as np
import pytest

from rayltr.data import load
from rayltr.data.lists import list_files
from rayltr.spec import fn
from tests.data.image_files import noise, png

IMAGES = noise((18, 3, 3, 3))
TARGET = np.arange(18) % 3
PATHS = [f"train/some class/image {number}.png" for number in range(18)]


@pytest.fixture
def root(tmp_path):
    for path, pixels in zip(PATHS, IMAGES, strict=True):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(png(pixels))
    return tmp_path


def text(rows) -> str:
    return "".join(f"{PATHS[row]} {TARGET[row]}\n" for row in rows)


def inaturalist(rows, **more) -> str:
    images = [{"id": 100 + row, "file_name": PATHS[row]} for row in rows]
    annotations = [{"id": row, "image_id": 100 + row, "category_id": int(TARGET[row])} for row in rows]
    return json.dumps({"images": images, "annotations": annotations, **more})


def bag_of_tricks(rows) -> str:
    annotations = [{"fpath": PATHS[row], "im_height": 3, "category_id": int(TARGET[row])} for row in rows]
    return json.dumps({"annotations": annotations, "num_classes": 3})


@pytest.mark.parametrize(("suffix", "write"), [("txt", text), ("json", inaturalist), ("json", bag_of_tricks)])
def test_lists_in_every_form(root, suffix, write):
    (root / f"train.{suffix}").write_text(write(range(15)))
    (root / f"test.{suffix}").write_text(write(range(15, 18)))
    pool = list_files(root=str(root), train=f"train.{suffix}", test=f"test.{suffix}")
    assert pool.classes == ("0", "1", "2")
    np.testing.assert_array_equal(pool.parts["train"].images, IMAGES[:15])
    np.testing.assert_array_equal(pool.parts["train"].target, TARGET[:15])
    np.testing.assert_array_equal(pool.parts["test"].images, IMAGES[15:])


def test_names_come_from_categories(root):
    categories = [{"id": 2, "name": "bee"}, {"id": 0, "name": "zebra"}, {"id": 1, "name": "ant"}]
    (root / "train.json").write_text(inaturalist(range(18), categories=categories))
    assert list_files(root=str(root), train="train.json").classes == ("zebra", "ant", "bee")


def test_val_is_val_and_lists_may_lie_elsewhere(root, tmp_path_factory):
    place = tmp_path_factory.mktemp("lists")
    for split, rows in {"train": range(12), "val": range(12, 15), "test": range(15, 18)}.items():
        (place / f"{split}.txt").write_text(text(rows) + "\n")
    named = {split: str(place / f"{split}.txt") for split in ("train", "val", "test")}
    data = load(fn("list", root=str(root), **named))
    assert data.manifest["protocol"]["validation"] == "official"
    assert data.manifest["images"] == {"train": 12, "val": 3, "test": 3}
    swapped = load(fn("list", root=str(root), train=named["train"], val=named["test"], test=named["val"]))
    assert swapped.digest != data.digest


def test_a_lone_val_stays_val(root):
    (root / "train.txt").write_text(text(range(15)))
    (root / "val.txt").write_text(text(range(15, 18)))
    data = load(fn("list", root=str(root), train="train.txt", val="val.txt"))
    assert data.manifest["images"] == {"train": 12, "val": 3, "test": 3}


def test_lazy_lists_and_the_size(root):
    (root / "train.txt").write_text(text(range(18)))
    eager, lazy = (load(fn("list", root=str(root), train="train.txt", size=6, in_memory_gb=gb)) for gb in (8.0, 0.0))
    assert lazy.train.lazy and lazy.size == (6, 6) and lazy.digest == eager.digest


def test_skipping_unreadable_images(root):
    (root / "train.txt").write_text(text(range(18)))
    (root / PATHS[4]).write_bytes(b"broken")
    with pytest.raises(ValueError, match="image 4.png cannot be read as an image"):
        list_files(root=str(root), train="train.txt")
    assert list_files(root=str(root), train="train.txt", skip_corrupt=True).skipped == (str(root / PATHS[4]),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", "a.png 0\n", "a.png, listed in .*train.txt, does not exist"),
        ("train.txt", f"{PATHS[0]} 0\n{PATHS[1]}\n", "train.txt, line 2: expected a path, a space and a class number"),
        ("train.txt", f"{PATHS[0]} 1\n", "no training image in class 0$"),
        ("train.txt", f"{PATHS[0]} -1\n{PATHS[1]} 0\n", "has target -1, outside the training classes 0 to 0"),
        ("train.txt", "", "has no training images"),
        ("train.json", "{", "train.json is not a list of images in a known JSON form"),
        ("train.json", '{"images": []}', "known JSON form .*annotations"),
        ("train.json", '{"annotations": [{"category_id": 0}]}', "known JSON form .*fpath"),
        ("other.txt", "", "there is no list train.json in"),
    ],
)
def test_lists_that_cannot_be_used(root, name, content, message):
    (root / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(fn("list", root=str(root), train="train.json" if name == "other.txt" else name))
