"""Top-1 on ImageNet-1K of converted models, beside the figures that the authors report.

Backbones, by the authors' protocol: a linear layer by SGD on L2-normalised features (momentum 0.9,
batch 1024, 100 epochs, cosine; learning rate and weight decay chosen on a fifth of train, then
fitted to all of it). Whole classifiers, by another: their own prototypes.

    DIR/imagenet.json       the results, written after every model
    DIR/features/*.npy      features, float16, from which an interrupted run goes on
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor
from tqdm import tqdm

from hub.hub_folder import load_folder
from trex_models import naver
from trex_models.atomic import write_whole
from trex_models.data.image_files import FolderSource
from trex_models.data.sources import digest
from trex_models.evaluation.features import image_batches
from trex_models.evaluation.linear import Samples, Setting, fitted_accuracies
from trex_models.evaluation.splits import held_out
from trex_models.manifest import sha256
from trex_models.transfer.published import reported

SETTINGS = tuple(
    Setting(rate, decay)
    for rate in (1.0, 3.0, 10.0, 30.0, 100.0)
    for decay in (1e-12, 1e-7, 1e-6, 1e-5)
)
LINEAR, PROTOTYPES = "a linear layer on the features", "its own prototypes"
TOLERANCES = {LINEAR: 0.5, PROTOTYPES: 1.5}
"""In percent points."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What to measure, and how; the defaults are ImageNet's."""

    classes: tuple[str, ...] = tuple(ImageNetInfo().label_names())
    """Names of the class folders in the order of the labels."""
    epochs: int = 100
    settings: tuple[Setting, ...] = SETTINGS
    image_batch: int = 128
    workers: int = min(16, os.cpu_count() or 1)
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


def measure(
    converted: Path, imagenet: Path, output: Path, protocol: Protocol | None = None
) -> dict[str, Any]:
    """Measure what has a reported figure; a model that was measured is not measured again.

    Args:
        converted: Holds timm folders by NAVER's names.
        imagenet: Holds ``val`` and, for backbones, ``train``: a folder of images per class.
        output: Where imagenet.json and the features go.
        protocol: None for ImageNet's.

    Returns:
        The results by model.

    Raises:
        ValueError: The images are not those of the classes, or one cannot be read.
    """
    protocol = protocol or Protocol()
    val = _source(imagenet / "val", protocol)
    train = _source(imagenet / "train", protocol) if (imagenet / "train").is_dir() else None
    path = output / "imagenet.json"
    results = read_results(path) if path.exists() else {}
    for name in naver.FILES:
        folder = converted / name
        if "_proj" in name or not folder.is_dir():
            continue
        kind = PROTOTYPES if "_cls" in name else LINEAR
        facts: dict[str, Any] = {
            "protocol": kind,
            "sha256": sha256(folder / "model.safetensors"),
            "images": len(val),
            "images_sha256": _images(val),
        }
        if kind == LINEAR:
            if train is None:
                print(f"{name}: not measured, for {imagenet / 'train'} is missing")
                continue
            facts |= {"train_images": len(train), "train_images_sha256": _images(train)}
            facts |= {"epochs": protocol.epochs}
        if facts.items() <= results.get(name, {}).items():
            print(f"{name}: measured already, {results[name]['top1']:.2f} %")
            continue
        print(f"{name}: {kind}, {len(val)} images, on {protocol.device}", flush=True)
        if kind == LINEAR and train is not None:
            found = linear_accuracy(name, folder, train, val, output / "features", protocol)
        else:
            found = {"top1": 100 * prototype_accuracy(folder, val, protocol)}
        results[name] = facts | found | _compared(name, kind, found["top1"])
        write_whole(path, json.dumps(results, indent=2) + "\n")
    return results


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results by model.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no results ({error}); delete it and measure again"
        ) from error


def prototype_accuracy(folder: Path, source: FolderSource, protocol: Protocol) -> float:
    """Return the share of images that a classifier's own prototypes classify right."""
    model = load_folder(folder).to(protocol.device)
    if model.num_classes != len(protocol.classes):
        raise ValueError(
            f"{folder} has {model.num_classes} classes, but the images have "
            f"{len(protocol.classes)}; give the images of its own classes"
        )
    labels = torch.from_numpy(source.labels)
    correct = 0
    for start, logits in _outputs(model, source, protocol):
        votes = logits.argmax(1).cpu()
        correct += int((votes == labels[start : start + len(votes)]).sum())
    return correct / len(source)


