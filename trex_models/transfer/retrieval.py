"""Task retrieval: rank images by the cosine similarity of their features.

Datasets of classes: each test image is a query for the other test images, or the queries are ranked
against a gallery; images of the query's class are relevant. Revisited Oxford and Paris: queries are
cropped to their box, and relevant and ignored images depend on the difficulty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from trex_models import plotting
from trex_models.cli import progress_bar
from trex_models.data.center_crop import CenterCrop
from trex_models.data.sources import Source
from trex_models.evaluation import ranking
from trex_models.evaluation.ranking import RECALLS
from trex_models.transfer.datasets import OpenedDataset
from trex_models.transfer.intervals import mean_score, share_score
from trex_models.transfer.readers import LandmarkSource
from trex_models.transfer.task import Context, Entry, Plan, Task

DIFFICULTIES = {  # relevant images and ignored images
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
Rows = Sequence[np.ndarray] | np.ndarray
_NEIGHBORS, _THUMBNAIL = 6, CenterCrop(size=(96, 96), crop_pct=1.0, interpolation="bicubic")


class Retrieval(Task):
    """Ranking of images by cosine similarity."""

    name = "retrieval"
    title = "ranking of images by cosine similarity"
    kinds = ("gallery", "landmarks", "classes")
    has_picture = True

    def protocol(self, opened: OpenedDataset, plan: Plan) -> Entry:
        """Return the protocol; raise a ValueError if the queries have nothing to find."""
        images, queries = opened.sources[0], opened.sources[-1]
        protocol: Entry = {"similarity": "cosine, ties by image order", "whitening": None}
        if opened.dataset.kind == "landmarks":
            protocol["ranking"] = "queries cropped to their box, ranked against the database"
            protocol["average_precision"] = "trapezoidal, junk images removed (arXiv 1803.11285)"
        else:
            alone = opened.dataset.kind == "classes"
            counts = np.bincount((queries if alone else images).labels)
            if (counts > alone).sum() < 1 or (counts > 0).sum() < 2:
                raise ValueError(
                    f"{opened.dataset.name}: retrieval requires two classes, and two test images "
                    "of one of them; add images, or omit the task retrieval"
                )
            ranked = "the other test images" if alone else "the gallery"
            protocol["ranking"] = f"each test image is ranked against {ranked}"
        if plan.whiten:
            source, title = plan.whiten.sources[0], plan.whiten.dataset.title
            whitening = {"dataset": title, "images": len(source), "sha256": source.digest()}
            protocol["whitening"] = whitening
        return protocol

    def dependencies(self, context: Context) -> Entry:
        """Return the identity of the features from which the whitening is learned."""
        whiten = context.plan.whiten
        return context.cache.identity(context.model, whiten.sources[0]) if whiten else {}

    def evaluate(self, opened: OpenedDataset, context: Context) -> Entry:
        """Rank the images for all queries and score the rankings."""
        if opened.dataset.kind == "classes":  # the test images among themselves
            opened = opened._replace(sources=opened.sources[-1:])
        plan, parts = context.plan, cast("list[Any]", context.features(opened))
        if plan.whiten:
            images, title = plan.whiten.sources[0], f"{plan.whiten.dataset.name}-train"
            train = context.cache.features(context.model, images, title)
            parts = ranking.whiten(train, *parts)
        source, labels = opened.sources[-1], opened.sources[0].labels
        gallery, queries = parts[0], parts[1] if len(parts) > 1 else None
        with progress_bar(len(source), f"retrieval, {opened.dataset.name}", " queries") as bar:
            if isinstance(source, LandmarkSource):
                blocks = ranking.rankings(gallery, queries, plan.device, bar.update)
                return _landmarks(source, blocks)
            result = ranking.class_retrieval(
                gallery, labels, queries, source.labels, _NEIGHBORS, plan.device, bar.update
            )
        valid = np.flatnonzero(np.isfinite(result.average_precision))
        precision = result.average_precision[valid]
        scores = {"mAP": mean_score(precision), "mAP@R": mean_score(result.map_at_r[valid])}
        for k, found in zip(RECALLS, result.recall[valid].T, strict=True):
            scores[f"Recall@{k}"] = share_score(found)
        relevant = labels[result.neighbors] == source.labels[:, None]
        examples = _examples(result.average_precision, result.neighbors, relevant)
        return {"scores": scores, "queries": len(valid), "examples": examples}

    def draw(self, opened: OpenedDataset, entry: Entry, context: Context) -> Any:
        """Draw the best, median and worst queries and their neighbors, framed by relevance."""
        del context
        queries = opened.sources[-1]
        images = queries if opened.dataset.kind == "classes" else opened.sources[0]
        examples, columns = entry["examples"], 1 + _NEIGHBORS
        title = f"{opened.dataset.title}: best, median and worst queries and their neighbors"
        with plotting.new_figure(1.4 * columns, 1.55 * len(examples) + 0.6) as figure:
            figure.suptitle(f"{title} (blue: relevant, orange: not)", fontsize=10)
            cells = figure.subplots(len(examples), columns, squeeze=False)
            for row, example in zip(cells, examples, strict=True):
                for cell in row:
                    cell.axis("off")
                row[0].set_title(f"query, AP {example['average_precision']:.2f}", fontsize=9)
                _draw_image(row[0], queries, example["query"], "black")
                neighbors = zip(row[1:], example["neighbors"], example["relevant"], strict=False)
                for cell, index, relevant in neighbors:
                    _draw_image(cell, images, index, plotting.PALETTE[0 if relevant else 1])
        return figure


def _landmarks(source: LandmarkSource, blocks: Iterable[tuple[slice, Tensor]]) -> Entry:
    orders = np.concatenate([block.cpu().numpy() for _, block in blocks])
    scores, examples = {}, []
    for difficulty, kinds in DIFFICULTIES.items():
        truth = [
            [np.concatenate([query[kind] for kind in part]) for part in kinds]
            for query in source.ground_truth
        ]
        pairs = zip(orders, truth, strict=True)
        results = np.array([ranking.landmark_metrics(order, *t) for order, t in pairs]).T
        for name, values in zip(("mAP", *(f"mP@{k}" for k in RECALLS)), results, strict=True):
            if np.isfinite(values).any():
                scores[f"{name} ({difficulty})"] = mean_score(values[np.isfinite(values)])
        if difficulty == "medium":
            kept = [o[~np.isin(o, junk)] for o, (_, junk) in zip(orders, truth, strict=True)]
            nearest = [order[:_NEIGHBORS] for order in kept]
            relevant = [np.isin(n, found) for n, (found, _) in zip(nearest, truth, strict=True)]
            examples = _examples(results[0], nearest, relevant)
    return {"scores": scores, "queries": len(source), "examples": examples}


def _examples(precision: np.ndarray, neighbors: Rows, relevant: Rows) -> list[Entry]:
    """Return the neighbors of the two best, median and worst queries."""
    order = np.argsort(-precision, kind="stable")[: np.isfinite(precision).sum()]  # NaN is last
    middle = len(order) // 2
    ranks = {0, 1, middle - 1, middle, len(order) - 2, len(order) - 1}
    return [
        {
            "query": int(query),
            "average_precision": float(precision[query]),
            "neighbors": neighbors[query].tolist(),
            "relevant": relevant[query].tolist(),
        }
        for query in order[sorted(rank for rank in ranks if 0 <= rank < len(order))]
    ]


def _draw_image(cell: Any, source: Source, index: int, color: str) -> None:
    crop = _THUMBNAIL.empty(1)
    _THUMBNAIL.crop_into(source.read(index), crop[0])
    cell.imshow(crop[0].numpy())
    cell.axis("on")
    cell.grid(visible=False)
    cell.set(xticks=[], yticks=[])
    for spine in cell.spines.values():
        spine.set(visible=True, color=color, linewidth=3)
