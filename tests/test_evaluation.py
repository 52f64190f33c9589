"""Classifiers on frozen features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from trex_models.data.samples import digits
from trex_models.data.sources import ArraySource
from trex_models.evaluation.classifiers import knn_accuracy, logistic_accuracy
from trex_models.evaluation.features import extract_features, pixel_features


def clusters(seed: int, distance: float, per_class: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian clusters of 5 classes around fixed centres in 16 dimensions."""
    centres = np.random.default_rng(0).normal(size=(5, 16)) * distance
    labels = np.repeat(np.arange(5), per_class)
    noise = np.random.default_rng(seed).normal(size=(len(labels), 16))
    return (centres[labels] + noise).astype(np.float32), labels


@pytest.mark.parametrize("accuracy", [knn_accuracy, logistic_accuracy])
def test_separable_classes_are_separated_and_noise_is_not(accuracy: object) -> None:
    assert callable(accuracy)
    assert accuracy(*clusters(1, 5.0), *clusters(2, 5.0)) > 0.99
    assert accuracy(*clusters(1, 0.0), *clusters(2, 0.0)) < 0.35
    between = accuracy(*clusters(1, 0.5), *clusters(2, 0.5))
    assert 0.5 < between < 1.0


def test_digits_pixels_reach_the_known_accuracy() -> None:
    train, test = digits(16)
    x, test_x = pixel_features(train, 8), pixel_features(test, 8)
    assert knn_accuracy(x, train.labels, test_x, test.labels) > 0.95
    assert logistic_accuracy(x, train.labels, test_x, test.labels) > 0.93


class ChannelMeans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes.add(self.training)
        return images.mean((2, 3)) * self.scale


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_in_order_and_in_eval_mode(workers: int) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (7, 3), dtype=np.uint8)
    images = np.broadcast_to(colors[:, None, None], (7, 5, 6, 3))
    source = ArraySource(images, np.zeros(7, dtype=int), ["a"])
    model = ChannelMeans().train()

    features = extract_features(model, source, _to_tensor, batch_size=3, workers=workers)
    np.testing.assert_allclose(features, colors, rtol=1e-6)
    assert features.dtype == np.float32
    assert model.training
    assert model.modes <= {False}


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_pixel_features() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    features = pixel_features(ArraySource([image], [0], ["a"]), 4)
    np.testing.assert_allclose(features[0], image.ravel() / 255, rtol=1e-6)
