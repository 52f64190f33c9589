"""Image retrieval by cosine similarity: exact rankings in bounded memory, and their metrics.

Retrieval by class: Recall@K, average precision, and MAP@R of Musgrave et al., "A Metric Learning
Reality Check" (arXiv 2003.08505). Landmarks: the protocol of Radenovic et al., "Revisiting Oxford
and Paris" (arXiv 1803.11285). PCA whitening: Jegou and Chum, "Negative evidences and co-occurrences
in image retrieval: the benefit of PCA and whitening" (ECCV 2012).

Shapes: N images of the gallery, M queries, F features, Q queries of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trex_models.evaluation.inputs import as_tensor, require_finite, require_samples
from trex_models.precision import full_float32

RECALLS = (1, 5, 10)
RULES = ("mAP", "VOC2007 11-point", "VOC2010 area")
PAIRS = 1 << 24  # pairs of query and image in memory, 24 bytes each
BLOCK = 8192


@dataclass(frozen=True)
class ClassRetrieval:
    """Metrics of each query, (M,); NaN for queries without another image of their class.

    Args:
        recall: 1 if one of the first K = 1, 5, 10 images has the query's class, else 0, (M, 3).
        average_precision: Mean precision at the ranks of all images of the class.
        map_at_r: Sum of the precisions at these ranks up to R, over R, the number of these images.
        neighbors: Indices of the first images, (M, K).
    """

    recall: np.ndarray
    average_precision: np.ndarray
    map_at_r: np.ndarray
    neighbors: np.ndarray


def class_retrieval(
    gallery: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    queries: Tensor | np.ndarray | None = None,
    query_labels: Tensor | np.ndarray | None = None,
    neighbors: int = 10,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> ClassRetrieval:
    """Rank the gallery for each query; images of the query's class are relevant.

        result = class_retrieval(features, labels)

    Args:
        gallery: Features of the gallery, (N, F); may be memory-mapped.
        labels: Labels of the gallery, (N,).
        queries: Features of the queries, (M, F). By default, each image of the gallery is a query
            for all others.
        query_labels: Labels of the queries, (M,).
        neighbors: Number of neighbors to return.
        device: Device of the computation.
        progress: Callback, called with the number of queries of each block.

    Raises:
        ValueError: Shapes do not match, or features are not finite.
    """
    labels = as_tensor(labels).to(device)
    targets = labels if query_labels is None else as_tensor(query_labels).to(device)
    parts = []
    for rows, order in rankings(gallery, queries, device, progress):
        relevant = labels[order] == targets[rows, None]
        # A copy, since a view would keep the rankings of all blocks in memory.
        parts.append((*_metrics(relevant), order[:, :neighbors].clone()))
    return ClassRetrieval(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))


def _metrics(relevant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return recall, average precision and MAP@R of rankings, (Q, N) bool."""
    total = relevant.sum(1)
    row, rank = relevant.nonzero(as_tuple=True)
    first = total.cumsum(0) - total  # index of each query's first relevant image in `rank`
    position = torch.arange(len(row), device=row.device) - first[row]
    precision = (position + 1).double() / (rank + 1)
    parts = precision, precision * (rank < total[row])
    sums = [precision.new_zeros(len(relevant)).index_add_(0, row, part) for part in parts]
    recall = torch.stack([relevant[:, :k].any(1) for k in RECALLS], 1).double()
    recall[total == 0] = torch.nan
    return recall, sums[0] / total, sums[1] / total


