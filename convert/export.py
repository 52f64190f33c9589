"""Export a timm model to what loads without timm: torchvision's state dicts, ONNX graphs.

NAME.pth, NAME.safetensors    the state dict
NAME.pth.json, ...            beside it: preprocessing, licence, origin, how to load it
NAME.onnx                     the graph; all of this is in its metadata

An export is compared with its source before it is written.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.data import resolve_model_data_config
from torch import nn

from convert import to_onnx, to_torchvision
from convert.comparison import HEADER, Difference, batches, resolutions
from trex_models import TRexResNet, __version__, folders, licenses, naver
from trex_models.evaluation.frozen_model import weights_digest
from trex_models.files import replacing
from trex_models.heads import Projector

TARGETS = {"torchvision": to_torchvision.SUFFIXES, "onnx": to_onnx.SUFFIXES}
OUTPUTS = ("features", "embeddings", "logits")


class Exported(NamedTuple):
    """What is about to be written."""

    data: bytes
    differences: list[Difference]
    description: str
    """In a line."""
    beside: str = ""
    """Text of the JSON file."""


def export(
    name: str,
    target: str,
    path: Path,
    *,
    file: Path | None = None,
    output: str | None = None,
    with_preprocessing: bool = False,
    half: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Export a model; say what was written, and how far it is from its source.

    Args:
        name: A timm model (with a tag or without, ``hf-hub:OWNER/NAME`` too), the folder of one,
            or the folder of a finished training run, whose backbone is meant.
        target: "torchvision" or "onnx".
        path: The file to write; its folder is made.
        file: Your copy of the weights, for the name of a model.
        output: Where to cut the model: features, embeddings or logits; None for its own output.
        with_preprocessing: For ONNX: uint8 images in, normalised inside.
        half: For ONNX: weights and computation in float16.
        overwrite: Whether ``path`` may exist.
        say: Takes lines of text.

    Raises:
        ValueError: The model cannot be had or cannot be exported so, an option does not fit, or
            the export does not reproduce the model. Nothing is written then.
        OSError: The file cannot be written.
    """
    started = time.perf_counter()
    if target == "onnx":
        to_onnx.require_packages()
    elif with_preprocessing or half:
        option = "--half" if half else "--with-preprocessing"
        raise ValueError(f"{option} is for --to onnx; leave it out")
    written = [path] if target == "onnx" else [path, path.with_name(f"{path.name}.json")]
    _check_paths(written, target, overwrite)
    say(f"reading   {file or name}")
    model = _load(name, file)
    output = _cut(name, model, output)
    facts = {**_facts(name, model, file), "output": output}
    if target == "onnx":
        exported = _to_onnx(name, model, facts, with_preprocessing, half)
    else:
        exported = _to_torchvision(name, model, facts, path)
    _check(name, exported.differences)

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # each is whole before the first takes its place
        contents = (exported.data, exported.beside.encode())
        for place, content in zip(written, contents, strict=False):
            stack.enter_context(replacing(place)).write(content)
    say(f"exported  {exported.description}")
    say(f"checked   largest difference from the source in float64:\n          {HEADER}")
    for found in exported.differences:
        say(f"          {found}")
    say(f"written   {len(exported.data) / 1e6:.1f} MB  {', '.join(map(str, written))}")
    say(f"licence   {facts['license']}")
    say(f"time      {time.perf_counter() - started:.1f} s")


def _check_paths(written: list[Path], target: str, overwrite: bool) -> None:
    path = written[0]
    suffixes = TARGETS[target]
    if path.suffix not in suffixes:
        raise ValueError(f"--out {path}: --to {target} writes {' or '.join(suffixes)} files")
    for place in written:
        if place.is_dir():
            raise ValueError(f"{place} is a folder; give the name of a file by --out")
        if place.exists() and not overwrite:
            raise ValueError(f"{place} exists; choose another --out, or add --overwrite")
    folder = next(place for place in path.absolute().parents if place.exists())
    if not folder.is_dir():
        raise ValueError(f"--out {path}: {folder} is a file; choose another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--out {path}: {folder} cannot be written; choose another folder")


