"""Export of timm models to formats that load without timm: torchvision state dicts and ONNX.

NAME.pth, NAME.safetensors    state dict
NAME.pth.json, ...            preprocessing, license, origin and Python code to load the state dict
NAME.onnx                     graph, with the same information in its metadata

An export is compared with its source before it is written.
"""

from __future__ import annotations

import copy
import json
import math
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from timm.data import resolve_model_data_config
from torch import nn
from tyro.conf import Positional

from convert import to_onnx, to_torchvision
from convert.comparison import HEADER, Difference, batches, resolutions
from trex_models import TRexResNet, __version__
from trex_models.atomic import replacing
from trex_models.cli import require_writable
from trex_models.evaluation.frozen_model import create_model, weights_digest
from trex_models.heads import Projector
from trex_models.pretrained import licenses, naver, timm_folder

TARGETS = {"torchvision": to_torchvision.SUFFIXES, "onnx": to_onnx.SUFFIXES}
# Value of --features -> name of the exported output.
OUTPUTS = {"backbone": "features", "projector": "embeddings", "logits": "logits"}


class Exported(NamedTuple):
    """An export in memory."""

    data: bytes
    differences: list[Difference]
    description: str
    """One-line description."""
    sidecar: str = ""
    """Text of the JSON file next to the export."""


def export_model(
    model: Positional[str],
    output: Path,
    *,
    to: Literal["torchvision", "onnx"],
    file: Path | None = None,
    features: Literal["backbone", "projector", "logits"] | None = None,
    with_preprocessing: bool = False,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Export a model as a torchvision ResNet state dict or an ONNX graph, and verify the outputs.

    Example: python -m convert export trex_resnet50 --to onnx --output trex_resnet50.onnx

    Args:
        model: Name of a timm model (or hf-hub:OWNER/NAME), a timm folder, or the folder of a
            finished training run, whose backbone is exported.
        output: File to write: .pth or .safetensors for torchvision, .onnx for ONNX.
        to: Format of the export.
        file: Local copy of the model's weights, such as one of NAVER's files.
        features: Output to export: backbone features, projector embeddings or class logits. The
            default is the model's last output.
        with_preprocessing: ONNX only: the graph accepts uint8 images, B x H x W x 3, and
            normalizes them.
        half: ONNX only: store the weights and compute in float16.
        overwrite: Replace an existing export.
    """
    started = time.perf_counter()
    if to == "onnx":
        to_onnx.require_packages()
    elif with_preprocessing or half:
        option = "--half" if half else "--with-preprocessing"
        raise ValueError(f"{option} requires --to onnx, got --to {to}; remove {option}")
    paths = [output] if to == "onnx" else [output, output.with_name(f"{output.name}.json")]
    require_writable(output, *TARGETS[to])
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; choose another --output or add --overwrite")
    print(f"reading   {file or model}", flush=True)
    network = create_model(model, file).float().eval()
    cut = _cut(model, network, features)
    metadata = {**_metadata(model, network, file), "output": OUTPUTS[cut]}
    if to == "onnx":
        exported = _to_onnx(model, network, metadata, with_preprocessing, half)
    else:
        exported = _to_torchvision(model, network, metadata, output)
    wrong = next((found for found in exported.differences if not found.is_small), None)
    if wrong:
        raise ValueError(
            f"the export does not reproduce {model}: for images {' x '.join(map(str, wrong.shape))}"
            f", the relative difference is {wrong.relative:.1e}, more than the tolerance of "
            f"{wrong.tolerance:.1e}; nothing was written"
        )

    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # both files are complete before the first one is moved
        contents = (exported.data, exported.sidecar.encode())
        for path, content in zip(paths, contents, strict=False):
            stack.enter_context(replacing(path)).write(content)
    print(f"exported  {exported.description}")
    print(f"checked   largest difference from the source in float64:\n          {HEADER}")
    for found in exported.differences:
        print(f"          {found}")
    print(f"written   {len(exported.data) / 1e6:.1f} MB  {', '.join(map(str, paths))}")
    print(f"license   {metadata['license']}")
    print(f"time      {time.perf_counter() - started:.1f} s")


def _cut(name: str, model: Any, features: str | None) -> str:
    """Remove the layers after the requested output and return the output's name."""
    has_projector = isinstance(model, TRexResNet) and isinstance(model.proj, Projector)
    present = {"backbone": True, "projector": has_projector, "logits": model.num_classes > 0}
    available = [part for part in OUTPUTS if present[part]]
    features = features or available[-1]
    if features not in available:
        raise ValueError(f"--features {features}: {name} has none; use {' or '.join(available)}")
    if features != "logits" and model.num_classes:
        model.reset_classifier(0)
    if features == "backbone" and has_projector:
        model.proj = nn.Identity()
    return features


def _metadata(name: str, model: Any, file: Path | None) -> dict[str, Any]:
    """Return the metadata of the export: license, origin, preprocessing and versions."""
    cfg = model.pretrained_cfg
    stated, origin = cfg.get("license") or "not stated", cfg.get("origin_url") or "not stated"
    if weights := file or timm_folder.find_timm_folder(name):  # not those in the model's cfg
        stated = licenses.describe(weights, str(cfg.get("architecture")))
    if file is not None:
        origin = f"the file {file.name}"
    if stated == naver.LICENSE:
        stated += " (NAVER's weights: not for commercial use)"
    return {
        "model": name,
        "architecture": cfg.get("architecture") or type(model).__name__,
        "license": stated,
        "origin": origin,
        "paper": cfg.get("paper_ids") or "not stated",
        "weights_sha256": weights_digest(model),
        "preprocessing": _preprocessing(model),
        "exported_by": f"trex_models {__version__}, torch {version('torch')}",
    }


def _as_strings(metadata: dict[str, Any]) -> dict[str, str]:
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in metadata.items()}


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return arguments of torchvision's transform preset ImageClassification.

    ``resize_size`` is None if that preset cannot reproduce timm's transform.
    """
    config = resolve_model_data_config(model)
    _, *size = config["input_size"]
    resized = [math.floor(side / config["crop_pct"]) for side in size]
    resize: int | list[int] | None = None
    if config["crop_mode"] == "squash":
        resize = resized
    elif config["crop_mode"] == "center" and size[0] == size[1]:
        resize = resized[0]
    return {
        "crop_size": size[0] if size[0] == size[1] else size,
        "resize_size": resize,
        "interpolation": config["interpolation"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }


def _size(model: nn.Module) -> tuple[int, int, int]:
    """Return the number of channels, height and width of a model's default input."""
    # From the first convolution, since timm's configurations ignore in_chans.
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    _, height, width = resolve_model_data_config(model)["input_size"]
    return channels, height, width


