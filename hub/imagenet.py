"""ImageNet-1K top-1 accuracy of converted models, compared with the authors' results.

Backbones are scored with the transfer evaluation's protocol for ImageNet: a linear layer trained by
SGD with one seed. Complete classifiers are scored with their prototypes, a different protocol.

    DIR/imagenet.json    results, written after every model
    DIR/features/        features, which an interrupted run reuses
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from trex_models.atomic import write_text_file
from trex_models.data.image_files import FolderSource
from trex_models.evaluation.extract import images_digest
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.precision import choose_device, free_cores
from trex_models.pretrained import naver
from trex_models.pretrained.manifest import sha256
from trex_models.transfer.cache import FeatureCache
from trex_models.transfer.protocol import sgd_scores
from trex_models.transfer.published import reported

LINEAR, PROTOTYPES = "a linear layer on the features", "its own prototypes"
TOLERANCES = {LINEAR: 0.5, PROTOTYPES: 1.5}
"""Largest differences from the authors' results, in percentage points."""
CLASSES = tuple(ImageNetInfo().label_names())
"""Names of ImageNet's class folders, in the order of the labels."""


def measure(
    converted: Path, imagenet: Path, output: Path, classes: Sequence[str] = CLASSES
) -> dict[str, Any]:
    """Measure models with a reported figure unless already done; return the results by model.

    Args:
        converted: Folder that contains timm folders with NAVER's names.
        imagenet: Folder with ``val`` and, for backbones, ``train``, in one subfolder per class.
        output: Folder of imagenet.json and the features.
        classes: Names of the class folders, in the order of the labels.
    """
    path = output / "imagenet.json"
    results = read_results(path) if path.exists() else {}
    splits = ("train", "val") if (imagenet / "train").is_dir() else ("val",)
    sources = {split: _source(imagenet / split, classes) for split in splits}
    images = {split: images_digest(source) for split, source in sources.items()}
    for name in naver.FILES:
        folder = converted / name
        if "_proj" in name or not folder.is_dir():
            continue
        kind = PROTOTYPES if "_cls" in name else LINEAR
        if kind == LINEAR and "train" not in sources:
            print(f"{name}: not measured, since {imagenet / 'train'} is missing")
            continue
        inputs = {
            "protocol": kind,
            "sha256": sha256(folder / "model.safetensors"),
            "images": len(sources["val"]),
            "images_sha256": images if kind == LINEAR else {"val": images["val"]},
        }
        if inputs.items() <= results.get(name, {}).items():
            print(f"{name}: already measured, {results[name]['top1']:.2f} %")
            continue
        print(f"{name}: {kind}, {inputs['images']} images", flush=True)
        scores = _top1(folder, kind, sources, output / "features")
        figure, tolerance = 100 * reported(name).top1, TOLERANCES[kind]
        compared = {
            "reported_top1": figure,
            "reported_protocol": LINEAR,
            "tolerance": tolerance,
            "within_tolerance": abs(scores["top1"] - figure) <= tolerance,
        }
        results[name] = inputs | scores | compared
        write_text_file(path, json.dumps(results, indent=2) + "\n")
    return results


def _top1(folder: Path, kind: str, sources: dict[str, FolderSource], root: Path) -> dict[str, Any]:
    """Return a model's top-1 in percent and the settings of the linear layer, if any."""
    device, val = str(choose_device()), sources["val"]
    cache = FeatureCache(root=root, dtype="float16", workers=min(free_cores(), 16))
    load = partial(FrozenModel.load, str(folder), preprocessing="model", device=device)
    if kind == LINEAR:
        model = load()
        train, test = (
            (cache.features(model, sources[split], split), sources[split].labels)
            for split in ("train", "val")
        )
        [choice] = sgd_scores(*train, *test, seeds=[0], device=device)
        return {"top1": 100 * choice.top1, **choice.settings}
    model = load(features="logits")
    if model.shape != (len(val.classes),):
        raise ValueError(
            f"{folder} has {model.shape[0]} classes, but the images have {len(val.classes)}; pass "
            "images of the model's classes"
        )
    # In float32, since rounding to float16 could make two logits equal.
    logits = replace(cache, dtype="float32").features(model, val, "val")
    return {"top1": 100 * float((logits.argmax(1) == val.labels).mean())}


def _source(root: Path, classes: Sequence[str]) -> FolderSource:
    source = FolderSource(root)
    if odd := sorted(set(source.classes) ^ set(classes)):
        raise ValueError(
            f"{root} has {len(source.classes)} class folders, which do not match the names of the "
            f"{len(classes)} classes; first missing or unexpected name: {odd[0]}"
        )
    return source


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read the results by model; raise ValueError for other contents."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no results ({error}); delete it, measure again") from error


def format_results(results: dict[str, Any]) -> str:
    """Format a table of the results and the authors' results."""
    lines = [f"{'top-1, %':<36}{'ours':>8}{'reported':>10}{'difference':>12}  within"]
    for name, result in results.items():
        title = f"{name} (*)" if result["protocol"] == PROTOTYPES else name
        top1, figure, tolerance = (result[k] for k in ("top1", "reported_top1", "tolerance"))
        verdict = "yes" if result["within_tolerance"] else "NO"
        numbers = f"{top1:8.2f}{figure:10.1f}{top1 - figure:+12.2f}"
        lines.append(f"{title:<36}{numbers}  {verdict} ({tolerance:g})")
    return "\n".join(lines) + (
        "\nours: measured here; reported: the authors' results for the backbone with a linear\n"
        "layer. (*) measured with the model's prototypes, a different protocol"
    )
