import subprocess
import sys

import pytest

from rayltr.spec import (
    FixedTrial,
    Fn,
    RandomTrial,
    Stage,
    chain,
    digest,
    dump,
    end,
    flat,
    fn,
    line,
    mapped,
    parse,
    scaled,
    start,
)

FIRST = Stage(source=fn("digits", ratio=20.0), epochs=160, horizon=200, mixing=fn("mixup", alpha=1.0))
SECOND = FIRST.but(epochs=40, resume=FIRST, mixing=None, weight=fn("effective_number", beta=0.999))
THIRD = SECOND.but(epochs=30, horizon=None, resume=None, init=SECOND, teacher=FIRST, head=fn("lws"))


def test_fn_sorts_its_keywords_drops_none_and_takes_a_function():
    def mine():
        pass

    assert fn("ldam", scale=30.0, max_margin=0.5) == Fn("ldam", (("max_margin", 0.5), ("scale", 30.0)))
    assert fn("ldam", scale=None) == fn("ldam")
    assert fn(mine, a=[1, 2]) == Fn("mine", (("a", (1, 2)),))
    assert fn("ldam", scale=1.0).but(scale=None, max_margin=0.3) == fn("ldam", max_margin=0.3)
    with pytest.raises(ValueError, match="number, a string"):
        fn("ldam", scale={})


def test_chain_lists_parents_first_and_each_stage_once():
    assert chain(THIRD) == [FIRST, SECOND, THIRD]
    assert (start(SECOND), end(SECOND), start(THIRD), end(THIRD)) == (160, 200, 0, 30)


def test_dump_and_parse_are_inverse():
    assert parse(dump(THIRD)) == THIRD
    assert "mixing" not in dump(SECOND)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": {"fn": "digits"}, "epochs": 1, "lr": 1}, "no field 'lr'"),
        ({"epochs": 1}, "needs the field 'source'"),
    ],
)
def test_parse_says_what_is_wrong(data, message):
    with pytest.raises(ValueError, match=message):
        parse(data)


def test_golden_addresses():
    """Changing one of these makes every stored artifact of every user unreachable: raise CODE instead, knowingly."""
    assert digest(FIRST) == "132335aa355349a284e7bb5a9f1440c5ca5d1770d48ba30e254ca54fc586cea8@160"
    assert digest(SECOND) == "29c24bba68ef7ebc48d60223e489629bcd9dc816c11f9c42c4a35e93eb56aba4@200"
    assert digest(THIRD) == "9cac688b55b2883949679b1e3d79f231939141b0ed4a199ec91b58aa0bc5c528@30"


def test_another_process_finds_the_same_address():
    code = "from tests.test_spec import THIRD, digest; print(digest(THIRD))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(THIRD)


def test_stages_of_one_line_differ_in_length_only():
    assert line(FIRST) == line(FIRST.but(epochs=120))
    assert line(FIRST) != line(FIRST.but(horizon=120))
    assert line(SECOND) != line(SECOND.but(resume=FIRST.but(epochs=120)))
    assert line(FIRST) != line(FIRST.but(seed=1))


@pytest.mark.parametrize("epochs", [2, 3, 7, 20, 199, 400])
def test_scaling_keeps_shares_and_horizon(epochs):
    short = scaled(SECOND, epochs)
    lengths = [stage.epochs for stage in chain(short)]
    assert sum(lengths) == epochs and min(lengths) >= 1
    assert abs(lengths[0] - 0.8 * epochs) <= 1
    assert {stage.horizon for stage in chain(short)} == {epochs}


def test_scaling_leaves_untrained_stages_and_refuses_too_few_epochs():
    evaluated = SECOND.but(epochs=0, horizon=None, resume=None, init=SECOND)
    assert [stage.epochs for stage in chain(scaled(evaluated, 10))] == [8, 2, 0]
    with pytest.raises(ValueError, match="1 epochs are too few for a chain of 2"):
        scaled(SECOND, 1)


def test_mapped_reaches_every_stage():
    assert {stage.seed for stage in chain(mapped(THIRD, lambda stage: stage.but(seed=7)))} == {7}


def test_flat_has_one_level():
    found = flat(SECOND)
    assert found["weight"] == "effective_number" and found["weight.beta"] == 0.999
    assert found["resume.mixing"] == "mixup" and found["views.0"] == "flip_crop"


def test_fixed_trial_replays_and_checks():
    trial = FixedTrial({"lr": 0.1, "q": 0.5, "n": 3})
    assert trial.suggest_categorical("lr", [0.1, 0.2]) == 0.1
    assert trial.suggest_float("q", 0, 1) == 0.5 and trial.suggest_int("n", 1, 5) == 3
    with pytest.raises(ValueError, match="asks for the parameter 'tau'"):
        trial.suggest_float("tau", 0, 1)
    with pytest.raises(ValueError, match="not between 0 and 0.4"):
        trial.suggest_float("q", 0, 0.4)


def test_random_trial_gives_one_value_per_name():
    trial = RandomTrial(0)
    assert trial.suggest_float("q", 0, 1) == trial.suggest_float("q", 0, 1) == trial.asked["q"]
