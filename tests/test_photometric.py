import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor

from benchmarks.augment import (
    ALWAYS,
    COLUMNS,
    LIMITS,
    Difference,
    compare_rows,
    cut_crops,
    draw_rows,
    keep,
    photometric_error,
    summary,
)
from benchmarks.photographs import bundled
from benchmarks.reference_pipeline import Rows, random_pipeline, random_rows, seeded
from trex_models.data import photometric as ph
from trex_models.data.multicrop import draw_boxes, resized_crops
from trex_models.data.photometric import (
    GLOBAL_AUGMENTATION,
    LOCAL_AUGMENTATION,
    PhotometricAugmentation,
    apply,
    normalize,
)

SIGNIFICANCE = 1e-3
EVEN = PhotometricAugmentation(flip=0.5, jitter=0.5, gray=0.5, blur=0.5, solarize=0.5)


def crop(size: int, count: int) -> Tensor:
    return cut_crops(bundled(), size, count)


def augment(images: Tensor, rows: Rows) -> Tensor:
    return apply(images, torch.from_numpy(rows))


@pytest.mark.parametrize(("size", "count"), [(224, 16), (96, 24), (31, 40), (16, 40)])
@pytest.mark.parametrize(
    ("operation", "mean", "most"),
    [("flip", 0, 0), ("jitter", 0.03, 16), ("gray", 0, 0), ("blur", 0.4, 4), ("solarize", 0, 0)],
)
def test_operations_match_pil(
    size: int, count: int, operation: str, mean: float, most: int
) -> None:
    images = crop(size, count)
    rows = keep(draw_rows(ALWAYS, count), operation)
    assert not torch.equal(augment(images, rows), images)
    found = summary(photometric_error(images, rows))
    assert found.within(LIMITS[operation]), found
    assert found.within(Difference(mean, mean / 2, most, percent_beyond_4=0.3)), found


@pytest.mark.parametrize("column", [*range(ph.FACTORS.start, ph.FACTORS.stop), ph.HUE])
def test_each_part_of_the_jitter_matches_pil(column: int) -> None:
    rows = draw_rows(ALWAYS, 32)
    neutral = keep(rows, "jitter")
    neutral[:, ph.FACTORS] = 1
    neutral[:, ph.HUE] = 0
    neutral[:, column] = rows[:, column]
    error = photometric_error(crop(64, 32), neutral)
    assert np.abs(error).mean() <= 0.02
    assert abs(error.mean()) <= 0.01


def test_hue_strong_jitter_and_gray_images_match_pil() -> None:
    colors = np.random.default_rng(0).integers(0, 256, (4, 3, 200, 200), dtype=np.uint8)
    rows = keep(draw_rows(ALWAYS, 4), "jitter")
    rows[:, ph.FACTORS] = 1
    rows[:, ph.HUE] = (-0.5, -0.07, 0, 0.1)
    error = photometric_error(torch.from_numpy(colors), rows)
    assert error.any(axis=3).mean() <= 0.005  # pixels
    augmentation = replace(ALWAYS, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5)
    error = photometric_error(crop(64, 32), keep(draw_rows(augmentation, 32), "jitter"))
    assert np.abs(error).mean() <= 0.05
    images = crop(64, 24)[:, :1].expand(-1, 3, -1, -1)
    assert not photometric_error(images, keep(draw_rows(ALWAYS, 24), "jitter")).any()


@pytest.mark.parametrize("augmentation", [GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION])
def test_the_complete_augmentation_matches_pil(augmentation: PhotometricAugmentation) -> None:
    error = photometric_error(crop(96, 48), draw_rows(augmentation, 48))
    assert np.abs(error).mean() <= 0.3
    assert abs(error.mean()) <= 0.05


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (2, 5)])
def test_tiny_images_match_pil(size: tuple[int, int]) -> None:
    image = torch.from_numpy(bundled()[0][: size[0], : size[1]].copy())
    images = image.permute(2, 0, 1).repeat(8, 1, 1, 1)
    for operation in COLUMNS:
        assert np.abs(photometric_error(images, keep(draw_rows(ALWAYS, 8), operation))).max() <= 6
    assert not photometric_error(
        images, keep(draw_rows(ALWAYS, 8), "flip", "gray", "solarize")
    ).any()