@torch.no_grad()
def rankings(
    gallery: Tensor | np.ndarray,
    queries: Tensor | np.ndarray | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of queries and the gallery's indices by descending cosine similarity, (Q, N).

    Equal similarities keep the order of the gallery. Without ``queries``, each image is a query,
    and is left out of its own ranking by its index, (Q, N - 1).
    """
    images = as_tensor(gallery)
    require_samples(images, name="gallery")
    require_finite("gallery", images)
    asked = images if queries is None else as_tensor(queries)
    require_samples(asked, name="queries", width=images.shape[1])
    require_finite("queries", asked)
    count = max(1, PAIRS // len(images))
    similarities = torch.empty(min(count, len(asked)), len(images), device=device)
    for start in range(0, len(asked), count):
        rows = slice(start, min(start + count, len(asked)))
        block = similarities[: rows.stop - start]
        with full_float32(torch.device(device)):
            unit = _normalize(asked[rows].to(device))
            for column in range(0, len(images), BLOCK):
                part = slice(column, column + BLOCK)
                torch.mm(unit, _normalize(images[part].to(device)).T, out=block[:, part])
        own = torch.arange(rows.start, rows.stop, device=device)[:, None]
        if queries is None:
            block.scatter_(1, own, -torch.inf)
        order = block.sort(dim=1, descending=True, stable=True).indices
        yield rows, order[:, :-1] if queries is None else order
        if progress is not None:
            progress(rows.stop - start)


def _normalize(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def landmark_metrics(
    order: np.ndarray, positives: Sequence[int] | np.ndarray, junk: Sequence[int] | np.ndarray
) -> list[float]:
    """Return average precision and precisions at 1, 5 and 10 of one query; NaN without positives.

    Junk images are removed from the ranking. The average precision is that of the trapezoidal rule,
    which differs from the usual one: ranks 0, 2 and 5 of three positives give 0.678, not 0.722. The
    precisions are at min(K, rank of the last positive). ``order`` are the indices of the gallery by
    descending similarity, (N,); ``positives`` and ``junk`` those of images to find and to ignore.
    """
    if not len(positives):
        return [np.nan] * (1 + len(RECALLS))
    kept = order[~np.isin(order, junk)]
    ranks = np.flatnonzero(np.isin(kept, positives))
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    precision = (before + (found + 1) / (ranks + 1)) / 2
    ends = [min(k, int(ranks[-1]) + 1) for k in RECALLS]
    return [float(precision.mean()), *(float((ranks < end).sum() / end) for end in ends)]


def average_precision(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return the average precision of one class by three rules; NaN without positives.

    - mAP: mean precision at the ranks of the positives, as sklearn's average_precision_score;
    - VOC2007 11-point: mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall
      or above (Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010);
    - VOC2010 area: area under the highest precision at each recall or above, the rule since 2010.

    In all three, images with equal scores are one threshold: their order does not matter.

    Args:
        scores: Scores of the images, (N,); higher means present.
        targets: 1 present, 0 absent, -1 ignored, (N,).
    """
    known = targets >= 0
    order = np.argsort(-scores[known])
    ranked = scores[known][order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))[: len(ranked)]
    found = np.cumsum(targets[known][order], dtype=np.int64)[ends]
    if not found[-1:].any():
        return dict.fromkeys(RULES, np.nan)
    total = found[-1]
    precision, gains = found / (ends + 1), np.diff(found, prepend=0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # In integers, since 0.1, 0.2, ... are not exact.
    at_recalls = envelope[np.searchsorted(10 * found, total * np.arange(11))]
    values = gains @ precision / total, at_recalls.mean(), gains @ envelope / total
    return dict(zip(RULES, map(float, values), strict=True))


def whiten(train: Tensor | np.ndarray, *parts: Tensor | np.ndarray) -> list[Tensor]:
    """Learn PCA whitening of L2-normalized features and apply it to others, in memory.

    ``train`` are the features to learn it from, (N, F); ``parts``, (M, F) each, are mapped to the
    D axes with variance, (M, D) float32.
    """
    samples = as_tensor(train)
    require_samples(samples)
    require_finite("features", samples)
    mean = torch.zeros(samples.shape[1], dtype=torch.float64)
    for block in samples.split(BLOCK):
        mean += _normalize(block).double().sum(0) / len(samples)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in samples.split(BLOCK):
        centered = _normalize(block).double() - mean
        covariance += centered.T @ centered / len(samples)
    values, axes = torch.linalg.eigh(covariance)
    kept = values > 1e-6 * values[-1]
    projection = (axes[:, kept] / values[kept].sqrt()).float()
    split = [as_tensor(part).split(BLOCK) for part in parts]
    return [torch.cat([(_normalize(b) - mean.float()) @ projection for b in p]) for p in split]
