import math

import pytest
import torch

from rayltr import build, catalogue
from rayltr.methods.dive import divergence
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, batch_of, built


def softmax(z):
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def slow(z, teacher, temperature, power):
    """The definition, word by word: the teacher's probabilities to a power, normalised, then KL."""
    q = [p**power for p in softmax([v / temperature for v in teacher])]
    q = [v / sum(q) for v in q]
    p = softmax([v / temperature for v in z])
    return temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True))


@pytest.mark.parametrize(("temperature", "power"), [(2.0, 0.5), (1.0, 1.0), (3.0, 0.7)])
def test_the_divergence_is_that_of_the_flattened_teacher(temperature, power):
    g = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    expected = [slow(a, b, temperature, power) for a, b in zip(z.tolist(), teacher.tolist(), strict=True)]
    found = divergence(z.requires_grad_(), teacher, temperature, power)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    found.sum().backward()
    q, p = (torch.softmax(v, 1) for v in (power * teacher / temperature, z.detach() / temperature))
    torch.testing.assert_close(z.grad, temperature * (p - q), rtol=1e-9, atol=1e-12)


def test_half_precision_and_large_logits_stay_finite():
    z = (50 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).bfloat16()
    assert divergence(z, z.flip(0), 2.0, 0.5).isfinite().all()
    torch.testing.assert_close(divergence(z, z, 2.0, 1.0), torch.zeros(4))


def stage_of(**keywords):
    return catalogue.complete(tiny(method=fn("dive", **keywords), teacher=tiny(seed=1), loss=fn("balanced_softmax")))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_terms_share_the_weight(alpha):
    stage = stage_of(alpha=alpha)
    module, batch = built(stage).train(), batch_of(stage)
    plain = build.method(catalogue.complete(tiny(loss=fn("balanced_softmax"))), FACTS).double().train()
    plain.load_state_dict(module.state_dict())
    logits, _ = module.classified(batch)
    expected = divergence(logits, module.teacher[0].predict(batch.views[0])["main"], 2.0, 0.5).mean()
    terms = module(batch)
    torch.testing.assert_close(terms["distilled"], alpha * expected)
    torch.testing.assert_close(terms["loss"], (1 - alpha) * plain(batch)["loss"])


def test_the_teacher_is_neither_trained_nor_kept():
    stage = stage_of()
    module = built(stage).train()
    before = {name: value.clone() for name, value in module.teacher[0].state_dict().items()}
    torch.stack([*module(batch_of(stage)).values()]).sum().backward()
    assert all(p.grad is None for p in module.teacher[0].parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.teacher[0].state_dict().items())
    assert module.state_dict().keys() == build.method(catalogue.complete(tiny()), FACTS).state_dict().keys()


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"temperature": 0.0}, {"power": -1.0}])
def test_values_outside_are_refused(wrong):
    with pytest.raises(ValueError, match="dive needs 0 <= alpha <= 1, temperature > 0 and power > 0"):
        built(stage_of(**wrong))


def test_mixing_inside_the_network_is_refused():
    with pytest.raises(ValueError, match="dive cannot mix inside the network"):
        built(stage_of().but(mixing=fn("manifold")))
