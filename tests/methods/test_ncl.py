import pytest
import torch
from torch.nn import functional as F

from rayltr import catalogue
from rayltr.methods.ncl import cross_entropies, disagreement, focused, hard_classes, instance_contrast
from rayltr.optim import sam
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods import test_methods
from tests.methods.test_methods import FACTS, batch_of, built

EXACT = {"rtol": 1e-9, "atol": 1e-12}
CONTRAST = {"method": fn("ncl", contrast=1.0, queue=24, out=8), "views": (fn("flip_crop"),) * 2}


def stage_of(**keywords):
    return catalogue.complete(tiny(method=fn("ncl", **keywords)))


def contrasting(**changes):
    return catalogue.complete(tiny(**CONTRAST, **changes))


def test_hard_classes_are_the_target_and_the_largest_others():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0]])
    found = hard_classes(logits, torch.tensor([3, 0]), 2)
    assert found.tolist() == [[True, False, False, True], [True, False, True, False]]


def test_other_classes_have_logit_0_so_that_a_shift_matters():
    logits, hard = torch.randn(2, 3, 4), torch.tensor([[True, False, True, False], [False, True, True, True]])
    found = focused(logits, hard)
    assert (found[0, :, [1, 3]] == 0).all() and (found[1, :, 0] == 0).all()
    assert torch.equal(found[0, :, [0, 2]], logits[0, :, [0, 2]])
    target = torch.tensor([0, 1])
    one, other = (cross_entropies(focused(logits + shift, hard), target) for shift in (0.0, 5.0))
    assert not torch.allclose(one, other, atol=0.1)


def test_the_share_of_hard_classes_is_rounded_down():
    assert [built(stage_of(hard=h)).hard for h in (0.1, 0.34, 0.67, 1.0)] == [1, 1, 2, 3]


def published(inputs, target, counts, number, factor):
    """The authors' loss for networks' logits [E][B, C]: probabilities plus 1e-9, batch means, all pairs."""
    scores = inputs[0].detach().scatter(1, target[:, None], 999999.0)
    chosen = scores.sort(descending=True, dim=1)[1][:, :number]
    mask = torch.zeros_like(inputs[0]).scatter(1, chosen, 1.0)
    z = [x + counts.log() for x in inputs]
    masked = [x * mask for x in z]
    plain = sum(F.cross_entropy(x, target) for x in (*z, *masked))
    mutual = 0.0
    for group in (z, masked):
        p = [x.softmax(1) for x in group]
        for i in range(len(p)):
            for j in range(len(p)):
                if i != j:
                    kl = p[j] * (p[j].log() - (p[i] + 1e-9).log())
                    mutual = mutual + factor * kl.sum(1).mean() / (len(p) - 1)
    return plain, mutual


