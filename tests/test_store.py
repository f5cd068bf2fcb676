import json
import multiprocessing
import os
import socket
import time
from dataclasses import replace

import pytest
import torch

from rayltr import claims
from rayltr.interface import State
from rayltr.parallel import share
from rayltr.spec import digest, fn, line
from rayltr.store import Store
from tests.conftest import tiny

STAGE = tiny(epochs=10, horizon=10)


def state(epoch, value=0.0):
    model = {"head.weight": torch.full((2, 3), value), "steps": torch.tensor(epoch)}
    return State(model, {"0.momentum_buffer": torch.ones(2, 3)}, epoch, ("head.weight",), [{"epoch": epoch}])


def test_what_is_put_comes_back(tmp_path):
    Store(tmp_path).put(STAGE, state(10, 2.5))
    found = Store(tmp_path).longest(STAGE)
    assert torch.equal(found.model["head.weight"], torch.full((2, 3), 2.5)) and found.model["steps"] == 10
    assert torch.equal(found.optimiser["0.momentum_buffer"], torch.ones(2, 3))
    assert (found.epoch, found.kept, found.history) == (10, ("head.weight",), [{"epoch": 10}])
    assert Store(tmp_path).history(STAGE) == [{"epoch": 10}]


def test_the_longest_prefix_is_found_and_nothing_beyond_the_end(tmp_path):
    store = Store(tmp_path)
    assert store.longest(STAGE) is None and store.history(STAGE) == []
    for epoch in (4, 6, 9):
        store.put(STAGE.but(epochs=epoch), state(epoch))
    assert store.longest(STAGE).epoch == 9
    assert store.longest(STAGE.but(epochs=8)).epoch == 6
    assert store.longest(STAGE.but(epochs=3)) is None
    assert store.longest(STAGE.but(seed=1)) is None


def test_a_snapshot_is_replaced_by_the_next_and_by_the_end(tmp_path):
    store = Store(tmp_path)
    for epoch in (2, 5):
        store.put(STAGE, state(epoch), partial=True)
    assert store.epochs(STAGE) == [(5, True)]
    store.put(STAGE, state(10))
    assert store.epochs(STAGE) == [(10, False)]
    assert sorted(os.listdir(tmp_path / line(STAGE))) == ["000010.json", "000010.safetensors"]


def test_the_stage_lies_readable_beside_the_weights(tmp_path):
    Store(tmp_path).put(STAGE, state(10))
    note = json.loads((tmp_path / line(STAGE) / "000010.json").read_text())
    assert note["stage"]["loss"] == {"fn": "cross_entropy"} and f"{note['line']}@10" == digest(STAGE)


def flip(path):
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(bytes(body))


