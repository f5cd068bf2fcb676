"""Images on disk become a cache entry: the same one, whoever decodes them."""

import numpy as np
import pytest

from rayltr.data import cache, images, load, processes
from rayltr.spec import fn
from tests.data.image_files import encoded, noise, png, write_folder, write_parquet

IMAGES, TARGET = noise((300, 5, 4, 3)), np.arange(300) % 3


@pytest.fixture
def several(monkeypatch):
    """Called: from now on two processes decode whatever is read.  blind: this one cannot."""

    def begin(blind=True):
        monkeypatch.setattr(processes, "MANY", 0)
        monkeypatch.setattr(processes, "cpus", lambda: 2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        if blind:
            monkeypatch.setattr(images, "decode", None)

    return begin


@pytest.fixture(params=["folder", "parquet"])
def source(request, tmp_path):
    """A set with an image in its third hundred that cannot be read."""
    if request.param == "folder":
        write_folder(tmp_path / "set", IMAGES, TARGET, ["a", "b", "c"])
        (tmp_path / "set/train/b/0250.png").write_bytes(png(IMAGES[250])[:60])
    else:
        rows = encoded(IMAGES)
        rows[250]["bytes"] = b"broken"
        write_parquet(tmp_path / "set/train.parquet", rows, {"label": TARGET.tolist()}, group=100)
    return fn(request.param, root=str(tmp_path / "set"), skip_corrupt=True)


def entries():
    """All that the cache holds, but the warnings."""
    return {str(path.relative_to(cache.home())): path.read_bytes() for path in cache.home().rglob("*.*")}


@pytest.mark.parametrize("keywords", [{}, {"in_memory_gb": 0.0}, {"size": 3}])
def test_processes_write_the_cache_entry_of_one(source, keywords, several, tmp_path, monkeypatch):
    one = load(source.but(**keywords))
    expected = entries()
    monkeypatch.setenv("RAYLTR_CACHE", str(tmp_path / "other"))
    several(blind="in_memory_gb" not in keywords)  # of lazy images this process takes the mean
    other = load(source.but(**keywords))
    assert other.digest == one.digest and other.manifest == one.manifest
    assert other.manifest["skipped"]["count"] == 1
    assert entries() == expected and len(expected) >= 3


def test_an_image_of_another_size_changes_the_plan_for_all(source, several, tmp_path, monkeypatch):
    """Wherever it comes: what was decoded before it is forgotten."""
    root = tmp_path / "set"
    if source.name == "folder":
        (root / "train/c/9999.png").write_bytes(png(noise((4, 5, 3))))
    else:
        write_parquet(root / "train-2.parquet", encoded(noise((1, 4, 5, 3))), {"label": [2]})
        (root / "train.parquet").rename(root / "train-1.parquet")
    one = load(source)
    assert one.size == (64, 64) and len(one.train.images) == 301
    assert one.digest == load(source.but(size=64)).digest
    monkeypatch.setenv("RAYLTR_CACHE", str(tmp_path / "other"))
    several()
    assert load(source).digest == one.digest


def test_an_unreadable_image_has_the_same_message(source, several):
    strict = source.but(skip_corrupt=None)
    with pytest.raises(ValueError, match="cannot be read as an image; --skip-corrupt goes on") as one:
        load(strict)
    several()
    with pytest.raises(ValueError) as other:
        load(strict)
    assert str(other.value) == str(one.value)
    assert not any(cache.home().iterdir())


def test_a_full_disk_leaves_the_images_in_memory(source, several, monkeypatch):
    expected = load(source).digest
    several()
    written = []

    def full(self, name, piece):
        if self.folder and len(written) > 3:
            raise cache.NotStored("No space left on device")
        written.append(name)
        append(self, name, piece)

    append = cache.Sink.append
    monkeypatch.setattr(cache.Sink, "append", full)
    monkeypatch.setenv("RAYLTR_CACHE", str(cache.home() / "other"))
    with pytest.warns(RuntimeWarning, match="No space left on device.*data stay in memory"):
        assert load(source).digest == expected
