"""Sources of image files: from a list of paths, from class folders, or from a CSV file."""

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

from trex_models.cli import progress_bar
from trex_models.data.decode import IMAGE_EXTENSIONS, UnreadableImageError, quoted, read_image
from trex_models.data.sources import EncodedSource, checked_labels, digest, encode_labels

_logger = logging.getLogger(__name__)

_EXTENSIONS = tuple(map(os.fsencode, IMAGE_EXTENSIONS))
_DELIMITERS = (",", "\t", ";")
_THREADS, _BLOCK = 8, 4096
_INT64 = (1 << 63) - 1  # some file systems have 64-bit unsigned inodes


class FileSource(EncodedSource):
    """Source of image files: N paths, absolute or relative to ``root``, and their labels."""

    def __init__(
        self,
        root: str | Path,
        paths: Sequence[str] | Sequence[bytes] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
    ) -> None:
        self.root = Path(root)
        # One array: reading a list of strings would copy its memory in every forked worker.
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.classes = list(classes)
        self.labels = checked_labels(labels, len(self.paths), len(self.classes), f"{self.root}: ")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (H, W, 3) uint8 RGB; raise a ValueError if the file is unreadable."""
        return read_image(self.name(index), self.reduction)

    def name(self, index: int) -> str:
        """Return the image's path."""
        return os.path.join(self.root, os.fsdecode(self.paths[index]))  # noqa: PTH118 - faster

    def digest(self) -> str:
        """Return a hash of the paths without the root, the labels and the classes."""
        return digest(b"\0".join(self.paths.tolist()), self.labels, *self.classes)

    def files(self, part: slice = slice(None)) -> list[bytes]:
        """Return the full paths of all images or a slice of them."""
        root = os.fsencode(self.root)
        return [os.path.join(root, path) for path in self.paths[part].tolist()]  # noqa: PTH118

    def stats(self, require: bool = True) -> np.ndarray:
        """Return file sizes in bytes, mtimes in seconds, devices and inodes, (N, 4) int64.

        Missing files are 0; with ``require``, they and empty files raise UnreadableImageError.
        """
        # Threads, because on network file systems each stat takes almost a millisecond.
        with ThreadPoolExecutor(_THREADS) as pool:
            blocks = pool.map(_stats, map(self.files, self._blocks()))
            stats = np.concatenate([np.empty((0, 4), np.int64), *blocks])
        missing = np.flatnonzero(stats[:, 0] <= 0)
        if require and len(missing):
            raise UnreadableImageError(
                f"{self.root}: {len(missing)} of {len(self)} image files are missing or empty, the "
                f"first is {quoted(self.name(int(missing[0])))}; unpack or copy them again"
            )
        return stats

    def fingerprint(self) -> np.ndarray:
        """Return size and modification time of each file, modulo a prime, (N, 2) uint16."""
        # One block at a time, because training uses memory and storage at the same time.
        blocks = [_stats(self.files(part))[:, :2] % 65521 for part in self._blocks()]
        return np.concatenate(blocks, dtype=np.uint16, casting="unsafe")

    def _blocks(self) -> list[slice]:
        return [slice(start, start + _BLOCK) for start in range(0, len(self), _BLOCK)]

    def part(self, indices: np.ndarray) -> FileSource:
        """Return a source of the images at the given indices, in this order, with all classes."""
        return FileSource(self.root, self.paths[indices], self.labels[indices], self.classes)


