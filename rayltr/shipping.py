"""Trained trials as models to ship: adjustments folded into one linear classifier, a folder timm can load, ONNX.

The export's forward takes RGB images in [0, 1] as float [B,3,H,W] and gives logits [B,C] that are already corrected:
z / T - tau * log prior, with the tau and temperature T that validation chose.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rayltr import build
from rayltr.backbones import Normalised
from rayltr.interface import Facts, Resources
from rayltr.metrics import fit
from rayltr.records import read_predictions
from rayltr.spec import Stage, dump, end, fn, parse
from rayltr.store import Store

SCHEMA = 1


class Shipped(nn.Module):
    """A backbone and one linear classifier, which sees features of unit length with `normalise` (cosine heads)."""

    def __init__(self, backbone: Normalised, classes: int, normalise: bool):
        super().__init__()
        self.backbone, self.normalise = backbone, normalise
        self.classifier = nn.Linear(backbone.dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.classifier(F.normalize(features) if self.normalise else features)


@dataclass(frozen=True)
class Adjustment:
    """tau and temperature, with the training counts [C] that the prior is taken from."""

    tau: float
    temperature: float
    counts: np.ndarray

    def shift(self) -> Tensor:
        """-tau * log prior, float64 [C]; an empty class counts as one image."""
        counts = torch.as_tensor(self.counts, dtype=torch.float64).clamp(min=1)
        return -self.tau * (counts / counts.sum()).log()


@torch.no_grad()
def folded(method: nn.Module, adjustment: Adjustment) -> Shipped:
    """The method's main prediction with the adjustment folded in.

    Raises ValueError when its head is not linear in its features, of any or of unit length.
    """
    backbone, head = method.backbone.double().eval(), method.head.double().eval()  # type: ignore[union-attr, operator]
    one = torch.eye(backbone.dim, dtype=torch.float64)  # type: ignore[arg-type]
    normalise = bool(torch.allclose(head(2 * one), head(one)))
    bias = head(0 * one[:1])[0]
    made = Shipped(backbone, len(bias), normalise).double()  # type: ignore[arg-type]
    made.classifier.weight.copy_((head(one) - bias).T / adjustment.temperature)
    made.classifier.bias.copy_(bias / adjustment.temperature + adjustment.shift())
    probe = torch.randn(8, backbone.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # type: ignore
    expected = head(probe) / adjustment.temperature + adjustment.shift()
    if not torch.allclose(made.classifier(F.normalize(probe) if normalise else probe), expected):
        raise ValueError("this head cannot be exported: it is not linear in its features")
    return made.float()


@dataclass(frozen=True)
class Finished:
    """A trained trial ready to be written: its model, what it was made of and what was measured."""

    model: Shipped
    stage: Stage
    facts: Facts
    adjustment: Adjustment


def finished(run: Path, row: Mapping[str, Any], size: tuple[int, int]) -> Finished:
    """The model of a row of the trials table, from the run's store; neither data nor Ray are needed.

    Raises ValueError when its weights are not in the store any more.
    """
    place = run / row["predictions_val"]
    note = place.with_name(place.name.replace(".val.parquet", ".json"))
    if not note.exists():
        raise ValueError(f"the weights of trial {row['trial']} are not in {run} any more; train it again with "
                         f"`python -m rayltr.train {run} --trial {row['trial']}`")  # fmt: skip
    stage = parse(json.loads(note.read_text())["stage"])
    state = Store(run / "store").longest(stage)
    if state is None or state.epoch != end(stage):  # what a shorter training left is another model
        raise ValueError(f"the weights of trial {row['trial']} in {run} are damaged; train it again with "
                         f"`python -m rayltr.train {run} --trial {row['trial']}`")  # fmt: skip
    val = read_predictions(place)
    mean, std = (tuple(state.model[f"backbone.{name}"].flatten().tolist()) for name in ("mean", "std"))
    facts = Facts(tuple(val.classes), val.counts, mean, std, size)
    method = build.method(stage.but(backbone=stage.backbone.but(pretrained=None)), facts)
    build.adopt(method, state, again=True)
    tau, temperature, _ = fit(next(iter(val.logits.values())), val.target, val.counts)
    adjustment = Adjustment(tau, temperature, val.counts)
    recipe = parse(json.loads(row["recipe"]))
    return Finished(folded(method, adjustment), recipe, facts, adjustment)


def written(out: Path, found: Finished, row: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Writes the export: config.json, model.safetensors, labels.txt, metrics.json, manifest.json and a model card."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("model.onnx", "study.py"):
        (out / stale).unlink(missing_ok=True)
    config, weights = form(found)
    metrics = {key[2:]: value for key, value in row.items() if key.startswith("m.") and value is not None}
    posthoc = {"tau": found.adjustment.tau, "temperature": found.adjustment.temperature,
               "counts": found.adjustment.counts.tolist(), "folded": True}  # fmt: skip
    more = {"rayltr": SCHEMA, "posthoc": posthoc, "recipe": dump(found.stage)}
    save_file({name: value.contiguous() for name, value in weights.items()}, out / "model.safetensors")
    texts = {
        "config.json": json.dumps({**config, **more}, indent=1),
        "labels.txt": "\n".join(found.facts.classes) + "\n",
        "metrics.json": json.dumps({"trial": row["trial"], **metrics}, indent=1),
        "manifest.json": json.dumps(manifest, indent=1),
    }
    for name, text in texts.items():
        (out / name).write_text(text)


def common(found: Finished) -> dict[str, Any]:
    """What a config.json says of the model in timm's words."""
    facts, classes = found.facts, len(found.facts.classes)
    normal = {"mean": list(facts.mean), "std": list(facts.std), "input_size": [3, *facts.size]}
    return {
        "num_classes": classes,
        "num_features": found.model.classifier.in_features,
        "label_names": list(facts.classes),
        "pretrained_cfg": {**normal, "num_classes": classes, "crop_pct": 1.0, "interpolation": "bicubic"},
    }


