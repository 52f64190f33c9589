"""Small images and their files."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import pytest


def save_image(
    path: Path, seed: int = 0, size: tuple[int, int] = (40, 30), **options: object
) -> np.ndarray:
    """Save a smooth random image; return its pixels before compression."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = picture(height, width, seed=seed)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return pixels


def fail_to_list(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make listing a folder fail as on a broken disk; permissions do not affect root."""
    scandir = os.scandir

    def failing(path: bytes) -> object:
        if Path(os.fsdecode(path)).absolute() == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


def picture(height: int = 30, width: int = 40, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random pixels, (H, W, channels) uint8."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(noise[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def save_classes(
    root: Path, count: int, classes: Iterable[str] = "ab", name: str = "{}.jpg"
) -> Path:
    """Save class folders of ``count`` images each, equal in all classes; return ``root``."""
    for label in classes:
        for index in range(count):
            save_image(root / label / name.format(index), seed=index)
    return root


def save_colors(root: Path, count: int, side: int, classes: int = 3) -> None:
    """Save images of each class, whose color is the brightest channel."""
    rng = np.random.default_rng(count)
    for label in range(classes):
        for index in range(count):
            pixels = rng.integers(0, 80, (side, side, 3), dtype=np.uint8)
            pixels[..., label] += 170
            path = root / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
