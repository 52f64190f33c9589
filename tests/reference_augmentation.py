"""The usual pipeline, PIL images through torchvision v1 transforms: what ours is measured against.

`reference_*` apply given parameters (the row's layout is that of trex_models.data.photometric);
`random_pipeline` draws its own.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import skimage.data
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

from trex_models.data import photometric as ph
from trex_models.data.crops import Box

Row = NDArray[np.float32]


@cache
def photographs() -> tuple[NDArray[np.uint8], ...]:
    """Return colour photographs that scikit-learn and scikit-image bring along, (H, W, 3) each."""
    names = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "retina")
    images = load_sample_images().images + [getattr(skimage.data, name)() for name in names]
    return tuple(np.array(image) for image in images)


def reference_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    top, left, height, width = box
    return TF.resized_crop(
        image, top, left, height, width, [size, size], T.InterpolationMode.BICUBIC, antialias=True
    )


def reference_flip(image: Image.Image, row: Row) -> Image.Image:
    return TF.hflip(image) if row[ph.FLIP] else image


def reference_jitter(image: Image.Image, row: Row) -> Image.Image:
    if not row[ph.JITTER]:
        return image
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    values = (*row[ph.FACTORS].tolist(), float(row[ph.HUE]))
    for part in row[ph.ORDER].astype(int):
        image = adjust[part](image, values[part])
    return image


def reference_grey(image: Image.Image, row: Row) -> Image.Image:
    return TF.to_grayscale(image, num_output_channels=3) if row[ph.GREY] else image


def reference_blur(image: Image.Image, row: Row) -> Image.Image:
    if not row[ph.SIGMA]:
        return image
    return image.filter(ImageFilter.GaussianBlur(radius=float(row[ph.SIGMA])))


def reference_solarize(image: Image.Image, row: Row) -> Image.Image:
    return ImageOps.solarize(image, int(row[ph.THRESHOLD])) if row[ph.SOLARIZE] else image


STEPS = (reference_flip, reference_jitter, reference_grey, reference_blur, reference_solarize)


def reference_photometric(image: Image.Image, row: Row) -> Image.Image:
    for step in STEPS:
        image = step(image, row)
    return image


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what `random_pipeline` draws from, and put its state back afterwards."""
    state = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        yield
    random.setstate(state)


class RandomBlur:
    """GaussianBlur with a sigma drawn from a range, as PIL has it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def random_pipeline(
    size: int, scale: tuple[float, float], law: ph.PhotometricLaw
) -> Callable[[Image.Image], Tensor]:
    """Return crop, photometric augmentation and normalisation by torchvision, all drawn inside."""
    jitter = T.ColorJitter(law.brightness, law.contrast, law.saturation, law.hue)
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(law.flip),
            T.RandomApply([jitter], law.jitter),
            T.RandomGrayscale(law.grey),
            T.RandomApply([RandomBlur(law.sigma)], law.blur),
            T.RandomSolarize(law.threshold, law.solarize),
            T.ToTensor(),
            T.Normalize(ph.IMAGENET_MEAN, ph.IMAGENET_STD),
        ]
    )
