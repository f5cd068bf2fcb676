"""Models to ship as folders, in timm's form where timm can load them, and as ONNX."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from rayltr import build
from rayltr.backbones import Normalised
from rayltr.command import processor
from rayltr.folding import Adjustment, Finished, Headed, Shipped
from rayltr.interface import Facts, Resources, State
from rayltr.spec import dump, fn, parse

SCHEMA = 1
WARM_UP, TIMED = 3, 15
"""Images that are not timed, and that are, one by one, to say what an image takes."""


def weighed(out: Path, found: Finished) -> None:
    """Writes what `opened` needs: config.json and model.safetensors."""
    config, weights = form(found)
    adjustment = found.adjustment
    posthoc = {"tau": adjustment.tau, "temperature": adjustment.temperature, "counts": adjustment.counts.tolist(),
               "bias": np.asarray(adjustment.bias).tolist(), "folded": True}  # fmt: skip
    more = {"rayltr": SCHEMA, "posthoc": posthoc, "recipe": dump(found.stage)}
    (out / "model.safetensors").write_bytes(bytes_of({name: value.contiguous() for name, value in weights.items()}))
    (out / "config.json").write_text(json.dumps({**config, **more}, indent=1))


def described(out: Path, classes: Sequence[str], metrics: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Writes what people read: labels.txt, metrics.json and manifest.json."""
    (out / "labels.txt").write_text("\n".join(classes) + "\n")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


def common(found: Finished) -> dict[str, Any]:
    """What a config.json says of the model in timm's words."""
    facts, classes = found.facts, len(found.facts.classes)
    normal = {"mean": list(facts.mean), "std": list(facts.std), "input_size": [3, *facts.size]}
    return {
        "num_classes": classes,
        "label_names": list(facts.classes),
        "pretrained_cfg": {**normal, "num_classes": classes, "crop_pct": 1.0, "interpolation": "bicubic"},
    }


def form(found: Finished) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights, in timm's form where timm can load them."""
    model = found.model
    if isinstance(model, Headed):
        return two_token_form(found, model) or headed_form(found, model)
    if found.stage.backbone.name != "timm" or model.normalise:
        return own_form(found, model)
    try:
        return timm_form(found, model)
    except RuntimeError:  # not every model of timm ends in one linear layer
        return own_form(found, model)


def own_form(found: Finished, model: Shipped) -> tuple[dict[str, Any], dict[str, Tensor]]:
    form = {"architecture": f"rayltr/{found.stage.backbone.name}", "backbone": dump(found.stage.backbone)}
    width = {"num_features": model.classifier.in_features, "normalise": model.normalise}
    return {**form, **common(found), **width}, model.state_dict()


def headed_form(found: Finished, model: Headed) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The weights of the whole method that predict; the recipe says what they belong to."""
    own = model.method.state_dict()
    kept = model.method.keep() if hasattr(model.method, "keep") else own  # type: ignore[operator]
    form = {"architecture": f"rayltr/{found.stage.method.name}", "head": model.head, "weights": dict(model.weights)}
    return {**form, **common(found)}, {name: own[name] for name in kept}


def two_token_form(found: Finished, model: Headed) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The mean of two tokens' linear classifiers under timm's own names, each of them with the adjustment.

    None for another head, and where the network resizes the images, which timm's does not.
    """
    own = getattr(model.method, "as_timm", lambda: None)() if model.weights == {"main": 1.0} else None
    if own is None or found.facts.size != (own[1]["img_size"],) * 2:
        return None
    name, sides, weights = own
    for head in ("head", "head_dist"):
        weights[f"{head}.weight"] = weights[f"{head}.weight"] / model.temperature
        weights[f"{head}.bias"] = weights[f"{head}.bias"] / model.temperature + model.shift
    config = {**common(found), "num_features": sides["embed_dim"], "model_args": sides}
    config["pretrained_cfg"] |= {"classifier": ["head", "head_dist"], "architecture": name, "fixed_input_size": True}
    return {"architecture": name, **config}, weights


def timm_form(found: Finished, model: Shipped) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The weights under timm's own names, so that `timm.create_model("local-dir:...")` loads them."""
    name = found.stage.backbone.get("model")
    made = import_module("timm").create_model(name, num_classes=len(found.facts.classes))
    place = made.default_cfg["classifier"]
    body = {key.removeprefix("body."): value for key, value in model.backbone.body.state_dict().items()}
    head = {f"{place}.{key}": value for key, value in model.classifier.state_dict().items()}
    made.load_state_dict({**body, **head})
    config = {**common(found), "num_features": model.classifier.in_features}
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
    if "head" in config:
        return whole(config, weights)
    if "backbone" in config:
        keywords = dict(config["backbone"])
        choice = fn(keywords.pop("fn"), **keywords).but(pretrained=None)
        backbone = Normalised(build.function("backbone", choice)(), normal["mean"], normal["std"])
        model = Shipped(backbone, classes, config["normalise"])
        model.load_state_dict(weights)
        return model
    sides = config.get("model_args", {})
    made = import_module("timm").create_model(config["architecture"], num_classes=classes, **sides)
    made.load_state_dict(weights)
    made.dim = classes
    return Normalised(made, normal["mean"], normal["std"])


def whole(config: Mapping[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """A head of a method that was exported whole."""
    normal, posthoc, stage = config["pretrained_cfg"], config["posthoc"], parse(config["recipe"])
    counts, size = np.asarray(posthoc["counts"]), tuple(normal["input_size"][1:])
    facts = Facts(tuple(config["label_names"]), counts, tuple(normal["mean"]), tuple(normal["std"]), size)
    method = build.method(stage.but(backbone=stage.backbone.but(pretrained=None)), facts)
    build.adopt(method, State(weights, {}, 0, tuple(weights)), again=True)
    adjustment = Adjustment(posthoc["tau"], posthoc["temperature"], counts, np.asarray(posthoc["bias"]))
    return Headed(method, config["head"], adjustment, config.get("weights"))


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
def price(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """What using a model takes here: its weights, milliseconds for one image (median), and the machine."""
    image, seconds = torch.rand(1, 3, *size), []
    for _ in range(WARM_UP + TIMED):
        began = time.perf_counter()
        model.eval()(image)
        seconds.append(time.perf_counter() - began)
    weights = sum(value.numel() for value in model.state_dict().values())
    machine = {"processor": processor(), "threads": torch.get_num_threads()}
    return {"weights": weights, "ms_per_image": 1000 * median(seconds[WARM_UP:]), **machine}


@torch.inference_mode()
def predictions(model: nn.Module, batches: Iterator[np.ndarray], device: torch.device) -> Iterator[np.ndarray]:
    """Probabilities float32 [B,C] for uint8 images [B,H,W,3]."""
    for images in batches:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
        yield model(pixels).softmax(1).cpu().numpy()
