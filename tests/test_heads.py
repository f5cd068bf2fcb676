import pytest
import torch
from torch.nn import functional as F

from rayltr.heads import HEADS

every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def features(size=6, dim=5):
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(0))


def handed_over(name, **keywords):
    """A linear head and another one that took over its parameters by name."""
    source, head = HEADS["linear"](5, 4), HEADS[name](5, 4, **keywords)
    missing = head.load_state_dict(source.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == set(getattr(head, "fresh", ()))
    return source, head


@every_head
def test_logits_names_and_gradient(head):
    module = head(5, 4)
    x = features().requires_grad_()
    logits = module(x)
    assert logits.shape == (6, 4) and logits.isfinite().all()
    logits[:, 1].sum().backward()
    assert x.grad.abs().sum() > 0
    assert set(module.state_dict()) <= {"weight", "bias", "scale"}
    assert module.weight.shape == (4, 5)


@every_head
def test_zero_features_and_zero_weights_stay_finite(head):
    module = head(5, 4)
    with torch.no_grad():
        module.weight[2] = 0
    x = torch.zeros(3, 5, requires_grad=True)
    module(x).sum().backward()
    assert module(x).isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def trainable(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_what_learns():
    assert trainable(HEADS["linear"](5, 4)) == {"weight", "bias"}
    assert trainable(HEADS["cosine"](5, 4)) == {"weight"}
    assert trainable(HEADS["lws"](5, 4)) == {"scale"}
    assert trainable(HEADS["tau_normalised"](5, 4)) == set()


def test_cosine_is_the_cosine_times_the_scale():
    module, x = HEADS["cosine"](5, 4, scale=30.0), features()
    expected = [[30 * F.cosine_similarity(a, w, dim=0).item() for w in module.weight] for a in x]
    torch.testing.assert_close(module(x), torch.tensor(expected))
    torch.testing.assert_close(module(7 * x), module(x))
    torch.testing.assert_close(module.weight.norm(dim=0), torch.ones(5))
    assert (module.weight < 0).any() and (module.weight > 0).any()
    assert list(module.state_dict()) == ["weight"]


def test_lws_starts_as_the_linear_head_and_scales_the_bias_too():
    source, head = handed_over("lws")
    x = features()
    torch.testing.assert_close(head(x), source(x), rtol=0, atol=0)
    with torch.no_grad():
        head.scale.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    torch.testing.assert_close(head(x), source(x) * head.scale)
    assert head(torch.zeros(1, 5))[0, 1] == 2 * source.bias[1]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 3.0])
def test_tau_normalised_divides_rows_by_a_power_of_their_length(tau):
    source, head = handed_over("tau_normalised", tau=tau)
    x = features()
    for k in range(4):
        w = source.weight[k]
        expected = x @ (w / w.square().sum().sqrt() ** tau) + source.bias[k]
        torch.testing.assert_close(head(x)[:, k], expected)
    _, bare = handed_over("tau_normalised", tau=tau, bias=False)
    bare.load_state_dict(source.state_dict())
    torch.testing.assert_close(bare(x), head(x) - source.bias)


def test_tau_zero_is_the_linear_head_exactly():
    source, head = handed_over("tau_normalised", tau=0.0)
    assert torch.equal(head(features()), source(features()))


def test_tau_normalised_keeps_a_zero_row_even_for_a_large_tau():
    source, head = handed_over("tau_normalised", tau=8.0)
    with torch.no_grad():
        head.weight[1] = 0
    torch.testing.assert_close(head(features())[:, 1], source.bias[1].expand(6))
