import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from rayltr.data import cache


def numbers(count: int = 5, *, calls: list | None = None):
    def make(sink: cache.Sink) -> dict:
        if calls is not None:
            calls.append(sink.folder)
        for start in range(0, count, 2):
            piece = np.arange(start, min(start + 2, count))
            sink.append("square", piece**2)
            sink.append("pair", np.stack([piece, -piece], axis=1).astype(np.int16))
        return {"count": count}

    return make


def check(arrays: dict, meta: dict, count: int = 5) -> None:
    assert meta == {"count": count}
    np.testing.assert_array_equal(arrays["square"], np.arange(count) ** 2)
    np.testing.assert_array_equal(arrays["pair"], np.stack([np.arange(count), -np.arange(count)], axis=1))
    assert arrays["pair"].dtype == np.int16


def test_the_second_time_arrays_are_mapped_and_not_made():
    calls: list = []
    for _ in range(2):
        arrays, meta = cache.remembered("entry", numbers(calls=calls))
        check(arrays, meta)
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays.values())
    assert len(calls) == 1


def test_many_pieces_make_one_readable_file(cache_folder):
    check(*cache.remembered("entry", numbers(2001)), count=2001)
    assert np.load(cache_folder / "entry" / "square.npy").shape == (2001,)


@pytest.mark.parametrize("damage", ["cut", "zeros", "missing", "json", "no json"])
def test_a_damaged_entry_is_made_anew(cache_folder, damage):
    cache.remembered("entry", numbers(4000))
    file, entry = cache_folder / "entry" / "square.npy", cache_folder / "entry" / "entry.json"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "zeros":
        file.write_bytes(content[:-800] + bytes(800))
    elif damage == "missing":
        file.unlink()
    elif damage == "json":
        entry.write_text(entry.read_text()[:-5])
    else:
        entry.unlink()
    with pytest.warns(RuntimeWarning, match="is damaged .* and is made anew"):
        check(*cache.remembered("entry", numbers(4000)), count=4000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(*cache.remembered("entry", numbers(4000)), count=4000)


def test_a_hole_in_a_large_file_is_noticed(cache_folder):
    def make(sink: cache.Sink) -> dict:
        sink.append("large", np.ones(8_000_000, np.uint8))
        return {}

    cache.remembered("entry", make)
    file = cache_folder / "entry" / "large.npy"
    with file.open("r+b") as opened:
        opened.seek(3_000_000)
        opened.write(bytes(1_000_000))
    with pytest.warns(RuntimeWarning, match="large.npy has changed"):
        assert cache.remembered("entry", make)[0]["large"].all()


def test_a_folder_that_cannot_be_written_means_memory(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file is no folder")
    monkeypatch.setenv("RAYLTR_CACHE", str(blocked))
    with pytest.warns(RuntimeWarning, match="data stay in memory"):
        arrays, meta = cache.remembered("entry", numbers())
    check(arrays, meta)
    assert not isinstance(arrays["pair"], np.memmap)


def test_a_full_disk_means_memory_and_leaves_nothing(cache_folder, monkeypatch):
    opened = Path.open

    def full(path, mode="r", *args, **keywords):
        if mode == "ab" and path.exists():  # the first piece still fits
            raise OSError(28, "No space left on device")
        return opened(path, mode, *args, **keywords)

    monkeypatch.setattr(Path, "open", full)
    with pytest.warns(RuntimeWarning, match="No space left on device.*data stay in memory"):
        check(*cache.remembered("entry", numbers()))
    assert list(cache_folder.iterdir()) == []


def test_of_two_that_make_an_entry_the_later_discards_its_own(cache_folder):
    def slow(sink: cache.Sink) -> dict:
        cache.remembered("entry", numbers())  # another process finishes first
        sink.append("mine", np.zeros(3))
        return {}

    check(*cache.remembered("entry", slow))
    assert [folder.name for folder in cache_folder.iterdir()] == ["entry"]


def test_an_error_while_making_leaves_nothing_and_is_not_hidden(cache_folder):
    def failing(sink: cache.Sink) -> dict:
        sink.append("square", np.arange(3))
        raise FileNotFoundError("the source is gone")

    with pytest.raises(FileNotFoundError, match="the source is gone"):
        cache.remembered("entry", failing)
    assert list(cache_folder.iterdir()) == []


def test_keys_tell_sources_keywords_and_files_apart(tmp_path):
    file = tmp_path / "a"
    file.write_text("1")
    keys = [cache.key("folder", {}), cache.key("list", {}), cache.key("folder", {"size": 3})]
    keys.append(cache.key("folder", {}, [cache.stat(file)]))
    file.write_text("12")
    keys.append(cache.key("folder", {}, [cache.stat(file)]))
    keys.append(cache.key("folder", {}, [cache.stat(shutil.copy(file, tmp_path / "b"))]))
    assert len(set(keys)) == len(keys)
    assert cache.key("folder", {"a": 1, "b": 2}) == cache.key("folder", {"b": 2, "a": 1})


def test_home_follows_the_environment(monkeypatch, cache_folder):
    assert cache.home() == cache_folder
    monkeypatch.delenv("RAYLTR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.home() == Path("/somewhere/rayltr")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.home() == Path.home() / ".cache" / "rayltr"
