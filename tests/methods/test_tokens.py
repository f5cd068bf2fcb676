import math

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.interface import Batch
from rayltr.losses import effective_number
from rayltr.methods.tokens import divergence, from_timm, to_timm
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, built

SIDES = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
STUDENT = fn("deit", size=8, patch=4, width=8, depth=2, heads=2, drop_path=0.0)
EXACT = {"rtol": 1e-9, "atol": 1e-12}
FIRST = {"mixing": fn("mixup_or_cutmix"), "loss": fn("label_smoothing", epsilon=0.1)}
"""What the first phase has."""


def stage_of(backbone=STUDENT, keywords=(), **changes):
    method = fn("tokens", **dict(keywords))
    return catalogue.complete(tiny(method=method, backbone=backbone, teacher=tiny(seed=1), **changes))


def batch_of(mixed, views=1):
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(6, 3, 8, 8, generator=g, dtype=torch.float64) for _ in range(views)]
    target = torch.tensor([0, 0, 1, 0, 1, 2])
    share = torch.full((6,), 0.7, dtype=torch.float64)
    return Batch(images, target, torch.arange(6), *((target.flip(0), share, torch.arange(5, -1, -1)) if mixed else ()))


def slow_cross_entropy(z, q):
    """Of logits and a distribution, one image at a time."""
    top = max(z)
    total = math.log(sum(math.exp(v - top) for v in z)) + top
    return -sum(share * (v - total) for share, v in zip(q, z, strict=True))


def one_hot(target, classes=3, smoothing=0.0):
    return [(1 - smoothing) * (c == target) + smoothing / classes for c in range(classes)]


def soft_targets(batch):
    """The targets of timm's Mixup with a smoothing of 0.1."""
    shares, pairs = batch.weight.tolist(), zip(batch.target.tolist(), batch.mixed.tolist(), strict=True)
    rows = [(one_hot(a, smoothing=0.1), one_hot(b, smoothing=0.1)) for a, b in pairs]
    return [[s * x + (1 - s) * y for x, y in zip(*row, strict=True)] for s, row in zip(shares, rows, strict=True)]


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_gradients(module, batch, slopes):
    """The gradients are those that the slopes of the loss, by the logits of both classifiers, lead to."""
    found = gradients(module, sum(module(batch).values()))
    pairs = zip(module.both(batch.views[0])[:2], slopes, strict=True)
    expected = gradients(module, sum((z * slope.detach()).sum() for z, slope in pairs))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def test_before_the_switch_targets_are_soft_and_the_teacher_s_class_counts_alike():
    module = built(stage_of(keywords={"alpha": 0.4}, **FIRST)).train()
    batch = batch_of(mixed=True)
    terms = module(batch)
    cls, dist, _ = module.both(batch.views[0])
    said = module.teacher[0].predict(batch.views[0])["main"].argmax(1).tolist()
    q = soft_targets(batch)
    own = sum(slow_cross_entropy(z, row) for z, row in zip(cls.tolist(), q, strict=True)) / 6
    far = sum(slow_cross_entropy(z, one_hot(y)) for z, y in zip(dist.tolist(), said, strict=True)) / 6
    assert terms["cls"].item() == pytest.approx(0.6 * own, rel=1e-9)
    assert terms["dist"].item() == pytest.approx(0.4 * far, rel=1e-9)
    wanted = torch.tensor(q, dtype=torch.float64), F.one_hot(torch.tensor(said), 3)
    slopes = [share * (z.softmax(1) - y) / 6 for share, z, y in zip((0.6, 0.4), (cls, dist), wanted, strict=True)]
    assert_gradients(module, batch, slopes)


def test_after_the_switch_the_distillation_is_weighted_by_what_the_teacher_says():
    module = built(stage_of(weight=fn("effective_number", beta=0.9))).train()
    module.drawn = weights = effective_number(torch.tensor([30.0, 12.0, 5.0], dtype=torch.float64), beta=0.9)
    batch = batch_of(mixed=False)
    module.teacher[0].head.bias.copy_(torch.tensor([0.3, 0.0, -0.1]))  # it shall say more than one class
    cls, dist, _ = module.both(batch.views[0])
    said = module.teacher[0].predict(batch.views[0])["main"].argmax(1).tolist()
    own = sum(slow_cross_entropy(z, one_hot(y)) for z, y in zip(cls.tolist(), batch.target.tolist(), strict=True)) / 6
    drawn = [weights[y].item() for y in said]
    losses = [slow_cross_entropy(z, one_hot(y)) for z, y in zip(dist.tolist(), said, strict=True)]
    far = sum(w * loss for w, loss in zip(drawn, losses, strict=True)) / sum(drawn)
    terms = module(batch)
    assert terms["cls"].item() == pytest.approx(0.5 * own, rel=1e-9)
    assert terms["dist"].item() == pytest.approx(0.5 * far, rel=1e-9)
    torch_s = F.cross_entropy(dist, torch.tensor(said), weight=weights)
    assert terms["dist"].item() == pytest.approx(0.5 * torch_s.item(), rel=1e-9)
    share = torch.tensor(drawn, dtype=torch.float64)[:, None] / sum(drawn)
    slopes = [
        0.5 * (cls.softmax(1) - F.one_hot(batch.target, 3)) / 6,
        0.5 * share * (dist.softmax(1) - F.one_hot(torch.tensor(said), 3)),
    ]
    assert_gradients(module, batch, slopes)


