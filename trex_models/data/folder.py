"""A folder of images per class: the layout of ImageNet's train folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from trex_models.data.file_list import FileSource, image_files
from trex_models.data.sources import digest


class FolderSource(FileSource):
    """Images under ``root/<class>/``, at any depth; a class is a folder's name.

    Classes and files are in sorted order, so that an index means the same image everywhere. Names
    that begin with a dot do not count, of folders and of files. Nothing is decoded before ``read``.

        source = FolderSource("imagenet/train")
        image, label = source.read(0), source.labels[0]  # (H, W, 3) uint8 RGB

    Args:
        root: The folder of class folders.

    Raises:
        ValueError: ``root`` is no folder, has fewer than two class folders, or one of them has
            no images.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root} is no folder; name the folder of class folders")
        folders = (entry.name for entry in os.scandir(root) if entry.is_dir())
        classes = sorted(name for name in folders if not name.startswith("."))
        if len(classes) < 2:
            raise ValueError(
                f"{root} holds {len(classes)} class folders, at least 2 are needed: "
                "put the images of each class into a folder of its own"
            )
        files = [image_files(root, name) for name in classes]
        empty = [name for name, found in zip(classes, files, strict=True) if not found]
        if empty:
            raise ValueError(
                f"{root}: no images in {len(empty)} of {len(files)} class folders "
                f"({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}); "
                f"fill or remove them (file types: {' '.join(IMG_EXTENSIONS)})"
            )
        labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
        super().__init__(root, [path for found in files for path in found], labels, classes)

    def digest(self) -> str:
        """Return a hash of the images' paths below the root, and so of their classes."""
        return digest(*(b"/" + path for path in self.paths.tolist()))
