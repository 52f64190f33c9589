"""A folder of images per class: the layout of ImageNet's train folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from trex_models.data.decode import IMAGE_ENDINGS
from trex_models.data.file_list import FileSource, list_folder, log_left_out, split_images, walk
from trex_models.data.sources import digest


class FolderSource(FileSource):
    """Images under ``root/<class>/``, at any depth; a class is a folder's name.

    Classes and files are in sorted order, so that an index means the same image everywhere. Names
    that begin with a dot do not count, of folders and of files. Files without the ending of an
    image (``decode.IMAGE_ENDINGS``) are left out and counted in a line of the log. Nothing is
    decoded before ``read``.

        source = FolderSource("imagenet/train")
        image, label = source.read(0), source.labels[0]  # (H, W, 3) uint8 RGB

    Args:
        root: The folder of class folders.

    Raises:
        ValueError: A folder cannot be listed, there are fewer than two class folders, one of them
            has no images, or two of them lead to the same folder.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        _, folders, others = list_folder(os.fsencode(root))
        classes = list(map(os.fsdecode, folders))
        if len(classes) < 2:
            raise ValueError(
                f"{root} holds {len(classes)} class folders, at least 2 are needed: "
                "put the images of each class into a folder of its own"
            )
        visited: dict[tuple[int, int], bytes] = {}
        files: list[list[bytes]] = []
        for name in classes:
            images, left_out = split_images(walk(root, name, visited))
            files.append(images)
            others += left_out
        empty = [name for name, found in zip(classes, files, strict=True) if not found]
        if empty:
            raise ValueError(
                f"{root}: no images in {len(empty)} of {len(files)} class folders "
                f"({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}); "
                f"fill or remove them (file types: {' '.join(IMAGE_ENDINGS)})"
            )
        log_left_out(root, others)
        labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
        super().__init__(root, [path for found in files for path in found], labels, classes)

    def digest(self) -> str:
        """Return a hash of the images' paths below the root, and so of their classes."""
        return digest(*(b"/" + path for path in self.paths.tolist()))