class FolderSource(FileSource):
    """Source of images in class folders, ``root/<class>/``, at any depth.

    Classes and files are sorted by name, so that an index is the same image on every machine.
    Folders and files whose names begin with a dot are ignored. Files without an image extension
    (``decode.IMAGE_EXTENSIONS``) are ignored, and a log line says how many. Images are decoded only
    by ``read``.

        source = FolderSource("imagenet/train")
        image, label = source.read(0), source.labels[0]  # (H, W, 3) uint8 RGB

    Args:
        root: Folder that contains the class folders.
        classes: Class names of the training set, some of which may have no folder here; by default,
            the names of the class folders.

    Raises:
        ValueError: A folder cannot be listed, there are fewer than two class folders (one with
            ``classes``), one has no images or an unknown class, or two are the same folder.
    """

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None) -> None:
        root = Path(root)
        _, folders, others = list_folder(os.fsencode(root))
        names = list(map(os.fsdecode, folders))
        least = 2 if classes is None else 1
        if len(names) < least:
            raise ValueError(
                f"{root} contains {len(names)} class folders, at least {least} are required: "
                "put the images of each class into a separate folder"
            )
        classes, codes = encode_labels(
            names, names if classes is None else classes, str(root), lambda _: "a class folder"
        )
        visited: dict[tuple[int, int], bytes] = {}
        files: list[list[bytes]] = []
        options = {"iterable": names, "delay": 2, "leave": False}
        for name in progress_bar(len(names), f"list {root}", "folder", **options):
            images, skipped = split_images(walk(root, name, visited))
            files.append(images)
            others += skipped
        empty = [name for name, images in zip(names, files, strict=True) if not images]
        if empty:
            raise ValueError(
                f"{root}: no images in {len(empty)} of {len(files)} class folders "
                f"({', '.join(empty[:3])}); add images or remove the folders "
                f"(extensions of images: {' '.join(IMAGE_EXTENSIONS)})"
            )
        log_ignored(root, others)
        labels = np.repeat(codes, [len(images) for images in files])
        super().__init__(root, [path for images in files for path in images], labels, classes)

    def digest(self) -> str:
        """Return a hash of the image paths without the root, which include the class names."""
        return digest(*(b"/" + path for path in self.paths.tolist()))


class CsvSource(FileSource):
    """Source of images listed in a CSV file with a header and one row per image.

    The encoding is UTF-8. The delimiter (comma, tab or semicolon) is detected from the header.
    Spaces around labels are ignored. Indices follow the order of the rows.

    Args:
        path: CSV file. The paths of images in it are absolute or relative to its folder.
        image_column: Name of the column of image paths.
        label_column: Name of the column of labels, which may be any text.
        classes: Class names of the training set. By default, the distinct labels of the file,
            sorted (numerically if all are integers).

    Raises:
        ValueError: The file is missing or not a valid CSV file, a row has no path, no label or an
            unknown label, an image has two labels, or there are fewer than 2 classes.
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
        rows = csv_rows(self.path)
        _, header = next(rows)
        columns = [
            csv_column(self.path, header, image_column, "--data.image-column"),
            csv_column(self.path, header, label_column, "--data.label-column"),
        ]
        for line, row in rows:
            image, label = (csv_value(self.path, line, header, row, column) for column in columns)
            label = label.strip()
            file = os.path.normpath(image) if "./" in image or "//" in image else image
            if label_of.setdefault(file, label) != label:
                raise ValueError(
                    f"{self.path}, line {line}: {quoted(image)} has the label {label!r} here and "
                    f"{label_of[file]!r} above; remove one of the rows"
                )
            paths.append(image)
            labels.append(sys.intern(label))
        if not labels:
            raise ValueError(f"{self.path} has a header but no rows; add a row for each image")
        where = str(self.path)
        classes, codes = encode_labels(labels, classes, where, lambda row: quoted(paths[row]))
        super().__init__(self.path.parent, paths, codes, classes)


def open_unlabeled(root: str) -> FileSource:
    """Open the images of a folder, at any depth, as one class."""
    images, others = split_images(walk(Path(root)))
    if not images:
        raise ValueError(f"{root} contains no images; pass another folder")
    log_ignored(root, [os.path.join(os.fsencode(root), path) for path in others])  # noqa: PTH118
    return FileSource(root, images, [0] * len(images), ["images"])


def list_folder(folder: bytes) -> tuple[tuple[int, int], list[bytes], list[bytes]]:
    """Return a folder's (device, inode), subfolders and files, sorted, without hidden ones."""
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
            f"{name} cannot be listed ({error.strerror}); use a folder that exists and is readable"
        ) from error
    return (status.st_dev, status.st_ino), sorted(folders), sorted(files)


