"""Images decoded ahead: the same ones, whoever decodes them."""

import multiprocessing
import os
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch

from rayltr import ahead
from rayltr.ahead import Reader, processes
from rayltr.data import load
from rayltr.spec import fn
from tests.data.image_files import noise, write_folder

CPU = torch.device("cpu")
PARTS = [np.arange(first, first + 5) for first in range(0, 35, 5)]


@pytest.fixture
def splits(tmp_path):
    """The training images of a folder, in memory and not."""
    write_folder(tmp_path, noise((60, 7, 9, 3)), np.arange(60) % 2, ["a", "b"])
    return [load(fn("folder", root=str(tmp_path), in_memory_gb=gb)).train for gb in (8.0, 0.0)]


@pytest.fixture
def two(monkeypatch):
    """Two CPUs, and processes that pay for anything."""
    monkeypatch.setattr(ahead, "FEW", 0)
    monkeypatch.setattr(ahead, "cpus", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    assert not multiprocessing.active_children()


def same(found, split, parts):
    for images, rows in zip(found, parts, strict=True):
        assert images.dtype is torch.uint8
        np.testing.assert_array_equal(images, split.take(rows))


def workers():
    return {child.pid for child in multiprocessing.active_children()}


def test_processes_give_the_images_of_the_memory_in_every_pass(splits, two):
    kept, lazy = splits
    read, before = Reader(lazy, CPU), torch.get_rng_state()
    again = [rows[::-1].repeat(2) for rows in PARTS[::-1]]
    same(read(PARTS), kept, PARTS)
    begun = workers()
    assert len(begun) == 2
    same(read(again), kept, again)
    same(read([]), kept, [])
    assert workers() == begun, "they stay from pass to pass"
    assert torch.equal(torch.get_rng_state(), before), "the training draws from it"


def test_a_thread_gives_the_same_images(splits):
    kept, lazy = splits
    same(Reader(lazy, CPU)(PARTS), kept, PARTS)
    same(Reader(kept, CPU)(PARTS), kept, PARTS)
    assert not workers()


def test_a_pass_that_is_left_early_does_not_disturb_the_next(splits, two):
    kept, lazy = splits
    read = Reader(lazy, CPU)
    found = read(PARTS)
    next(found)
    found.close()
    same(read(PARTS[3:]), kept, PARTS[3:])


@pytest.mark.parametrize("several", [False, True])
def test_an_image_that_vanished_is_named(splits, several, request):
    if several:
        request.getfixturevalue("two")
    lazy = splits[1]
    path = lazy.images.items.name(int(lazy.rows[12]))
    os.unlink(path)
    found = Reader(lazy, CPU)(PARTS)
    next(found), next(found)
    with pytest.raises(ValueError) as error:
        next(found)
    assert str(error.value) == f"{path} cannot be read as an image any more"
    assert bool(workers()) == several
    del found, error


def test_a_killed_process_is_one_clear_error(splits, two):
    read = Reader(splits[1], CPU)
    found = read(PARTS * 20)
    next(found)
    for worker in workers():
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="^a process that decodes images was killed") as error:
        list(found)
    del read, found, error


Usage = namedtuple("Usage", "free")


@pytest.mark.parametrize(
    ("threads", "cpus", "images", "free", "found"),
    [
        (4, 8, 3000, 10**9, 4),
        (8, 4, 3000, 10**9, 4),
        (64, 64, 3000, 10**12, 16),
        (1, 8, 3000, 10**9, 0),
        (4, 8, 1500, 10**9, 0),
        (4, 8, 3000, 500 * 3 * 64 * 64 * 8, 0),
        (4, 8, 3000, 500 * 3 * 64 * 64 * 10, 4),
    ],
)
def test_processes_decode_where_that_pays_and_there_is_room(monkeypatch, tmp_path, threads, cpus, images, free, found):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(ahead, "cpus", lambda: cpus)
    monkeypatch.setattr(ahead, "SHARED", tmp_path)
    monkeypatch.setattr(ahead.shutil, "disk_usage", lambda place: Usage(free))
    assert processes((64, 64), [np.arange(500)] * (images // 500)) == found


@pytest.mark.parametrize(("members", "found"), [(1, 8), (3, 2), (4, 2), (8, 0)])
def test_trials_that_share_a_process_share_its_cpus(monkeypatch, tmp_path, members, found):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(ahead, "cpus", lambda: 8)
    monkeypatch.setattr(ahead, "SHARED", tmp_path / "none")
    assert processes((64, 64), [np.arange(500)] * 6, members) == found