def _load(name: str, file: Path | None) -> Any:
    """Return a model with its weights, in float32 and eval mode."""
    folder = folders.find(name)
    if folder is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(
            f"{name}: there is no such folder with a config.json and weights; name a timm folder, "
            "the folder of a finished run, or a model of timm"
        )
    if file is not None and folder is not None:
        raise ValueError(f"--file {file} goes with a model's name, and {name} is a folder")
    if file is not None and not file.is_file():
        raise ValueError(f"--file {file}: there is no such file")
    overlay = {"file": str(file)} if file else None
    try:
        model = timm.create_model(
            f"local-dir:{folder}" if folder else name, True, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # timm, the Hub and safetensors let anything out
        raise ValueError(f"{file or name} cannot be loaded: {_in_a_line(error)}") from error
    return model.float().eval()


def _cut(name: str, model: Any, output: str | None) -> str:
    """Drop what comes after an output; return the output's name.

    Raises:
        ValueError: The model does not have it.
    """
    has_projector = isinstance(model, TRexResNet) and isinstance(model.proj, Projector)
    present = {"features": True, "embeddings": has_projector, "logits": model.num_classes > 0}
    has = [part for part in OUTPUTS if present[part]]
    output = output or has[-1]
    if output not in has:
        raise ValueError(f"--output {output}: {name} has {' and '.join(has)} alone")
    if output != "logits" and model.num_classes:
        model.reset_classifier(0)
    if output == "features" and has_projector:
        model.proj = nn.Identity()
    return output


def _facts(name: str, model: Any, file: Path | None) -> dict[str, Any]:
    """Return what a user of the export has to know, for JSON."""
    cfg = model.pretrained_cfg
    licence, origin = cfg.get("license") or "not stated", cfg.get("origin_url") or "not stated"
    if own_weights := file or folders.find(name):  # not those of the architecture
        licence = licenses.describe(own_weights, str(cfg.get("architecture")))
    if file is not None:
        origin = f"the file {file.name}"
    if licence == naver.LICENSE:
        licence += " (NAVER's weights: not for commercial use)"
    return {
        "model": name,
        "architecture": cfg.get("architecture") or type(model).__name__,
        "license": licence,
        "origin": origin,
        "paper": cfg.get("paper_ids") or "not stated",
        "weights_sha256": weights_digest(model),
        "preprocessing": _preprocessing(model),
        "exported_by": f"trex_models {__version__}, torch {version('torch')}",
    }


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of torchvision.transforms' preset ImageClassification.

    ``resize_size`` is null where that preset cannot do what timm's transform does.
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
    """Return C, H and W of a model's own images."""
    # timm's configurations do not follow in_chans.
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    _, height, width = resolve_model_data_config(model)["input_size"]
    return channels, height, width


def _to_torchvision(name: str, model: Any, facts: dict[str, Any], path: Path) -> Exported:
    architecture = to_torchvision.architecture(name, model, facts["output"])
    classes = model.num_classes
    facts |= {"load": to_torchvision.usage(path, architecture, classes)}
    header = {key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()}
    data = to_torchvision.serialise(model, path.suffix, header)
    channels, height, width = _size(model)
    images = batches(channels, resolutions(height, width))
    return Exported(
        data,
        to_torchvision.compare(data, path.suffix, architecture, model, images),
        f"{facts['output']}, torchvision.models.{architecture}, "
        f"{f'fc of {classes} classes' if classes else 'fc = torch.nn.Identity()'}",
        json.dumps(facts, indent=2) + "\n",
    )


def _to_onnx(
    name: str, model: Any, facts: dict[str, Any], with_preprocessing: bool, half: bool
) -> Exported:
    size = channels, height, width = _size(model)
    sizes = resolutions(height, width)
    any_size = all(
        to_onnx.takes_other_sizes(model, (1, channels, *other))
        for other in (*sizes, (2 * height, 3 * width))
    )
    values = facts["preprocessing"]
    if with_preprocessing and len(values["mean"]) != channels:
        raise ValueError(
            f"--with-preprocessing: {name} takes {channels} channels, and its configuration has "
            f"the mean of {len(values['mean'])}; leave it out, and normalise as it was trained"
        )
    normalise = (values["mean"], values["std"]) if with_preprocessing else None
    graph = to_onnx.Graph(model, normalise).eval()
    exact = copy.deepcopy(graph).double()
    if half:
        graph.model.half()
    colours = "RGB" if channels == 3 else f"{channels} channels"
    kind = f"uint8, {colours}, B x H x W x {channels}"
    if not with_preprocessing:
        kind = f"float32, {colours}, B x {channels} x H x W"
    facts |= {"images": f"{kind}{'' if with_preprocessing else ', normalised'}"}
    header = {key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()}
    data = to_onnx.build(graph, facts["output"], size, any_size, header).SerializeToString()
    sides = "any height and width" if any_size else f"{height} x {width} pixels"
    return Exported(
        data,
        to_onnx.compare(
            data, graph, exact, batches(channels, sizes if any_size else [(height, width)] * 3)
        ),
        f"{facts['output']}, opset {to_onnx.OPSET}; images {kind}: any batch, {sides}",
    )


def _check(name: str, differences: list[Difference]) -> None:
    wrong = next((found for found in differences if not found.is_small), None)
    if wrong:
        raise ValueError(
            f"the export does not reproduce {name}: on images {' x '.join(map(str, wrong.shape))} "
            f"it is off by {wrong.relative:.1e} of the largest value, more than "
            f"{wrong.tolerance:.1e}; nothing was written"
        )


def _in_a_line(error: Exception) -> str:
    """Return what an error says, with the first of what torch lists below."""
    lines = (str(error) or type(error).__name__).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])
