"""Compare an export with its source on the same images, before anything is written.

Differences are relative to the largest value of the source's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_SIZES = (1, 2, 5)


class Difference(NamedTuple):
    """Difference between an export and its source, for one batch of images."""

    shape: tuple[int, ...]
    absolute: float
    relative: float
    tolerance: float
    """Largest relative difference allowed."""

    @property
    def is_small(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{shape:<20}{self.absolute:<12.1e}{self.relative:<12.1e}{self.tolerance:.1e}"


HEADER = f"{'images':<20}{'absolute':<12}{'relative':<12}tolerance"


def difference(images: Tensor, found: Tensor, expected: Tensor, tolerance: float) -> Difference:
    """Compare two outputs for the same images; those of different shapes differ infinitely."""
    shape = tuple(images.shape)
    if found.shape != expected.shape:
        return Difference(shape, math.inf, math.inf, tolerance)
    absolute = (found.double() - expected.double()).abs().max()
    return Difference(shape, float(absolute), float(absolute / expected.abs().max()), tolerance)


def resolutions(height: int, width: int) -> list[tuple[int, int]]:
    """Return a model's own resolution, a smaller one and one that is not square, in pixels.

    224 x 224 gives 160 x 160 and 288 x 224 too. All others are multiples of 32.
    """
    smaller, larger = (max(32, round(height * part / 7 / 32) * 32) for part in (5, 9))
    return [(height, width), (smaller, smaller), (larger, width)]


def batches(channels: int, resolutions: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Yield batches of 1, 2 and 5 images, (B, C, H, W) float32, of about unit variance.

    Every second image has flat areas and edges: behind a few convolutions noise is the same
    everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    for size, (height, width) in zip(BATCH_SIZES, resolutions, strict=True):
        images = torch.randn(size, channels, height, width, generator=generator)
        areas = torch.randn(size, channels, 4, 3, generator=generator)
        images[::2] = F.interpolate(areas, (height, width))[::2]
        yield images
