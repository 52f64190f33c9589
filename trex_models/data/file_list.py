"""Image files listed by path: what class folders, CSV files and data sets' own lists come to.

Shapes: N images.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from trex_models.data.decode import IMAGE_ENDINGS, quoted, read_image
from trex_models.data.sources import digest

_logger = logging.getLogger(__name__)

_ENDINGS = tuple(map(os.fsencode, IMAGE_ENDINGS))
_KINDS = 6  # of files left out that are listed
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
                f"first is {quoted(self.name(int(absent[0])))}; unpack or copy them again"
            )
        return found

    def fingerprint(self) -> np.ndarray:
        """Return size and modification time of every file, modulo a prime, (N, 2) uint16."""
        root, found = os.fsencode(self.root), np.empty((len(self), 2), dtype=np.uint16)
        for start in range(0, len(self), _BLOCK):
            block = slice(start, start + _BLOCK)
            files = [os.path.join(root, path) for path in self.paths[block].tolist()]  # noqa: PTH118
            found[block] = np.array(_stats(files), dtype=np.int64)[:, :2] % 65521
        return found

    def part(self, indices: np.ndarray) -> FileSource:
        """Return some of the images in the order of their indices, with all classes."""
        return FileSource(self.root, self.paths[indices], self.labels[indices], self.classes)


def list_folder(folder: bytes) -> tuple[tuple[int, int], list[bytes], list[bytes]]:
    """List a folder, without names that begin with a dot.

    Returns:
        Its device and inode, the names of its folders, and those of all else; both sorted.

    Raises:
        ValueError: It cannot be listed.
    """
    folders: list[bytes] = []
    files: list[bytes] = []
    try:
        status = os.stat(folder)  # noqa: PTH116 - bytes
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(b"."):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        name = quoted(os.fsdecode(error.filename or folder))
        raise ValueError(
            f"{name} cannot be listed ({error.strerror}); name another folder, or fix its "
            "permissions or its storage"
        ) from error
    return (status.st_dev, status.st_ino), sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link to itself, which cannot be read as an image either


def walk(
    root: Path, folder: str = "", visited: dict[tuple[int, int], bytes] | None = None
) -> Iterator[bytes]:
    """Yield the paths below ``root`` of a folder's files at any depth, folders in sorted order.

    Names that begin with a dot are left out, and so are folders that were listed before, which
    links can lead to.

    Args:
        root: The folder that the paths are relative to.
        folder: The folder to walk, below ``root``; a class.
        visited: Folders that were listed for the classes before, to which this one's are added.

    Raises:
        ValueError: A folder cannot be listed, or was listed for another class.
    """
    visited = {} if visited is None else visited
    top, of_class = os.fsencode(root), os.path.join(os.fsencode(folder), b"")  # noqa: PTH118
    pending = [of_class]
    while pending:
        below = pending.pop()
        identity, folders, files = list_folder(os.path.join(top, below))  # noqa: PTH118
        if identity not in visited:
            visited[identity] = below
            pending += [os.path.join(below, name, b"") for name in reversed(folders)]  # noqa: PTH118
            yield from [below + name for name in files]
        elif not visited[identity].startswith(of_class):
            first, second = map(os.fsdecode, (visited[identity], below))
            raise ValueError(
                f"{root}: {first} and {second} are the same folder, so that its images would have "
                "two labels; remove the link"
            )


def split_images(paths: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return the paths that end as those of images do, sorted, and the others."""
    images: list[bytes] = []
    others: list[bytes] = []
    for path in paths:
        (images if path.lower().endswith(_ENDINGS) else others).append(path)
    return sorted(images), others


def log_left_out(place: object, others: Iterable[bytes]) -> None:
    """Log in one line how many files were left out, if any.

    Args:
        place: What the images are called.
        others: Paths of the files; without a folder if they are next to class folders.
    """
    kinds = Counter(map(_kind, others))
    if kinds:
        parts = [f"{count:,} {kind}" for kind, count in kinds.most_common(_KINDS)]
        parts += ["..."] if len(kinds) > _KINDS else []
        _logger.warning("%s: %d file(s) left out (%s)", place, kinds.total(), ", ".join(parts))


def _kind(path: bytes) -> str:
    folder, name = os.path.split(path)
    ending = os.fsdecode(os.path.splitext(name.lower())[1])  # noqa: PTH122 - bytes
    if not folder:
        return "next to the class folders"
    return f"ending in {ending!r}" if ending else "without an ending"


def _stats(files: Sequence[bytes]) -> list[tuple[int, int, int, int]]:
    """Return size, time of change, device and inode of each file, 0 if there is none."""
    stats = [(0, 0, 0, 0)] * len(files)
    for position, file in enumerate(files):
        with suppress(OSError):
            found = os.stat(file)  # noqa: PTH116 - bytes
            times = found.st_size, int(found.st_mtime)
            stats[position] = *times, found.st_dev, found.st_ino & _INT64
    return stats
