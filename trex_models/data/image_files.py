"""Image files as sources: listed by path, in a folder per class, or in a CSV file."""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from trex_models.data.decode import IMAGE_EXTENSIONS, quoted, read_image
from trex_models.data.sources import checked_labels, digest, encode_labels

_logger = logging.getLogger(__name__)

_EXTENSIONS = tuple(map(os.fsencode, IMAGE_EXTENSIONS))
_DELIMITERS = (",", "\t", ";")
_THREADS, _BLOCK = 8, 4096
_INT64 = (1 << 63) - 1  # inodes of some file systems have a bit more


class FileSource:
    """Images in files: N paths below ``root`` or absolute, text or bytes, and their labels."""

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
        self.classes = list(classes)
        self.labels = checked_labels(labels, len(self.paths), len(self.classes), f"{self.root}: ")

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

    def files(self, part: slice = slice(None)) -> list[bytes]:
        """Return the paths of all images, or of a part, each with the root."""
        root = os.fsencode(self.root)
        return [os.path.join(root, path) for path in self.paths[part].tolist()]  # noqa: PTH118

    def stats(self, require: bool = True) -> np.ndarray:
        """Return size in bytes, time of change in seconds, device and inode, (N, 4) int64.

        Missing files have zeros; if files are required and missing or empty, raise ValueError.
        """
        # The threads wait for network file systems, where one look costs most of a millisecond.
        with ThreadPoolExecutor(_THREADS) as pool:
            blocks = pool.map(_stats, map(self.files, self._blocks()))
            found = np.concatenate([np.empty((0, 4), np.int64), *blocks])
        absent = np.flatnonzero(found[:, 0] <= 0)
        if require and len(absent):
            raise ValueError(
                f"{self.root}: {len(absent)} of {len(self)} image files are missing or empty, the "
                f"first is {quoted(self.name(int(absent[0])))}; unpack or copy them again"
            )
        return found

    def fingerprint(self) -> np.ndarray:
        """Return size and modification time of every file, modulo a prime, (N, 2) uint16."""
        # One block after the other: next to training, neither memory nor storage is its own.
        blocks = [_stats(self.files(part))[:, :2] % 65521 for part in self._blocks()]
        return np.concatenate(blocks, dtype=np.uint16, casting="unsafe")

    def _blocks(self) -> list[slice]:
        return [slice(start, start + _BLOCK) for start in range(0, len(self), _BLOCK)]

    def part(self, indices: np.ndarray) -> FileSource:
        """Return some of the images in the order of their indices, with all classes."""
        return FileSource(self.root, self.paths[indices], self.labels[indices], self.classes)


class FolderSource(FileSource):
    """Images under ``root/<class>/``, at any depth; a class is a folder's name.

    Classes and files are in sorted order, so that an index means the same image everywhere. Names
    of folders and files that begin with a dot are ignored. Files without the ending of an
    image (``decode.IMAGE_EXTENSIONS``) are left out and counted in a line of the log. Nothing is
    decoded before ``read``.

        source = FolderSource("imagenet/train")
        image, label = source.read(0), source.labels[0]  # (H, W, 3) uint8 RGB

    Args:
        root: The folder of class folders.
        classes: Class names of the training set, which need not all have a folder; the folders'
            own by default.

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
        classes, codes = encode_labels(
            names, names if classes is None else classes, str(root), lambda _: "a class folder"
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
                f"({', '.join(empty[:3])}); fill or remove them "
                f"(file types: {' '.join(IMAGE_EXTENSIONS)})"
            )
        log_left_out(root, others)
        labels = np.repeat(codes, [len(found) for found in files])
        super().__init__(root, [path for found in files for path in found], labels, classes)

    def digest(self) -> str:
        """Return a hash of the images' paths below the root, and so of their classes."""
        return digest(*(b"/" + path for path in self.paths.tolist()))


