import pytest
import torch
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.methods.rotation import guessed, turned
from rayltr.samplers import SAMPLERS
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, batch_of, built


def counter_clockwise(image):
    """One quarter turn, pixel by pixel: what was at the right is at the top."""
    found = torch.empty_like(image)
    side = image.shape[1]
    for row in range(side):
        for column in range(side):
            found[:, row, column] = image[:, column, side - 1 - row]
    return found


def test_copies_are_turned_by_their_place_and_row():
    images = torch.rand(7, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    copies, turns = turned(images, torch.tensor([0, 0, 0, 0, 7, 100, 3]))
    assert turns.tolist() == [0, 1, 2, 3, 3, 1, 1]
    for image, copy, times in zip(images, copies, turns, strict=True):
        for _ in range(times):
            image = counter_clockwise(image)
        assert torch.equal(copy, image)


def test_turns_go_on_where_the_batch_of_another_worker_ends(monkeypatch):
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([5, 2, 9, 4, 4, 8, 1, 0])
    whole, turns = turned(images, rows)
    monkeypatch.setattr("rayltr.methods.rotation.gather_rows", lambda x: (x, 3))
    part, own = turned(images[3:], rows[3:])
    assert torch.equal(part, whole[3:]) and torch.equal(own, turns[3:])


def test_a_sampler_of_pairs_does_not_give_classes_away():
    """Of `reverse` even places are ordinary and odd ones rare; rows of a class are any."""
    counts = torch.tensor([300, 100, 20])
    target = torch.arange(3).repeat_interleave(counts)
    g = torch.Generator().manual_seed(0)
    rows = torch.cat([SAMPLERS["reverse"](counts, target, 0.0, g) for _ in range(12)])
    _, turns = turned(torch.zeros(len(rows), 1, 1, 1), rows)
    for times in range(4):
        shares = torch.bincount(target[rows][turns == times], minlength=3) / (turns == times).sum()
        torch.testing.assert_close(shares, torch.bincount(target[rows]) / len(rows), atol=0.05, rtol=0)


@pytest.mark.parametrize("mixing", [None, fn("mixup")])
def test_the_terms_are_those_of_the_two_halves_of_one_pass(mixing):
    stage = catalogue.complete(tiny(method=fn("rotation", rotation=0.3), mixing=mixing))
    module, batch = built(stage).train(), batch_of(stage)
    terms = module(batch)
    copies, turns = turned(batch.views[0], batch.rows)
    features = module.backbone(torch.cat([batch.views[0], copies]))
    share = torch.ones(8) if mixing is None else batch.weight
    losses = share * F.cross_entropy(module.head(features[:8]), batch.target, reduction="none")
    if mixing:
        losses = losses + (1 - share) * F.cross_entropy(module.head(features[:8]), batch.mixed, reduction="none")
    torch.testing.assert_close(terms["loss"], losses.mean())
    four = module.angle(features[8:]).log_softmax(1)
    expected = -sum(four[i, t] for i, t in enumerate(turns.tolist())) / 8
    torch.testing.assert_close(terms["rotation"], 0.3 * expected)


def test_what_knows_nothing_of_angles_loses_log_four():
    assert guessed(torch.zeros(6, 4), torch.arange(6) % 4).item() == pytest.approx(1.3862943611)


def test_it_keeps_what_predicts_and_refuses_what_cannot_be():
    module = build.method(catalogue.complete(tiny(method=fn("rotation"))), FACTS)
    plain = build.method(catalogue.complete(tiny()), FACTS)
    assert module.keep() == list(plain.state_dict())
    with pytest.raises(ValueError, match="square images, not 4 x 6"):
        turned(torch.zeros(2, 3, 4, 6), torch.arange(2))
    with pytest.raises(ValueError, match="rotation needs rotation > 0, not 0.0"):
        build.method(catalogue.complete(tiny(method=fn("rotation", rotation=0))), FACTS)
    with pytest.raises(ValueError, match="cannot mix inside the network"):
        build.method(catalogue.complete(tiny(method=fn("rotation"), mixing=fn("manifold", layer="pool"))), FACTS)
