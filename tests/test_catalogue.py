import importlib
import subprocess
import sys
import types

import pytest

from rayltr import build, catalogue
from rayltr.data import SOURCES
from rayltr.spec import Stage, fn
from tests.conftest import tiny

STAGE = tiny()


def test_what_is_read_from_the_text_is_what_the_tables_hold():
    for axis, table in {**build.TABLES, "source": SOURCES}.items():
        assert set(catalogue.names(axis)) == set(table), axis


@pytest.mark.parametrize("axis", [axis for axis in catalogue.TABLES if axis != "source"])
def test_signatures_are_those_of_the_functions(axis):
    for name, found in catalogue.names(axis).items():
        assert found == catalogue._user_signature(build.TABLES[axis][name]), name


def test_every_method_can_be_imported_and_takes_what_is_read():
    for name in catalogue.names("method"):
        assert importlib.import_module(f"rayltr.methods.{name}").Method


def test_checking_imports_nothing_heavy():
    code = """
import sys
from rayltr.catalogue import complete
from rayltr.spec import Stage, fn
complete(Stage(source=fn("digits"), epochs=1))
heavy = {"torch", "ray", "optuna", "plotly", "numpy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_written_out_and_whole_numbers_become_floats():
    left_out, written = STAGE.but(loss=fn("focal")), STAGE.but(loss=fn("focal", gamma=2))
    assert catalogue.complete(left_out) == catalogue.complete(written)
    assert catalogue.complete(left_out).loss == fn("focal", gamma=2.0)
    assert catalogue.complete(STAGE).horizon == STAGE.epochs
    assert catalogue.complete(catalogue.complete(STAGE)) == catalogue.complete(STAGE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": fn("balanced_sofmax")}, "unknown loss 'balanced_sofmax': did you mean balanced_softmax"),
        ({"source": fn("cifar", ratio=10)}, "unknown source 'cifar': did you mean cifar10"),
        ({"method": fn("supervise")}, "unknown method 'supervise': did you mean supervised"),
        ({"views": (fn("flipcrop"),)}, "unknown view 'flipcrop': did you mean flip_crop"),
        ({"loss": fn("ldam", margin=0.5)}, "loss ldam has no keyword 'margin': did you mean max_margin"),
        ({"source": fn("folder")}, "source folder needs the keyword 'root'"),
        ({"loss": fn("focal", gamma="a")}, "loss focal: gamma is a number, not 'a'"),
        ({"loss": fn("focal", gamma=float("nan"))}, "gamma is nan, which is no finite number"),
        ({"method": fn("supervised", frozen=1)}, "frozen is true or false, not 1"),
        ({"views": (fn("resized_crop", scale=0.5),)}, "scale is a list, not 0.5"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"epochs": -1}, "epochs is a whole number, not -1"),
        ({"batch": 0}, "batch is a whole number, not 0"),
        ({"horizon": 1}, "ends at epoch 2, beyond its horizon of 1"),
        ({"views": ()}, "at least one view"),
        ({"resume": STAGE, "init": STAGE}, "not both"),
        ({"resume": STAGE, "horizon": 9, "head": fn("lws")}, "keeps its head"),
        ({"loss": fn("seql"), "weight": fn("inverse_frequency")}, "the loss seql takes no class weight: "),
        ({"loss": fn("balanced_softmax"), "weight": fn("effective_number")}, "balanced_softmax takes no class weight"),
        ({"method": fn("cam")}, "the method cam needs a teacher"),
        ({"teacher": STAGE}, "the method supervised consults no teacher"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        catalogue.complete(STAGE.but(**changes))
    assert "\n" not in str(error.value)


def test_a_users_function_is_identified_by_its_text(monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "USER", {})
    found = []
    for text in ("return logits.sum(1) * gamma", "return logits.sum(1) * gamma * 2"):
        path = tmp_path / f"mine{len(found)}.py"
        path.write_text(f"def my_loss(logits, target, counts, *, gamma=1.0):\n    {text}\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        catalogue.extend(module)
        found.append(catalogue.complete(STAGE.but(loss=fn("my_loss", gamma=2))))
    assert found[0].loss.get("gamma") == 2.0
    assert found[0].loss.get("code") != found[1].loss.get("code")


def test_only_functions_of_the_file_itself_are_taken(monkeypatch):
    monkeypatch.setattr(catalogue, "USER", {})
    module = types.ModuleType("mine")
    module.Stage, module.borrowed = Stage, catalogue.nearest
    catalogue.extend(module)
    assert catalogue.USER == {}
