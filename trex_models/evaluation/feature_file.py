"""Files of features: how they are read, and how they grow.

NAME.safetensors holds a tensor ``features``, (N, F) or (N, C, H, W), and optionally ``names``, the
bytes of a JSON list: a million names would exceed what safetensors allows in a header. Metadata
are strings. NAME.npy holds the features alone; names and metadata are in NAME.npy.json.

Shapes: N images, F features, C channels, H, W height and width of a feature map.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from trex_models.atomic import open_new, safetensors_header, sync_folder, write_text_file

FORMATS = (".safetensors", ".npy")
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_MARK_SECONDS = 30.0  # work that a killed process loses at most
_SPARE = 64  # bytes in a header for numbers that grow
_MOST_HEADER = 100_000_000  # safetensors' own limit


class Features(NamedTuple):
    """Contents of a file of features."""

    features: np.ndarray
    """(N, F) or (N, C, H, W), mapped into memory, read-only."""
    names: list[str]
    """Paths of the images below ``metadata["root"]``, with slashes; N, or none."""
    metadata: dict[str, str]
    """Description of model, preprocessing and images; see docs/features.md."""


def load(path: str | Path) -> Features:
    """Read NAME.safetensors, or NAME.npy with NAME.npy.json next to it; only names take memory.

    Raises:
        ValueError: The file is missing, incomplete, or not a file of features.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: files of features end in {' or '.join(FORMATS)}")
    try:
        if path.suffix == ".npy":
            about = json.loads(names_path(path).read_text())
            found = Features(np.load(path, mmap_mode="r"), about["names"], about["metadata"])
        else:
            found = _read_safetensors(path)
        if len(found.names) not in (0, len(found.features)):
            raise ValueError("its names are not those of its features")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else "incomplete, or something else"
        raise ValueError(f"{path} holds no features ({reason}); extract them again") from error
    return found


def _read_safetensors(path: Path) -> Features:
    header, start = _read_header(path)
    about = header["features"]
    size = about["data_offsets"][1]
    end = header["names"]["data_offsets"][1] if "names" in header else size
    if path.stat().st_size != start + end:
        raise ValueError("incomplete")
    dtype = DTYPES[f"float{about['dtype'].removeprefix('F')}"]
    features = np.memmap(path, dtype, "r", start, tuple(about["shape"]))
    with path.open("rb") as file:
        file.seek(start + size)
        return Features(features, json.loads(file.read() or b"[]"), header["__metadata__"])


def read_metadata(path: Path) -> dict[str, str] | None:
    """Return a file's metadata, even if it is incomplete; None if it is no file of features."""
    try:
        if path.suffix == ".npy":
            found = json.loads(names_path(path).read_text())["metadata"]
        else:
            found = _read_header(path)[0]["__metadata__"]
        return dict(found) if "weights_sha256" in found else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header, and where its tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MOST_HEADER:
            raise ValueError("no header of safetensors")
        return dict(json.loads(file.read(size))), 8 + size


def ends(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    metadata: Mapping[str, str],
    names: Sequence[str] | None,
    length: int = 0,
) -> tuple[bytes, bytes]:
    """Return the bytes before the features, and those after them (for .npy: of its JSON file).

    The first ones are ``length`` bytes; if it is 0 as many as they need, with names a few more.
    """
    if path.suffix == ".npy":  # numpy leaves room for N to grow
        file = io.BytesIO()
        about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        text = json.dumps({"metadata": metadata, "names": names}, indent=1)
        return file.getvalue(), f"{text}\n".encode()
    size = dtype.itemsize * math.prod(shape)
    tensors: dict[str, Any] = {
        "__metadata__": metadata,
        "features": {"dtype": f"F{8 * dtype.itemsize}", "shape": shape, "data_offsets": [0, size]},
    }
    if names is None:
        return safetensors_header(tensors), b""
    listed = json.dumps(names).encode()
    offsets = [size, size + len(listed)]
    tensors["names"] = {"dtype": "U8", "shape": [len(listed)], "data_offsets": offsets}
    header = json.dumps(tensors, sort_keys=True).encode()
    header = header.ljust(length - 8 if length else (len(header) + _SPARE) // 8 * 8 + 8)
    return len(header).to_bytes(8, "little") + header, listed


def names_path(path: Path) -> Path:
    """Return the path of the names and metadata of NAME.npy."""
    return path.with_name(f"{path.name}.json")


class GrowingFile:
    """A file of rows that grows next to its path, with the number of rows that are on the disk.

    A part of it that does not begin with ``header`` is started again.

    Attributes:
        rows: Number of rows; a lower number, set before ``writing``, drops the last ones.
        notes: Text that is kept with that number.
    """

    def __init__(self, path: Path, header: bytes, row_bytes: int) -> None:
        self.path, self.header, self.row_bytes = path, header, row_bytes
        self.part = path.with_name(f".{path.name}.part")
        self.mark = path.with_name(f".{path.name}.rows")
        self.rows, self.notes = 0, ""
        if self.part.is_file() and self.mark.is_file():  # of an earlier attempt
            with self.part.open("rb") as file:
                same = file.read(len(header)) == header
            marked, _, notes = self.mark.read_bytes().partition(b"\n")
            if same and marked.isdigit():
                complete = (self.part.stat().st_size - len(header)) // row_bytes
                self.rows, self.notes = min(int(marked), complete), notes.decode()

    @contextmanager
    def writing(self) -> Iterator[Callable[[np.ndarray], None]]:
        """Yield a function that appends rows; they are kept however the block ends."""
        with self.part.open("r+b") if self.rows else open_new(self.part) as file:
            if not self.rows:
                file.write(self.header)
            file.truncate(len(self.header) + self.rows * self.row_bytes)
            file.seek(0, os.SEEK_END)
            marked = time.monotonic()

            def keep() -> None:
                file.flush()
                os.fsync(file.fileno())
                write_text_file(self.mark, f"{self.rows}\n{self.notes}")

            def write(rows: np.ndarray) -> None:
                nonlocal marked
                file.write(rows.tobytes())
                self.rows += len(rows)
                if time.monotonic() - marked > _MARK_SECONDS:
                    keep()
                    marked = time.monotonic()

            keep()  # rows that an earlier attempt marked may be dropped
            try:
                yield write
            finally:
                keep()

    def finish(self, header: bytes, tail: bytes) -> None:
        """Complete the file and move it to its path; ``header`` is as long as the first one."""
        if self.path.suffix == ".npy":
            self.path.unlink(missing_ok=True)  # names next to other features would mislead
            write_text_file(names_path(self.path), tail.decode())
            tail = b""
        with self.part.open("r+b") as file:
            file.write(header)
            file.seek(0, os.SEEK_END)
            file.write(tail)
            file.flush()
            os.fsync(file.fileno())
        self.part.replace(self.path)
        self.mark.unlink()
        sync_folder(self.path.parent)


def exclusive(path: Path) -> AbstractContextManager[object]:
    """Wait until no other process writes the same file, and keep others waiting in the context."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that writes {path.name}", flush=True)
        return lock.acquire()
