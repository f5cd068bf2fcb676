import pytest
import torch

from rayltr import build, catalogue
from rayltr.interface import Resources
from rayltr.methods.route import helped, misjudged, running_means
from rayltr.spec import fn
from rayltr.train import train
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, batch_of, built

ONE = Resources(device="cpu", threads=1)


def stage_of(**keywords):
    return catalogue.complete(tiny(method=fn("route", **keywords)))


def test_who_is_helped_by_another_expert():
    """Of two classes, the first is right; after 1, 2 and 3 experts in turn."""
    right, wrong = [2.0, 0.0], [0.0, 1.0]
    logits = torch.tensor([
        [right, right, right],  # right from the start
        [wrong, right, right],  # the second expert helps
        [wrong, wrong, [5.0, 0.0]],  # only the third does
        [wrong, wrong, wrong],  # nobody helps
        [wrong, right, [0.0, 9.0]],  # the second helps, the third spoils it again
    ])  # fmt: skip
    found = helped(running_means(logits), torch.zeros(5, dtype=torch.long))
    assert found.tolist() == [[False, False], [True, False], [True, True], [False, False], [True, False]]


def test_running_means():
    z = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = torch.stack([z[:, : i + 1].mean(1) for i in range(3)], 1)
    torch.testing.assert_close(running_means(z), expected)


def test_the_loss_in_value_and_gradient():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 2, generator=g, dtype=torch.float64)
    wanted = torch.rand(6, 2, generator=g) < 0.5
    one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    found, p = misjudged(one, wanted, 100.0), torch.sigmoid(other)
    slow = torch.where(wanted, -100 * p.log(), -(1 - p).log())
    expected = (slow[:, 0] + slow[:, 1]) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert misjudged(1e4 * z.bfloat16(), wanted, 100.0).isfinite().all()


def test_the_term_is_the_mean_over_routers_and_images():
    stage = stage_of(top=2)
    module, batch = built(stage).train(), batch_of(stage)
    features = module.backbone(batch.views[0])
    logits = module.head(features)
    total = 0.0
    for router in range(2):
        mean = logits[:, : router + 1].mean(1)
        unit = features[:, router] / features[:, router].norm(dim=1, keepdim=True)
        seen = torch.relu(module.hidden[router](unit))
        asked = module.confidence(torch.cat([mean.sort(1, descending=True).values[:, :2], seen], 1))[:, 0]
        later = [logits[:, : n + 1].mean(1).argmax(1) == batch.target for n in range(router + 1, 3)]
        wanted = (mean.argmax(1) != batch.target) & torch.stack(later).any(0)
        total += misjudged(asked[:, None], wanted[:, None], 100.0).mean() / 2
    torch.testing.assert_close(module(batch)["routing"], total)


def test_only_routers_learn_and_no_statistic_moves():
    stage = stage_of()
    module = built(stage).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.stack([*module(batch_of(stage)).values()]).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    learning = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None}
    assert learning == {"hidden", "confidence"}


def made(bias=None):
    stage = stage_of()
    module = built(stage).eval()
    if bias is not None:
        torch.nn.init.zeros_(module.confidence.weight)
        torch.nn.init.constant_(module.confidence.bias, bias)
    return module, batch_of(stage).views[0]


@torch.no_grad()
def test_everybody_or_nobody_asks():
    module, images = made(bias=1.0)
    logits = module.head(module.backbone(images))
    torch.testing.assert_close(module.predict(images)["main"], logits.mean(1))
    module, images = made(bias=-1.0)
    found, used = module.routed(images)
    torch.testing.assert_close(found, logits[:, 0])
    assert used.tolist() == [1.0] * 8


@torch.no_grad()
def test_each_image_gets_the_mean_of_the_experts_it_asked():
    module, images = made()
    torch.manual_seed(0)
    module.confidence.weight.normal_(0, 20)
    features = module.backbone(images)
    logits = module.head(features)
    means = running_means(logits)
    asks = torch.stack([module.ask(i, features[:, i], means[:, i]) for i in range(2)], 1)
    module.confidence.bias -= asks.median()  # half of the images ask
    found, used = module.routed(images)
    for row in range(len(images)):
        number = 1
        while (
            number < 3
            and module.ask(number - 1, features[row : row + 1, number - 1], means[row : row + 1, number - 1]) > 0
        ):
            number += 1
        assert used[row] == number
        torch.testing.assert_close(found[row], means[row, number - 1])
    assert len(used.unique()) > 1, "the images differ in what they need"
    torch.testing.assert_close(module.unrolled(images), found)


@torch.no_grad()
def test_experts_that_nobody_asks_are_not_computed():
    module, images = made(bias=-1.0)
    shown = []
    for end in module.backbone.body.ends:
        end.register_forward_hook(lambda part, given, output: shown.append(len(output)))
    module.predict(images)
    assert shown == [8]


@pytest.mark.slow
def test_it_can_be_exported():
    module, images = made(bias=0.0)
    predict = torch.nn.Module()
    predict.method, predict.forward = module, lambda images: module.predict(images)["main"]
    exported = torch.export.export(predict.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(images[:3]), module.predict(images[:3])["main"])


def test_routers_come_after_the_experts():
    first = tiny(method=fn("ride", experts=2), epochs=1)
    state, before = train(first, resources=ONE)
    last = first.but(method=fn("route", experts=2), sampler=fn("power", q=0.0), init=first)
    routed, logits = train(last, {"init": state}, resources=ONE)
    assert all(torch.equal(routed.model[name], value) for name, value in state.model.items())
    assert logits["val"].keys() == {"main"} and logits["val"]["main"].shape == before["val"]["main"].shape
    with pytest.raises(ValueError, match="has no place in this stage|is missing in the parent stage"):
        train(last.but(method=fn("route", experts=3)), {"init": state}, resources=ONE)


def test_a_router_sees_no_more_logits_than_there_are_classes():
    assert build.method(stage_of(top=30), FACTS).confidence.in_features == 16 + 3


@pytest.mark.parametrize("wrong", [{"experts": 1}, {"top": 0}, {"positive": 0.0}, {"hidden": 0}])
def test_values_outside_are_refused(wrong):
    with pytest.raises(ValueError, match="route needs experts >= 2, top > 0, hidden > 0 and positive > 0"):
        built(stage_of(**wrong))
