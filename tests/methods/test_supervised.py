import pytest
import torch
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.losses import LOSSES
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, batch_of, built


def test_the_weighted_mean_is_that_of_torch():
    stage = catalogue.complete(tiny(weight=fn("inverse_frequency")))
    module, batch = built(stage).train(), batch_of(stage)
    logits = module.predict(batch.views[0])["main"]
    torch.testing.assert_close(
        module(batch)["loss"], F.cross_entropy(logits, batch.target, module.class_weight.double())
    )


def test_each_half_of_a_mixed_batch_has_its_own_weighted_mean():
    stage = catalogue.complete(tiny(weight=fn("inverse_frequency"), mixing=fn("mixup")))
    module, batch = built(stage).train(), batch_of(stage)
    losses = F.cross_entropy(module.predict(batch.views[0])["main"], batch.target, reduction="none")
    other = F.cross_entropy(module.predict(batch.views[0])["main"], batch.mixed, reduction="none")
    w = module.class_weight.double()
    own, partner = w[batch.target], w[batch.mixed]
    expected = (batch.weight * own * losses).sum() / own.sum()
    expected += ((1 - batch.weight) * partner * other).sum() / partner.sum()
    torch.testing.assert_close(module(batch)["loss"], expected)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="unknown reduction 'sum': known: weighted_mean, mean"):
        build.method(catalogue.complete(tiny(method=fn("supervised", reduction="sum"))), FACTS)


def test_influence_balanced_sees_the_features():
    stage = catalogue.complete(tiny(loss=fn("influence_balanced")))
    module, batch = built(stage).train(), batch_of(stage)
    features = module.backbone(batch.views[0])
    expected = LOSSES["influence_balanced"](module.head(features), batch.target, module.counts, features).mean()
    torch.testing.assert_close(module(batch)["loss"], expected)


def by_hand(module, batch, layer):
    """The logits when activations are mixed after `layer`, the network written out."""
    body, share = module.backbone.body, batch.weight

    def mix(x, here):
        rate = share.view(-1, *[1] * (x.ndim - 1))
        return rate * x + (1 - rate) * x[batch.partner] if here == layer else x

    x = (batch.views[0] - module.backbone.mean) / module.backbone.std
    stages = 0
    for part in body.trunk:
        x = part(x)
        if isinstance(part, torch.nn.Sequential):
            stages += 1
            x = mix(x, f"layer{stages}")
    return mix(module.head(mix(x.mean((2, 3)), "pool")), "fc")


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "pool", "fc"])
def test_manifold_mixup_mixes_the_activations_of_its_layer(layer):
    stage = catalogue.complete(tiny(mixing=fn("manifold", layer=layer)))
    module, batch = built(stage).train(), batch_of(stage)
    logits, _ = module.classified(batch)
    torch.testing.assert_close(logits, by_hand(module, batch, layer))
    plain = built(catalogue.complete(tiny(mixing=fn("mixup")))).train()
    assert not torch.allclose(plain.classified(batch)[0], logits), "mixed images are not mixed again, and this is"
    module.eval()
    torch.testing.assert_close(module.predict(batch.views[0])["main"], by_hand(module, batch, "nowhere"))


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no layer 'layer4' to mix at; it has pool, fc, layer1, layer2, layer3"):
        build.method(catalogue.complete(tiny(mixing=fn("manifold", layer="layer4"))), FACTS)


def test_places_of_other_networks():
    places = {
        "layer4": fn("torchvision", model="resnet18"),
        "blocks.11": fn("timm", model="deit_tiny_patch16_224"),
        "layer2": fn("timm", model="resnet10t"),
    }
    for layer, backbone in places.items():
        stage = catalogue.complete(tiny(mixing=fn("manifold", layer=layer), backbone=backbone))
        assert build.method(stage, FACTS).place() is not None
