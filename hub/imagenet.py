"""Top-1 on ImageNet-1K of converted models, next to the figures that the authors report.

Backbones are scored by the transfer evaluation's protocol for ImageNet, a linear layer by SGD, with
one seed. Complete classifiers are scored by their own prototypes, which is another protocol.

    DIR/imagenet.json    the results, written after every model
    DIR/features/        features, from which an interrupted run continues
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from hub.figures import reported
from trex_models import naver
from trex_models.data.folder import FolderSource
from trex_models.evaluation.extract import images_digest
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.files import write_whole
from trex_models.machine import free_cores
from trex_models.manifest import sha256
from trex_models.precision import choose_device
from trex_models.transfer.cache import FeatureCache
from trex_models.transfer.protocol import sgd_scores

LINEAR, PROTOTYPES = "a linear layer on the features", "its own prototypes"
TOLERANCES = {LINEAR: 0.5, PROTOTYPES: 1.5}
"""Largest differences from the authors' figures, in percent points."""
CLASSES = tuple(ImageNetInfo().label_names())
"""Names of ImageNet's class folders in the order of the labels."""


def measure(
    converted: Path, imagenet: Path, output: Path, classes: Sequence[str] = CLASSES
) -> dict[str, Any]:
    """Measure the models that have a reported figure, each once; return the results by model.

    Args:
        converted: Folder of timm folders with NAVER's names.
        imagenet: Folder of ``val`` and, for backbones, ``train``: a folder of images per class.
        output: Folder of imagenet.json and the features.
        classes: Names of the class folders in the order of the labels.

    Raises:
        ValueError: The images are not those of the classes, or one cannot be read.
    """
    path = output / "imagenet.json"
    results = read_results(path) if path.exists() else {}
    splits = [split for split in ("train", "val") if split == "val" or (imagenet / split).is_dir()]
    sources = {split: _source(imagenet / split, classes) for split in splits}
    digests = {split: images_digest(source) for split, source in sources.items()}
    for name in naver.FILES:
        folder = converted / name
        if "_proj" in name or not folder.is_dir():
            continue
        kind = PROTOTYPES if "_cls" in name else LINEAR
        if kind == LINEAR and "train" not in sources:
            print(f"{name}: not measured, for {imagenet / 'train'} is missing")
            continue
        facts: dict[str, Any] = {
            "protocol": kind,
            "sha256": sha256(folder / "model.safetensors"),
            "images": len(sources["val"]),
            "images_sha256": digests if kind == LINEAR else {"val": digests["val"]},
        }
        if facts.items() <= results.get(name, {}).items():
            print(f"{name}: measured already, {results[name]['top1']:.2f} %")
            continue
        print(f"{name}: {kind}, {facts['images']} images", flush=True)
        found = _top1(folder, kind, sources, output / "features")
        figure, tolerance = reported(name).top1, TOLERANCES[kind]
        results[name] = {
            **facts,
            **found,
            "reported_top1": figure,
            "reported_protocol": LINEAR,
            "tolerance": tolerance,
            "within_tolerance": abs(found["top1"] - figure) <= tolerance,
        }
        write_whole(path, json.dumps(results, indent=2) + "\n")
    return results


def _top1(folder: Path, kind: str, sources: dict[str, FolderSource], root: Path) -> dict[str, Any]:
    """Return a model's top-1, in percent, and the settings of its linear layer."""
    device = str(choose_device())
    output: Any = None if kind == LINEAR else "logits"
    model = FrozenModel.load(str(folder), features=output, preprocessing="model", device=device)
    dtype = "float16" if kind == LINEAR else "float32"  # rounding must not decide between logits
    cache = FeatureCache(root=root, dtype=dtype, workers=min(free_cores(), 16))
    val, classes = sources["val"], len(sources["val"].classes)
    if kind == LINEAR:
        train = sources["train"]
        samples = cache.features(model, train, "train"), train.labels
        tests = cache.features(model, val, "val"), val.labels
        [choice] = sgd_scores(*samples, *tests, seeds=[0], device=device)
        held_out = 100 * choice.validation_top1
        return {"top1": 100 * choice.top1, "held_out_top1": held_out, **choice.settings}
    if model.shape != (classes,):
        raise ValueError(
            f"{folder} has {model.shape[0]} classes, but the images have {classes}; give the "
            "images of its own classes"
        )
    logits = cache.features(model, val, "val")
    return {"top1": 100 * float((logits.argmax(1) == val.labels).mean())}


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results by model; ValueError if the file holds something else."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no results ({error}); delete it and measure again"
        ) from error


def table(results: dict[str, Any]) -> str:
    """Render the results next to the authors' figures."""
    lines = [f"{'top-1, %':<36}{'ours':>8}{'reported':>10}{'difference':>12}  within"]
    for name, result in results.items():
        mark = " (*)" if result["protocol"] == PROTOTYPES else ""
        difference = result["top1"] - result["reported_top1"]
        lines.append(
            f"{name + mark:<36}{result['top1']:8.2f}{result['reported_top1']:10.1f}"
            f"{difference:+12.2f}  {'yes' if result['within_tolerance'] else 'NO'} "
            f"({result['tolerance']:g})"
        )
    return "\n".join(
        [
            *lines,
            "ours: measured here; reported: the authors' figures for the backbone, by a linear",
            "layer. (*) the model's own prototypes, which is another protocol than the reported",
        ]
    )


def _source(root: Path, classes: Sequence[str]) -> FolderSource:
    source = FolderSource(root)
    if tuple(source.classes) != tuple(classes):
        odd = sorted(set(source.classes) ^ set(classes))
        raise ValueError(
            f"{root}: its {len(source.classes)} class folders are not the {len(classes)} expected, "
            f"by name; the first that is missing or too much: {odd[0]}"
        )
    return source