def walk(
    root: Path, folder: str = "", visited: dict[tuple[int, int], bytes] | None = None
) -> Iterator[bytes]:
    """Yield the files of a folder at any depth, as paths relative to ``root``.

    A link to a visited folder is ignored within a class, and an error across classes.
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
                f"{root}: {first} and {second} are the same folder, so its images would have two "
                "labels; remove the link"
            )


def split_images(paths: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Split paths into those with an image extension, which are sorted, and the others."""
    images: list[bytes] = []
    others: list[bytes] = []
    for path in paths:
        (images if path.lower().endswith(_EXTENSIONS) else others).append(path)
    return sorted(images), others


def log_ignored(root: object, ignored: Iterable[bytes]) -> None:
    """Log how many files were ignored, by extension, in one line; nothing if there are none."""
    kinds = Counter(sorted(map(_kind, ignored)))  # sorted, so that ties are in order of names
    if kinds:
        parts = [f"{count:,} {kind}" for kind, count in kinds.most_common(6)]
        parts += [f"{len(kinds) - 6} other extensions"] * (len(kinds) > 6)
        _logger.warning("%s: %d file(s) ignored (%s)", root, kinds.total(), ", ".join(parts))


def _kind(path: bytes) -> str:
    folder, name = os.path.split(path)
    extension = os.fsdecode(os.path.splitext(name.lower())[1])  # noqa: PTH122 - bytes
    if not folder:
        return "outside the class folders"
    return f"with extension {extension!r}" if extension else "without an extension"


def _stats(files: Sequence[bytes]) -> np.ndarray:
    """Return size, mtime, device and inode of each file, zeros if missing, (N, 4) int64."""
    stats = np.zeros((len(files), 4), dtype=np.int64)
    for row, file in zip(stats, files, strict=True):
        with suppress(OSError):
            status = os.stat(file)  # noqa: PTH116 - bytes
            row[:] = status.st_size, int(status.st_mtime), status.st_dev, status.st_ino & _INT64
    return stats


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of the header, then those of each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = max(_DELIMITERS, key=file.readline().count)
            file.seek(0)
            rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [column.strip() for column in next(rows, [])]
            yield rows.line_num, header
            for row in rows:
                if not any(field.strip() for field in row):
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: {len(row)} fields, but the header has "
                        f"{len(header)}; fix the row (text that contains {delimiter!r} must be "
                        "quoted)"
                    )
                yield rows.line_num, row
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error.reason}"
        raise ValueError(f"{path} cannot be read ({reason}); use a CSV file in UTF-8") from error
    except csv.Error as error:
        line = rows.line_num
        raise ValueError(f"{path}, line {line}: {error}; fix the quotes of the row") from error


def csv_column(path: Path, header: list[str], column: str, option: str = "") -> int:
    """Return the index of a column; ``option`` is the flag of its name, if there is one."""
    count = header.count(column)
    if count != 1:
        remedy = f"add a header{option and f' or specify {option} NAME'}"
        raise ValueError(
            f"{path}: the first line has {count} columns named {column!r} (columns: "
            f"{', '.join(map(repr, header)) or 'none'}); "
            f"{'rename all but one' if count else remedy}"
        )
    return header.index(column)


def csv_value(path: Path, line: int, header: list[str], row: list[str], column: int) -> str:
    """Return the field of a row in a column, which must not be blank."""
    if not row[column].strip():
        raise ValueError(f"{path}, line {line}: no value for {header[column]!r}; add one")
    return row[column]