@pytest.mark.parametrize("mixed", [False, True])
def test_without_distillation_both_tokens_learn_from_the_targets(mixed):
    """The second one with the class weights, by the target, that the distillation would have."""
    stage = stage_of(keywords={"distil": "none"}, weight=fn("effective_number", beta=0.9), loss=FIRST["loss"])
    module, batch = built(stage).train(), batch_of(mixed)
    cls, dist, _ = module.both(batch.views[0])
    rows = soft_targets(batch) if mixed else [one_hot(y, smoothing=0.1) for y in batch.target.tolist()]
    own, far = (
        [slow_cross_entropy(z, q) for z, q in zip(logits.tolist(), rows, strict=True)] for logits in (cls, dist)
    )
    drawn = [module.drawn[y].item() for y in batch.target]  # the larger part of the mixes, too
    terms = module(batch)
    assert terms["cls"].item() == pytest.approx(0.5 * sum(own) / 6, rel=1e-9)
    weighted = sum(w * loss for w, loss in zip(drawn, far, strict=True)) / sum(drawn)
    assert terms["dist"].item() == pytest.approx(0.5 * weighted, rel=1e-9)


def test_the_published_weights():
    """Of CIFAR-10 and CIFAR-100 with a ratio of 100, for beta = 0.9999."""
    for classes, largest, low, high in ((10, 5000, 0.0506, 3.993), (100, 500, 0.0449, 4.378)):
        counts = torch.tensor([int(largest * 0.01 ** (c / (classes - 1))) for c in range(classes)])
        weight = effective_number(counts.double(), beta=0.9999)
        assert weight.sum().item() == pytest.approx(classes) and (weight.diff() >= 0).all()
        assert weight[0].item() == pytest.approx(low, abs=1e-4) and weight[-1].item() == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("weight", [None, (0.2, 0.8, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_compares_with_probabilities_that_may_be_weighted(temperature, weight):
    g = torch.Generator().manual_seed(0)
    z, taught = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    weights = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = []
    for own, other in zip(z.tolist(), taught.tolist(), strict=True):
        q = [w * math.exp(v / temperature) for w, v in zip(weight or (1, 1, 1), other, strict=True)]
        q = [v / sum(q) for v in q]
        entropy = -sum(v * math.log(v) for v in q)
        expected.append(temperature**2 * (slow_cross_entropy([v / temperature for v in own], q) - entropy))
    found = divergence(z, taught, temperature, weights)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    if weight is None:  # the form of the authors' code, divided by all logits
        logs = [F.log_softmax(v / temperature, 1) for v in (z, taught)]
        published = F.kl_div(*logs, reduction="sum", log_target=True) * temperature**2 / z.numel()
        assert found.mean().item() / 3 == pytest.approx(published.item(), rel=1e-9)


@pytest.mark.parametrize(("normalise", "divisor"), [("numel", 3), ("batch", 1)])
def test_soft_distillation_is_averaged_over_images_and_perhaps_classes(normalise, divisor):
    keywords = {"distil": "soft", "temperature": 2.0, "scale": 30.0, "normalise": normalise}
    module, batch = built(stage_of(keywords=keywords)).train(), batch_of(mixed=False)
    _, dist, _ = module.both(batch.views[0])
    taught = 30.0 * module.teacher[0].predict(batch.views[0])["main"]
    expected = divergence(dist, taught, 2.0, None).mean() / divisor
    torch.testing.assert_close(module(batch)["dist"], 0.5 * expected, **EXACT)


@pytest.mark.parametrize("weight", [None, fn("effective_number", beta=0.9)])
@pytest.mark.parametrize("distil", ["hard", "soft"])
def test_of_a_mixed_image_a_teacher_that_saw_it_unmixed_says_something_about_either_part(distil, weight):
    keywords = {"distil": distil, "normalise": "batch"}
    stage = stage_of(keywords=keywords, weight=weight, views=(fn("flip_crop"),) * 2, **FIRST)
    module, batch = built(stage).train(), batch_of(mixed=True, views=2)
    teacher = module.teacher[0]
    teacher.head.bias.sub_(teacher.predict(batch.views[1])["main"].mean(0))  # it shall say more than one class
    if weight:
        module.drawn = module.drawn.double()
    drawn = [1.0] * 3 if weight is None else module.drawn.tolist()
    _, dist, _ = module.both(batch.views[0])
    taught = teacher.predict(batch.views[1])["main"]
    said, shares = taught.argmax(1).tolist(), batch.weight.tolist()
    far = mass = 0.0
    for b, (z, share) in enumerate(zip(dist.tolist(), shares, strict=True)):
        for place, part in ((b, share), (batch.partner[b].item(), 1 - share)):
            if distil == "hard":
                far += part * drawn[said[place]] * slow_cross_entropy(z, one_hot(said[place]))
                mass += part * drawn[said[place]]
            else:
                far += part * divergence(dist[b : b + 1], taught[place : place + 1], 1.0, module.drawn).item()
                mass += part
    assert len(set(said)) > 1
    assert module(batch)["dist"].item() == pytest.approx(0.5 * far / mass, rel=1e-9)
    right = [y == target for y, target in zip(said, batch.target.tolist(), strict=True)]
    assert module.measured["teacher_accuracy"].item() == pytest.approx(sum(right) / 6)


def test_a_mixing_without_partners_does_not_go_with_a_teacher_s_own_view():
    module, batch = built(stage_of(views=(fn("flip_crop"),) * 2, **FIRST)).train(), batch_of(mixed=True, views=2)
    with pytest.raises(ValueError, match="mixup, cutmix"):
        module(Batch(batch.views, batch.target, batch.rows, batch.mixed, batch.weight))


def test_half_precision_and_large_logits_stay_finite():
    z = (50 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).bfloat16()
    assert divergence(z, z.flip(0), 2.0, torch.rand(6) + 0.1).isfinite().all()


def test_it_measures_itself_and_its_teacher_without_a_trace():
    """Cosines of the tokens, and the teacher's logits as its own loss has them; of mixes the larger part counts."""
    teacher = tiny(seed=1, loss=fn("ldam", scale=20.0), head=fn("cosine"))
    for keywords in ({}, {"distil": "soft", "scale": 30.0}):
        module = built(stage_of(keywords=keywords, **FIRST).but(teacher=catalogue.complete(teacher))).train()
        batch = batch_of(mixed=True)
        batch = Batch(batch.views, batch.target, batch.rows, batch.mixed, torch.tensor([0.7, 0.4] * 3).double())
        assert module.measured == {}
        state = torch.get_rng_state()
        loss = sum(module(batch).values())
        assert torch.equal(torch.get_rng_state(), state)
        tokens = module.backbone.body.tokens(module.backbone.normalised(batch.views[0])).tolist()
        cosines = [sum(a * b for a, b in zip(*pair, strict=True)) / math.prod(math.hypot(*t) for t in pair)
                   for pair in tokens]  # fmt: skip
        chances = (20 * module.teacher[0].predict(batch.views[0])["main"]).softmax(1).tolist()
        entropies = [-sum(p * math.log(p) for p in row) for row in chances]
        main = [0, 1, 1, 1, 1, 0]
        right = [max(range(3), key=row.__getitem__) == y for row, y in zip(chances, main, strict=True)]
        expected = {"token_distance": 1 - sum(cosines) / 6, "teacher_accuracy": sum(right) / 6,
                    "teacher_entropy": sum(entropies) / 6}  # fmt: skip
        assert {name: value.item() for name, value in module.measured.items()} == pytest.approx(expected, rel=1e-9)
        assert loss.requires_grad and not any(value.requires_grad for value in module.measured.values())


# ---------------------------------------------------------------------------------------------------- what it is shown


def seen_by(module):
    """The images that the teacher gets, normalised as its network gets them."""
    seen = []
    module.teacher[0].backbone.body.register_forward_pre_hook(lambda part, given: seen.append(given[0]))
    return seen


def test_the_teacher_sees_the_student_s_images_or_a_view_of_its_own():
    for views in (1, 2):
        stage = stage_of(views=(fn("flip_crop"),) * views, **FIRST)
        module, batch = built(stage), batch_of(mixed=True, views=views)
        seen = seen_by(module)
        module(batch)
        torch.testing.assert_close(seen[0], (batch.views[-1] - 0.5) / 0.25)


@pytest.mark.parametrize("antialias", [False, True])
def test_the_teacher_s_images_are_resized_and_normalised_as_asked(antialias):
    network = STUDENT.but(size=16, imagenet=True)
    keywords = {"teacher_size": 8, "teacher_renorm": False, "antialias": antialias}
    module = built(stage_of(network, keywords))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                                             (0.229, 0.224, 0.225)))  # fmt: skip
    seen = seen_by(module)
    module.taught_by(images)
    expected = F.interpolate((images - mean) / std, (8, 8), mode="bicubic", antialias=antialias)
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-6)  # the statistics are single precision


