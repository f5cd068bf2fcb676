"""BatchNorm as a part of the convolution before it: for the time of an evaluation, or in a teacher."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.fx import Tracer
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def fused(*modules: nn.Module) -> Iterator[None]:
    """Inside, modules in eval mode predict the same with fewer operations; afterwards they are what they were.

    They are traced, so they are to be networks: the forward of a method would call its loss.  Only convolutions and
    BatchNorms are exchanged, in their places, so a prediction may take any path through the modules around them.  What
    cannot be traced stays as it is.
    """
    before = fuse(*modules)
    try:
        yield
    finally:
        for module, name, own in before:
            module.set_submodule(name, own)


def fuse(*modules: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Makes networks in eval mode predict the same with fewer operations: (network, name, what was there before)."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    after: list[tuple[nn.Module, str, nn.Module]] = []  # set when all are made: an error leaves networks as they are
    for module, (first, second) in ((own, pair) for own in modules for pair in pairs(own)):
        one, other = module.get_submodule(first), module.get_submodule(second)
        before += [(module, first, one), (module, second, other)]
        joined = fuse_conv_bn_eval(one, other)  # type: ignore[type-var, arg-type]
        after += [(module, first, joined), (module, second, nn.Identity())]
    for module, name, made in after:
        module.set_submodule(name, made)
    return before


def pairs(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The names of convolutions, and of the BatchNorms that alone see what they give."""
    if not any(type(part) in NORMS for part in module.modules()):
        return
    try:
        calls = [node for node in Tracer().trace(module).nodes if node.op == "call_module"]
    except Exception:  # a network can do anything when it is traced; perhaps its parts can be
        for name, part in module.named_children():
            yield from pairs(part, f"{prefix}{name}.")
        return
    targets = [node.target for node in calls]
    for node in calls:
        given = node.args[0]
        if given in calls and len(given.users) == 1 and targets.count(node.target) == targets.count(given.target) == 1:
            first, second = module.get_submodule(given.target), module.get_submodule(node.target)
            if type(first) in CONVOLUTIONS and type(second) in NORMS and second.running_mean is not None:
                yield f"{prefix}{given.target}", f"{prefix}{node.target}"
