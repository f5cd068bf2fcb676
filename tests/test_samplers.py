import pytest
import torch

from rayltr.samplers import SAMPLERS, class_probabilities

COUNTS = torch.tensor([400, 0, 150, 40, 10])
ENTRIES = [
    ("power", {}),
    ("power", {"q": 0.5}),
    ("power", {"q": 0.0}),
    ("power", {"q": -1.0}),
    ("progressive", {}),
]
every_entry = pytest.mark.parametrize("name, keywords", ENTRIES, ids=str)


def targets(counts=COUNTS, seed=5):
    """The classes of the images, in no order."""
    target = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return target[torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))]


def drawn(name, keywords, t=0.3, seed=0, epochs=1, target=None):
    g = torch.Generator().manual_seed(seed)
    target = targets() if target is None else target
    return torch.cat([SAMPLERS[name](COUNTS, target, t, g, **keywords) for _ in range(epochs)])


def test_every_sampler_is_tested():
    assert {name for name, _ in ENTRIES} == set(SAMPLERS)


@every_entry
def test_an_epoch_is_valid_indices_of_one_epochs_length(name, keywords):
    indices = drawn(name, keywords)
    assert indices.shape == (600,) and indices.dtype == torch.int64
    assert indices.min() >= 0 and indices.max() < 600


@every_entry
def test_the_generator_decides_everything(name, keywords):
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        first = drawn(name, keywords, seed=9)
        torch.manual_seed(2)
        assert torch.equal(first, drawn(name, keywords, seed=9))
    assert not torch.equal(first, drawn(name, keywords, seed=10))
    two = drawn(name, keywords, seed=9, epochs=2)
    assert not torch.equal(two[:600], two[600:])


@every_entry
@pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
def test_classes_come_as_often_as_announced(name, keywords, t):
    p = class_probabilities(name, COUNTS, t, **keywords)
    assert p.dtype == torch.float64 and p.shape == (5,)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    epochs = 50
    seen = torch.bincount(targets()[drawn(name, keywords, t, epochs=epochs)], minlength=5)
    deviation = (seen - 600 * epochs * p).square() / (600 * epochs * p).clamp(min=1e-9)
    assert deviation.sum() < 20  # chi-square with 3 degrees of freedom: p < 0.0002
    assert seen[1] == 0 and p[1] == 0


@every_entry
def test_images_of_a_class_come_equally_often(name, keywords):
    indices = drawn(name, keywords, epochs=100)
    target = targets()
    for c in (0, 2, 3, 4):
        seen = torch.bincount(indices, minlength=600)[target == c].double()
        expected = seen.mean()
        assert expected > 0
        degrees = len(seen) - 1
        assert (seen - expected).square().sum() / expected < degrees + 5 * (2 * degrees) ** 0.5


def test_power_one_shows_every_image_once():
    assert torch.equal(drawn("power", {}).sort().values, torch.arange(600))


def test_a_rare_class_of_a_million_is_drawn_correctly():
    classes = 1_000_000
    target = torch.arange(classes).flip(0)
    indices = SAMPLERS["power"](torch.ones(classes), target, 1.0, torch.Generator().manual_seed(0), q=0.0)
    seen = torch.bincount(indices, minlength=classes)
    assert seen.double().var().item() == pytest.approx(1, abs=0.02)  # Poisson


def test_counts_decide_the_class_and_targets_the_image():
    more = torch.cat([targets(), torch.full((200,), 4)])  # images added to the last class
    indices = SAMPLERS["power"](COUNTS, more, 1.0, torch.Generator().manual_seed(0), q=0.5)
    assert len(indices) == 800
    last = indices[more[indices] == 4]
    expected = 800 * class_probabilities("power", COUNTS, 1.0, q=0.5)[4].item()
    assert abs(len(last) - expected) < 5 * expected**0.5
    assert (last >= 600).double().mean() > 0.8


def test_a_class_with_a_count_but_without_images_is_passed_over():
    target = targets()
    target = target[target != 2]
    indices = SAMPLERS["power"](COUNTS, target, 1.0, torch.Generator().manual_seed(0), q=0.0)
    seen = torch.bincount(target[indices], minlength=5)
    assert seen[2] == 0 and (seen[[0, 3, 4]] - 150).abs().max() < 50


def test_the_formulas():
    n = COUNTS.double()
    torch.testing.assert_close(class_probabilities("power", COUNTS, 0.5), n / 600)
    torch.testing.assert_close(class_probabilities("power", COUNTS, 0.5, q=0.5), n.sqrt() / n.sqrt().sum())
    balanced = torch.tensor([1, 0, 1, 1, 1]).double() / 4
    torch.testing.assert_close(class_probabilities("power", COUNTS, 0.5, q=0.0), balanced)
    torch.testing.assert_close(class_probabilities("progressive", COUNTS, 0.25), 0.75 * n / 600 + 0.25 * balanced)
    torch.testing.assert_close(class_probabilities("progressive", COUNTS, 1.0), balanced)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="'square'; there are power, progressive"):
        class_probabilities("square", COUNTS, 1.0)