def test_the_teacher_is_neither_trained_nor_kept():
    module = built(stage_of()).train()
    before = {name: value.clone() for name, value in module.teacher[0].state_dict().items()}
    sum(module(batch_of(mixed=False)).values()).backward()
    assert not module.teacher[0].training and all(p.grad is None for p in module.teacher[0].parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.teacher[0].state_dict().items())
    assert all(p.grad is not None for p in module.parameters())
    assert not any("teacher" in name or "drawn" in name for name in module.state_dict())


# ------------------------------------------------------------------------------------------------- heads and weights


@torch.no_grad()
def test_every_combination_of_the_two_tokens_is_a_head():
    module = built(stage_of(keywords={"fusion": (0.0, 0.3, 0.5, 1.0)})).eval()
    images = batch_of(mixed=False).views[0]
    cls, dist, _ = module.both(images)
    heads = module.predict(images)
    assert list(heads) == ["main", "cls", "dist", "cls0", "cls30", "cls50", "cls100"]
    for name, expected in {"main": (cls + dist) / 2, "cls0": dist, "cls30": 0.3 * cls + 0.7 * dist, "cls100": cls,
                           "cls": cls, "dist": dist, "cls50": heads["main"]}.items():  # fmt: skip
        torch.testing.assert_close(heads[name], expected, **EXACT)