def rewritten(path):
    note = json.loads(path.read_text())
    note["stage"]["loss"] = {"fn": "focal"}
    path.write_text(json.dumps(note))


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "000010.safetensors"),
    "half a file": lambda folder: os.truncate(folder / "000010.safetensors", 40),
    "no weights": lambda folder: (folder / "000010.safetensors").unlink(),
    "half a note": lambda folder: os.truncate(folder / "000010.json", 20),
    "another stage": lambda folder: rewritten(folder / "000010.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_and_the_artifact_before_is_used(damage, tmp_path, caplog):
    store = Store(tmp_path)
    store.put(STAGE.but(epochs=4), state(4))
    store.put(STAGE, state(10))
    DAMAGE[damage](tmp_path / line(STAGE))
    assert store.longest(STAGE).epoch == 4
    assert "damaged artifact" in caplog.text and "epoch 10" in caplog.text
    assert store.epochs(STAGE) == [(4, False)]


def test_weights_without_a_note_do_not_count(tmp_path):
    """The note is written last: a crash between the two leaves nothing that could be trusted."""
    store = Store(tmp_path)
    store.put(STAGE, state(10))
    (tmp_path / line(STAGE) / "000010.json").unlink()
    assert store.longest(STAGE) is None


def test_a_failed_write_leaves_nothing(tmp_path):
    store = Store(tmp_path)

    def full(self, *paths):
        raise OSError(28, "No space left on device")

    files = store.files

    class Full:
        def __getattr__(self, name):
            return full if name == "move" else getattr(files, name)

    store.files = Full()
    with pytest.raises(OSError, match="No space left"):
        store.put(STAGE, state(10))
    assert os.listdir(tmp_path / line(STAGE)) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        Store(tmp_path / "file" / "store")


def claim_file(folder):
    return folder / line(STAGE) / "claim"


def test_a_claim_is_held_by_one_until_it_is_released(tmp_path):
    store = Store(tmp_path)
    first = store.claim(STAGE)
    assert first and store.claim(STAGE) is None
    assert store.claim(STAGE.but(seed=1)), "another line"
    first.release()
    assert not claim_file(tmp_path).exists()
    store.claim(STAGE).release()


def hold_and_die(path):
    Store(path).claim(STAGE)
    os._exit(9)


def test_the_claim_of_a_dead_process_is_nobodys(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert claim_file(tmp_path).exists()
    assert Store(tmp_path).claim(STAGE)


def elsewhere(folder, **changes):
    claim_file(folder).parent.mkdir(exist_ok=True)
    content = {"owner": "x", "host": "elsewhere", "pid": 1, "time": time.time(), **changes}
    claim_file(folder).write_text(json.dumps(content))


def test_a_claim_from_elsewhere_expires(tmp_path):
    elsewhere(tmp_path)
    assert Store(tmp_path).claim(STAGE) is None
    elsewhere(tmp_path, time=time.time() - claims.EXPIRY_S - 1)
    assert Store(tmp_path).claim(STAGE)


def test_a_living_process_of_this_machine_is_not_robbed(tmp_path):
    """However long it did not renew its claim: it may have been stopped, or the disk was full."""
    elsewhere(tmp_path, host=socket.gethostname(), pid=os.getppid(), time=0)
    assert Store(tmp_path).claim(STAGE) is None


def test_a_claim_that_cannot_be_read_is_nobodys(tmp_path):
    elsewhere(tmp_path)
    os.truncate(claim_file(tmp_path), 5)
    assert Store(tmp_path).claim(STAGE)


def test_a_fresh_claim_is_not_removed_in_place_of_a_dead_one(tmp_path):
    store = Store(tmp_path)
    elsewhere(tmp_path, owner="fresh")
    assert not claims.removed(store.files, str(claim_file(tmp_path)), {"owner": "dead"})
    assert json.loads(claim_file(tmp_path).read_text())["owner"] == "fresh"


def test_a_claim_that_was_lost_is_left_alone(tmp_path):
    claim = Store(tmp_path).claim(STAGE)
    elsewhere(tmp_path, owner="other")
    claim.release()
    assert json.loads(claim_file(tmp_path).read_text())["owner"] == "other"


def test_a_held_claim_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    claim = Store(tmp_path).claim(STAGE)
    first = json.loads(claim_file(tmp_path).read_text())["time"]
    time.sleep(0.3)
    assert json.loads(claim_file(tmp_path).read_text())["time"] > first
    claim.release()


def test_a_disk_that_answers_with_an_error_costs_no_artifact(tmp_path, monkeypatch):
    """An error of the moment is no damage."""
    store = Store(tmp_path)
    store.put(STAGE, state(10))

    def fails(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(store, "_bytes", fails)
    with pytest.raises(OSError, match="Too many"):
        store.longest(STAGE)
    assert Store(tmp_path).longest(STAGE).epoch == 10


def test_another_file_system_works_too(tmp_path):
    """Any URI that pyarrow knows; `file://` goes the same way as `s3://`."""
    store = Store(f"file://{tmp_path}/deep/er")
    store.put(STAGE, state(10))
    assert Store(tmp_path / "deep" / "er").longest(STAGE).epoch == 10
    assert store.predictions(STAGE, "val").endswith(f"deep/er/{line(STAGE)}/000010.val.parquet")


def test_names_of_axes_do_not_collide(tmp_path):
    """A view and a mixing of the same name are different stages."""
    assert line(STAGE.but(mixing=fn("cutmix"))) != line(STAGE.but(views=(fn("cutmix"),)))


ROWS = {"classes.weight": torch.arange(22.0).view(11, 2), "classes.velocity": -torch.arange(11.0)[:, None]}


def put_shared(store, workers, epoch=10, partial=False):
    """What so many workers do, one after the other; 11 rows are shared by them."""
    shards = []
    for number in range(workers):
        first, many = share(11, number, workers)
        own = replace(state(epoch), rows={name: value[first : first + many] for name, value in ROWS.items()})
        shards.append(store.put_rows(STAGE, own, number, partial=partial))
    store.put(STAGE, own, partial=partial, shards=shards)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (3, 4), (4, 3), (2, 5)])
def test_rows_that_workers_share_come_back_for_any_number_of_them(before, after, tmp_path):
    put_shared(Store(tmp_path), before)
    found = Store(tmp_path).longest(STAGE)
    assert not found.rows and sum(rows for _, rows in found.shards) == 11
    parts = [Store(tmp_path).fetched(found, number, after).rows for number in range(after)]
    assert [len(part["classes.weight"]) for part in parts] == [share(11, number, after)[1] for number in range(after)]
    for name, value in ROWS.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)