def test_zero_rows_have_no_effect_and_inputs_are_unchanged() -> None:
    images = crop(40, 6)
    assert torch.equal(augment(images, np.zeros((6, ph.NUM_PARAMETERS), np.float32)), images)
    off = PhotometricAugmentation(flip=0, jitter=0, gray=0, blur=0, solarize=0)
    assert torch.equal(augment(images, draw_rows(off, 6)), images)
    assert augment(images[:0], draw_rows(off, 0)).shape == (0, 3, 40, 40)
    rows = torch.from_numpy(draw_rows(ALWAYS, 6))
    before = images.clone(), rows.clone()
    apply(images, rows)
    assert torch.equal(images, before[0])
    assert torch.equal(rows, before[1])


@pytest.mark.parametrize("size", [16, 50])
def test_an_image_does_not_depend_on_its_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows = crop(size, 30), draw_rows(EVEN, 30)
    whole = augment(images, rows)
    alone = [augment(images[i : i + 1], rows[i : i + 1]) for i in range(30)]
    assert torch.equal(torch.cat(alone), whole)
    order = np.random.default_rng(1).permutation(30)
    assert torch.equal(augment(images[order], rows[order]), whole[order])
    monkeypatch.setattr(ph, "_CPU_CHUNK", 7 * 3 * size * size)
    assert torch.equal(augment(images, rows), whole)


