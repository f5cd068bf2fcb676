"""From names to functions: the only file that sees every table."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from rayltr import catalogue
from rayltr.backbones import BACKBONES, Normalised
from rayltr.heads import HEADS
from rayltr.interface import Facts, Parts, State
from rayltr.losses import CLASS_WEIGHTS, LOSSES
from rayltr.mixing import MIXINGS
from rayltr.optim import OPTIMISERS, SCHEDULES
from rayltr.samplers import SAMPLERS
from rayltr.spec import Fn, Stage
from rayltr.views import VIEWS

TABLES: dict[str, dict[str, Callable]] = {
    "views": VIEWS,
    "sampler": SAMPLERS,
    "mixing": MIXINGS,
    "backbone": BACKBONES,
    "head": HEADS,
    "loss": LOSSES,
    "weight": CLASS_WEIGHTS,
    "optimiser": OPTIMISERS,
    "schedule": SCHEDULES,
}


def function(axis: str, choice: Fn) -> Callable:
    """The function of a choice with its keywords filled in; raises ValueError for what does not exist."""
    keywords = dict(catalogue.completed(axis, choice).keywords)
    keywords.pop("code", None)
    return partial(TABLES[axis].get(choice.name) or catalogue.USER[choice.name], **keywords)


def method(stage: Stage, facts: Facts, teacher: nn.Module | None = None) -> nn.Module:
    """The method of a stage, with fresh weights drawn from the stage's seed."""
    torch.manual_seed(stage.seed)
    counts = torch.as_tensor(facts.counts)
    head = function("head", stage.head)
    parts = Parts(
        backbone=lambda: Normalised(function("backbone", stage.backbone)(), facts.mean, facts.std),
        head=lambda dim: head(dim, len(facts.classes)),
        loss=loss(stage.loss),
        weight=None if stage.weight is None else function("weight", stage.weight)(counts).float(),
        counts=counts,
        teacher=teacher,
        teacher_scale=scale(stage.teacher),
        layer=catalogue.completed("mixing", stage.mixing).get("layer") if stage.mixing else None,
        batch=stage.batch,
    )
    keywords = catalogue.completed("method", stage.method).keywords
    made = import_module(f"rayltr.methods.{stage.method.name}").Method(parts, **dict(keywords))
    if parts.layer and getattr(made, "layer", None) != parts.layer:
        raise ValueError(f"the method {stage.method.name} does not mix inside the network; mix its images instead")
    return made


def loss(choice: Fn) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The per-sample loss of (logits, target, counts, features); few losses look at the features."""
    made = function("loss", choice)
    if "features" in inspect.signature(made).parameters:
        return made
    return lambda logits, target, counts, features: made(logits, target, counts)


def scale(teacher: Stage | None) -> float:
    """What the loss of a teacher multiplies logits by, such as the 30 of LDAM's cosines."""
    return catalogue.completed("loss", teacher.loss).get("scale") or 1.0 if teacher else 1.0


def teacher(stage: Stage, facts: Facts, state: State) -> nn.Module:
    """A finished stage as a frozen module in eval mode."""
    module = method(stage, facts)
    adopt(module, state, again=True)
    return module.eval().requires_grad_(False)


def adopt(module: nn.Module, state: State, *, again: bool = False) -> None:
    """Gives a module the kept weights of a finished stage, strictly.

    What the module declares in `fresh` (prefixes of names) may be missing in the parent and then keeps its own start;
    what it declares in `anew` keeps it whatever the parent has.  Its function `inherit`, if it has one, says which
    weights become which.  None of these holds for a module that is the finished stage `again`.  Raises ValueError
    naming the first weight that is missing, left over, or of another shape.
    """
    own = module.state_dict()
    anew, fresh = ((), ()) if again else (tuple(getattr(module, name, ())) for name in ("anew", "fresh"))
    needed = module.keep() if again and hasattr(module, "keep") else own  # type: ignore[operator]
    kept = {name: state.model[name] for name in state.kept}
    if hasattr(module, "inherit") and not again:
        kept = module.inherit(kept)  # type: ignore[operator]
    given = {name: value for name, value in kept.items() if not name.startswith(anew)}
    for name, value in given.items():
        if name not in own:
            raise ValueError(f"the weight {name} of the parent stage has no place in this stage")
        if value.shape != own[name].shape:
            raise ValueError(f"the weight {name} is {list(value.shape)} in the parent and {list(own[name].shape)} here")
    for name in needed:
        if name not in given and not name.startswith((*anew, *fresh)):
            raise ValueError(f"the weight {name} of this stage is missing in the parent stage")
    module.load_state_dict(given, strict=False)


def weights(stage: Stage, facts: Facts) -> int:
    """How many numbers a trained stage keeps, statistics included: the size of the model that an export writes."""
    module = method(stage, facts)
    state = module.state_dict()
    return sum(state[name].numel() for name in (module.keep() if hasattr(module, "keep") else state))  # type: ignore[operator]


def optimiser(stage: Stage, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over what the method trains; a stage of no epochs may have nothing to train."""
    trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    made = function("optimiser", stage.optimiser)(trained or [torch.zeros(1, requires_grad=True)])
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    if hasattr(module, "obey"):
        module.obey(made)  # type: ignore[operator]
    return made
