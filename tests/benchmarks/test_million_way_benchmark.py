"""What sharing a classifier saves: a ratio divides what one way takes by what another does, and both are measured."""

import re
from pathlib import Path

import pytest

from benchmarks import million_way
from benchmarks.million_way import Found, main, modelled, parser

TINY = ["--steps", "1", "--batch", "8", "--dim", "64"]
FULL, KEPT, BLOCKS = million_way.WAYS
MIB = 2**20
PEAKS = {(FULL, 1000): 90, (KEPT, 1000): 60, (BLOCKS, 1000): 10, (FULL, 3000): 240, (KEPT, 3000): 60,
         (BLOCKS, 3000): 11}  # fmt: skip
SECONDS = {FULL: 6.0, KEPT: 5.0, BLOCKS: 3.0}


def ratios(said):
    """The ratios that are printed, by name."""
    return {name.strip(): float(ratio) for name, ratio in re.findall(r"^(\w+, .+?) +([\d.]+) times less", said, re.M)}


@pytest.fixture
def measured(monkeypatch):
    """Puts a function that makes numbers up in the place of measuring them."""
    monkeypatch.setattr(million_way, "SIZES", (1000, 3000))
    return lambda found: monkeypatch.setattr(million_way, "measured", found)


def made_up(**changed):
    """Found numbers; `changed`: factors by the place of the way, and of what is sent."""
    factors = dict(zip(million_way.WAYS, (changed.get(name, 1.0) for name in ("full", "kept", "blocks")), strict=True))

    def found(way, classes, options):
        seconds = [2 * SECONDS[way] * factors[way], SECONDS[way] * factors[way]]
        sent = modelled(way, classes, options) * changed.get("sent", 1.0)
        return Found(seconds, sent, int(PEAKS[way, classes] * factors[way] * MIB))

    return found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (4.0, 240 / 11, 2.0)),
        ({"full": 2.0}, (8.0, 480 / 11, 4.0)),
        ({"kept": 2.0}, (2.0, 240 / 11, 2.0)),
        ({"blocks": 2.0}, (4.0, 120 / 11, 1.0)),
    ],
)
def test_a_ratio_follows_both_of_its_sides_and_no_other(changes, expected, measured, capsys):
    measured(made_up(**changes))
    failed = main(TINY)
    found = ratios(capsys.readouterr().out)
    assert list(found) == ["memory, logits kept", "memory, blocks", "time, blocks"]
    assert [*found.values()] == pytest.approx(expected, abs=0.005)
    assert failed == ("kept" in changes or "blocks" in changes), "2.0 < 2.5 times, and 1.0 < 1.4 times"


@pytest.mark.parametrize(("factor", "failed"), [(1.0, 0), (1.04, 0), (1.06, 1), (0.94, 1)])
def test_the_traffic_is_that_of_the_model(factor, failed, measured, capsys):
    measured(made_up(sent=factor))
    assert main(TINY) == failed
    assert f"{abs(100 * factor - 100):.2f} % (at most 5)" in capsys.readouterr().out


def test_the_slope_is_the_memory_of_more_classes(measured, capsys):
    measured(made_up())
    assert main(TINY) == 0
    assert f"{MIB / 2000:.0f} (at most 600; 256 are" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts memory and traffic")
def test_both_sides_are_measured_in_two_processes():
    """Of so few classes only the traffic means something; messages have headers, too."""
    options = parser().parse_args([*TINY, "--batch", "128"])
    found = {way: million_way.measured(way, 3000, options) for way in (FULL, BLOCKS)}
    for way, one in found.items():
        assert len(one.seconds) == 1 and one.seconds[0] > 0 and one.peak > 0
        assert one.sent == pytest.approx(modelled(way, 3000, options), rel=0.1)
    assert found[FULL].sent > 8 * found[BLOCKS].sent
