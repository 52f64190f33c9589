"""Geometry compared with brute force and with values known in closed form."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from trex_models.evaluation.geometry import Geometry, analyze, rankme


def sample(images: int = 90, width: int = 12, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return non-centered features as after a ReLU, with unequal scales and class sizes."""
    rng = np.random.default_rng(images)
    labels = rng.permutation(np.minimum(np.arange(images) % (classes + 3), classes - 1))
    centers = rng.normal(size=(classes, width))
    features = centers[labels] + rng.normal(size=(images, width)) * np.geomspace(1, 0.05, width)
    return np.maximum(features, 0).astype(np.float32), labels


def unit(features: np.ndarray) -> np.ndarray:
    wide = features.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def all_pairs(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return mean distances within and between classes, from the matrix of all cosines."""
    distances, classes = 1 - unit(features) @ unit(features).T, np.unique(labels)
    within = []
    for name in classes:
        block = distances[np.ix_(labels == name, labels == name)]
        if len(block) > 1:
            within.append(block[~np.eye(len(block), dtype=bool)].mean())
    between = [
        distances[np.ix_(labels == one, labels == two)].mean()
        for one, two in combinations(classes, 2)
    ]
    return float(np.mean(within)), float(np.mean(between))


def scalars(geometry: Geometry) -> dict[str, float]:
    """Return the fields that are single numbers."""
    return {name: x for name, x in asdict(geometry).items() if isinstance(x, int | float)}


def same(one: Geometry, two: Geometry, rel: float = 1e-10) -> None:
    np.testing.assert_allclose(one.singular_values, two.singular_values, atol=1e-9)
    assert scalars(one) == pytest.approx(scalars(two), rel=rel)


@pytest.mark.parametrize("images", [9, 90])  # fewer and more than features
@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_numbers_equal_those_of_brute_force(images: int, eps: float) -> None:
    features, labels = sample(images)
    z, width = unit(features), features.shape[1]
    found = analyze(features, labels, eps)

    inner = np.eye(images) + width / (images * eps**2) * z @ z.T  # equal to the (F, F) form
    assert found.coding_length == pytest.approx(np.linalg.slogdet(inner)[1] / 2, rel=1e-10)
    singular = np.linalg.svd((z - z.mean(0)) / np.sqrt(images), compute_uv=False)
    expected = np.zeros(width)
    expected[: len(singular)] = singular
    np.testing.assert_allclose(found.singular_values, expected, atol=1e-7)
    shares = singular[singular > 1e-7] / singular.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    held = np.cumsum(singular**2) / (singular**2).sum()
    assert held[found.axes_of_95_percent - 1] >= 0.95 > held[found.axes_of_95_percent - 2]
    assert found.sparsity == (np.abs(z) <= 1e-5).mean() > 0.2
    within, between = all_pairs(features, labels)
    assert found.within_class_distance == pytest.approx(within, rel=1e-10)
    assert found.between_class_distance == pytest.approx(between, rel=1e-10)
    assert found.distance_ratio == pytest.approx(within / between, rel=1e-10)
    assert (found.num_images, found.num_features, found.num_classes) == (images, width, 4)
    assert (found.eps, found.threshold) == (eps, 1e-5)
    as_json = asdict(found)
    assert json.loads(json.dumps(as_json, allow_nan=False)) == as_json
    assert as_json["normalization"] == "rows of unit length"


def test_chunks_types_and_lengths_do_not_change_the_result(tmp_path: Path) -> None:
    features, labels = sample()
    expected = analyze(features, labels)
    for chunk in (1, 7, 89, 90, 91):
        same(analyze(features, labels, chunk=chunk), expected)
    done: list[int] = []
    analyze(features, labels, chunk=40, progress=done.append)
    assert done == [40, 40, 10]
    scales = np.geomspace(1e-18, 1e18, len(features))[:, None]
    same(analyze(features * scales, labels), expected)
    half = features.astype(np.float16)
    np.save(tmp_path / "features.npy", half)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    same(analyze(mapped, labels, chunk=20), analyze(half.astype(np.float64), labels))


def test_collapsed_classes_and_one_direction() -> None:
    """Two orthogonal directions: one principal axis, and no variance within classes."""
    found = analyze(np.repeat([[3.0, 0, 0], [0, 0.5, 0]], [4, 4], axis=0), np.repeat([0, 1], 4))
    assert (found.within_class_distance, found.between_class_distance) == (0, 1)
    assert found.distance_ratio == 0
    assert found.singular_values == pytest.approx([np.sqrt(0.5), 0, 0])
    assert list(found.singular_values[1:]) == [0, 0]
    assert found.effective_rank == pytest.approx(1)
    assert found.axes_of_95_percent == 1
    assert found.dead_features == 1
    assert found.sparsity == pytest.approx(2 / 3)
    assert found.coding_length == pytest.approx(np.log(1 + 3 / 0.25 / 2))
    features = np.outer(np.arange(1, 60), np.sqrt([1, 2, 3, 5, 6]))
    found = analyze(features, np.arange(59) % 3)
    assert list(found.singular_values) == [0] * 5
    assert (found.effective_rank, found.axes_of_95_percent) == (0, 0)
    assert (found.within_class_distance, found.between_class_distance) == (0, 0)
    assert found.distance_ratio is None
    assert found.coding_length == pytest.approx(np.log(1 + 5 / 0.25) / 2)


def test_zeros_and_classes_of_one_image() -> None:
    features, labels = sample()
    more = np.insert(features, [0, 50, 90], 0, axis=0)
    found = analyze(more, np.insert(labels, [0, 50, 90], [0, 1, 9]))
    assert found.zero_images == 3
    same(replace(found, zero_images=0), analyze(features, labels))
    labels[0] = 7  # a class of one image counts only between classes
    found = analyze(features, labels)
    expected = all_pairs(features, labels)
    assert (found.within_class_distance, found.between_class_distance) == pytest.approx(expected)
    features[:, [2, 5]] = 0
    assert analyze(features, labels, chunk=20).dead_features == 2
    features[60, 5] = -1e-30  # nonzero for one image
    assert analyze(features, labels, chunk=20).dead_features == 1
    features = np.array([[1.0, 0.01, 0], [0, 1, -1e-6]])
    labels = np.array(["a", "a"])
    features, labels = np.concatenate([features] * 2), np.concatenate([labels, ["b", "b"]])
    shares = [analyze(features, labels, threshold=t).sparsity for t in (0, 1e-5, 0.1)]
    assert shares == pytest.approx([2 / 6, 3 / 6, 4 / 6])


@pytest.mark.cuda
def test_cuda_agrees_with_the_processor() -> None:
    features, labels = sample()
    same(analyze(features, labels, chunk=20, device="cuda"), analyze(features, labels))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 57])
def test_non_finite_rows_are_reported(value: float, row: int) -> None:
    features, labels = sample()
    features[[row, 88], 3] = value
    with pytest.raises(ValueError, match=f"row {row} has a NaN or an infinity"):
        analyze(features, labels, chunk=20)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.ones((4, 2, 1)), np.arange(4), r"\(N, F\) and not empty, got \(4, 2, 1\)"),
        (np.ones((4, 2)), np.arange(3), r"must be 4 integers.* of shape \(3,\)"),
        (np.ones((0, 2)), np.arange(0), "not empty"),
        (np.ones((4, 0)), np.arange(4), "not empty"),
        (np.ones((4, 2)), np.zeros(4), "two classes .* 1 classes, the largest of 4 images"),
        (np.ones((4, 2)), np.arange(4), "there are 4 classes, the largest of 1 images"),
        (np.zeros((4, 2)), np.arange(4) // 2, "there are 0 classes, the largest of 0"),
    ],
)
def test_unsuitable_data_is_rejected(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyze(images, labels)


def test_rankme() -> None:
    """Features of F orthogonal directions of equal length have rank F."""
    basis = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0]
    assert rankme(basis.T @ basis) == pytest.approx(4)
    scaled = basis * torch.tensor([4.0, 2, 1, 1])  # shares 1/2, 1/4, 1/8, 1/8
    assert rankme(scaled.T @ scaled) == pytest.approx(2**1.75)
    assert rankme(torch.ones(3, 3, dtype=torch.float64)) == pytest.approx(1, abs=1e-5)
    assert rankme(torch.zeros(3, 3)) == rankme(torch.full((3, 3), torch.nan)) == 0
