"""Image files listed by path: what class folders, CSV files and data sets' own lists come to.

Shapes: N images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from trex_models.data.decode import read_image
from trex_models.data.sources import digest

_THREADS, _BLOCK = 8, 4096
_INT64 = (1 << 63) - 1  # inodes of some file systems have a bit more


class FileSource:
    """Images in files, by index.

    Args:
        root: The folder that the paths are relative to.
        paths: N paths below ``root``, text or file system bytes; an absolute path stays as it is.
        labels: N labels in [0, len(classes)).
        classes: Class names; a name's position is its label.

    Raises:
        ValueError: The lengths differ, or a label has no class.
    """

    def __init__(
        self,
        root: str | Path,
        paths: Sequence[str] | Sequence[bytes] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
    ) -> None:
        self.root = Path(root)
        # Bytes in one array, not a list of strings: reading it does not copy memory into workers.
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(classes)
        if self.labels.shape != self.paths.shape:
            raise ValueError(
                f"{self.root}: need one label a file: {len(self.paths)} files, "
                f"labels {self.labels.shape}"
            )
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"{self.root}: labels span [{self.labels.min()}, {self.labels.max()}], "
                f"outside the {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (H, W, 3) uint8 RGB; ValueError names a file that is no image."""
        return read_image(Path(self.name(index)))

    def name(self, index: int) -> str:
        """Return the image's path."""
        return str(self.root / os.fsdecode(self.paths[index]))

    def digest(self) -> str:
        """Return a hash of paths below the root, labels and classes."""
        return digest(b"\0".join(self.paths.tolist()), self.labels, *self.classes)

    def files(self) -> list[bytes]:
        """Return all paths, each with the root."""
        root = os.fsencode(self.root)
        return [os.path.join(root, path) for path in self.paths.tolist()]  # noqa: PTH118 - bytes

    def stats(self, require: bool = True) -> np.ndarray:
        """Return size in bytes, time of change in seconds, device and inode, (N, 4) int64.

        Args:
            require: Whether every file must be there; zeros stand for one that is not.

        Raises:
            ValueError: Files are missing or empty.
        """
        files = self.files()
        blocks = [files[start : start + _BLOCK] for start in range(0, len(files), _BLOCK)]
        # The threads wait for network file systems, where one look costs most of a millisecond.
        with ThreadPoolExecutor(_THREADS) as pool:
            stats = [stat for block in pool.map(_stats, blocks) for stat in block]
        found = np.array(stats, dtype=np.int64).reshape(-1, 4)
        absent = np.flatnonzero(found[:, 0] <= 0)
        if require and len(absent):
            raise ValueError(
                f"{self.root}: {len(absent)} of {len(self)} image files are missing or empty, the "
                f"first is {self.name(int(absent[0]))}; unpack or copy them again"
            )
        return found

    def part(self, indices: np.ndarray) -> FileSource:
        """Return some of the images in the order of their indices, with all classes."""
        return FileSource(self.root, self.paths[indices], self.labels[indices], self.classes)


def image_files(root: Path, folder: str) -> list[bytes]:
    """Return the paths of a folder's images below the root, at any depth, sorted.

    Names that begin with a dot do not count. A folder that links lead to again is looked into once.
    """
    seen: set[tuple[int, int]] = set()
    found: list[bytes] = []
    for parent, folders, names in os.walk(root / folder, followlinks=True):
        place = Path(parent).stat()
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(root)
        found += [
            os.fsencode(below / name)
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def _stats(files: Sequence[bytes]) -> list[tuple[int, int, int, int]]:
    """Return size, time of change, device and inode of each file, 0 if there is none."""
    stats = [(0, 0, 0, 0)] * len(files)
    for position, file in enumerate(files):
        with suppress(OSError):
            found = os.stat(file)  # noqa: PTH116 - bytes
            times = found.st_size, int(found.st_mtime)
            stats[position] = *times, found.st_dev, found.st_ino & _INT64
    return stats
