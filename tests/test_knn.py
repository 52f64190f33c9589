"""Weighted k-NN compared with a computation on the full matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import Ledger
from trex_models.evaluation.knn import knn_votes, nearest_neighbors, topk_correct


def sample(
    references: int = 203, queries: int = 61, width: int = 12, classes: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(references + queries)
    return (
        torch.randn(references, width, generator=generator),
        torch.randint(classes, (references,), generator=generator),
        torch.randn(queries, width, generator=generator),
    )


def brute_force(
    features: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Compute votes from the full matrix in float64, relative to each query's nearest neighbor."""
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(features.double(), dim=1).T
    best, order = cosines.sort(dim=1, descending=True)
    weights = (best[:, :k] / temperature).exp() / (best[:, :1] / temperature).exp()
    return torch.einsum("mk,mkc->mc", weights, F.one_hot(labels[order[:, :k]], classes).double())


@pytest.mark.parametrize("chunk", [3, 61, 64, 203, 4096])
@pytest.mark.parametrize("k", [1, 20, 500])
def test_votes_equal_those_of_the_full_matrix(chunk: int, k: int) -> None:
    features, labels, queries = sample()
    votes = knn_votes(features, labels, queries, 7, k, chunk=chunk)
    expected = brute_force(features, labels, queries, 7, k, 0.07)
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes.double(), expected, rtol=1e-4, atol=1e-6)


def test_neighbors_are_the_nearest_in_order() -> None:
    features, _, queries = sample()
    done: list[int] = []
    similarities, indices = nearest_neighbors(features, queries, 9, chunk=50, progress=done.append)
    assert (similarities.diff(dim=1) <= 0).all()
    cosines = F.cosine_similarity(queries[:, None], features[indices], dim=2)
    torch.testing.assert_close(similarities, cosines)
    assert all(len(set(row)) == 9 for row in indices.tolist())
    assert len(done) > 1
    assert sum(done) == len(features) * len(queries)


def test_order_length_and_type_of_vectors_do_not_matter() -> None:
    features, labels, queries = sample()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(5))
    votes = knn_votes(features, labels, queries, 7, chunk=30)
    torch.testing.assert_close(
        knn_votes(features[order], labels[order], queries, 7, chunk=30), votes
    )
    assert torch.equal(knn_votes(features, labels, queries, 7, chunk=30), votes)
    for scale in (1e-30, 1e30, 5e37):  # the sum overflows
        scaled = knn_votes(features * scale, labels, queries / scale, 7, chunk=30)
        torch.testing.assert_close(scaled, votes)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        narrow, narrow_queries = features.to(dtype), queries.to(dtype)
        expected = knn_votes(narrow.float(), labels, narrow_queries.float(), 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(knn_votes(narrow, labels, narrow_queries, 7), expected)


def test_zeros_have_no_direction() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    queries = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 2])
    similarities, indices = nearest_neighbors(features, queries, 3)
    assert similarities[0].tolist() == [1, 0, -1]
    assert indices[0].tolist() == [1, 0, 2]
    votes = knn_votes(features, labels, queries, 3, temperature=1.0)
    torch.testing.assert_close(votes[0], torch.tensor([-1.0, 0.0, -2.0]).exp())
    assert votes[1].tolist() == [0, 0, 0]
    assert not topk_correct(votes, torch.tensor([1, 0]))[1].any()
    votes = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0, 0.0]]).expand(6, 6)
    found = topk_correct(votes, torch.arange(6))
    assert found[:, 0].tolist() == [False, True, False, False, False, False]
    assert found[:, -1].tolist() == [False, True, False, True, False, False]
    assert topk_correct(votes[:, :2], torch.zeros(6, dtype=torch.int64)).shape == (6, 2)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 100.0])
def test_extreme_temperatures_keep_every_neighbor_a_voter(temperature: float) -> None:
    features, labels, queries = sample()
    votes = knn_votes(features, labels, queries, 7, 20, temperature)
    _, indices = nearest_neighbors(features, queries, 20)
    assert votes.isfinite().all()
    assert torch.equal(votes > 0, F.one_hot(labels[indices], 7).any(1))
    _, nearest = nearest_neighbors(features, queries, 1)
    if temperature < 1:
        assert torch.equal(votes.argmax(1), labels[nearest[:, 0]])


def test_memory_is_bounded() -> None:
    """The full matrix would take 200 MB, and the features in float32 51 MB."""
    features, labels, queries = sample(50_000, 1_000, 256)
    features, block = features.half(), 512
    with Ledger() as ledger:
        ledger.enter(features, labels, queries)
        given = ledger.live
        votes = knn_votes(features, labels, queries, 7, chunk=block)
        assert ledger.live - given == pytest.approx(4 * votes.numel(), abs=512)
    peak = ledger.peak - given
    blocks = 4 * block**2 + 20 * 256 * block + 60 * block * 20
    assert 4 * block**2 < peak <= blocks + 1_000 * (28 * 20 + 4 * 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(3)}, r"features must be of shape \(N, F\) and not .*got \(3,\)"),
        ({"queries": torch.ones(2, 11)}, r"queries must be of shape \(N, 12\) .*, got \(2, 11\)"),
        ({"features": torch.ones(0, 12)}, r"features .*not empty, got \(0, 12\)"),
        ({"queries": torch.ones(0, 12)}, r"queries .*not empty, got \(0, 12\)"),
        ({"queries": torch.full((9, 12), torch.nan)}, "queries must be finite, but row 0"),
        (
            {"features": sample()[0].index_fill(0, torch.tensor([150]), torch.inf)},
            "features must be finite, but row 150 has",
        ),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"203 integers.*got torch.int64.*\(9,\)"),
        ({"labels": torch.zeros(203)}, "203 integers.*got torch.float32"),
        ({"num_classes": 6}, r"labels must be in \[0, 6\), got 0 to 6"),
        ({"labels": torch.full((203,), -1)}, "got -1 to -1"),
        ({"k": 0}, "k and chunk must be at least 1, got 0 and 40"),
        ({"chunk": 0}, "k and chunk must be at least 1, got 20 and 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    given = dict(zip(("features", "labels", "queries"), sample(), strict=True))
    with pytest.raises(ValueError, match=message):
        knn_votes(**{**given, "num_classes": 7, "chunk": 40, **change})


@pytest.mark.cuda
def test_cuda_in_full_precision_within_the_stated_memory() -> None:
    features, labels, queries = sample(50_000, 5_000, 256)
    expected = knn_votes(features, labels, queries, 7)
    on_device = features.cuda()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            votes = knn_votes(on_device, labels, queries, 7, chunk=2048)
            again = knn_votes(on_device, labels, queries, 7, chunk=2048)
        peak = torch.cuda.max_memory_allocated() - before
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(votes, again)
    torch.testing.assert_close(votes.cpu(), expected, rtol=1e-3, atol=1e-4)
    blocks = 16 * 2048 * 2048 + 4 * 256 * 5 * 2048 + 60 * 2048 * 20
    assert peak < blocks + 5_000 * (28 * 20 + 4 * 7) + 8 * 50_000 + (16 << 20)  # cuBLAS's own
