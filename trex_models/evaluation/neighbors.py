"""Weighted k-nearest-neighbour classification by cosine similarity, in bounded memory.

Wu et al. 2018 (arXiv 1805.01978), section 3.4, as DINO (arXiv 2104.14294) uses it: among the k
reference features nearest to a query, the i-th, of similarity s_i, votes for its class with
exp(s_i / T). Here all votes of a query are divided by the first one's, exp(s_1 / T), which
changes no ranking and keeps a small T from overflowing.

Shapes: N references, M queries, F features, C classes, K = min(k, N) neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trex_models.precision import full_float32


def knn_accuracy(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    queries: Tensor | np.ndarray,
    query_labels: Tensor | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the top-1 accuracy of the weighted k-NN classifier by cosine similarity.

    Wu et al. 2018 (arXiv 1805.01978), section 3.4, with DINO's k and T (arXiv 2104.14294).

        knn_accuracy(train_features, train_labels, test_features, test_labels)

    Args:
        features: Of the references, (N, F).
        labels: Of the references, (N,), integers from 0 on.
        queries: (M, F).
        query_labels: (M,), integers; one that no reference has is never right.
        k: Neighbours; all references where there are fewer.
        temperature: T.

    Returns:
        The share of the queries that are right, from 0 to 1.

    Raises:
        ValueError: As ``knn_votes``, or there is not one label for each query.
    """
    references, answers = torch.as_tensor(labels), torch.as_tensor(query_labels)
    if answers.shape != (len(queries),):
        raise ValueError(
            f"query_labels must be {len(queries)}, one for each query, "
            f"got shape {tuple(answers.shape)}"
        )
    num_classes = int(references.max()) + 1 if len(references) else 0
    votes = knn_votes(
        torch.as_tensor(features),
        references,
        torch.as_tensor(queries),
        num_classes,
        k,
        temperature,
    )
    return int(hits(votes, answers, 1).sum()) / len(answers)


def knn_votes(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 4096,
) -> Tensor:
    """Return what the neighbours of each query vote for each class.

    Wu et al. 2018 (arXiv 1805.01978), section 3.4; their argmax is the classifier's answer.

        answers = knn_votes(train_features, train_labels, test_features, num_classes=10).argmax(1)

    Args:
        features: Of the references, (N, F).
        labels: Of the references, (N,), integers in [0, C).
        queries: (M, F).
        num_classes: C.
        k: Neighbours; all references where there are fewer.
        temperature: T.
        chunk: As in ``nearest_neighbors``.

    Returns:
        (M, C) float32 on the device of ``features``; 1 for a query's nearest reference, less for
        the others, 0 for classes without a neighbour and everywhere for a query of zeros. Beside
        the 4 M C bytes of the result, and what ``nearest_neighbors`` takes, 16 M K bytes.

    Raises:
        ValueError: Shapes do not match, a set is empty, a feature is not finite, or a number is
            out of range.
    """
    _require_shapes(features, queries)
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(features)} integers, one for each reference, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.to(features.device, torch.int64)
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {low} to {high}")
    similarities, indices = nearest_neighbors(features, queries, k, chunk)
    return class_votes(similarities, labels[indices], num_classes, temperature)


