"""Center crops compared with timm's evaluation transform."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from benchmarks.features import reference_transform
from benchmarks.photographs import bundled
from trex_models.data.center_crop import PROTOCOLS, CenterCrop, CenterCropDataset
from trex_models.data.decode import UnreadableImageError
from trex_models.data.sources import ArraySource


def reference(crop: CenterCrop, image: NDArray[np.uint8], normalize: bool = False) -> Tensor:
    """Return timm's transform of an image, (3, H, W), as levels or normalized."""
    return reference_transform(crop, normalize)(Image.fromarray(image))


def ours(crop: CenterCrop, *images: NDArray[np.uint8]) -> Tensor:
    """Return our crops of images, (B, H, W, 3) uint8."""
    out = crop.empty(len(images))
    for image, row in zip(images, out, strict=True):
        crop.crop_into(image, row)
    return out


def noise(height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng((height, width))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "crop",
    [
        PROTOCOLS["validation"],
        PROTOCOLS["transfer"],
        CenterCrop(crop_pct=0.9, interpolation="bilinear", crop_mode="squash"),
        CenterCrop(size=(160, 224), crop_pct=0.95, interpolation="bicubic"),
        CenterCrop(crop_pct=1.15, interpolation="bicubic"),
    ],
)
def test_crops_match_timms(crop: CenterCrop) -> None:
    images = [view for image in bundled() for view in (image, image[:, 40:250], image[50:270])]
    theirs = torch.stack([reference(crop, image) for image in images])
    difference = ours(crop, *images).permute(0, 3, 1, 2).float() - theirs
    assert difference.abs().mean() <= 0.05
    assert abs(difference.mean()) <= 0.05
    assert (difference.abs() > 4).float().mean() <= 1e-3


@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.15])
@pytest.mark.parametrize("excess", range(9))
def test_places_of_crops_are_timms(crop_pct: float, excess: int) -> None:
    """If the shorter side already has the target size, pixels are copied."""
    crop = CenterCrop(size=(23, 23), crop_pct=crop_pct, interpolation="bicubic")
    shorter = math.floor(23 / crop_pct)
    for size in ((shorter, shorter + excess), (shorter + excess, shorter)):
        image = noise(*size)
        assert torch.equal(ours(crop, image)[0].permute(2, 0, 1), reference(crop, image))


@pytest.mark.parametrize("size", [(24, 24), (32, 32), (20, 30)])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_sizes_of_resized_images_are_timms(size: tuple[int, int], mode: str) -> None:
    crop = CenterCrop(size=size, crop_pct=0.9, interpolation="bilinear", crop_mode=mode)
    resize = create_transform((3, *size), crop_pct=0.9, crop_mode=mode).transforms[0]
    for height, width in np.random.default_rng(0).integers(1, 90, (200, 2)).tolist():
        resized = resize(Image.new("RGB", (width, height)))
        assert crop._resized(height, width) == (resized.height, resized.width)


def test_features_differ_little() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # use the statistics of these images
    for crop in PROTOCOLS.values():
        theirs = torch.stack([reference(crop, image, normalize=True) for image in bundled()])
        with torch.no_grad():
            model.train()(theirs)
            expected = model.eval()(theirs)
            found = model(crop.normalize(ours(crop, *bundled())))
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.01


def test_normalized_crops_are_timms() -> None:
    crop = CenterCrop(
        crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.3)
    )
    image = noise(224, 224)
    found = crop.normalize(ours(crop, image))
    torch.testing.assert_close(found[0], reference(crop, image, normalize=True))
    assert found.is_contiguous(memory_format=torch.channels_last)
    for crop in PROTOCOLS.values():
        assert crop.mean == timm.data.IMAGENET_DEFAULT_MEAN
        assert crop.std == timm.data.IMAGENET_DEFAULT_STD


