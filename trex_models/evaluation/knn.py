"""Weighted k-nearest-neighbor classification by cosine similarity, in bounded memory.

Wu et al. 2018 (arXiv 1805.01978), section 3.4, as used by DINO (arXiv 2104.14294): each of a
query's k nearest references, with similarity s_i, votes for its class with exp(s_i / T). Here, all
votes of a query are divided by the largest one, exp(s_1 / T), so that a small T cannot overflow.

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

_VOTES = 1 << 26  # votes in memory: 256 MB


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

    Needs 8 M K bytes and 256 MB in addition to the memory of ``nearest_neighbors``.

    Args:
        features: Features of the references, (N, F).
        labels: Labels of the references, (N,), integers from 0.
        queries: Features of the queries, (M, F).
        query_labels: Labels of the queries, (M,). Labels without a reference count as errors.
        k: Number of neighbors; at most N are used.
        temperature: Temperature, T.
        progress: Callback, see ``nearest_neighbors``.

    Returns:
        Fraction of queries that are classified correctly, from 0 to 1.

    Raises:
        ValueError: See ``knn_votes``; or the number of query labels is not M.
    """
    references, queries, targets = as_tensor(features), as_tensor(queries), as_tensor(query_labels)
    require_samples(queries, targets, "queries")
    labels = as_tensor(labels)
    num_classes = int(labels.max()) + 1 if labels.numel() else 0
    cosines, voters = _neighbors(references, labels, queries, num_classes, k, progress=progress)
    size, correct = max(1, _VOTES // num_classes), 0
    blocks = (part.split(size) for part in (cosines, voters, targets.to(voters.device)))
    for similarities, neighbor_labels, target in zip(*blocks, strict=True):
        votes = vote(similarities, neighbor_labels, num_classes, temperature)
        correct += int(topk_correct(votes, target, 1).sum())
    return correct / len(targets)


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

    Wu et al. 2018 (arXiv 1805.01978), section 3.4; the argmax is the predicted class.

        predicted = knn_votes(train_features, train_labels, test_features, num_classes=10).argmax(1)

    Args:
        features: Features of the references, (N, F).
        labels: Labels of the references, (N,), integers in [0, C).
        queries: Features of the queries, (M, F).
        num_classes: Number of classes, C.
        k: Number of neighbors; at most N are used.
        temperature: Temperature, T.
        chunk: Size of a block, see ``nearest_neighbors``.

    Returns:
        Votes, (M, C) float32 on the device of ``features``. The nearest neighbor votes with 1, the
        others with less. Classes without a neighbor have 0 votes, as do queries that are all zero.

    Raises:
        ValueError: Shapes do not match, features or queries are empty or not finite, or another
            argument is out of range.
    """
    similarities, voters = _neighbors(features, labels, queries, num_classes, k, chunk)
    return vote(similarities, voters, num_classes, temperature)


def _neighbors(
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
        raise ValueError(f"labels must be in [0, {num_classes}), got {low} to {high}")
    similarities, indices = nearest_neighbors(features, queries, k, chunk, progress)
    return similarities, labels[indices]


def vote(
    similarities: Tensor, neighbor_labels: Tensor, num_classes: int, temperature: float = 0.07
) -> Tensor:
    """Return the votes, (M, C), of neighbors, (M, K), which are sorted by similarity."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    # A vote that underflows still counts. NaN marks queries that are all zero.
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).nan_to_num(0.0)
    votes = weights.new_zeros(len(weights), num_classes)
    # One column at a time: scatter_add_ of all would add in an undefined order on CUDA.
    for weight, label in zip(weights.split(1, 1), neighbor_labels.split(1, 1), strict=True):
        votes.scatter_(1, label, votes.gather(1, label) + weight)
    return votes


def topk_correct(
    scores: Tensor, labels: Tensor, count: int = 5, missing_score: float = 0.0
) -> Tensor:
    """Return a mask of the labels, (M,), that are among the highest of scores, (M, C).

    The mask has shape (M, min(count, C)): its first column is top-1, its fifth top-5. A class
    without votes has the lowest score, ``missing_score``, and is never correct.
    """
    ranked = scores.topk(min(count, scores.shape[1]))
    matches = ranked.indices == labels.to(scores.device)[:, None]
    return (matches & (ranked.values > missing_score)).cumsum(1) > 0


def nearest_neighbors(
    features: Tensor,
    queries: Tensor,
    k: int = 20,
    chunk: int = 4096,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k references nearest to each query by cosine similarity.

        similarities, indices = nearest_neighbors(gallery, queries, k=10)

    Computes in float32 on the device of ``features``, regardless of autocast and TF32, in blocks
    of ``chunk`` queries and ``chunk`` references. With q = min(chunk, M) and r = min(chunk, N),
    peak memory, including the result, is at most

        4 q r + 20 F max(q, r) + 60 q K + 12 M K bytes

    in addition to the arguments and, on CUDA, the workspace of topk, at most about 12 q r bytes.
    If several references tie for the k-th neighbor, any of them may be returned; the same call
    always returns the same one.

    Args:
        features: Features of the references, (N, F); blocks of half precision are cast to float32.
        queries: Features of the queries, (M, F); moved to the device of ``features`` in blocks.
        k: Number of neighbors; at most N are used.
        chunk: Number of queries and number of references in a block.
        progress: Callback, called after each block with its number of pairs of query and
            reference; these add up to N M.

    Returns:
        Similarities, (M, K) float32, descending, and indices of the references, (M, K). References
        that are all zero have similarity 0. For queries that are all zero, similarities are NaN,
        since they have no direction.

    Raises:
        ValueError: Shapes do not match, features or queries are empty or not finite, or k or chunk
            is below 1.
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
            block = _normalize(queries[rows].to(device))
            cosines, nearest = _nearest(block, features, k, chunk, progress)
            cosines[~block.any(1)] = torch.nan
            similarities[rows], indices[rows] = cosines, nearest
    return similarities, indices


def _nearest(
    queries: Tensor, features: Tensor, k: int, chunk: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Return the k largest cosines of unit queries, with their indices, by a running top-k."""
    best = queries.new_empty(len(queries), 0)
    indices = torch.empty_like(best, dtype=torch.int64)
    for start in range(0, len(features), chunk):
        cosines = queries @ _normalize(features[start : start + chunk]).T
        values, columns = cosines.topk(min(k, cosines.shape[1]))
        del cosines  # before the next block is allocated
        values, columns = torch.cat([best, values], 1), torch.cat([indices, columns + start], 1)
        best, order = values.topk(min(k, values.shape[1]))
        indices = columns.gather(1, order)
        if progress is not None:
            progress(len(queries) * min(chunk, len(features) - start))
    return best, indices


def _normalize(features: Tensor) -> Tensor:
    features = features.float()
    largest = torch.linalg.vector_norm(features, torch.inf, 1, keepdim=True)
    scaled = features / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return F.normalize(scaled, dim=1, out=scaled)