@pytest.mark.parametrize("experts", [2, 3])
def test_the_terms_are_the_published_ones_in_value_and_gradient(experts):
    stage = stage_of(experts=experts, hard=0.67, distil=0.6)
    module, batch = built(stage).train(), batch_of(stage)
    counts = torch.as_tensor(FACTS.counts).double()
    logits = module.head(module.backbone(batch.views[0]))
    expected = published(logits.unbind(1), batch.target, counts, 2, 0.6)
    terms = module(batch)
    torch.testing.assert_close(terms["loss"], expected[0], **EXACT)
    torch.testing.assert_close(terms["collaboration"], expected[1], **EXACT)
    weights = [module.head[0].weight, module.backbone.body.ends[1].trunk[0].weight]
    found = torch.autograd.grad(sum(terms.values()), weights)
    for one, other in zip(found, torch.autograd.grad(sum(expected), weights), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_the_disagreement_flows_into_both_sides():
    z = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    disagreement(z).sum().backward()
    assert z.grad[:, 0].abs().sum() > 0 and z.grad[:, 1].abs().sum() > 0
    same = torch.randn(2, 1, 4).expand(-1, 3, -1)
    torch.testing.assert_close(disagreement(same), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_probabilities_of_0_are_harmless(kind):
    """A gap of 200 is beyond float32's exponentials; as published the gradient would be no number."""
    z = torch.tensor([[[200.0, 0.0, 0.0], [0.0, 200.0, -1e4]]], dtype=kind).float().requires_grad_()
    found = disagreement(z)
    found.sum().backward()
    assert found.isfinite().all() and z.grad.isfinite().all() and found.item() > 20
    assert found.item() == pytest.approx(2 * 20.7233, rel=1e-4), "log 1e-9 bounds it"


def slow_contrast(queries, keys, queues, temperature):
    rows = []
    for b in range(len(queries)):
        total = 0.0
        for e in range(queries.shape[1]):
            own = (queries[b, e] @ keys[b, e] / temperature).exp()
            others = sum((queries[b, e] @ row / temperature).exp() for row in queues[e])
            total = total - (own / (own + others)).log()
        rows.append(total)
    return torch.stack(rows)


def test_the_instance_contrast_in_value_and_gradient():
    g = torch.Generator().manual_seed(0)
    unit = [F.normalize(torch.randn(*s, 5, generator=g, dtype=torch.float64), dim=2) for s in ((4, 3), (4, 3), (3, 6))]
    one, other = unit[0].clone().requires_grad_(), unit[0].clone().requires_grad_()
    found, expected = instance_contrast(one, *unit[1:], 0.2), slow_contrast(other, *unit[1:], 0.2)
    torch.testing.assert_close(found, expected, **EXACT)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, **EXACT)
    assert instance_contrast(*(x.bfloat16() for x in unit), 0.001).isfinite().all()


def test_the_contrast_fills_the_queue_with_keys_of_the_second_view():
    stage = contrasting()
    module, batch = built(stage).train(), batch_of(stage)
    before = torch.stack([queue.rows.clone() for queue in module.queues])
    terms = module(batch)
    leaders, followers = (dict(part.named_parameters()) for part in (module.backbone, module.slow.copies[0]))
    assert all(torch.equal(value, leaders[name]) for name, value in followers.items()), "copies at the first step"
    keys = F.normalize(module.project(module.backbone(batch.views[1])), dim=2)
    for number, queue in enumerate(module.queues):
        torch.testing.assert_close(queue.rows[:8], keys[:, number].detach())
        assert torch.equal(queue.rows[8:], before[number, 8:])
    queries = F.normalize(module.project(module.backbone(batch.views[0])), dim=2)
    torch.testing.assert_close(terms["contrast"], slow_contrast(queries, keys, before, 0.2).mean())


def test_the_second_pass_of_sam_moves_neither_queue_nor_followers():
    stage = contrasting()
    module, batch = built(stage).train(), batch_of(stage)
    optimiser = sam([p for p in module.parameters() if p.requires_grad], lr=0.1, rho=0.5)
    optimiser.guard(module)

    def closure():
        optimiser.zero_grad()
        loss = torch.stack([*module(batch).values()]).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert [int(queue.oldest) for queue in module.queues] == [8, 8, 8]


def test_what_is_kept_predicts():
    module = built(contrasting())
    assert {name.split(".")[0] for name in module.keep()} == {"backbone", "head"}
    assert built(stage_of()).state_dict().keys() == set(module.keep()), "nothing else without the contrast"


def test_the_contrast_needs_a_second_view():
    stage = stage_of(contrast=1.0)
    with pytest.raises(ValueError, match="ncl with contrast compares two views of each image, the stage has one"):
        built(stage).train()(batch_of(stage))


@pytest.mark.parametrize(
    "wrong", [{"experts": 1}, {"hard": 0.0}, {"hard": 1.5}, {"distil": -1.0}, {"momentum": 1.0}, {"temperature": 0.0}]
)
def test_values_outside_are_refused(wrong):
    with pytest.raises(ValueError, match="ncl needs "):
        built(stage_of(**wrong))


def worker(number, folder):
    test_methods.CASES.clear()
    test_methods.CASES["ncl, contrast"] = CONTRAST
    test_methods.worker(number, folder)


@pytest.mark.slow
def test_two_workers_contrast_as_one(tmp_path, monkeypatch):
    monkeypatch.setitem(test_methods.CASES, "ncl, contrast", CONTRAST)
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    test_methods.test_two_workers_give_the_loss_and_gradients_of_one("ncl, contrast", found)
