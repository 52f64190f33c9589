"""Photographs for benchmarks: synthetic ones with ImageNet's file sizes, and bundled real ones.

The synthetic photographs have the properties that determine the cost of decoding and cropping: a
1/f spectrum of color, object edges in front of a shaded background, and sensor noise. They are
rendered individually, 30 to 60 ms each at 500 x 375.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

NUM_CLASSES = 8


@dataclass(frozen=True)
class Kind:
    """Properties of JPEG files: image sizes, file size and exponent of the 1/f spectrum."""

    sizes: tuple[tuple[int, int], ...]
    kilobytes: int
    falloff: float


KINDS = {
    "standard": Kind(((500, 375),) * 7 + ((375, 500),) * 2 + ((500, 333),), 100, 1.2),
    "small": Kind(((500, 375),) * 10, 30, 1.4),
    "large": Kind(((2000, 1500),) * 10, 500, 1.4),
    "huge": Kind(((4000, 3000),) * 10, 2000, 1.4),
}
"""ImageNet's usual sizes at about 100 KB; a third of the file size; cameras' resolutions."""


def write_photographs(root: Path, count: int, kind: str, seed: int = 0) -> None:
    """Write different JPEG files into `NUM_CLASSES` class folders."""
    if count < NUM_CLASSES:
        raise ValueError(f"count must be at least {NUM_CLASSES}, one per class, got {count}")
    for index in range(count):
        folder = root / f"class{index % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:05d}.jpg").write_bytes(jpeg(KINDS[kind], index, seed))


def jpeg(kind: Kind, index: int, seed: int = 0) -> bytes:
    """Return a JPEG file, with the quality chosen to match the file size of the kind."""
    width, height = kind.sizes[index % len(kind.sizes)]
    image = Image.fromarray(
        photograph(np.random.default_rng((seed, index)), width, height, kind.falloff)
    )
    low, high = 1, 98
    while True:
        quality = (low + high) // 2
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        size = file.tell() / 1000
        if 0.9 * kind.kilobytes <= size <= 1.1 * kind.kilobytes:
            return file.getvalue()
        if high - low <= 1:
            raise ValueError(f"photograph {index} has {size} KB, no JPEG quality fits {kind}")
        low, high = (quality, high) if size < kind.kilobytes else (low, quality)


def photograph(
    rng: np.random.Generator, width: int, height: int, falloff: float
) -> NDArray[np.uint8]:
    """Render a random photograph, (height, width, 3)."""
    texture = _texture(rng, width, height, falloff)
    objects = Image.new("RGBA", (width, height))
    brush = ImageDraw.Draw(objects)
    for _ in range(rng.integers(3, 9)):
        x, y = rng.uniform(0, (width, height))
        corners = [(x + dx, y + dy) for dx, dy in rng.normal(0, height / 5, (5, 2))]
        color = tuple(rng.integers(0, 256, 3).tolist())
        if rng.random() < 0.5:
            brush.polygon(corners, (*color, 255))
        else:
            radius = rng.uniform(height / 20, height / 4)
            brush.ellipse((x - radius, y - radius, x + radius, y + radius), (*color, 255))
    layer = np.asarray(objects).astype(np.float32)
    top, bottom = rng.uniform(60, 190, (2, 3)).astype(np.float32)
    shading = top + (bottom - top) * np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    image = np.where(layer[..., 3:] > 0, layer[..., :3] * 0.7 + 30, shading)
    image += rng.uniform(20, 35) * texture
    image += 2 * rng.standard_normal(image.shape, dtype=np.float32)
    return image.clip(0, 255).astype(np.uint8)


def _texture(
    rng: np.random.Generator, width: int, height: int, falloff: float
) -> NDArray[np.float32]:
    """Return a random texture with unit-variance luma and a third of that amplitude in chroma."""
    frequency = np.hypot(
        np.fft.fftfreq(height, 1 / height)[:, None], np.fft.rfftfreq(width, 1 / width)
    ).astype(np.float32)
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((3, *frequency.shape, 2), dtype=np.float32).view(np.complex64)
    fields = np.fft.irfft2(noise[..., 0] * frequency**-falloff, (height, width))
    luma, red, blue = fields / fields.std((1, 2), keepdims=True)
    texture: NDArray[np.float32] = np.stack(
        [luma + red / 3, luma - red / 6 - blue / 9, luma + blue / 3], axis=2
    ).astype(np.float32)
    return texture


@cache
def bundled() -> tuple[NDArray[np.uint8], ...]:
    """Return the color photographs bundled with scikit-learn and scikit-image, (H, W, 3) each."""
    names = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "retina")
    images = load_sample_images().images + [getattr(skimage.data, name)() for name in names]
    return tuple(np.array(image) for image in images)
