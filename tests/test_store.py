import json
import multiprocessing
import os
import threading
import time

import pytest
import torch

from rayltr import store as module
from rayltr.interface import State
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
    with pytest.raises(ValueError, match="cannot be written"):
        Store(tmp_path / "file" / "store")


def test_a_second_claim_waits_for_the_first(tmp_path):
    store, order = Store(tmp_path), []

    def other():
        with store.claimed(STAGE, wait_s=0.01):
            order.append("second")

    with store.claimed(STAGE):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not (tmp_path / line(STAGE) / "claim").exists()


def hold_and_die(path):
    claim = Store(path).claimed(STAGE)
    claim.__enter__()
    os._exit(9)


def test_the_claim_of_a_dead_process_is_nobodys(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / line(STAGE) / "claim").exists()
    with Store(tmp_path).claimed(STAGE) as waited:
        assert waited < 1


def test_a_claim_from_elsewhere_expires(tmp_path, monkeypatch):
    store, claim = Store(tmp_path), tmp_path / line(STAGE) / "claim"
    claim.parent.mkdir()
    claim.write_text(json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "time": time.time()}))
    assert not store._take(str(claim), {"owner": "me", "host": "here", "pid": os.getpid()})
    monkeypatch.setattr(module, "EXPIRY_S", 0.0)
    assert store._take(str(claim), {"owner": "me", "host": "here", "pid": os.getpid()})


def test_a_held_claim_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    claim = tmp_path / line(STAGE) / "claim"
    with Store(tmp_path).claimed(STAGE):
        first = json.loads(claim.read_text())["time"]
        time.sleep(0.3)
        assert json.loads(claim.read_text())["time"] > first


def test_another_file_system_works_too(tmp_path):
    """Any URI that pyarrow knows; `file://` goes the same way as `s3://`."""
    store = Store(f"file://{tmp_path}/deep/er")
    store.put(STAGE, state(10))
    assert Store(tmp_path / "deep" / "er").longest(STAGE).epoch == 10
    assert store.predictions(STAGE, "val").endswith(f"deep/er/{line(STAGE)}/000010.val.parquet")


def test_names_of_axes_do_not_collide(tmp_path):
    """A view and a mixing of the same name are different stages."""
    assert line(STAGE.but(mixing=fn("cutmix"))) != line(STAGE.but(views=(fn("cutmix"),)))
