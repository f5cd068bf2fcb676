"""Imports point downwards only, and none hides inside a function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AXES = {"rayltr.views", "rayltr.samplers", "rayltr.mixing", "rayltr.backbones", "rayltr.heads", "rayltr.losses",
        "rayltr.optim", "rayltr.parallel", "rayltr.contrast", "rayltr.momentum", "rayltr.experts",
        "rayltr.fused", "rayltr.joint", "rayltr.data"}  # fmt: skip
LAYERS = [
    {"rayltr.files"},
    {"rayltr.spec", "rayltr.records", "rayltr.metrics", "rayltr.choice", "rayltr.interface"},
    {"search_spaces", "analysis"},
    {"rayltr.catalogue", "rayltr.claims"},
    {"rayltr.transformers"},
    {"rayltr.objectives", "rayltr.studies", "rayltr.progress", "rayltr.agenda", "rayltr.boards", "rayltr.machines"},
    AXES,
    {"rayltr.sharded", "rayltr.hardest", "rayltr.ablation", "rayltr.ahead", "rayltr.stacked", "rayltr.compiled"},
    {"rayltr.command", "rayltr.methods", "rayltr.model_card"},
    {"rayltr.build"},
    {"rayltr.train", "rayltr.evaluate", "rayltr.store"},
    {"rayltr.trial", "rayltr.rehearsal", "rayltr.recipe"},
    {"rayltr.cluster", "rayltr.folding"},
    {"rayltr.sampling", "rayltr.shipping"},
    {"rayltr.proposals", "rayltr.ensemble"},
    {"rayltr.ledger", "rayltr.finalists"},
    {"rayltr.unsealing", "rayltr.actor"},
    {"rayltr.tuning"},
    {"rayltr.summary"},
    {"rayltr.search", "rayltr.export", "rayltr.predict", "rayltr.prune", "rayltr.inspect", "rayltr.__main__"},
    {"rayltr.adapt"},
]
"""From the bottom up.  A module imports from lower layers only; inside a package (data, analysis) it is free."""

INSIDE = {"rayltr.data", "rayltr.methods", "rayltr.views", "analysis", "search_spaces"}
ALLOWED = {
    ("rayltr.export", "rayltr.recipe"),
}
FILES = sorted(path for name in ("rayltr", "search_spaces", "analysis") for path in (ROOT / name).rglob("*.py"))
ONLY = {
    "ray": {"rayltr.tuning", "rayltr.actor", "rayltr.unsealing", "rayltr.machines", "rayltr.cluster"},
    "optuna": {"rayltr.sampling", "rayltr.proposals"},
    "plotly": {"analysis"},
    "torch": AXES - {"rayltr.data"} | {f"rayltr.{name}" for name in (
        "interface", "methods", "build", "train", "rehearsal", "store", "folding", "shipping", "ensemble",
        "sharded", "hardest", "ahead", "stacked", "compiled", "transformers", "inspect", "adapt")},
}  # fmt: skip


def unit(name: str) -> str:
    """The layer's name of a module: packages below rayltr, analysis and search_spaces are one unit each."""
    parts = name.split(".")
    return parts[0] if parts[0] != "rayltr" else ".".join(parts[:2])


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "rayltr" else {node.module}
    return found


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level(name: str) -> int:
    return next(height for height, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_downwards(path):
    own = unit(module(path))
    if own == "rayltr":
        return
    for name in imported(path):
        other = unit(name)
        if not other.startswith(("rayltr", "analysis", "search_spaces")) or other == "rayltr":
            continue
        if other == own and own in INSIDE:
            continue
        assert level(other) < level(own) or (own, other) in ALLOWED, f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_import_hides_in_a_function(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hidden = [inner for inner in ast.walk(node) if isinstance(inner, (ast.Import, ast.ImportFrom))]
            assert not hidden, f"{node.name} in {path.name}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_heavy_libraries_stay_where_they_belong(path):
    for name in imported(path):
        top = name.split(".")[0]
        if top in ONLY:
            assert unit(module(path)) in ONLY[top], f"{module(path)} imports {top}"


def test_files_are_short_enough_to_read():
    long = {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 300}
    assert not long