class CsvSource(FileSource):
    """Images listed in a CSV file: a header that names the columns, then one row an image.

    The delimiter is the header's: a comma, a tab or a semicolon. The text is UTF-8. Spaces around
    labels are ignored. Class names are the distinct labels, sorted; as numbers if all are
    integers. Indices follow the rows.

    Args:
        path: The file. Paths of images in it are relative to its folder, or absolute.
        image_column: Column of paths.
        label_column: Column of labels, any text.
        classes: Class names of the training set; the file's own by default.

    Raises:
        ValueError: The file is missing or no such CSV file, a row lacks its path or label or has a
            label of no known class, an image has two labels, or there are fewer than 2 classes.
    """

    def __init__(
        self,
        path: str | Path,
        image_column: str = "path",
        label_column: str = "label",
        classes: Sequence[str] | None = None,
    ) -> None:
        self.path = Path(path)
        label_of: dict[str, str] = {}
        paths, labels = [], []
        for line, image, label in _csv_rows(self.path, image_column, label_column):
            file = os.path.normpath(image) if "./" in image or "//" in image else image
            if label_of.setdefault(file, label) != label:
                raise ValueError(
                    f"{self.path}, line {line}: {quoted(image)} has the label {label!r} here and "
                    f"{label_of[file]!r} above; remove one of the rows"
                )
            paths.append(image)
            labels.append(sys.intern(label))
        if not labels:
            raise ValueError(f"{self.path} has a header and no rows; add a row for each image")
        classes, codes = encode_labels(
            labels, classes, str(self.path), lambda row: quoted(paths[row])
        )
        super().__init__(self.path.parent, paths, codes, classes)


def list_folder(folder: bytes) -> tuple[tuple[int, int], list[bytes], list[bytes]]:
    """Return a folder's device and inode, and its folders and files that are not hidden, sorted."""
    folders: list[bytes] = []
    files: list[bytes] = []
    try:
        status = os.stat(folder)  # noqa: PTH116 - bytes
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(b"."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        name = quoted(os.fsdecode(error.filename or folder))
        raise ValueError(
            f"{name} cannot be listed ({error.strerror}); name another folder, or fix this one"
        ) from error
    return (status.st_dev, status.st_ino), sorted(folders), sorted(files)


def walk(
    root: Path, folder: str = "", visited: dict[tuple[int, int], bytes] | None = None
) -> Iterator[bytes]:
    """Yield the paths below ``root`` of a folder's files at any depth, folders in sorted order.

    Links may lead to folders that were listed before; those of other classes are an error.
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
        (images if path.lower().endswith(_EXTENSIONS) else others).append(path)
    return sorted(images), others


def log_left_out(place: object, others: Iterable[bytes]) -> None:
    """Log in one line how many files were left out of a place, if any."""
    kinds = Counter(sorted(map(_kind, others)))  # ties in the order of names
    if kinds:
        parts = [f"{count:,} {kind}" for kind, count in kinds.most_common(6)]
        _logger.warning("%s: %d file(s) left out (%s)", place, kinds.total(), ", ".join(parts))


def _kind(path: bytes) -> str:
    folder, name = os.path.split(path)
    ending = os.fsdecode(os.path.splitext(name.lower())[1])  # noqa: PTH122 - bytes
    if not folder:
        return "next to the class folders"
    return f"ending in {ending!r}" if ending else "without an ending"


def _stats(files: Sequence[bytes]) -> np.ndarray:
    """Return size, time of change, device and inode of each file, or zeros, (N, 4) int64."""
    stats = np.zeros((len(files), 4), dtype=np.int64)
    for row, file in zip(stats, files, strict=True):
        with suppress(OSError):
            found = os.stat(file)  # noqa: PTH116 - bytes
            row[:] = found.st_size, int(found.st_mtime), found.st_dev, found.st_ino & _INT64
    return stats


def _csv_rows(path: Path, image_column: str, label_column: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, image and label of every row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = max(_DELIMITERS, key=file.readline().count)
            file.seek(0)
            rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [column.strip() for column in next(rows, [])]
            image = _csv_column(path, header, image_column, "--data.image-column")
            label = _csv_column(path, header, label_column, "--data.label-column")
            for row in rows:
                if not any(field.strip() for field in row):
                    continue
                line = rows.line_num
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {line}: {len(row)} fields, but the header has {len(header)}"
                        f"; correct the row (text that holds {delimiter!r} must be quoted)"
                    )
                for column, value in ((image_column, row[image]), (label_column, row[label])):
                    if not value.strip():
                        raise ValueError(f"{path}, line {line}: {column!r} is empty; fill it in")
                yield line, row[image], row[label].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8: {error.reason}"
        raise ValueError(f"{path} cannot be read ({reason}); name a CSV file in UTF-8") from error
    except csv.Error as error:
        line = rows.line_num
        raise ValueError(f"{path}, line {line}: {error}; correct the row's quotes") from error


def _csv_column(path: Path, header: list[str], column: str, option: str) -> int:
    count = header.count(column)
    if count != 1:
        remedy = "rename all but one" if count else f"add a header or give {option} NAME"
        raise ValueError(
            f"{path}: the first line names {count or 'no'} columns {column!r} (it has "
            f"{', '.join(map(repr, header)) or 'nothing'}); {remedy}"
        )
    return header.index(column)