@torch.no_grad()
def test_the_state_is_that_of_timm_s_model():
    module = build.method(stage_of(), FACTS).eval()
    theirs = VisionTransformerDistilled(**SIDES, num_classes=3).eval()
    theirs.load_state_dict(to_timm(module.state_dict()))
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(theirs((images - 0.5) / 0.25), module.predict(images)["main"])
    other = build.method(stage_of().but(seed=5), FACTS).eval()
    missing, unexpected = other.load_state_dict(from_timm(theirs.state_dict()), strict=False)
    assert set(missing) == {"backbone.mean", "backbone.std"} and not unexpected
    torch.testing.assert_close(other.predict(images)["main"], module.predict(images)["main"])


def test_the_weights_start_as_timm_starts_them():
    network = fn("deit", size=32, patch=4, width=192, depth=2, heads=3)
    state = to_timm(build.method(stage_of(network), FACTS).state_dict())
    for name in ("head.weight", "head_dist.weight", "pos_embed", "dist_token", "blocks.0.attn.qkv.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.1), name
    assert state["head.bias"].eq(0).all() and state["blocks.1.mlp.fc1.bias"].eq(0).all()
    assert 0 < state["cls_token"].std() < 1e-5


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"alpha": 1.5}, "tokens needs alpha and shares of fusion from 0 to 1"),
        ({"fusion": (0.5, 2.0)}, "tokens needs alpha and shares of fusion from 0 to 1"),
        ({"fusion": (0.251, 0.5, 0.249)}, "shares of fusion must differ by a hundredth"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"distil": "warm"}, "distil is one of hard, soft, none, normalise one of numel, batch"),
        ({"normalise": "sum"}, "distil is one of hard, soft, none, normalise one of numel, batch"),
    ],
)
def test_values_outside_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        built(stage_of(keywords=keywords))


def test_other_backbones_and_mixing_inside_are_refused():
    with pytest.raises(ValueError, match="tokens needs a backbone with two tokens: deit"):
        built(stage_of(fn("resnet20", width=4)))
    with pytest.raises(ValueError, match="tokens cannot mix inside the network"):
        built(stage_of(mixing=fn("manifold", layer="blocks.0")))


def test_class_weights_go_with_any_loss():
    """They are for the distillation."""
    stage = stage_of(loss=fn("balanced_softmax"), weight=fn("effective_number", beta=0.99))
    assert built(stage).drawn is not None and built(stage).class_weight is None