def linear_accuracy(
    name: str,
    folder: Path,
    train: FolderSource,
    val: FolderSource,
    features_folder: Path,
    protocol: Protocol,
) -> dict[str, Any]:
    """Return the top-1, in percent, of a linear layer on a backbone's features, and its choice."""
    features_folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{sha256(folder / 'model.safetensors')[:12]}"
    device = torch.device(protocol.device)
    samples = []
    for split, source in (("train", train), ("val", val)):
        path = features_folder / f"{stem}-{split}-{_images(source)[:12]}.npy"
        if not path.exists():
            keep_features(folder, source, path, protocol)
        features = torch.from_numpy(np.load(path, mmap_mode="c")).to(device)
        labels = torch.from_numpy(source.labels).to(device)
        samples.append(Samples(features, labels, torch.arange(len(labels))))
    everything, tests = samples
    mask = torch.from_numpy(held_out(train.labels))
    fitted, held = (everything._replace(rows=m.nonzero().flatten()) for m in (~mask, mask))
    score = partial(
        fitted_accuracies, num_classes=len(protocol.classes), device=device, epochs=protocol.epochs
    )
    scores = score(fitted, held, protocol.settings, title="choosing the setting")
    best = protocol.settings[int(np.argmax(scores))]
    (top1,) = score(everything, tests, [best], title="fitting to all of train")
    return {
        "top1": 100 * top1,
        "learning_rate": best.learning_rate,
        "weight_decay": best.weight_decay,
        "held_out_top1": [
            {**setting._asdict(), "top1": 100 * score}
            for setting, score in zip(protocol.settings, scores, strict=True)
        ],
    }


def keep_features(folder: Path, source: FolderSource, path: Path, protocol: Protocol) -> None:
    """Write a backbone's L2-normalised features of all images, (N, F) float16, whole or not."""
    model = load_folder(folder).to(protocol.device)
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)  # it may be a link
    shape = (len(source), model.num_features)
    kept = np.lib.format.open_memmap(beside, "w+", np.float16, shape)
    for start, features in _outputs(model, source, protocol):
        rows = F.normalize(features, dim=1).half().cpu().numpy()
        kept[start : start + len(rows)] = rows
    kept.flush()
    beside.replace(path)


def table(results: dict[str, Any]) -> str:
    """Render the results beside the authors' figures."""
    lines = [
        f"{'top-1, %':<36}{'ours':>8}{'reported':>10}{'difference':>12}  within",
    ]
    for name, result in results.items():
        mark = " (*)" if result["protocol"] == PROTOTYPES else ""
        verdict = "yes" if result["within_tolerance"] else "NO"
        lines.append(
            f"{name + mark:<36}{result['top1']:8.2f}{result['reported_top1']:10.1f}"
            f"{result['top1'] - result['reported_top1']:+12.2f}  "
            f"{verdict} ({result['tolerance']:g})"
        )
    lines.append(
        "ours: measured here; reported: the authors' figures for the backbone, by a linear"
    )
    lines.append(
        "layer. (*) the model's own prototypes, which is another protocol than the reported"
    )
    return "\n".join(lines)


def _source(root: Path, protocol: Protocol) -> FolderSource:
    source = FolderSource(root)
    if tuple(source.classes) != protocol.classes:
        odd = sorted(set(source.classes) ^ set(protocol.classes))
        raise ValueError(
            f"{root}: its {len(source.classes)} class folders are not the "
            f"{len(protocol.classes)} expected, by name; the first that is missing or too much: "
            f"{odd[0]}"
        )
    return source


def _images(source: FolderSource) -> str:
    """Hash the list of images with the sizes and modification times of their files."""
    return digest(source.digest(), source.stats()[:, :2])


@torch.inference_mode()
def _outputs(model: Any, source: FolderSource, protocol: Protocol) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each batch's first image and its outputs, float32."""
    transform = create_transform(**resolve_model_data_config(model))
    batches = image_batches(source, transform, protocol.image_batch, protocol.workers)
    start = 0
    with tqdm(total=len(source), desc=source.root.name, unit="image", dynamic_ncols=True) as bar:
        for images in batches:
            yield start, model(images.to(protocol.device)).float()
            start += len(images)
            bar.update(len(images))


def _compared(name: str, kind: str, top1: float) -> dict[str, Any]:
    figure, tolerance = 100 * reported(name).top1, TOLERANCES[kind]
    return {
        "reported_top1": figure,
        "reported_protocol": LINEAR,
        "tolerance": tolerance,
        "within_tolerance": abs(top1 - figure) <= tolerance,
    }
