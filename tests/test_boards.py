"""TensorBoard logs, read back from their files by an own reader of the framing."""

import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rayltr import boards
from rayltr.boards import Boards

# the whole package, after the parts of it that rayltr uses
from tensorboardX import SummaryWriter  # isort: skip
from tensorboardX.proto.event_pb2 import Event  # isort: skip
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData  # isort: skip

ROOT = Path(__file__).parents[1]


def report(number, stage, epoch, trial=None):
    terms = {"loss": 2.0 / epoch, "distance": 0.25 * epoch}
    return {"trial": trial or f"{number:04d}", "final": 0, "stage": stage, "epoch": epoch, "of_epochs": 9,
            "terms": terms, "images_per_s": 100.0 * epoch, "wall_s": 1.0, "trained": epoch}  # fmt: skip


def row(number, **changes):
    return {"trial": f"{number:04d}", "number": number, "state": "complete", "epochs_asked": 5,
            "m.val.balanced": 0.75, "m.val.few": math.nan, "m.test.balanced": None, "p.loss": "focal", "p.lr": 0.05,
            "p.deferred": True, "p.depth": 3, "p.gamma": None, **changes}  # fmt: skip


def files(run, trial):
    return sorted((run / "tensorboard" / trial).glob("events.out.tfevents.*"))


def events(file):
    body, found = file.read_bytes(), []
    while body:
        (size,) = struct.unpack_from("<Q", body)
        found.append(Event.FromString(body[12 : 12 + size]))
        body = body[16 + size :]
    return found


def scalars(run, trial):
    """(tag, step, value) of all files of a trial, in the order in which they were written."""
    return [(value.tag, event.step, pytest.approx(value.simple_value)) for file in files(run, trial)
            for event in events(file) for value in event.summary.value
            if not value.tag.startswith("_hparams_")]  # fmt: skip


def hparams(run, trial):
    """What the plugin finds by tag."""
    values = [value for file in files(run, trial) for event in events(file) for value in event.summary.value]
    return {value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
            for value in values if value.metadata.plugin_data.plugin_name == "hparams"}  # fmt: skip


def test_terms_and_speed_of_every_stage_are_drawn_over_its_clock(tmp_path):
    made = Boards(tmp_path)
    made.epoch({"trial": "0003", "final": 0, "started": 0.0})  # a trial that has only begun
    for stage, epoch in ((0, 1), (0, 2), (1, 1)):
        made.epoch(report(3, stage, epoch))
    made.close()
    assert os.listdir(tmp_path / "tensorboard") == ["0003"]
    (file,) = files(tmp_path, "0003")
    assert events(file)[0].file_version == "brain.Event:2"
    assert scalars(tmp_path, "0003") == [
        *(("stage1/loss", 1, 2.0), ("stage1/distance", 1, 0.25), ("stage1/images_per_s", 1, 100.0)),
        *(("stage1/loss", 2, 1.0), ("stage1/distance", 2, 0.5), ("stage1/images_per_s", 2, 200.0)),
        *(("stage2/loss", 1, 2.0), ("stage2/distance", 1, 0.25), ("stage2/images_per_s", 1, 100.0)),
    ]


def test_an_end_brings_what_was_measured_and_the_active_parameters(tmp_path):
    made = Boards(tmp_path)
    made.epoch(report(0, 0, 1))
    made.ended(row(0))
    assert scalars(tmp_path, "0000")[-1] == ("val/balanced", 5, 0.75), "written without a close"
    assert [tag for tag, _, _ in scalars(tmp_path, "0000") if tag.startswith("val/")] == ["val/balanced"]
    found = hparams(tmp_path, "0000")
    assert set(found) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}, (
        "an experiment of one trial would hide the parameters that only others have"
    )
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()} == {
        "loss": "focal",
        "lr": 0.05,
        "deferred": True,
        "depth": 3.0,
    }
    assert values["deferred"].WhichOneof("kind") == "bool_value"


def test_a_failed_trial_has_no_end(tmp_path):
    made = Boards(tmp_path)
    made.epoch(report(0, 0, 1))
    failed = {"trial": "0000", "number": 0, "state": "failed", "error": "boom", "epochs_asked": 5, "p.lr": 1.0}
    made.ended(failed)
    made.ended({**failed, "trial": "0001", "number": 1})
    assert len(scalars(tmp_path, "0000")) == 3 and not hparams(tmp_path, "0000")
    assert os.listdir(tmp_path / "tensorboard") == ["0000"], "of one that never trained nothing is left"


