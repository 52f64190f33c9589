import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.augment import LIMITS, compare_boxes, crop_error, our_boxes, summary
from benchmarks.photographs import bundled
from benchmarks.reference_pipeline import random_boxes, reference_crop
from trex_models.data.multicrop import Box, CropSpec, MultiCrop, resized_crops
from trex_models.data.photometric import LOCAL_AUGMENTATION

LOCAL, GLOBAL = (0.05, 0.25), (0.25, 1.0)
SIGNIFICANCE = 1e-3


def least_p(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> float:
    return min(found.p for found in compare_boxes(ours, theirs))


@pytest.mark.parametrize("scale", [LOCAL, GLOBAL])
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (150, 400), (32, 32), (5, 7)])
def test_boxes_have_torchvisions_distribution(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    compared = compare_boxes(our_boxes(*size, scale, 4000), random_boxes(*size, scale, 4000))
    assert len(compared) == 8
    for found in compared:
        assert found.p > SIGNIFICANCE, found


def test_distribution_test_can_fail() -> None:
    theirs = random_boxes(375, 500, LOCAL, 4000)
    assert least_p(our_boxes(375, 500, (0.05, 0.27), 4000), theirs) < SIGNIFICANCE
    assert least_p(our_boxes(375, 480, LOCAL, 4000), theirs) < SIGNIFICANCE


@pytest.mark.parametrize("size", [(3, 200), (200, 3), (1, 1), (1, 9), (100, 130), (90, 100)])
def test_fallback_is_torchvisions(size: tuple[int, int]) -> None:
    scale = (2.0, 2.0)  # never fits
    assert our_boxes(*size, scale, 1).tolist() == random_boxes(*size, scale, 1).tolist()


@pytest.mark.parametrize("size", [(3, 200), (200, 3), (1, 1), (2, 2), (1, 9), (64, 64)])
def test_boxes_lie_in_the_image(size: tuple[int, int]) -> None:
    top, left, height, width = our_boxes(*size, LOCAL, 500).T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]


@pytest.mark.parametrize(
    "scale", [(0.0, 0.5), (0.5, 0.2), (-1.0, 1.5), (0.1, float("nan")), (0.1, float("inf"))]
)
def test_impossible_ranges_are_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="scale must be positive and ascending"):
        CropSpec(1, 16, scale, LOCAL_AUGMENTATION)


@pytest.mark.parametrize(("size", "scale"), [(224, GLOBAL), (96, LOCAL), (32, GLOBAL), (16, LOCAL)])
def test_crops_match_pil(size: int, scale: tuple[float, float]) -> None:
    found = summary(crop_error(bundled(), size, 64, scale))
    assert found.within(LIMITS["crop"]), found


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (3, 5, 1, 60), (2, 7, 50, 1), (10, 10, 8, 9)])
def test_boxes_of_few_pixels_match_pil(box: Box) -> None:
    image = bundled()[2]
    out = torch.empty(32, 32, 3, dtype=torch.uint8)
    resized_crops(image, [box], 32, out[None])
    theirs = np.asarray(reference_crop(Image.fromarray(image), box, 32)).astype(int)
    assert np.abs(out.numpy() - theirs).max() <= 4


def test_resized_crops_read_only_their_boxes_and_write_only_their_rows() -> None:
    image = bundled()[0]
    box = (40, 50, 100, 120)
    inside = slice(40, 140), slice(50, 170)
    other = 255 - image
    other[inside] = image[inside]
    first, second = torch.empty(2, 1, 64, 64, 3, dtype=torch.uint8)
    resized_crops(image, [box], 64, first)
    resized_crops(other, [box], 64, second)
    assert torch.equal(first, second)
    batch = torch.full((3, 16, 16, 3), 7, dtype=torch.uint8)
    resized_crops(np.full((20, 30, 3), 200, dtype=np.uint8), [(0, 0, 20, 30)], 16, batch[1:2])
    assert (batch[1] == 200).all()
    assert (batch[[0, 2]] == 7).all()


def test_boxes_are_resized_by_the_channels_last_kernel(
    resized: list[tuple[Tensor, Tensor]],
) -> None:
    out = torch.empty(2, 1, 32, 32, 3, dtype=torch.uint8)
    for crop, writeable in zip(out, (True, False), strict=True):
        image = bundled()[0].copy()
        image.flags.writeable = writeable
        resized_crops(image, [(10, 20, 90, 80)], 32, crop)
        patch, result = resized[-1]
        np.testing.assert_array_equal(patch[0].permute(1, 2, 0), image[10:100, 20:100])
        assert patch.is_contiguous(memory_format=torch.channels_last)
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*out)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((20, 30), np.uint8), ((20, 30, 2), np.uint8), ((0, 5, 3), np.uint8), ((20, 30, 3), float)],
)
def test_images_of_another_kind_are_refused(shape: tuple[int, ...], dtype: type) -> None:
    crops = MultiCrop([CropSpec(1, 16, LOCAL, LOCAL_AUGMENTATION)])
    with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\)"):
        crops(np.zeros(shape, dtype))
