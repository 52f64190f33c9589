"""Task segmentation: a linear head on the last feature map of timm's ``features_only``."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np

from trex_models import plotting
from trex_models.data.sources import digest
from trex_models.evaluation.extract import as_text
from trex_models.evaluation.segmentation_head import (
    IGNORED,
    LinearSegmentation,
    Settings,
    class_iou,
)
from trex_models.transfer.datasets import OpenedDataset
from trex_models.transfer.intervals import bootstrap_scores
from trex_models.transfer.task import Context, Entry, Plan, Task

_DATASETS = {"scenes": Settings(iterations=300, batch_size=8, crop=192)}
_NOTE = (
    "DINOv2's protocol (arXiv 2304.07193), except for the color jitter in place of photometric "
    "distortion, antialiased resizing, and the map of ViTs, which lacks their last normalization"
)
_EXAMPLES = 6


class Segmentation(Task):
    """A linear head on frozen feature maps."""

    name = "segmentation"
    title = "a linear head on the last feature map, DINOv2's protocol"
    kinds = ("masks",)
    features = "features_only"
    has_picture = True

    def protocol(self, opened: OpenedDataset, plan: Plan) -> Entry:
        """Return the protocol."""
        protocol = {**asdict(_settings(opened, plan.iterations)), "ignored": IGNORED, "note": _NOTE}
        return {"segmentation": protocol}

    def evaluate(self, opened: OpenedDataset, context: Context) -> Entry:
        """Train the head and score the test images."""
        segmenter = _trained(opened, context, context.plan.iterations)
        test: Any = opened.sources[1]
        counts = segmenter.test(test, opened.dataset.name, context.cache.workers)
        rows = counts.reshape(len(counts), -1)

        def measure(indices: np.ndarray) -> dict[str, float]:
            weights = np.bincount(indices, minlength=len(counts))
            total = (weights @ rows).reshape(counts.shape[1:])
            correct, _, labeled = total.sum(1)
            if not labeled:
                return {"mIoU": np.nan, "pixel accuracy": np.nan}
            return {"mIoU": np.nanmean(class_iou(total)), "pixel accuracy": correct / labeled}

        iou = class_iou(counts.sum(0))
        return {
            "scores": bootstrap_scores(measure, len(counts)),
            "class_iou": [None if np.isnan(value) else float(value) for value in iou],
            "stride": context.model.metadata["stride"],
            "channels": context.model.shape[0],
        }

    def draw(self, opened: OpenedDataset, entry: Entry, context: Context) -> Any:
        """Draw test images, their labels and predictions."""
        from matplotlib.colors import to_rgb

        segmenter = _trained(opened, context, entry["segmentation"]["iterations"])
        source: Any = opened.sources[1]
        count = min(_EXAMPLES, len(source))
        indices = [number * len(source) // count for number in range(count)]
        masks = [(source.mask(index), segmenter.predict(source, index)) for index in indices]
        shown = np.unique(np.concatenate([np.unique(mask) for pair in masks for mask in pair]))
        shown = shown[shown != IGNORED]
        table = np.full((IGNORED + 1, 3), IGNORED, np.uint8)
        table[shown] = [np.multiply(to_rgb(c), 255) for c in plotting.colors(len(shown))]
        with plotting.new_figure(1.6 * count, 6.2) as figure:
            figure.suptitle(f"{opened.dataset.title}: image, label and prediction", fontsize=10)
            columns = figure.subplots(3, count, squeeze=False).T
            for cells, index, pair in zip(columns, indices, masks, strict=True):
                pictures = (source.read(index), *(table[mask] for mask in pair))
                for cell, picture in zip(cells, pictures, strict=True):
                    cell.imshow(picture)
                    cell.axis("off")
            plotting.legend(figure, [source.classes[label] for label in shown])
        return figure


def _settings(opened: OpenedDataset, iterations: int) -> Settings:
    default = _DATASETS.get(opened.dataset.name, Settings())
    return replace(default, iterations=iterations or default.iterations)


def _trained(opened: OpenedDataset, context: Context, iterations: int) -> LinearSegmentation:
    model, cache, train = context.model, context.cache, cast("Any", opened.sources[0])
    chosen = _settings(opened, iterations)
    identities = [cache.identity(model, source) for source in opened.sources]
    key, test_key = digest(as_text([asdict(chosen), identities[0]])), digest(as_text(identities[1]))
    path = cache.folder(model) / f"{opened.dataset.name}-segmentation-{key[:12]}.safetensors"
    segmenter = LinearSegmentation(model, len(train.classes), chosen, path, key, test_key)
    segmenter.train(train, opened.dataset.name, cache.workers)
    return segmenter
