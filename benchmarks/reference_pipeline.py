"""Reference data pipeline: PIL images and torchvision v1 transforms, as commonly used.

`reference_*` apply given parameters, in rows as in trex_models.data.photometric. `random_pipeline`
draws random parameters; `random_boxes` and `random_rows` return samples of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from trex_models.data import photometric as ph
from trex_models.data.multicrop import Box, CropSpec
from trex_models.train.build import crop_specs
from trex_models.train.config import CropsConfig

Rows = NDArray[np.float32]  # (B, NUM_PARAMETERS)

SPECS = crop_specs(CropsConfig())
"""The recipe's crops."""

_RATIO = (3 / 4, 4 / 3)


def reference_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Cut a box and resize it to a square of `size` pixels."""
    top, left, height, width = box
    return TF.resized_crop(
        image, top, left, height, width, [size, size], T.InterpolationMode.BICUBIC, antialias=True
    )


def reference_photometric(image: Image.Image, row: Rows) -> Image.Image:
    """Apply a row of parameters, (NUM_PARAMETERS,), in the recipe's order of operations."""
    if row[ph.FLIP]:
        image = TF.hflip(image)
    if row[ph.JITTER]:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        values = (*row[ph.FACTORS].tolist(), float(row[ph.HUE]))
        for part in row[ph.ORDER].astype(int):
            image = adjust[part](image, values[part])
    if row[ph.GRAY]:
        image = TF.to_grayscale(image, num_output_channels=3)
    if row[ph.SIGMA]:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(row[ph.SIGMA])))
    return ImageOps.solarize(image, int(row[ph.THRESHOLD])) if row[ph.SOLARIZE] else image


def reference_tensor(image: Image.Image) -> Tensor:
    """Convert an image to a normalized float32 tensor, (3, H, W)."""
    return TF.normalize(TF.to_tensor(image), ph.IMAGENET_MEAN, ph.IMAGENET_STD)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the pipeline's random generators, and restore their states afterwards."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        yield
    random.setstate(state)


class RandomBlur:
    """PIL's GaussianBlur with a random sigma from a range."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def draw(self) -> float:
        """Draw a sigma in pixels."""
        return random.uniform(*self.sigma)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image with a random sigma."""
        return image.filter(ImageFilter.GaussianBlur(radius=self.draw()))


def random_pipeline(
    size: int, scale: tuple[float, float], augmentation: ph.PhotometricAugmentation
) -> Callable[[Image.Image], Tensor]:
    """Return torchvision's random crop, photometric augmentation and normalization."""
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale, _RATIO, T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(augmentation.flip),
            T.RandomApply([_jitter(augmentation)], augmentation.jitter),
            T.RandomGrayscale(augmentation.gray),
            T.RandomApply([RandomBlur(augmentation.sigma)], augmentation.blur),
            T.RandomSolarize(augmentation.threshold, augmentation.solarize),
            T.ToTensor(),
            T.Normalize(ph.IMAGENET_MEAN, ph.IMAGENET_STD),
        ]
    )


class RandomCrops:
    """Transform that returns all crops of an image: a list of tensors, (3, S, S)."""

    def __init__(self, specs: Sequence[CropSpec]) -> None:
        self.pipelines = [
            pipeline
            for spec in specs
            for pipeline in [random_pipeline(spec.size, spec.scale, spec.augmentation)] * spec.count
        ]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Return random crops of an image."""
        return [pipeline(image) for pipeline in self.pipelines]


def reference_dataset(root: Path, specs: Sequence[CropSpec]) -> Dataset[tuple[list[Tensor], int]]:
    """Return an ImageFolder whose samples are a list of crops and a label."""
    dataset: Dataset[tuple[list[Tensor], int]] = ImageFolder(root, RandomCrops(specs))
    return dataset


def random_boxes(
    height: int, width: int, scale: tuple[float, float], count: int, seed: int = 0
) -> NDArray[np.int64]:
    """Draw crop boxes with torchvision, (count, 4): top, left, height, width."""
    image = torch.empty(3, height, width)
    with seeded(seed):
        return np.array(
            [T.RandomResizedCrop.get_params(image, scale, _RATIO) for _ in range(count)]
        )


def random_rows(augmentation: ph.PhotometricAugmentation, count: int, seed: int = 0) -> Rows:
    """Draw parameters with torchvision's transforms, (count, NUM_PARAMETERS).

    A probe image of two pixels shows whether a transform was applied.
    """
    jitter, blur = _jitter(augmentation), RandomBlur(augmentation.sigma)
    probe = Image.new("RGB", (2, 1))
    probe.putdata([(255, 200, 150), (200, 255, 150)])
    flip, gray, solarize = (
        T.RandomHorizontalFlip(augmentation.flip),
        T.RandomGrayscale(augmentation.gray),
        T.RandomSolarize(augmentation.threshold, augmentation.solarize),
    )
    jitters = T.RandomApply([lambda _: None], augmentation.jitter)
    sigma = T.RandomApply([lambda _: blur.draw()], augmentation.blur)
    rows = np.zeros((count, ph.NUM_PARAMETERS), np.float32)
    with seeded(seed):
        for row in rows:
            row[ph.FLIP] = flip(probe) != probe
            row[ph.JITTER] = jitters(probe) is None
            order, *values = jitter.get_params(
                jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
            )
            row[ph.ORDER] = order
            row[ph.FACTORS.start : ph.HUE + 1] = values
            row[ph.GRAY] = gray(probe) != probe
            row[ph.SIGMA] = sigma(0)
            row[ph.SOLARIZE] = solarize(probe) != probe
            row[ph.THRESHOLD] = augmentation.threshold
    return rows


def _jitter(augmentation: ph.PhotometricAugmentation) -> T.ColorJitter:
    return T.ColorJitter(
        augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue
    )
