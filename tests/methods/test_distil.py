import pytest
import torch
from torch.nn import functional as F

from rayltr import build, catalogue
from rayltr.interface import State
from rayltr.spec import fn
from tests.conftest import tiny
from tests.methods.test_methods import FACTS, batch_of, built

TEACHER = tiny(seed=1, head=fn("lws"))


def stage_of(**keywords):
    return catalogue.complete(tiny(method=fn("distil", **keywords), teacher=TEACHER))


def slow_divergence(student, teacher, temperature):
    """T^2 / B sum_i sum_c q log(q / p), element by element."""
    total = 0.0
    for z, t in zip(student / temperature, teacher / temperature, strict=True):
        p, q = z.exp() / z.exp().sum(), t.exp() / t.exp().sum()
        for c in range(len(z)):
            total = total + q[c] * (q[c] / p[c]).log()
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_the_terms_and_their_gradients(temperature):
    stage = stage_of(temperature=temperature, distil=0.7)
    module, batch = built(stage).train(), batch_of(stage)
    terms = module(batch)
    features = module.backbone(batch.views[0])
    with torch.no_grad():
        taught = module.teacher[0].predict(batch.views[0])["main"]
    soft, hard = module.head(features), module.hard(features)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(terms["distilled"], 0.7 * slow_divergence(soft, taught, temperature), **close)
    torch.testing.assert_close(terms["loss"], F.cross_entropy(hard, batch.target), **close)
    (found,) = torch.autograd.grad(terms["distilled"], module.head.bias)
    gradient = temperature / 8 * ((soft / temperature).softmax(1) - (taught / temperature).softmax(1))
    torch.testing.assert_close(found, 0.7 * gradient.sum(0), **close)


def test_each_classifier_has_its_own_targets():
    stage = stage_of()
    module, batch = built(stage).train(), batch_of(stage)
    terms = module(batch)
    for term, other in (("loss", module.head), ("distilled", module.hard)):
        grads = torch.autograd.grad(terms[term], other.parameters(), retain_graph=True, allow_unused=True)
        assert grads == (None, None), "a classifier learns from one term only"
    assert not any(p.requires_grad for p in module.teacher[0].parameters())
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_the_teacher_normalises_as_asked(statistics):
    stage = stage_of(teacher_bn=statistics)
    batch = batch_of(stage)
    module, fresh = built(stage).train(), build.method(catalogue.complete(TEACHER), FACTS).double()
    fresh.train(statistics == "batch")
    expected = slow_divergence(module.head(module.backbone(batch.views[0])), fresh.predict(batch.views[0])["main"], 2.0)
    torch.testing.assert_close(module(batch)["distilled"], expected)


def test_the_statistics_of_a_frozen_teacher_can_be_those_of_the_batch_too():
    """A teacher whose own training mode leaves its backbone alone."""
    stage = stage_of(teacher_bn="batch").but(teacher=catalogue.complete(tiny(method=fn("supervised", frozen=True))))
    batch = batch_of(stage)
    module, plain = built(stage).train(), build.method(catalogue.complete(tiny()), FACTS).double().train()
    expected = slow_divergence(module.head(module.backbone(batch.views[0])), plain.predict(batch.views[0])["main"], 2.0)
    torch.testing.assert_close(module(batch)["distilled"], expected)


def test_the_first_prediction_is_the_soft_one():
    module = build.method(stage_of(), FACTS).eval()
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found, features = module.predict(images), module.backbone(images)
    assert list(found) == ["soft", "hard", "both"]
    torch.testing.assert_close(found["soft"], module.head(features))
    torch.testing.assert_close(found["hard"], module.hard(features))
    torch.testing.assert_close(found["both"], (found["soft"] + found["hard"]) / 2)
    assert not torch.allclose(found["soft"], found["hard"])


def left_by(module):
    model = module.state_dict()
    return State(model, {}, 2, tuple(model))


def adopted(method, parent, head="linear"):
    teacher = TEACHER if method.name == "distil" else None
    module = build.method(catalogue.complete(tiny(method=method, head=fn(head), teacher=teacher, seed=7)), FACTS)
    build.adopt(module, left_by(parent))
    return module.eval()


@pytest.mark.parametrize("head", ["linear", "lws"])
@pytest.mark.parametrize("chosen", ["soft", "hard", "sum"])
def test_a_student_goes_on_with_one_of_the_classifiers(chosen, head):
    parent = build.method(stage_of(), FACTS).eval()
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = parent.predict(images)
    expected = logits["soft"] + logits["hard"] if chosen == "sum" else logits[chosen]
    student = adopted(fn("student", chosen=chosen), parent, head)
    torch.testing.assert_close(student.predict(images)["main"], expected)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == ({"head.scale"} if head == "lws" else {"head.weight", "head.bias"})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (fn("supervised"), "hard.weight of the parent stage has no place in this stage"),
        (fn("rotation"), "hard.weight of the parent stage has no place in this stage"),
    ],
)
def test_two_classifiers_have_no_place_in_a_method_of_one(method, message):
    with pytest.raises(ValueError, match=message):
        adopted(method, build.method(stage_of(), FACTS))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (fn("distil"), "hard.weight of this stage is missing in the parent stage"),
        (fn("student", chosen="hard"), "head.weight of this stage is missing in the parent stage"),
        (fn("student", chosen="sum"), "takes a parent stage with two linear classifiers"),
    ],
)
def test_one_classifier_does_not_make_two(method, message):
    with pytest.raises(ValueError, match=message):
        adopted(method, build.method(catalogue.complete(tiny()), FACTS))


def test_cosines_are_not_added():
    parent = build.method(stage_of().but(head=fn("cosine", scale=1.0)), FACTS)
    with pytest.raises(ValueError, match="takes a parent stage with two linear classifiers"):
        adopted(fn("student", chosen="sum"), parent, "cosine")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (fn("distil", distil=-1.0), "distil >= 0 and temperature > 0, not -1.0 and 2.0"),
        (fn("distil", temperature=0.0), "temperature > 0, not 1.0 and 0.0"),
        (fn("distil", teacher_bn="train"), "unknown teacher_bn 'train': known: running, batch"),
        (fn("student", chosen="both"), "chosen is one of soft, hard, sum, not 'both'"),
    ],
)
def test_values_that_cannot_be_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        teacher = TEACHER if method.name == "distil" else None
        build.method(catalogue.complete(tiny(method=method, teacher=teacher)), FACTS)


def test_a_student_does_not_begin_with_the_weights_of_a_first_stage_of_its_seed():
    first, student = build.method(catalogue.complete(tiny()), FACTS), build.method(stage_of(), FACTS)
    own = dict(student.backbone.named_parameters())
    alike = [
        name for name, value in first.backbone.named_parameters() if value.ndim > 1 and torch.equal(value, own[name])
    ]
    assert alike == []
