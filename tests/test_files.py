"""Files appear whole or not at all, and a power cut does not change that."""

import os
import stat
from pathlib import Path

import pytest
from pyarrow import fs

from rayltr import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.save(tmp_path / "f", b"old")

    class Full(fs.LocalFileSystem):
        def move(self, source: str, target: str) -> None:
            raise OSError("no space left on device")

    monkeypatch.setattr(files, "filesystem", lambda path: (Full(), str(path)))
    with pytest.raises(OSError, match="no space"):
        files.save(tmp_path / "f", b"new")
    assert names(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_a_plain_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    system, place = files.filesystem("run")
    assert isinstance(system, fs.LocalFileSystem) and place == str(tmp_path / "run")


@pytest.mark.parametrize("uri", [False, True])
def test_the_disk_has_a_file_before_its_name_and_then_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri):
    seen, real = [], os.fsync

    def watched(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        body = b"" if folder else os.pread(descriptor, 10, 0)
        seen.append((body, (tmp_path / "f").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    files.save(f"file://{tmp_path}/f" if uri else tmp_path / "f", b"content")
    assert seen == [(b"content", False), (b"", True)]


def test_a_disk_that_cannot_keep_a_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.save(tmp_path / "f", b"old")

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        files.save(tmp_path / "f", b"new")
    assert names(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_a_folder_that_cannot_be_synchronised_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.fsync

    def some(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", some)
    files.save(tmp_path / "new" / "f", b"content")
    assert (tmp_path / "new" / "f").read_bytes() == b"content"
