"""Feature extraction in memory."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import ToTensor

from trex_models.data.center_crop import PROTOCOLS
from trex_models.data.sources import ArraySource
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.frozen_model import preprocessing


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
    model.frozen = nn.Dropout().eval()

    features = extract_features(model, source, ToTensor(), batch_size=3, workers=workers)
    np.testing.assert_allclose(features, colors / 255, rtol=1e-6)
    assert features.dtype == np.float32
    assert model.training
    assert not model.frozen.training
    assert model.modes <= {False}


def random_source(count: int) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (count, 50, 60, 3), dtype=np.uint8)
    return ArraySource(images, np.zeros(count, dtype=int), ["a"])


@pytest.mark.parametrize("workers", [0, 1])
def test_default_is_the_crop_that_the_model_asks_for(workers: int) -> None:
    source, model = random_source(5), timm.create_model("test_resnet", num_classes=0)
    features = extract_features(model, source, batch_size=2, workers=workers)
    transform = create_transform(**resolve_model_data_config(model))
    expected = extract_features(model, source, transform, batch_size=5)
    np.testing.assert_allclose(features, expected, atol=0.01 * float(np.abs(expected).max()))
    assert preprocessing(model).size == (160, 160)


def test_images_arrive_in_channels_last_format_and_autocast_is_entered() -> None:
    seen = []

    class Noting(ChannelMeans):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return F.linear(super().forward(images), torch.eye(3))

    source, crop = random_source(3), PROTOCOLS["transfer"]
    exact = extract_features(Noting(), source, crop)
    rough = extract_features(Noting(), source, crop, precision="bf16")
    assert rough.dtype == np.float32
    np.testing.assert_array_equal(rough, torch.from_numpy(exact).bfloat16().float().numpy())
    assert not np.array_equal(rough, exact)
    extract_features(Noting(), source, create_transform(16))
    assert seen == [True] * 3


def test_missing_outputs_are_reported_and_the_mode_is_restored() -> None:
    model, source = ChannelMeans(), random_source(2)
    with pytest.raises(ValueError, match="ChannelMeans has no pretrained_cfg"):
        extract_features(model, source)
    with pytest.raises(ValueError, match="no images"):
        extract_features(model, random_source(0), PROTOCOLS["transfer"])

    def fail(_: Image.Image) -> Tensor:
        raise ZeroDivisionError

    model.train()
    with pytest.raises(ZeroDivisionError):
        extract_features(model, random_source(2), fail)
    assert model.training


@pytest.mark.cuda
def test_cuda_yields_every_batch_in_order_and_waits_for_no_current_one() -> None:
    source, model = random_source(23), timm.create_model("test_resnet", num_classes=0)
    expected = extract_features(model, source, batch_size=23)
    found = extract_features(model.cuda(), source, batch_size=4, workers=1)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)