@pytest.mark.parametrize("damage", ["a flipped bit", "missing"])
def test_damaged_rows_are_damage(damage, tmp_path, caplog):
    store = Store(tmp_path)
    put_shared(store, 2, epoch=4, partial=True)
    folder = tmp_path / line(STAGE)
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    put_shared(store, 2)
    for name, body in saved.items():
        (folder / name).write_bytes(body)
    path = folder / "000010.rows1.safetensors"
    flip(path) if damage == "a flipped bit" else path.unlink()
    assert store.longest(STAGE).epoch == 4 and "epoch 10" in caplog.text
    assert set(os.listdir(folder)) == set(saved), "nothing of what was damaged is left"


def test_rows_of_more_workers_that_died_are_removed_with_the_snapshot(tmp_path):
    store = Store(tmp_path)
    for number in range(3):
        store.put_rows(STAGE, replace(state(10), rows=ROWS), number)  # and then they died
    put_shared(store, 2, epoch=5, partial=True)
    put_shared(store, 2)
    names = ["000010.json", "000010.rows0.safetensors", "000010.rows1.safetensors", "000010.safetensors"]
    assert sorted(os.listdir(tmp_path / line(STAGE))) == names


@pytest.mark.parametrize("partial", [True, False])
def test_what_workers_wrote_before_they_died_goes_at_the_next_write(partial, tmp_path):
    """Rows and weights without a note; what others have noted and what is not of the store stays."""
    store, folder = Store(tmp_path), tmp_path / line(STAGE)
    put_shared(store, 2, epoch=4)
    put_shared(store, 2, epoch=6, partial=True)
    before = set(os.listdir(folder))
    for number in range(3):  # two snapshots on, and at the end, and then they died
        store.put_rows(STAGE, replace(state(7), rows=ROWS), number, partial=True)
        store.put_rows(STAGE, replace(state(12), rows=ROWS), number)
    (folder / "000008.snapshot.safetensors").write_bytes(b"weights, but no note")
    (folder / "mine.safetensors").write_bytes(b"somebody else's")
    assert store.longest(STAGE).epoch == 6
    put_shared(store, 1, epoch=9, partial=partial)
    name = f"000009{'.snapshot' if partial else ''}"
    own = {f"{name}.{end}" for end in ("json", "safetensors", "rows0.safetensors")}
    kept = {file for file in before if ".snapshot" not in file}
    assert set(os.listdir(folder)) == own | kept | {"mine.safetensors"}


def test_a_state_without_shared_rows_has_one_file(tmp_path):
    store = Store(tmp_path)
    assert store.put_rows(STAGE, state(10), 0) is None
    store.put(STAGE, state(10))
    assert store.longest(STAGE).shards == () and "shards" not in (tmp_path / line(STAGE) / "000010.json").read_text()