def test_trials_of_several_lengths_are_kept_apart(tmp_path):
    """A recipe that is trained again, longer, has the same number and another id."""
    made = Boards(tmp_path)
    made.epoch(report(7, 0, 1))
    made.epoch(report(7, 0, 1, trial="0007.1"))
    made.ended(row(7, trial="0007.1"))
    made.close()
    assert len(scalars(tmp_path, "0007")) == 3 and len(scalars(tmp_path, "0007.1")) == 4


def test_a_resumed_search_draws_every_step_once(tmp_path):
    """A trial that goes on from a snapshot trains some epochs again; their numbers are the same."""
    first = Boards(tmp_path)
    for epoch in (1, 2, 3):
        first.epoch(report(0, 0, epoch))
    first.close()
    second = Boards(tmp_path)
    for epoch in (2, 3, 3, 4):
        second.epoch(report(0, 0, epoch))
    second.ended(row(0))
    third = Boards(tmp_path)
    third.ended(row(0))
    assert len(files(tmp_path, "0000")) == 3
    steps = [step for tag, step, _ in scalars(tmp_path, "0000") if tag == "stage1/loss"]
    assert steps == [1, 2, 3, 4]
    assert [tag for tag, _, _ in scalars(tmp_path, "0000")].count("val/balanced") == 1


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_file_that_a_crash_cut_off_is_read_up_to_there(tmp_path, lost):
    first = Boards(tmp_path)
    for epoch in (1, 2):
        first.epoch(report(0, 0, epoch))
    first.close()
    (file,) = files(tmp_path, "0000")
    os.truncate(file, file.stat().st_size - lost)
    steps = [event.step for event in boards.events(file)]
    assert steps == [0, 1], "the version and the first epoch"
    second = Boards(tmp_path)
    second.epoch(report(0, 0, 2))
    second.close()
    assert [event.step for event in events(files(tmp_path, "0000")[1])] == [0, 2]


def test_what_was_written_appears_while_the_trial_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(boards, "FLUSH_S", 0.0)
    made = Boards(tmp_path)
    for number in (0, 1):
        made.epoch(report(number, 0, 1))
        made.epoch(report(number, 0, 2))
    assert len(scalars(tmp_path, "0000")) == len(scalars(tmp_path, "0001")) == 6
    made.close()


def told(caplog):
    return [record for record in caplog.records if record.name == "rayltr.boards"]


def test_a_full_disk_ends_the_logs_and_says_so_once(tmp_path, monkeypatch, caplog):
    made = Boards(tmp_path)
    made.epoch(report(0, 0, 1))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(boards, "FLUSH_S", 0.0)
    monkeypatch.setattr(os, "fsync", full)
    for epoch in (2, 3):
        for number in (0, 1, 2):
            made.epoch(report(number, 0, epoch))
    made.ended(row(0))
    made.close()
    (only,) = told(caplog)
    assert "no more TensorBoard logs in" in only.getMessage() and "No space left" in only.getMessage()
    assert len(os.listdir(tmp_path / "tensorboard")) <= 2, "no trial that came later"


def test_a_folder_that_cannot_be_made_costs_only_the_logs(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    made = Boards(tmp_path)
    made.epoch(report(0, 0, 1))
    made.ended(row(0))
    made.close()
    assert len(told(caplog)) == 1


def test_it_can_be_pickled_with_open_files(tmp_path):
    made = Boards(tmp_path)
    made.epoch(report(0, 0, 1))
    assert isinstance(pickle.loads(pickle.dumps(made)), Boards)
    made.close()


def test_the_driver_imports_no_torch_for_it():
    code = "import sys; import rayltr.boards; print({'torch', 'tensorflow', 'tensorboardX'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_the_whole_tensorboardx_can_be_imported_later(tmp_path):
    with SummaryWriter(str(tmp_path / "theirs")) as writer:
        writer.add_scalar("a", 1.0, 1)
    (file,) = (tmp_path / "theirs").glob("events.*")
    assert [value.tag for event in boards.events(file) for value in event.summary.value] == ["a"]
