"""Task robustness: ImageNet classifiers on other test images, by their own logits.

ImageNet-V2 (arXiv 1902.10811), -A (arXiv 1907.07174), -R (arXiv 2006.16241), -Sketch (arXiv
1905.13549), and the validation images with the labels of ReaL (arXiv 2006.07159).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from trex_models.data.image_files import FileSource
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.evaluation.inputs import as_tensor
from trex_models.transfer.datasets import OpenedDataset
from trex_models.transfer.intervals import share_score
from trex_models.transfer.readers import imagenet_classes, timm_file
from trex_models.transfer.task import Context, Entry, Plan, Task


class Robustness(Task):
    """ImageNet-1K classifiers on other test images."""

    name = "robustness"
    title = "accuracy of ImageNet-1K classifiers on other test images"
    kinds = ("imagenet",)
    features = "logits"

    def check_model(self, model: FrozenModel) -> None:
        """Raise a ValueError unless the model is an ImageNet-1K classifier."""
        if model.shape != (1000,):
            raise ValueError(
                f"--model {model.name} has {model.shape[0]} logits, but the task robustness needs "
                "the 1,000 of ImageNet-1K; choose a model that has them, such as "
                "trex_resnet50_cls or resnet50.a1_in1k"
            )

    def protocol(self, opened: OpenedDataset, _: Plan) -> Entry:
        """Return the protocol; raise a ValueError if images have no ReaL labels by their names."""
        protocol = {"predictions": "the highest of the logits of the dataset's classes"}
        source: Any = opened.sources[0]
        if opened.dataset.name == "imagenet-real":
            count = sum(not labels for labels in real_labels(source))
            left_out = f"{count} images without any are left out"
            protocol["ReaL"] = f"any of the labels is correct; {left_out}"
        return protocol

    def evaluate(self, opened: OpenedDataset, context: Context) -> Entry:
        """Score the predictions of the test images."""
        source: Any = opened.sources[0]
        (logits,) = context.features(opened)
        ranked = _ranked(logits, source.classes)
        correct = ranked == source.labels[:, None]
        scores = {"top-1": share_score(correct[:, 0])}
        if len(source.classes) == len(imagenet_classes()):
            scores["top-5"] = share_score(correct.any(1))
        if opened.dataset.name == "imagenet-real":
            pairs = zip(ranked[:, 0].tolist(), real_labels(source), strict=True)
            real = np.array([first in labels for first, labels in pairs if labels])
            scores = {"ReaL": share_score(real), **scores}
            for subset in ("ImageNet-A", "ImageNet-R"):
                classes = imagenet_classes(subset)
                members = np.array([name in classes for name in source.classes])[source.labels]
                first = np.array(classes)[_ranked(logits[members], classes)[:, 0]]
                truth = np.array(source.classes)[source.labels[members]]
                scores[f"top-1, {subset} classes"] = share_score(first == truth)
        return {"scores": scores}


def _ranked(logits: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return the five best of the classes for each image, best first, (N, 5)."""
    columns = np.searchsorted(imagenet_classes(), classes)
    return as_tensor(logits[:, columns]).float().topk(min(5, len(columns))).indices.numpy()


def real_labels(source: FileSource) -> list[list[int]]:
    """Return the ReaL labels of validation images, by the numbers in their file names."""
    labels = json.loads(timm_file("imagenet_real_labels.json"))
    found = []
    for index, path in enumerate(source.paths.tolist()):
        match = re.search(rb"ILSVRC2012_val_(\d{8})\.\w+$", path)
        if not match or not 0 < int(match[1]) <= len(labels):
            raise ValueError(
                f"{source.name(index)} has no number from 1 to {len(labels)}, by which ReaL labels "
                "are assigned; keep the original names, such as ILSVRC2012_val_00000001.JPEG"
            )
        found.append(labels[int(match[1]) - 1])
    return found
