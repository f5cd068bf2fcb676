"""What the tests of exports and predictions share."""

import pyarrow.parquet as pq
import torch

from rayltr import command
from rayltr.spec import fn

CPU = torch.device("cpu")
SOURCE = fn("synthetic", ratio=10.0, size=8)
DATA = ["--data", "synthetic", "--ratio", "10", "--size", "8"]

STUDY = """
from torch.nn.functional import cross_entropy
from rayltr.spec import Stage, fn

PAPER = {"plain": {"gamma": 1.0}, "bad": {"gamma": 1e39}}

def heavier(logits, target, counts, *, gamma=1.0):
    return gamma * cross_entropy(logits, target, reduction="none")

def space(trial):
    first = Stage(source=fn("digits"), epochs=4, horizon=8, backbone=fn("resnet20", width=4), batch=32,
                  optimiser=fn("sgd", lr=0.05))
    return first.but(resume=first, loss=fn(heavier, gamma=trial.suggest_float("gamma", 0, float("inf"))))
"""


def did(program, *words):
    return command.run(program.main, [*map(str, words)])


def floats(images):
    """uint8 [N,H,W,3] as the float [N,3,H,W] in [0, 1] that models take."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def said(module, images):
    return module(floats(images)).numpy()


def columns(path):
    """What `predict --out` wrote: columns by name, and the class names."""
    table = pq.read_table(path)
    found = {name: table[name].to_pylist() for name in table.column_names}
    return found, table.schema.metadata[b"classes"].decode().splitlines()
