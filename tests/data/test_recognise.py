import numpy as np
import pytest

from rayltr.data import load, recognise
from rayltr.spec import fn
from tests.data.image_files import encoded, noise, png, write_folder, write_parquet

IMAGES, TARGET = noise((12, 3, 3, 3)), np.arange(12) % 2


def test_a_folder_of_folders(tmp_path):
    write_folder(tmp_path, IMAGES, TARGET, ["a", "b"])
    assert recognise(tmp_path) == fn("folder", root=str(tmp_path))
    assert recognise(str(tmp_path / "train")) == fn("folder", root=str(tmp_path / "train"))
    assert len(load(recognise(tmp_path)).unseal()) == 2


def test_parquet_at_any_depth_and_as_a_file(tmp_path):
    path = tmp_path / "deep" / "er" / "train.parquet"
    write_parquet(path, encoded(IMAGES), {"label": TARGET.tolist()})
    assert recognise(tmp_path) == fn("parquet", root=str(tmp_path))
    assert recognise(path) == fn("parquet", root=str(path))
    assert len(load(recognise(path)).train) == 8


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    write_folder(tmp_path, IMAGES, TARGET, ["a", "b"])
    monkeypatch.chdir(tmp_path)
    assert recognise("train") == fn("folder", root=str(tmp_path / "train"))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt"], ("train", "val", "test")),
        (["iNaturalist18_train.txt", "iNaturalist18_val.txt"], ("train", "test")),
        (["train2018.json", "val2018.json"], ("train", "test")),
        (["train.txt", "README.txt", "labels.txt"], ("train",)),
        (["train.txt", "train.json", "val.json"], ("train",)),
    ],
)
def test_lists(tmp_path, names, found):
    write_folder(tmp_path, IMAGES, TARGET, ["a", "b"], "images")
    for name in names:
        is_list = name.endswith("txt") and "_" in name or name == "train.txt"
        (tmp_path / name).write_text("a/b c.png 3\n" if is_list else '{"annotations": []}\n')
    (tmp_path / "test2018.json").write_text('{"images": []}')
    assert recognise(tmp_path) == fn("list", root=str(tmp_path), **dict(zip(found, names, strict=False)))


def test_several_lists_of_one_split(tmp_path):
    for name in ("train.txt", "places_train.txt"):
        (tmp_path / name).write_text("a.png 0\n")
    with pytest.raises(ValueError, match="several lists for one split .places_train.txt, train.txt"):
        recognise(tmp_path)


def test_what_is_not_known_is_refused(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").write_text("nothing")
    (tmp_path / "train.txt").write_text("some prose about training\n")
    (tmp_path / "1.png").write_bytes(png(IMAGES[0]))
    for path in (tmp_path, tmp_path / "1.png"):
        with pytest.raises(ValueError, match="is no data set that is known here: a Parquet file or a folder of them"):
            recognise(path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        recognise(tmp_path / "nowhere")