def form(found: Finished) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights, in timm's form where timm can load them."""
    if found.stage.backbone.name != "timm" or found.model.normalise:
        return own_form(found)
    try:
        return timm_form(found)
    except RuntimeError:  # not every model of timm ends in one linear layer
        return own_form(found)


def own_form(found: Finished) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = found.model
    form = {"architecture": f"rayltr/{found.stage.backbone.name}", "backbone": dump(found.stage.backbone)}
    return {**form, **common(found), "normalise": model.normalise}, model.state_dict()


def timm_form(found: Finished) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The weights under timm's own names, so that `timm.create_model("local-dir:...")` loads them."""
    name = found.stage.backbone.get("model")
    made = import_module("timm").create_model(name, num_classes=len(found.facts.classes))
    place = made.default_cfg["classifier"]
    body = {key.removeprefix("body."): value for key, value in found.model.backbone.body.state_dict().items()}
    head = {f"{place}.{key}": value for key, value in found.model.classifier.state_dict().items()}
    made.load_state_dict({**body, **head})
    config = common(found)
    config["pretrained_cfg"] |= {"classifier": place, "architecture": name, "fixed_input_size": False}
    return {"architecture": name, **config}, made.state_dict()


def place(device: str | None) -> torch.device:
    return Resources(device=device).place()


def opened(folder: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """An exported model in eval mode, from images in [0, 1] to corrected logits, and its config.

    Raises ValueError for a folder that is no export or is damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        if config.get("rayltr") == SCHEMA:
            return rebuilt(config, weights).to(device).eval(), config
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{folder} is no exported model, or damaged: {type(error).__name__}: {reason}") from error
    raise ValueError(f"{folder} was exported by an incompatible version ({config.get('rayltr')}, here {SCHEMA})")


def rebuilt(config: Mapping[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The model that a config.json describes, with its weights.  Raises whatever a damaged one leads to."""
    normal, classes = config["pretrained_cfg"], len(config["label_names"])
    if "backbone" in config:
        keywords = dict(config["backbone"])
        choice = fn(keywords.pop("fn"), **keywords).but(pretrained=None)
        backbone = Normalised(build.function("backbone", choice)(), normal["mean"], normal["std"])
        model = Shipped(backbone, classes, config["normalise"])
        model.load_state_dict(weights)
        return model
    made = import_module("timm").create_model(config["architecture"], num_classes=classes)
    made.load_state_dict(weights)
    made.dim = classes
    return Normalised(made, normal["mean"], normal["std"])


def onnx(out: Path, model: nn.Module, size: tuple[int, int]) -> Path:
    """Writes model.onnx: float images [B,3,H,W] in [0, 1] -> logits [B,C].  Raises ValueError without the extra."""
    try:
        import_module("onnxscript")
    except ImportError as error:
        raise ValueError("ONNX needs the extra: pip install 'rayltr[onnx]'") from error
    path = out / "model.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(model.eval(), (torch.rand(2, 3, *size),), path, input_names=["images"], output_names=["logits"],
                      dynamic_shapes=({0: batch},), dynamo=True, external_data=False, verbose=False)  # fmt: skip
    return path


@torch.inference_mode()
def predictions(model: nn.Module, batches: Iterator[np.ndarray], device: torch.device) -> Iterator[np.ndarray]:
    """Probabilities float32 [B,C] for uint8 images [B,H,W,3]."""
    for images in batches:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
        yield model(pixels).softmax(1).cpu().numpy()
