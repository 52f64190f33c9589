"""Weighted k-nearest-neighbor classification by cosine similarity, in bounded memory.

Wu et al. 2018 (arXiv 1805.01978), section 3.4, as DINO (arXiv 2104.14294) uses it: the i-th of
the k references nearest to a query, of similarity s_i, votes for its class with exp(s_i / T).
Here a query's votes are divided by its first, exp(s_1 / T): a small T overflows nowhere.

Shapes: N references, M queries, F features, C classes, K = min(k, N) neighbors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trex_models.evaluation.inputs import as_tensor, require_finite, require_samples
from trex_models.precision import full_float32

Progress = Callable[[int], object]

_VOTES = 1 << 26  # in memory at a time: 256 MB


def knn_accuracy(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    queries: Tensor | np.ndarray,
    query_labels: Tensor | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    progress: Progress | None = None,
) -> float:
    """Return the top-1 accuracy of the weighted k-NN classifier by cosine similarity.

    Wu et al. 2018 (arXiv 1805.01978), section 3.4, with DINO's k and T (arXiv 2104.14294).

        knn_accuracy(train_features, train_labels, test_features, test_labels)

    Memory is that of ``nearest_neighbors``, 8 M K bytes, and 256 MB of votes.

    Args:
        features: Features of the references, (N, F).
        labels: Labels of the references, (N,), integers from 0.
        queries: Features of the queries, (M, F).
        query_labels: Labels of the queries, (M,). A label that no reference has is never right.
        k: Number of neighbors; all references if there are fewer.
        temperature: T.
        progress: As in ``nearest_neighbors``.

    Returns:
        Share of queries that are classified correctly, from 0 to 1.

    Raises:
        ValueError: As ``knn_votes``, or there is not one label for each query.
    """
    references, queries, answers = as_tensor(features), as_tensor(queries), as_tensor(query_labels)
    require_samples(queries, answers, "queries")
    labels = as_tensor(labels)
    num_classes = int(labels.max()) + 1 if labels.numel() else 0
    similarities, voters = _voters(references, labels, queries, num_classes, k, progress=progress)
    size, correct = max(1, _VOTES // num_classes), 0
    blocks = (part.split(size) for part in (similarities, voters, answers.to(voters.device)))
    for cosines, classes, expected in zip(*blocks, strict=True):
        votes = vote(cosines, classes, num_classes, temperature)
        correct += int(topk_correct(votes, expected, 1).sum())
    return correct / len(answers)


def knn_votes(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 4096,
) -> Tensor:
    """Return the votes of each query's neighbors for each class.

    Wu et al. 2018 (arXiv 1805.01978), section 3.4; their argmax is the classifier's answer.

        answers = knn_votes(train_features, train_labels, test_features, num_classes=10).argmax(1)

    Args:
        features: Features of the references, (N, F).
        labels: Labels of the references, (N,), integers in [0, C).
        queries: Features of the queries, (M, F).
        num_classes: C.
        k: Number of neighbors; all references if there are fewer.
        temperature: T.
        chunk: As in ``nearest_neighbors``.

    Returns:
        Votes, (M, C) float32 on the device of ``features``: 1 for a query's nearest reference, less
        for others, 0 for classes without a neighbor; all 0 for a query of zeros.

    Raises:
        ValueError: Shapes do not match, a set is empty, a feature is not finite, or a number is
            out of range.
    """
    similarities, voters = _voters(features, labels, queries, num_classes, k, chunk)
    return vote(similarities, voters, num_classes, temperature)


def _voters(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int,
    chunk: int = 4096,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Return similarities and labels of each query's neighbors, (M, K) each."""
    require_samples(features, labels)
    labels = labels.to(features.device, torch.int64)
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {low} to {high}")
    similarities, indices = nearest_neighbors(features, queries, k, chunk, progress)
    return similarities, labels[indices]


def vote(
    similarities: Tensor, neighbor_labels: Tensor, num_classes: int, temperature: float = 0.07
) -> Tensor:
    """Return the votes, (M, C), of known neighbors, (M, K), the nearest first."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    # However small, it is a vote; NaN marks a query that has no direction.
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).nan_to_num(0.0)
    votes = weights.new_zeros(len(weights), num_classes)
    # One neighbor of each query at a time: no two additions meet, so their order is fixed.
    for weight, label in zip(weights.split(1, 1), neighbor_labels.split(1, 1), strict=True):
        votes.scatter_(1, label, votes.gather(1, label) + weight)
    return votes


def topk_correct(
    scores: Tensor, labels: Tensor, count: int = 5, missing_score: float = 0.0
) -> Tensor:
    """Return whether labels, (M,), are among the 1 to ``count`` highest of scores, (M, C).

    A column is a number of classes, (M, min(count, C)): top-1 is the first, top-5 the last of
    five. A class without votes has ``missing_score``, the least one, and is never correct.
    """
    ranked = scores.topk(min(count, scores.shape[1]))
    found = ranked.indices == labels.to(scores.device)[:, None]
    return (found & (ranked.values > missing_score)).cumsum(1) > 0


def nearest_neighbors(
    features: Tensor,
    queries: Tensor,
    k: int = 20,
    chunk: int = 4096,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k references nearest to each query by cosine similarity.

        similarities, indices = nearest_neighbors(gallery, queries, k=10)

    Computed in float32 on the device of ``features``, whatever autocast and TF32 say, in blocks
    of ``chunk`` queries and ``chunk`` references. With q = min(chunk, M), r = min(chunk, N) and
    the result's 12 M K bytes, the peak is at most

        4 q r + 20 F max(q, r) + 60 q K + 12 M K bytes

    in addition to the arguments, and on CUDA topk's own work space, some 12 q r bytes at most. Of
    several references that are equally near at the k-th place it is not defined which one counts;
    the same call gives the same answer.

    Args:
        features: Features of the references, (N, F); half precision is widened block by block.
        queries: Features of the queries, (M, F); moved to the device of ``features`` in blocks.
        k: Number of neighbors; all references if there are fewer.
        chunk: Number of queries, and of references, in a block.
        progress: Called after each block with the product of its queries and references; the
            total is N M.

    Returns:
        Similarities, (M, K) float32, descending, and indices of the references, (M, K). A
        reference of zeros has similarity 0; the similarities of a query of zeros are NaN, as it
        has no direction.

    Raises:
        ValueError: Shapes do not match, a set is empty, a feature is not finite, or k or chunk is
            below 1.
    """
    require_samples(features)
    require_samples(queries, name="queries", width=features.shape[1])
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
    queries: Tensor, features: Tensor, k: int, chunk: int, progress: Progress | None
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


def _directions(features: Tensor) -> Tensor:
    """Return float32 unit vectors; zeros stay zeros, and no square over- or underflows."""
    features = features.float()
    largest = features.abs().amax(1, keepdim=True)
    return F.normalize(features / largest.clamp_min(torch.finfo(torch.float32).tiny), dim=1)