def test_memory_formats_and_autocast_do_not_touch_the_pixels() -> None:
    images, rows = crop(24, 12), draw_rows(EVEN, 12)
    assert images.is_contiguous(memory_format=torch.channels_last)
    padded = torch.zeros(12, 3, 30, 40, dtype=torch.uint8)
    padded[:, :, 3:27, 5:29] = images
    result = augment(images, rows)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == torch.uint8
    for same in (images.contiguous(), padded[:, :, 3:27, 5:29]):
        other = augment(same, rows)
        assert other.is_contiguous()
        assert torch.equal(other, result)
    images, rows = crop(24, 12), draw_rows(EVEN, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = augment(images, rows)
    assert torch.equal(inside, augment(images, rows))


@pytest.mark.client
@pytest.mark.filterwarnings("ignore")  # torch's compiler emits its own warnings
def test_compiled_arithmetic_gives_the_same_pixels() -> None:
    for count, seed in ((30, 0), (11, 1), (1, 2), (2, 3)):
        images, rows = crop(40, count), torch.from_numpy(draw_rows(LOCAL_AUGMENTATION, count, seed))
        assert torch.equal(apply(images, rows, compiled=True), apply(images, rows))


def test_normalize() -> None:
    images = crop(24, 4)
    ours = normalize(images)
    theirs = T.Normalize(ph.IMAGENET_MEAN, ph.IMAGENET_STD)(images.float() / 255)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert normalize(images.contiguous()).is_contiguous()
    torch.testing.assert_close(normalize(images.float()), ours)
    assert torch.allclose(normalize(images, (0, 0, 0), (1, 1, 1)), images / 255)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "flip": (-0.1, 1.1, math.nan),
        "jitter": (2.0,),
        "gray": (-1.0,),
        "blur": (1.5,),
        "solarize": (math.inf,),
        "brightness": (-0.1, math.nan),
        "contrast": (-0.1,),
        "saturation": (math.inf,),
        "hue": (0.6, -0.1),
        "sigma": ((0.0, 1.0), (2.0, 1.0)),
        "threshold": (-1, 300),
    }.items(),
)
def test_impossible_augmentations_are_refused(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            replace(GLOBAL_AUGMENTATION, **{name: value})


def test_unfit_tensors_are_refused() -> None:
    images, rows = crop(16, 2), torch.from_numpy(draw_rows(EVEN, 2))
    with pytest.raises(ValueError, match="images must be"):
        apply(images.float(), rows)
    with pytest.raises(ValueError, match="images must be"):
        apply(images[:, :2], rows)


def test_augmentations_of_the_recipes() -> None:
    assert (GLOBAL_AUGMENTATION.blur, GLOBAL_AUGMENTATION.solarize) == (0.2, 0.2)
    assert (LOCAL_AUGMENTATION.blur, LOCAL_AUGMENTATION.solarize) == (0.5, 0)
    for found in (GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION):
        assert (found.flip, found.jitter, found.gray) == (0.5, 0.8, 0.2)
        jitter = found.brightness, found.contrast, found.saturation, found.hue
        assert jitter == (0.4, 0.4, 0.2, 0.1)
        assert (found.sigma, found.threshold) == ((0.1, 2.0), 128)


def test_flags_are_independent() -> None:
    rows = draw_rows(EVEN, 5000)
    flags = (rows[:, [ph.FLIP, ph.JITTER, ph.GRAY, ph.SIGMA, ph.SOLARIZE]] > 0).astype(float)
    assert np.abs(np.corrcoef(flags.T) - np.eye(5)).max() < 3.5 / math.sqrt(len(rows))


AUGMENTATIONS = [GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION, replace(EVEN, brightness=1.5, hue=0.5)]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_draws_have_torchvisions_distribution(augmentation: PhotometricAugmentation) -> None:
    ours, theirs = draw_rows(augmentation, 4000), random_rows(augmentation, 4000)
    compared = compare_rows(ours, theirs)
    assert len(compared) == 11
    for found in compared:
        assert found.p > SIGNIFICANCE, found
    assert (ours[:, ph.THRESHOLD] == theirs[:, ph.THRESHOLD]).all()
    for rows in (ours, theirs):
        assert len(np.unique(rows[:, ph.ORDER], axis=0)) == 24


def test_distribution_test_can_fail() -> None:
    ours, theirs = draw_rows(EVEN, 4000), random_rows(EVEN, 4000)
    ours[:, ph.FACTORS.start : ph.HUE + 1] *= 1.1
    ours[:, ph.SIGMA] *= 1.1
    for column in (ph.FLIP, ph.JITTER, ph.GRAY, ph.SIGMA, ph.SOLARIZE):
        ours[:800, column] = 0
    ours[:800, ph.ORDER] = (3, 2, 1, 0)
    for found in compare_rows(ours, theirs):
        assert found.p < SIGNIFICANCE, found


def test_augmented_images_have_the_reference_pipelines_distribution() -> None:
    size, count, scale = 32, 600, (0.25, 1.0)
    photograph = bundled()[1]
    height, width, _ = photograph.shape
    boxes = draw_boxes(np.random.default_rng(0), count, height, width, scale)
    batch = torch.empty(count, size, size, 3, dtype=torch.uint8)
    resized_crops(photograph, boxes, size, batch)
    ours = normalize(augment(batch.permute(0, 3, 1, 2), draw_rows(GLOBAL_AUGMENTATION, count)))
    with seeded(0):
        pipeline = random_pipeline(size, scale, GLOBAL_AUGMENTATION)
        image = Image.fromarray(photograph)
        theirs = torch.stack([pipeline(image) for _ in range(count)])

    def statistics(images: Tensor) -> list[Tensor]:
        detail = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
        return [*images.mean((2, 3)).T, images.std((1, 2, 3)), images.std(1).mean((1, 2)), detail]

    for a, b in zip(statistics(ours), statistics(theirs), strict=True):
        assert ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue > SIGNIFICANCE
    dull = normalize(augment(batch.permute(0, 3, 1, 2), draw_rows(LOCAL_AUGMENTATION, count)))
    assert any(
        ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue < SIGNIFICANCE
        for a, b in zip(statistics(dull), statistics(theirs), strict=True)
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(("size", "count"), [(224, 16), (16, 64)])
def test_cuda_gives_the_cpus_pixels_without_waiting(
    size: int, count: int, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, rows = crop(size, count), torch.from_numpy(draw_rows(EVEN, count))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    on_device = images.to("cuda")
    apply(on_device, rows)  # creates library handles, which are lazy
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = apply(on_device, rows)
        normalized = normalize(result)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result.cpu(), apply(images, rows))
    torch.testing.assert_close(normalized.cpu(), normalize(apply(images, rows)))
