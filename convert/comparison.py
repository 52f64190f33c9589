"""Comparison of an export with its source on the same images, before any file is written.

Relative differences are divided by the largest absolute value of the source's outputs.
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
    """Largest difference between the outputs of an export and its source for one batch."""

    shape: tuple[int, ...]
    absolute: float
    relative: float
    tolerance: float
    """Largest relative difference allowed."""

    @property
    def is_small(self) -> bool:
        """True if the relative difference is within the tolerance; False for NaN."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{shape:<20}{self.absolute:<12.1e}{self.relative:<12.1e}{self.tolerance:.1e}"


HEADER = f"{'images':<20}{'absolute':<12}{'relative':<12}tolerance"


def difference(images: Tensor, output: Tensor, expected: Tensor, tolerance: float) -> Difference:
    """Compare two outputs for the same images; the difference of unequal shapes is infinite."""
    shape = tuple(images.shape)
    if output.shape != expected.shape:
        return Difference(shape, math.inf, math.inf, tolerance)
    absolute = (output.double() - expected.double()).abs().max()
    return Difference(shape, float(absolute), float(absolute / expected.abs().max()), tolerance)


def resolutions(height: int, width: int) -> list[tuple[int, int]]:
    """Return three test resolutions in pixels: the model's, a smaller one, a non-square one.

    For 224 x 224, the others are 160 x 160 and 288 x 224. They are always multiples of 32.
    """
    smaller, larger = (max(32, round(height * part / 7 / 32) * 32) for part in (5, 9))
    return [(height, width), (smaller, smaller), (larger, width)]


def batches(channels: int, resolutions: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Yield float32 batches of 1, 2 and 5 images, (B, C, H, W), with about unit variance.

    Every second image has flat areas and edges, since a few convolutions average pure noise to
    nearly constant features.
    """
    generator = torch.Generator().manual_seed(0)
    for size, (height, width) in zip(BATCH_SIZES, resolutions, strict=True):
        images = torch.randn(size, channels, height, width, generator=generator)
        areas = torch.randn(size, channels, 4, 3, generator=generator)
        images[::2] = F.interpolate(areas, (height, width))[::2]
        yield images
