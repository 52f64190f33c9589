"""A folder of images per class: the layout of ImageNet's train folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
        classes: Class names that the folders are looked up in (a training set's), which need not
            all have one; the folders' own if None.

    Raises:
        ValueError: A folder cannot be listed, there are fewer than two class folders, one of them
            has no images or is of no known class, or two of them lead to the same folder.
    """

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None) -> None:
        root = Path(root)
        _, folders, others = list_folder(os.fsencode(root))
        names = list(map(os.fsdecode, folders))
        least = 2 if classes is None else 1
        if len(names) < least:
            raise ValueError(
                f"{root} holds {len(names)} class folders, at least {least} are needed: "
                "put the images of each class into a folder of its own"
            )
        code = {name: label for label, name in enumerate(names if classes is None else classes)}
        unknown = [name for name in names if name not in code]
        if unknown:
            raise ValueError(
                f"{root}: {len(unknown)} of {len(names)} class folders are none of the {len(code)} "
                f"classes of the training set ({', '.join(unknown[:3])}); rename or remove them"
            )
        visited: dict[tuple[int, int], bytes] = {}
        files: list[list[bytes]] = []
        for name in names:
            images, left_out = split_images(walk(root, name, visited))
            files.append(images)
            others += left_out
        empty = [name for name, found in zip(names, files, strict=True) if not found]
        if empty:
            raise ValueError(
                f"{root}: no images in {len(empty)} of {len(files)} class folders "
                f"({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}); "
                f"fill or remove them (file types: {' '.join(IMAGE_ENDINGS)})"
            )
        log_left_out(root, others)
        labels = np.repeat([code[name] for name in names], [len(found) for found in files])
        super().__init__(root, [path for found in files for path in found], labels, list(code))

    def digest(self) -> str:
        """Return a hash of the images' paths below the root, and so of their classes."""
        return digest(*(b"/" + path for path in self.paths.tolist()))
