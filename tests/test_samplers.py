import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from rayltr.samplers import SAMPLERS, class_probabilities

COUNTS = torch.tensor([400, 0, 150, 40, 10])
ENTRIES = [
    ("power", {}),
    ("power", {"q": 0.5}),
    ("power", {"q": 0.0}),
    ("power", {"q": -1.0}),
    ("progressive", {}),
    ("progressive", {"start": 0.4}),
    ("reverse", {}),
    ("repeated", {"repeats": 1}),  # copies of an image come together, so that draws are not independent
    ("oversample", {}),
    ("undersample", {}),
    ("class_aware", {}),
    ("class_aware", {"each": 4}),
]
LENGTHS = {"power": 600, "progressive": 600, "reverse": 2 * 600, "oversample": 4 * 400, "undersample": 4 * 10,
           "repeated": 512, "class_aware": 600}  # fmt: skip
every_entry = pytest.mark.parametrize("name, keywords", ENTRIES, ids=str)


def targets(counts=COUNTS, seed=5):
    """The classes of the images, in no order."""
    target = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return target[torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))]


def drawn(name, keywords, t=0.3, seed=0, epochs=1, target=None):
    g = torch.Generator().manual_seed(seed)
    target = targets() if target is None else target
    return torch.cat([SAMPLERS[name](COUNTS, target, t, g, **keywords) for _ in range(epochs)])


def announced(name, indices):
    """The draws that `class_probabilities` speaks of: of pairs, the reversed half."""
    return indices[1::2] if name == "reverse" else indices


def test_every_sampler_is_tested():
    assert {name for name, _ in ENTRIES} == set(SAMPLERS)


@every_entry
def test_an_epoch_is_valid_indices_of_one_epochs_length(name, keywords):
    indices = drawn(name, keywords)
    assert indices.shape == (LENGTHS[name],) and indices.dtype == torch.int64
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
    assert not torch.equal(*two.chunk(2))


@every_entry
@pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
def test_classes_come_as_often_as_announced(name, keywords, t):
    p = class_probabilities(name, COUNTS, t, **keywords)
    assert p.dtype == torch.float64 and p.shape == (5,)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    indices = announced(name, drawn(name, keywords, t, epochs=50))
    seen, expected = torch.bincount(targets()[indices], minlength=5), len(indices) * p
    deviation = (seen - expected).square() / expected.clamp(min=1e-9)
    assert deviation.sum() < 20  # chi-square with 3 degrees of freedom: p < 0.0002
    assert seen[1] == 0 and p[1] == 0


@every_entry
def test_images_of_a_class_come_equally_often(name, keywords):
    indices = announced(name, drawn(name, keywords, epochs=100))
    target = targets()
    for c in (0, 2, 3, 4):
        seen = torch.bincount(indices, minlength=600)[target == c].double()
        expected = seen.mean()
        assert expected > 0
        degrees = len(seen) - 1
        assert (seen - expected).square().sum() / expected < degrees + 5 * (2 * degrees) ** 0.5


def test_power_one_shows_every_image_once():
    assert torch.equal(drawn("power", {}).sort().values, torch.arange(600))