@pytest.mark.parametrize("shape", [(3, 40000), (40000, 2), (1, 1)])
def test_very_long_images_are_cut_before_they_are_resized(
    shape: tuple[int, int], resized: list[tuple[Tensor, Tensor]]
) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    middle = tuple(
        slice(side // 2 - 5, side // 2 + 5) if side > 9 else slice(None) for side in shape
    )
    image[middle] = 255
    crop = ours(PROTOCOLS["transfer"], image)
    assert crop.shape == (1, 224, 224, 3)
    assert (crop == 255).all()
    assert max(resized[0][1].shape[2:]) <= 8 * 224 + 224


def test_squashed_images_are_never_cut() -> None:
    crop = CenterCrop(size=(8, 8), crop_pct=1.0, interpolation="bilinear", crop_mode="squash")
    image = np.zeros((4, 400, 3), np.uint8)
    image[:, :200] = 255
    assert (ours(crop, image)[0, :, :4] > 200).all()


@pytest.mark.parametrize("writeable", [True, False])
def test_image_is_read_in_place_by_the_channels_last_kernel(
    writeable: bool, resized: list[tuple[Tensor, Tensor]]
) -> None:
    image = bundled()[0].copy()
    image.flags.writeable = writeable
    ours(PROTOCOLS["transfer"], image)
    [(patch, result)] = resized
    assert (patch.data_ptr() == image.ctypes.data) == writeable  # read-only images are copied
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_timms_data_config_is_honored() -> None:
    names = "resnet50.a1_in1k vit_base_patch16_clip_224.openai convnext_tiny.in12k_ft_in1k_384"
    for name in names.split():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        config = resolve_data_config(pretrained_cfg=cfg.to_dict())
        crop = CenterCrop.from_data_config(config)
        assert (3, *crop.size) == config["input_size"]
        for key in ("crop_pct", "interpolation", "crop_mode", "mean", "std"):
            assert getattr(crop, key) == config[key]
    assert crop.crop_mode == "squash"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (1, 8, 8)}, r"3 input channels \(RGB\), got 1"),
        ({"input_size": (3, 0, 8)}, r"size must be positive, got \(0, 8\)"),
        ({"crop_pct": 0.0}, r"crop_pct must be in \[0.01, 8\], got 0.0"),
        ({"crop_pct": 1000.0}, "crop_pct must be in"),
        ({"interpolation": "lanczos"}, "interpolation must be bilinear or bicubic, got lanczos"),
        ({"crop_mode": "border"}, "crop_mode must be center or squash, got border"),
    ],
)
def test_impossible_requests_are_rejected(change: dict[str, Any], message: str) -> None:
    config = resolve_data_config({"img_size": 8}) | change
    with pytest.raises(ValueError, match=message):
        CenterCrop.from_data_config(config)


def test_other_arrays_are_refused() -> None:
    crop = PROTOCOLS["transfer"]
    for image in (np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.float32)):
        with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\)"):
            crop.crop_into(image, crop.empty(1)[0])


class Torn(ArraySource):
    """Source whose second image is unreadable."""

    def read(self, index: int) -> np.ndarray:
        if index == 1:
            raise UnreadableImageError("torn")
        return super().read(index)


def test_unreadable_images_are_reported_or_skipped() -> None:
    images = [noise(30, 40), noise(30, 40), noise(50, 20)]
    source, crop = Torn(images, [0, 1, 2], ["a", "b", "c"]), PROTOCOLS["validation"]
    with pytest.raises(UnreadableImageError, match="^torn$"):
        CenterCropDataset(source, crop).__getitems__([0, 1])
    batch = CenterCropDataset(source, crop, skip=True).__getitems__([2, 1, 0])
    assert torch.equal(batch.images, ours(crop, images[2], images[0]))
    assert batch.labels.tolist() == [2, 0]
    assert batch.unreadable == {1: "torn"}
    assert len(CenterCropDataset(source, crop, skip=True).__getitems__([1]).images) == 0