def _to_torchvision(name: str, model: Any, metadata: dict[str, Any], path: Path) -> Exported:
    architecture = to_torchvision.architecture(name, model, metadata["output"])
    classes = model.num_classes
    metadata |= {"load": to_torchvision.usage(path, architecture, classes)}
    data = to_torchvision.serialize(model, path.suffix, _as_strings(metadata))
    channels, height, width = _size(model)
    images = batches(channels, resolutions(height, width))
    return Exported(
        data,
        to_torchvision.compare_torchvision(data, path.suffix, architecture, model, images),
        f"{metadata['output']}, torchvision.models.{architecture}, "
        f"{f'fc of {classes} classes' if classes else 'fc = torch.nn.Identity()'}",
        json.dumps(metadata, indent=2) + "\n",
    )


def _to_onnx(
    name: str, model: Any, metadata: dict[str, Any], with_preprocessing: bool, half: bool
) -> Exported:
    size = channels, height, width = _size(model)
    sizes = resolutions(height, width)
    any_size = all(
        to_onnx.accepts_shape(model, (1, channels, *other))
        for other in (*sizes, (2 * height, 3 * width))
    )
    values = metadata["preprocessing"]
    if with_preprocessing and len(values["mean"]) != channels:
        raise ValueError(
            f"--with-preprocessing: {name} has {channels} input channels, but its configuration "
            f"has means of {len(values['mean'])}; remove the option and normalize the images before"
        )
    normalize = (values["mean"], values["std"]) if with_preprocessing else None
    graph = to_onnx.Graph(model, normalize).eval()
    exact = copy.deepcopy(graph).double()
    if half:
        graph.model.half()
    colors = "RGB" if channels == 3 else f"{channels} channels"
    kind = f"uint8, {colors}, B x H x W x {channels}"
    if not with_preprocessing:
        kind = f"float32, {colors}, B x {channels} x H x W"
    metadata |= {"images": f"{kind}{'' if with_preprocessing else ', normalized'}"}
    proto = to_onnx.build_onnx(graph, metadata["output"], size, any_size, _as_strings(metadata))
    data = proto.SerializeToString()
    sides = "any height and width" if any_size else f"{height} x {width} pixels"
    return Exported(
        data,
        to_onnx.compare_onnx(
            data, graph, exact, batches(channels, sizes if any_size else [(height, width)] * 3)
        ),
        f"{metadata['output']}, opset {to_onnx.OPSET}; images {kind}: any batch size, {sides}",
    )