@pytest.mark.parametrize("images", [100, 600])
def test_repeated_is_the_sampler_of_timm(images):
    """With one worker; several take every W-th of the same order there."""
    for repeats, epoch in ((3, 0), (3, 5), (1, 2)):
        theirs = RepeatAugSampler(range(images), num_replicas=1, rank=0, num_repeats=repeats)
        theirs.set_epoch(epoch)
        ours = drawn("repeated", {"repeats": repeats}, seed=epoch, target=targets()[:images])
        assert ours.tolist() == list(theirs) and len(ours) == (512 if images == 600 else 100)
    assert len(drawn("repeated", {}).unique()) == -(-512 // 3)
    with pytest.raises(ValueError, match="repeats of the sampler repeated is at least 1, not 0"):
        drawn("repeated", {"repeats": 0})


def test_the_ordinary_half_of_reverse_is_power_one():
    indices = drawn("reverse", {}, seed=3)
    assert torch.equal(indices[::2], drawn("power", {}, seed=3))
    assert len(indices[1::2].unique()) < 600


def test_oversample_repeats_whole_classes_and_a_random_rest():
    rest = set()
    for seed in range(3):
        indices = drawn("oversample", {}, seed=seed)
        assert torch.bincount(targets()[indices], minlength=5).tolist() == [400, 0, 400, 400, 400]
        copies = torch.bincount(indices, minlength=600)
        for c, floor, more in [(0, 1, 0), (2, 2, 100), (3, 10, 0), (4, 40, 0)]:
            assert copies[targets() == c].bincount().tolist() == [0] * floor + [COUNTS[c] - more] + [more] * bool(more)
        rest.add(tuple((copies == 3).nonzero().flatten().tolist()))
        assert len(set(targets()[indices[:200]].tolist())) == 4  # shuffled
    assert len(rest) == 3


def test_undersample_takes_the_smallest_class_and_as_many_of_the_others():
    kept = set()
    for seed in range(3):
        indices = drawn("undersample", {}, seed=seed)
        assert torch.bincount(targets()[indices], minlength=5).tolist() == [10, 0, 10, 10, 10]
        assert len(indices.unique()) == 40
        assert set(indices[targets()[indices] == 4].tolist()) == set((targets() == 4).nonzero().flatten().tolist())
        assert targets()[indices].diff().count_nonzero() > 10  # shuffled
        assert indices.diff().sign().unique().tolist() == [-1, 1]
        kept.add(tuple(indices.sort().values.tolist()))
    assert len(kept) == 3


@pytest.mark.parametrize("name, each", [("oversample", 60), ("undersample", 7)])
def test_class_sizes_are_those_of_the_images_that_can_be_drawn(name, each):
    """Whatever the counts say, and whichever classes are empty: the first, one in between or the last."""
    size = torch.tensor([0, 60, 0, 7, 41, 0])
    target = targets(size)
    indices = SAMPLERS[name](torch.tensor([9, 900, 3, 30, 90, 0]), target, 1.0, torch.Generator().manual_seed(0))
    assert torch.bincount(target[indices], minlength=6).tolist() == [0, each, 0, each, each, 0]
    copies = torch.bincount(indices, minlength=len(target)).double()
    assert (copies - each / size[target]).abs().max() < 1  # floor or floor + 1 of each image


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
    rare = torch.tensor([3, 0, 8, 30, 120]).double() / 161  # 1/400, 1/150, 1/40, 1/10 in units of 1/1200
    torch.testing.assert_close(class_probabilities("reverse", COUNTS, 0.5), rare)
    torch.testing.assert_close(class_probabilities("oversample", COUNTS, 0.5), balanced)
    torch.testing.assert_close(class_probabilities("undersample", COUNTS, 0.5), balanced)


@pytest.mark.parametrize("t, u", [(0.5, 0.0), (0.8, 0.0), (0.805, 0.025), (0.9, 0.5), (1.0, 1.0)])
def test_progressive_goes_its_way_from_its_start_on(t, u):
    n, balanced = COUNTS.double() / 600, torch.tensor([1, 0, 1, 1, 1]).double() / 4
    found = class_probabilities("progressive", COUNTS, t, start=0.8)
    torch.testing.assert_close(found, (1 - u) * n + u * balanced, rtol=0, atol=1e-9)


@pytest.mark.parametrize("start", [-0.1, 1.0])
def test_a_start_outside_the_horizon_is_refused(start):
    message = f"start of progressive is at least 0 and below 1, not {start}"
    with pytest.raises(ValueError, match=message):
        class_probabilities("progressive", COUNTS, 1.0, start=start)
    with pytest.raises(ValueError, match=message):
        drawn("progressive", {"start": start})


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="'square'; there are power, progressive, reverse, oversample, under"):
        class_probabilities("square", COUNTS, 1.0)


def slow_walk(target, each, shuffled):
    """The published program's: cycles that are shuffled whenever they begin, `each` images of a class in a row."""

    def cycle(values):
        while True:
            yield from shuffled(values)

    classes = sorted(set(target.tolist()))
    images = {c: cycle([i for i, y in enumerate(target.tolist()) if y == c]) for c in classes}
    tour, found = cycle(classes), []
    while len(found) < len(target):
        own = images[next(tour)]
        found += [next(own) for _ in range(each)]
    return found[: len(target)]


@pytest.mark.parametrize("each", [1, 2, 4])
def test_class_aware_walks_over_the_classes_as_published(each):
    """With shuffling taken out of both, the order is the same, image by image."""
    size = torch.tensor([23, 0, 9, 3, 1])
    target = targets(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator: torch.arange(n).flip(0))
        found = SAMPLERS["class_aware"](size, target, 1.0, torch.Generator(), each=each)
    dealt = torch.arange(len(target)).flip(0)
    walk = slow_walk(target[dealt], each, lambda values: values[::-1])
    assert found.tolist() == dealt[walk].tolist()


def test_class_aware_shuffles_both_cycles_whenever_they_begin():
    size = torch.tensor([23, 0, 9, 3, 1])
    target = targets(size)
    found = SAMPLERS["class_aware"](size, target, 1.0, torch.Generator().manual_seed(0))
    pairs = target[found].view(-1, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    rounds = [tuple(part.tolist()) for part in pairs[:16, 0].split(4)]
    assert all(sorted(part) == [0, 2, 3, 4] for part in rounds) and len(set(rounds)) > 1
    own = found[target[found] == 3].split(3)
    assert all(len(set(part.tolist())) == 3 for part in own[:-1]) and len({tuple(part.tolist()) for part in own}) > 1


@pytest.mark.parametrize(("walks", "length"), [(1, 36), (2, 36), (5, 40), (7, 42)])
def test_the_walks_of_class_aware_alternate_and_know_what_they_were_dealt(walks, length):
    """Images are dealt out like cards; the first ones twice where the last round is incomplete."""
    size = torch.tensor([23, 0, 9, 3, 1])
    target, g = targets(size), torch.Generator().manual_seed(0)
    dealt = torch.randperm(36, generator=torch.Generator().manual_seed(0)).tolist()
    dealt += dealt[: length - 36]
    found = SAMPLERS["class_aware"](size, target, 1.0, g, walks=walks)
    assert len(found) == length
    for walk in range(walks):
        own = found[walk::walks]
        hand = torch.tensor(dealt[walk::walks])
        assert len(own) == len(hand) and set(own.tolist()) <= set(hand.tolist())
        seen = torch.bincount(target[own], minlength=5)[target[hand].unique()]
        assert seen.max() - seen.min() <= 2


@pytest.mark.parametrize("keywords", [{"each": 0}, {"walks": 0}])
def test_class_aware_refuses_numbers_below_one(keywords):
    with pytest.raises(ValueError, match="each and walks of class_aware are at least 1"):
        drawn("class_aware", keywords)
