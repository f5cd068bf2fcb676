import pytest
import timm as timm_library
import torch
import torchvision as torchvision_library
from torch import nn
from torch.nn import functional as F

from rayltr.backbones import BACKBONES, Block, Branched, Normalised, branched

SMALL = {
    "resnet20": ({}, 32),
    "resnet32": ({}, 32),
    "timm": ({"model": "resnet18"}, 64),
    "torchvision": ({"model": "resnet18"}, 64),
    "deit": ({"size": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2}, 16),
}
every_backbone = pytest.mark.parametrize("name", BACKBONES)
every_convolutional = pytest.mark.parametrize("name", [name for name in BACKBONES if name != "deit"])


def built(name):
    keywords, side = SMALL[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return BACKBONES[name](**keywords).eval(), torch.rand(2, 3, side, side)


@every_backbone
@torch.no_grad()
def test_images_become_features(name):
    body, images = built(name)
    assert type(body.dim) is int and body(images).shape == (2, body.dim)


@every_convolutional
@torch.no_grad()
def test_features_are_the_average_of_the_feature_map(name):
    body, images = built(name)
    features, places = body(images), body.feature_map(images)
    assert features.shape == (2, body.dim)
    assert places.shape[:2] == features.shape and places.dim() == 4
    torch.testing.assert_close(places.mean((2, 3)), features)


@every_backbone
@torch.no_grad()
def test_normalised_subtracts_and_divides_first(name):
    body, images = built(name)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    wrapped = Normalised(body, mean, std).eval()
    channels = [(images[:, c] - mean[c]) / std[c] for c in range(3)]
    plain = torch.stack(channels, dim=1)
    assert wrapped.dim == body.dim and wrapped.body is body
    torch.testing.assert_close(wrapped(images), body(plain))
    if hasattr(body, "feature_map"):
        torch.testing.assert_close(wrapped.feature_map(images), body.feature_map(plain))
    assert wrapped.state_dict()["mean"].shape == wrapped.state_dict()["std"].shape == (1, 3, 1, 1)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_resnet32_has_the_published_size():
    body = BACKBONES["resnet32"]()
    assert body.dim == 64
    assert parameters(body) + parameters(nn.Linear(64, 100)) == 470_004
    assert body.feature_map(torch.rand(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    assert sum(isinstance(m, nn.Conv2d) for m in body.modules()) == 31


def test_resnet20_and_width():
    body = BACKBONES["resnet20"](width=4)
    assert body.dim == 16
    assert sum(isinstance(m, nn.Conv2d) for m in body.modules()) == 19
    assert parameters(BACKBONES["resnet20"]()) + 650 == 269_722  # with ten classes, parameter-free shortcuts
    assert body(torch.rand(2, 3, 8, 8)).shape == (2, 16)


@torch.no_grad()
def test_the_shortcut_subsamples_and_pads_channels_on_both_sides():
    body = BACKBONES["resnet32"]().eval()
    first = body.trunk[4][0]  # 16 -> 32 channels
    for conv in (first.conv1, first.conv2):
        conv.weight.zero_()
    x = torch.rand(1, 16, 32, 32)
    expected = torch.zeros(1, 32, 16, 16)
    expected[:, 8:24] = x[:, :, 0::2, 0::2]
    torch.testing.assert_close(first(x), expected)


@pytest.mark.parametrize("width", [1, 3])
def test_a_network_may_have_any_width(width):
    """Of an odd number of channels that the shortcut lacks, one more comes behind."""
    assert BACKBONES["resnet20"](width=width)(torch.rand(2, 3, 8, 8)).shape == (2, 4 * width)
    block = Block(width, 2 * width, 2)
    for p in block.parameters():
        torch.nn.init.zeros_(p)
    x = torch.rand(1, width, 4, 4)
    assert torch.equal(block(x)[:, width // 2 : width // 2 + width], x[:, :, ::2, ::2])


def test_convolutions_start_kaiming_normal_by_fan_in():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        body = BACKBONES["resnet32"]()
    for conv in (m for m in body.modules() if isinstance(m, nn.Conv2d)):
        fan_in = conv.in_channels * 9
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.12)
        assert conv.bias is None


@torch.no_grad()
def test_timm_is_the_library_s_network_and_passes_dropout():
    keywords = {"model": "mobilenetv3_small_050", "drop": 0.3}  # widens its features before the classifier
    body = BACKBONES["timm"](**keywords).eval()
    assert body.body.drop_rate == 0.3
    assert body(torch.rand(2, 3, 64, 64)).shape == (2, body.dim)
    vit = BACKBONES["timm"](model="vit_tiny_patch16_224").eval()
    assert vit(torch.rand(1, 3, 224, 224)).shape == (1, vit.dim) == (1, 192)


@torch.no_grad()
def test_torchvision_is_the_library_s_network_without_its_classifier():
    body, images = built("torchvision")
    full = torchvision_library.models.resnet18().eval()
    stripped = {name.removeprefix("trunk."): value for name, value in body.state_dict().items()}
    assert full.load_state_dict(stripped, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    torch.testing.assert_close(F.linear(body(images), full.fc.weight, full.fc.bias), full(images))


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_an_unknown_model_is_refused_with_names_near_it(name):
    with pytest.raises(ValueError, match="no model 'resnet19'.*near are .*resnet18"):
        BACKBONES[name](model="resnet19")


def test_torchvision_offers_only_what_it_can_strip():
    with pytest.raises(ValueError, match="torchvision has no model 'vgg16'"):
        BACKBONES["torchvision"](model="vgg16")


@pytest.mark.parametrize(
    "name, library, function",
    [("timm", timm_library, "create_model"), ("torchvision", torchvision_library.models, "get_model")],
)
def test_weights_that_cannot_be_had_are_one_clear_line(name, library, function, monkeypatch):
    def offline(*_, **keywords):
        assert keywords.get("pretrained") or keywords.get("weights")
        raise OSError("no connection\nand a long story")

    monkeypatch.setattr(library, function, offline)
    with pytest.raises(ValueError) as error:
        BACKBONES[name](model="resnet18", pretrained=True)
    assert str(error.value) == "'resnet18' cannot be made with pretrained weights here: no connection"


def test_a_reduced_network_has_three_quarters_of_the_late_channels():
    body = BACKBONES["resnet32"](reduced=True).eval()
    assert body.dim == 48
    assert [part[0].conv2.out_channels for part in body.layers().values()] == [16, 24, 48]
    assert body(torch.rand(2, 3, 32, 32)).shape == (2, 48)
    assert BACKBONES["resnet32"](reduced=False).dim == 64
    with pytest.raises(ValueError, match="the width of a reduced network is a multiple of 4, not 6"):
        BACKBONES["resnet20"](width=6, reduced=True)


@torch.no_grad()
def test_the_reduced_shortcut_is_centred():
    body = BACKBONES["resnet20"](reduced=True).eval()
    for stage, inside, out in ((4, 16, 24), (5, 24, 48)):
        first = body.trunk[stage][0]
        for conv in (first.conv1, first.conv2):
            conv.weight.zero_()
        x, side = torch.rand(1, inside, 8, 8), (out - inside) // 2
        expected = torch.zeros(1, out, 4, 4)
        expected[:, side : side + inside] = x[:, :, ::2, ::2]
        torch.testing.assert_close(first(x), expected)


@torch.no_grad()
def test_a_reduced_network_of_torchvision():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        body = BACKBONES["torchvision"](model="resnext50_32x4d", reduced=True).eval()
    layers = body.layers()
    assert body.dim == 4 * 384 and [len(part) for part in layers.values()] == [3, 4, 6, 3]
    assert [part[-1].conv2.out_channels for part in layers.values()] == [128, 256, 384, 768]
    assert [part[-1].conv3.out_channels for part in layers.values()] == [256, 512, 768, 1536]
    assert body(torch.rand(1, 3, 64, 64)).shape == (1, 1536)
    conv = layers["layer3"][1].conv1  # by fan-out, as torchvision itself
    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.02)
    with pytest.raises(ValueError, match="no pretrained weights for a reduced network"):
        BACKBONES["torchvision"](model="resnet18", pretrained=True, reduced=True)


@every_convolutional
@pytest.mark.parametrize("own", [1, 2, 3])
@torch.no_grad()
def test_the_two_parts_of_a_network_are_the_network(name, own):
    body, images = built(name)
    expected = body(images)
    first, last = body.split(own)
    assert last.dim == body.dim and len(last.layers()) == own
    assert set(map(id, body.parameters())) == {id(p) for part in (first, last) for p in part.parameters()}
    torch.testing.assert_close(last(first.eval()(images)), expected)


def test_a_network_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="an expert can own 1 to 3 residual stages, not 4"):
        BACKBONES["resnet20"]().split(4)
    with pytest.raises(ValueError, match="can own 1 to 4 residual stages, not 0"):
        BACKBONES["torchvision"](model="resnet18").split(0)
    for model, drop in (("vit_tiny_patch16_224", 0.0), ("resnet18", 0.1)):
        with pytest.raises(ValueError, match="only ResNets without dropout can be shared"):
            BACKBONES["timm"](model=model, drop=drop).split(1)
    own = nn.Linear(3, 3)
    own.dim = 3
    with pytest.raises(ValueError, match="cannot be shared among experts: it has no method split"):
        Branched([own], 2)


def three(own):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        bodies = [BACKBONES["resnet20"](width=4) for _ in range(3)]
    apart = [Normalised(body, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).eval() for body in bodies]
    return bodies, apart, branched(apart, own).eval()


@torch.no_grad()
def test_experts_share_the_beginning_of_the_first_network():
    bodies, apart, several = three(2)
    images = torch.rand(2, 3, 8, 8)
    found = several(images)
    assert several.dim == 16 and found.shape == (2, 3, 16)
    torch.testing.assert_close(found[:, 0], apart[0](images))
    shared = bodies[0].trunk[:4](apart[0].normalised(images))
    for number in (1, 2):
        torch.testing.assert_close(found[:, number], bodies[number].trunk[4:](shared).mean((2, 3)))
    assert list(several.layers()) == ["layer1"] and several.layers()["layer1"] is bodies[0].trunk[3]
    own, whole = parameters(bodies[0].trunk[4:]), parameters(bodies[0])
    assert parameters(several) == whole + 2 * own


@torch.no_grad()
def test_whole_networks_beside_each_other_share_nothing():
    bodies, apart, several = three(None)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(several(images), torch.stack([one(images) for one in apart], 1))
    assert several.layers() == {} and parameters(several) == 3 * parameters(bodies[0])