def class_votes(
    similarities: Tensor, neighbor_labels: Tensor, num_classes: int, temperature: float = 0.07
) -> Tensor:
    """Return the votes of neighbours that are already known, to try several k or T.

    Args:
        similarities: Of each query's neighbours, (M, K), the nearest first.
        neighbor_labels: (M, K), in [0, C).
        num_classes: C.
        temperature: T.

    Returns:
        (M, C), as ``knn_votes``.

    Raises:
        ValueError: The temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    # However small, it is a vote; NaN marks a query that has no direction.
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).nan_to_num(0.0)
    votes = weights.new_zeros(len(weights), num_classes)
    # One neighbour of each query at a time: no two additions meet, so their order is fixed.
    for weight, label in zip(weights.split(1, 1), neighbor_labels.split(1, 1), strict=True):
        votes.scatter_(1, label, votes.gather(1, label) + weight)
    return votes


def nearest_neighbors(
    features: Tensor,
    queries: Tensor,
    k: int = 20,
    chunk: int = 4096,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k references nearest to each query by cosine similarity.

        similarities, indices = nearest_neighbors(gallery, queries, k=10)

    Computed in float32 on the device of ``features``, whatever autocast and TF32 say, in blocks
    of ``chunk`` queries and ``chunk`` references. With q = min(chunk, M), r = min(chunk, N) and
    the result's 12 M K bytes, the peak is at most

        4 q r + 20 F max(q, r) + 60 q K + 12 M K bytes

    beside the arguments, and on CUDA topk's own work space, some 12 q r bytes at most. Of several
    references that are equally near at the k-th place it is not defined which one counts; the
    same call gives the same answer.

    Args:
        features: Of the references, (N, F); half precision is widened block by block.
        queries: (M, F); moved to the device of ``features`` block by block.
        k: Neighbours; all references where there are fewer.
        chunk: Queries, and references, in a block.
        progress: Called after each block of queries and references with the product of their
            numbers; N M in all.

    Returns:
        Similarities, (M, K) float32, descending, and indices of the references, (M, K). A
        reference of zeros has similarity 0; the similarities of a query of zeros are NaN, as it
        has no direction.

    Raises:
        ValueError: Shapes do not match, a set is empty, a feature is not finite, or k or chunk is
            below 1.
    """
    _require_shapes(features, queries)
    if min(k, chunk) < 1:
        raise ValueError(f"k and chunk must be at least 1, got {k} and {chunk}")
    device, k = features.device, min(k, len(features))
    similarities = torch.empty(len(queries), k, device=device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=device)
    with torch.no_grad(), full_float32(device):
        require_finite("features", features, chunk)
        require_finite("queries", queries, chunk)
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            block = _directions(queries[rows].to(device))
            best, where = _nearest(block, features, k, chunk, progress)
            best[~block.any(1)] = torch.nan
            similarities[rows], indices[rows] = best, where
    return similarities, indices


def _nearest(
    queries: Tensor,
    features: Tensor,
    k: int,
    chunk: int,
    progress: Callable[[int], object] | None,
) -> tuple[Tensor, Tensor]:
    """Return the k largest cosines of unit queries, with the references', by a running top-k."""
    best = queries.new_empty(len(queries), 0)
    where = torch.empty_like(best, dtype=torch.int64)
    for start in range(0, len(features), chunk):
        cosines = queries @ _directions(features[start : start + chunk]).T
        values, columns = cosines.topk(min(k, cosines.shape[1]))
        del cosines  # before the next block's are made
        values, columns = torch.cat([best, values], 1), torch.cat([where, columns + start], 1)
        best, order = values.topk(min(k, values.shape[1]))
        where = columns.gather(1, order)
        if progress is not None:
            progress(len(queries) * min(chunk, len(features) - start))
    return best, where


def hits(votes: Tensor, labels: Tensor, count: int = 5, no_vote: float = 0.0) -> Tensor:
    """Return whether each label is among the first n classes, for n = 1 to ``count``.

    A class without a vote is never a hit.

    Args:
        votes: (M, C), none below ``no_vote``; logits are as good.
        labels: (M,), in [0, C).
        count: The largest n; C where it is above that.
        no_vote: What stands for a class without a vote.

    Returns:
        (M, count) bool: top-1 in the first column, top-5 in the last one of five.
    """
    ranked = votes.topk(min(count, votes.shape[1]))
    found = (ranked.indices == labels.to(votes.device)[:, None]) & (ranked.values > no_vote)
    return found.cumsum(1) > 0


def _directions(features: Tensor) -> Tensor:
    """Return float32 unit vectors; zeros stay zeros, and no square over- or underflows."""
    features = features.float()
    largest = features.abs().amax(1, keepdim=True)
    return F.normalize(features / largest.clamp_min(torch.finfo(torch.float32).tiny), dim=1)


def _require_shapes(features: Tensor, queries: Tensor) -> None:
    if features.ndim != 2 or queries.ndim != 2 or features.shape[1] != queries.shape[1]:
        raise ValueError(
            "features and queries must be of shapes (N, F) and (M, F), "
            f"got {tuple(features.shape)} and {tuple(queries.shape)}"
        )
    if not features.numel() or not queries.numel():
        raise ValueError(
            "features and queries must not be empty, "
            f"got {tuple(features.shape)} and {tuple(queries.shape)}"
        )


def require_finite(name: str, features: Tensor, chunk: int) -> None:
    """Check rows, (N, F), some at a time.

    Raises:
        ValueError: One is not finite; the message has its index.
    """
    for start in range(0, len(features), chunk):
        finite = features[start : start + chunk].isfinite().all(1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise ValueError(f"{name} must be finite, but row {row} has a NaN or an infinity")
