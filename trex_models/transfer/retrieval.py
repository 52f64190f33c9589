"""Task retrieval: rank images by the cosine similarity of their features.

Datasets of classes: each test image is a query for the other test images, or the queries are ranked
against a gallery; images of the query's class are relevant. Revisited Oxford and Paris: queries are
cropped to their box, and relevant and ignored images depend on the difficulty.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trex_models import plotting
from trex_models.cli import progress_bar
from trex_models.data.center_crop import CenterCrop
from trex_models.data.sources import Source
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.evaluation.retrieval import (
    RECALLS,
    Whitening,
    class_retrieval,
    landmark_metrics,
    rankings,
)
from trex_models.transfer.cache import FeatureCache
from trex_models.transfer.datasets import OpenedDataset
from trex_models.transfer.intervals import mean_score, share_score
from trex_models.transfer.plan import Entry, Plan
from trex_models.transfer.readers import LandmarkSource

DIFFICULTIES = {  # relevant images and ignored images
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
_NEIGHBORS, _THUMBNAIL = 6, CenterCrop(size=(96, 96), crop_pct=1.0, interpolation="bicubic")


def settings(opened: OpenedDataset, plan: Plan) -> Entry:
    """Return the protocol; raise a ValueError if the queries have nothing to find."""
    images, queries = opened.sources[0], opened.sources[-1]
    protocol: Entry = {"similarity": "cosine, ties in the order of the images", "whitening": None}
    if opened.dataset.kind == "landmarks":
        protocol["ranking"] = "queries cropped to their box, ranked against the database"
        protocol["average_precision"] = "trapezoidal, junk images removed (arXiv 1803.11285)"
    else:
        alone = opened.dataset.kind == "classes"
        counts = np.bincount((queries if alone else images).labels)
        if (counts > alone).sum() < 1 or (counts > 0).sum() < 2:
            raise ValueError(
                f"{opened.dataset.name}: retrieval requires two classes, and two test images of "
                "one of them; add images, or omit the task retrieval"
            )
        ranked = "the other test images" if alone else "the gallery"
        protocol["ranking"] = f"each test image is ranked against {ranked}"
    if plan.whiten:
        source = plan.whiten.sources[0]
        protocol["whitening"] = {
            "dataset": plan.whiten.dataset.title,
            "images": len(source),
            "sha256": source.digest(),
        }
    return protocol


def run(model: FrozenModel, opened: OpenedDataset, cache: FeatureCache, plan: Plan) -> Entry:
    """Rank the images for all queries and score the rankings."""
    name, alone = opened.dataset.name, opened.dataset.kind == "classes"
    parts: dict[str, Any] = {
        split: cache.features(model, source, f"{name}-{split}")
        for split, source in zip(("train", "test"), opened.sources, strict=True)
        if split == "test" or not alone
    }
    if plan.whiten:
        title = f"{plan.whiten.dataset.name}-train"
        whiten = Whitening.learn(cache.features(model, plan.whiten.sources[0], title))
        parts = {split: whiten(features) for split, features in parts.items()}
    queries = opened.sources[-1]
    with progress_bar(len(queries), f"retrieval, {name}", " queries") as bar:
        if isinstance(queries, LandmarkSource):
            return _landmarks(parts["train"], parts["test"], queries, plan.device, bar.update)
        gallery, labels = ("test" if alone else "train"), [s.labels for s in opened.sources]
        gallery_labels = labels[1 if alone else 0]
        result = class_retrieval(
            parts[gallery],
            gallery_labels,
            None if alone else parts["test"],
            None if alone else labels[1],
            neighbors=_NEIGHBORS,
            device=plan.device,
            progress=bar.update,
        )
    valid = np.flatnonzero(np.isfinite(result.average_precision))
    precision = result.average_precision[valid]
    scores = {"mAP": mean_score(precision), "mAP@R": mean_score(result.map_at_r[valid])}
    for k, found in zip(RECALLS, result.recall[valid].T, strict=True):
        scores[f"Recall@{k}"] = share_score(found)
    examples = [
        {
            "query": int(query),
            "average_precision": float(result.average_precision[query]),
            "neighbors": result.neighbors[query].tolist(),
            "relevant": (gallery_labels[result.neighbors[query]] == labels[1][query]).tolist(),
        }
        for query in valid[_best_median_worst(precision)]
    ]
    return {"scores": scores, "queries": len(valid), "examples": examples}


def _landmarks(
    gallery: Any, queries: Any, source: LandmarkSource, device: str, progress: Any
) -> Entry:
    order = np.concatenate(
        [o.cpu().numpy() for _, o in rankings(gallery, queries, device, progress)]
    )
    scores, examples = {}, []
    for difficulty, (relevant, ignored) in DIFFICULTIES.items():
        truth = [
            [np.concatenate([query[kind] for kind in kinds]) for kinds in (relevant, ignored)]
            for query in source.ground_truth
        ]
        results = [landmark_metrics(o, *t) for o, t in zip(order, truth, strict=True)]
        precision = np.array([result[0] for result in results])
        valid = np.flatnonzero(np.isfinite(precision))
        scores[f"mAP ({difficulty})"] = mean_score(precision[valid])
        for column, k in enumerate(RECALLS):
            at_k = np.array([results[query][1][column] for query in valid])
            scores[f"mP@{k} ({difficulty})"] = mean_score(at_k)
        if difficulty == "medium":
            for query in valid[_best_median_worst(precision[valid])]:
                positives, junk = truth[query]
                neighbors = order[query][~np.isin(order[query], junk)][:_NEIGHBORS]
                examples.append(
                    {
                        "query": int(query),
                        "average_precision": float(precision[query]),
                        "neighbors": neighbors.tolist(),
                        "relevant": np.isin(neighbors, positives).tolist(),
                    }
                )
    return {"scores": scores, "queries": len(source), "examples": examples}


def _best_median_worst(precision: np.ndarray) -> np.ndarray:
    """Return the indices of the two best, median and worst values."""
    order = np.argsort(-precision, kind="stable")
    middle = len(order) // 2
    rows = [0, 1, middle - 1, middle, len(order) - 2, len(order) - 1]
    return order[sorted({row for row in rows if 0 <= row < len(order)})]


def draw(model: FrozenModel, opened: OpenedDataset, entry: Entry, cache: FeatureCache) -> Any:
    """Draw the best, median and worst queries and their neighbors, framed by relevance."""
    del model, cache
    queries = opened.sources[-1]
    images = queries if opened.dataset.kind == "classes" else opened.sources[0]
    with plotting.new_figure(1.4 * (1 + _NEIGHBORS), 1.55 * len(entry["examples"]) + 0.6) as figure:
        figure.suptitle(
            f"{opened.dataset.title}: best, median and worst queries and their neighbors "
            "(blue: relevant, orange: not)",
            fontsize=10,
        )
        cells = figure.subplots(len(entry["examples"]), 1 + _NEIGHBORS, squeeze=False)
        for row, example in zip(cells, entry["examples"], strict=True):
            for cell in row:
                cell.axis("off")
            row[0].set_title(f"AP {example['average_precision']:.2f}", fontsize=9)
            _draw_image(row[0], queries, example["query"], "black")
            neighbors = zip(row[1:], example["neighbors"], example["relevant"], strict=False)
            for cell, index, relevant in neighbors:
                _draw_image(cell, images, index, plotting.PALETTE[0 if relevant else 1])
    return figure


def _draw_image(cell: Any, source: Source, index: int, color: str) -> None:
    crop = _THUMBNAIL.empty(1)
    _THUMBNAIL.crop_into(source.read(index), crop[0])
    cell.imshow(crop[0].numpy())
    cell.axis("on")
    cell.grid(visible=False)
    cell.set(xticks=[], yticks=[])
    for spine in cell.spines.values():
        spine.set(visible=True, color=color, linewidth=3)
