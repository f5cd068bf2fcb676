"""Networks that are compiled while they are trained: which ones, that they give the same, and that nothing stays."""

import json

import pytest
import torch

from rayltr import catalogue, command, recipe, trial
from rayltr.compiled import Compiled, networks
from rayltr.interface import Resources
from rayltr.ledger import Settings
from rayltr.spec import dump, fn
from rayltr.studies import Plan
from rayltr.train import train
from tests.conftest import tiny
from tests.methods.test_methods import METHODS, TAUGHT, asked

ONE = Resources(device="cpu", threads=1)


@pytest.fixture
def calls(monkeypatch):
    """What torch.compile was given, once for each call of what it made: that is here the function itself."""
    found = []

    def made(function, **how):
        def run(*given):
            found.append((function, how))
            return function(*given)

        return run

    monkeypatch.setattr(torch, "compile", made)
    return found


def trained(stage, lane=None, given=None):
    resources = Resources("cpu", 1, lane=lane) if lane else ONE
    return train(stage, given, resources=resources)


def same(one, other, **near):
    (state, logits), (its, theirs) = one, other
    for name, value in state.model.items():
        torch.testing.assert_close(value, its.model[name], **near)
    for head, values in logits["val"].items():
        torch.testing.assert_close(torch.from_numpy(values), torch.from_numpy(theirs["val"][head]), **near)


@pytest.mark.parametrize("method", METHODS)
def test_the_networks_of_every_method_are_compiled_with_those_of_its_teacher(method, calls):
    stage = tiny(**asked(method), epochs=1)
    given = {"teacher": train(tiny(seed=1, epochs=1), resources=ONE)[0]} if method in TAUGHT else {}
    assert not calls
    same(trained(stage, Compiled(), given), trained(stage, None, given), rtol=0, atol=0)
    owners = {id(function.__self__) for function, _ in calls}
    assert len(owners) == 1 + (method in TWO)
    assert all(how == {"dynamic": False, "mode": "reduce-overhead"} for _, how in calls)


TWO = TAUGHT - {"cam"} | {"instance", "paco"}
"""Methods with a teacher, of which cam asks no features, or with a second network that follows the first one."""


def test_a_network_is_itself_again_after_its_epochs(calls):
    module = torch.nn.Module()
    module.backbone = torch.nn.Identity()
    with Compiled().training(module, None):  # no network behind a normalisation
        pass
    assert not list(networks(module))
    state, logits = trained(tiny(epochs=1), Compiled())
    steps = len(calls)
    assert steps and all("forward" not in vars(function.__self__) for function, _ in calls)
    with pytest.raises(ValueError, match="stopped"):
        train(tiny(epochs=2), resources=Resources("cpu", 1, lane=Compiled()), on_epoch=stop)
    assert all("forward" not in vars(function.__self__) for function, _ in calls)


def stop(record):
    raise ValueError("stopped")


def test_mixing_inside_the_network_is_left_to_hooks_that_a_compiled_one_would_not_call(calls):
    stage = tiny(epochs=1, mixing=fn("manifold", layer="layer2"))
    same(trained(stage, Compiled()), trained(stage), rtol=0, atol=0)
    assert not calls


STUDY = """
from rayltr.spec import parse


def space(trial):
    return parse({recipe!r})


control = space
"""


@pytest.mark.parametrize("compile", [True, False])
def test_trials_of_a_search_and_single_recipes_are_compiled_where_that_is_asked_for(
    compile, calls, tmp_path, monkeypatch
):
    monkeypatch.setattr(catalogue, "USER", {})
    monkeypatch.setattr(trial, "end_with_parent", lambda: None)
    (tmp_path / "config.json").write_text(json.dumps(dump(tiny(epochs=1))))
    words = [str(tmp_path / "config.json"), f"--storage={tmp_path}", "--name=run", "--device=cpu", "--threads=1"]
    assert command.run(recipe.main, words + ["--compile"] * compile) == 0
    assert bool(calls) == compile
    calls.clear()
    (tmp_path / "own_study.py").write_text(STUDY.format(recipe=dump(tiny(epochs=1, seed=1))))
    plan = Plan(str(tmp_path / "own_study.py"))
    settings = Settings(str(tmp_path / "run"), plan, 1, ("balanced_nll",), "random", compile=compile)
    trial.for_search(settings, "0000", {"arm": "study"}, lambda record: None)
    assert bool(calls) == compile


@pytest.mark.parametrize("changes", [{}, {"mixing": fn("mixup"), "optimiser": fn("sam", lr=0.05, rho=0.1)}])
def test_a_traced_network_trains_to_the_same_bits(changes):
    stage = tiny(epochs=2, **changes)
    same(trained(stage, Compiled(backend="eager")), trained(stage), rtol=0, atol=0)


def test_a_process_compiles_one_structure_after_the_other_and_none_twice():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, given):
        graphs.append(graph)
        return graph

    for width in (*range(1, 11), 3):  # more than torch's own limit
        trained(tiny(epochs=1, batch=64, backbone=fn("resnet20", width=width)), Compiled(backend=backend))
    assert len(graphs) == 10


@pytest.mark.slow
def test_a_network_of_decomposed_operations_trains_to_the_same_up_to_the_order_of_sums():
    """All but the generation of code, which takes torch a minute (`python -m benchmarks.epoch --compile` has it)."""
    stage = tiny(epochs=1, batch=64, optimiser=fn("sgd", lr=0.01))
    decomposed = Compiled(backend="aot_eager_decomp_partition")
    same(trained(stage, decomposed), trained(stage), rtol=1e-3, atol=1e-4)
