"""A folder of images per class: the layout of ImageNet's train folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from trex_models.data.decode import read_image
from trex_models.data.sources import digest


class FolderSource:
    """Images under ``root/<class>/``, at any depth; a class is a folder's name.

    Classes and files are in sorted order, so that an index means the same image everywhere.

    Args:
        root: The folder of class folders.

    Raises:
        ValueError: ``root`` is no folder, has fewer than two class folders, or one of them has
            no images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is no folder; name the folder of class folders")
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.root} holds {len(self.classes)} class folders, at least 2 are needed: "
                "put the images of each class into a folder of its own"
            )
        files = [_image_files(self.root / name) for name in self.classes]
        empty = [name for name, found in zip(self.classes, files, strict=True) if not found]
        if empty:
            raise ValueError(
                f"{self.root}: no images in {len(empty)} of {len(files)} class folders "
                f"({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}); "
                f"fill or remove them (file types: {' '.join(IMG_EXTENSIONS)})"
            )
        self.labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
        # Bytes in one array, not a list of strings: reading it does not copy memory into workers.
        self._paths = np.array([path for found in files for path in found])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (H, W, 3) uint8 RGB; ValueError names a file that is no image."""
        return read_image(Path(self.name(index)))

    def name(self, index: int) -> str:
        """Return the image's path."""
        return os.fsdecode(self._paths[index])

    def digest(self) -> str:
        """Return a hash of the images' paths below the root, and so of their classes."""
        start = len(os.fsencode(self.root))
        return digest(*(path[start:] for path in self._paths.tolist()))


def _image_files(folder: Path) -> list[bytes]:
    return sorted(
        os.fsencode(Path(parent) / name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
