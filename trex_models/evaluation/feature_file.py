"""Feature files: their formats, reading them, and writing them row by row.

NAME.safetensors contains a tensor ``features``, (N, F) or (N, C, H, W), and optionally ``names``,
the bytes of a JSON list, since a million names exceed the maximum size of a safetensors header.
Metadata values are strings. NAME.npy contains only features; NAME.npy.json names and metadata.

Shapes: N images; F features; C channels, H height and W width of a feature map.
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
_MARK_SECONDS = 30.0  # the most work that a killed process loses
_SPARE = 64  # bytes in a header for numbers that gain digits
_MAX_HEADER = 100_000_000  # limit of the safetensors format


class Features(NamedTuple):
    """Contents of a feature file."""

    features: np.ndarray
    """Features, (N, F) or (N, C, H, W), memory-mapped and read-only."""
    names: list[str]
    """N image paths relative to ``metadata["root"]``, with slashes; empty if not stored."""
    metadata: dict[str, str]
    """Description of the model, preprocessing and images; see docs/features.md."""


def load(path: str | Path) -> Features:
    """Read NAME.safetensors, or NAME.npy with NAME.npy.json; features are memory-mapped.

    Raises:
        ValueError: The file is missing, incomplete, or not a feature file.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a feature file must end in {' or '.join(FORMATS)}")
    try:
        if path.suffix == ".npy":
            sidecar = json.loads(names_path(path).read_text())
            loaded = Features(np.load(path, mmap_mode="r"), sidecar["names"], sidecar["metadata"])
        else:
            loaded = _read_safetensors(path)
        if len(loaded.names) not in (0, len(loaded.features)):
            raise ValueError("the names do not match the features")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else "incomplete or another format"
        raise ValueError(f"{path} is not a feature file ({reason}); extract it again") from error
    return loaded


def _read_safetensors(path: Path) -> Features:
    header, start = _read_header(path)
    entry = header["features"]
    size = entry["data_offsets"][1]
    end = header["names"]["data_offsets"][1] if "names" in header else size
    if path.stat().st_size != start + end:
        raise ValueError("incomplete")
    dtype = DTYPES[f"float{entry['dtype'].removeprefix('F')}"]
    features = np.memmap(path, dtype, "r", start, tuple(entry["shape"]))
    with path.open("rb") as file:
        file.seek(start + size)
        return Features(features, json.loads(file.read() or b"[]"), header["__metadata__"])


def read_metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a feature file, complete or not; None for any other file."""
    try:
        if path.suffix == ".npy":
            metadata = json.loads(names_path(path).read_text())["metadata"]
        else:
            metadata = _read_header(path)[0]["__metadata__"]
        return dict(metadata) if "weights_sha256" in metadata else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError("not a safetensors header")
        return dict(json.loads(file.read(size))), 8 + size


def header_and_tail(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    metadata: Mapping[str, str],
    names: Sequence[str] | None,
    length: int = 0,
) -> tuple[bytes, bytes]:
    """Return the bytes before and after the features (for .npy, the latter are the JSON file).

    The header has ``length`` bytes; if 0, as many as needed, and with names some spare ones.
    """
    if path.suffix == ".npy":  # NumPy leaves room for a larger N
        file = io.BytesIO()
        header_data = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header_data)
        text = json.dumps({"metadata": metadata, "names": names}, indent=1)
        return file.getvalue(), f"{text}\n".encode()
    size = dtype.itemsize * math.prod(shape)
    tensors: dict[str, Any] = {
        "__metadata__": metadata,
        "features": {"dtype": f"F{8 * dtype.itemsize}", "shape": shape, "data_offsets": [0, size]},
    }
    if names is None:
        return safetensors_header(tensors), b""
    encoded = json.dumps(names).encode()
    offsets = [size, size + len(encoded)]
    tensors["names"] = {"dtype": "U8", "shape": [len(encoded)], "data_offsets": offsets}
    header = json.dumps(tensors, sort_keys=True).encode()
    header = header.ljust(length - 8 if length else (len(header) + _SPARE) // 8 * 8 + 8)
    return len(header).to_bytes(8, "little") + header, encoded


def names_path(path: Path) -> Path:
    """Return the path of the JSON file with the names and metadata of NAME.npy."""
    return path.with_name(f"{path.name}.json")


class GrowingFile:
    """Partial file of rows next to the final path, with a record of the rows on the disk.

    A partial file that does not begin with ``header`` is overwritten.

    Attributes:
        rows: Number of rows; setting a lower number before ``writing`` drops the last rows.
        notes: Text to store in the record.
    """

    def __init__(self, path: Path, header: bytes, row_bytes: int) -> None:
        self.path, self.header, self.row_bytes = path, header, row_bytes
        self.part = path.with_name(f".{path.name}.part")
        self.mark = path.with_name(f".{path.name}.rows")
        self.rows, self.notes = 0, ""
        if self.part.is_file() and self.mark.is_file():  # left by an earlier attempt
            with self.part.open("rb") as file:
                same = file.read(len(header)) == header
            marked, _, notes = self.mark.read_bytes().partition(b"\n")
            if same and marked.isdigit():
                complete = (self.part.stat().st_size - len(header)) // row_bytes
                self.rows, self.notes = min(int(marked), complete), notes.decode()

    @contextmanager
    def writing(self) -> Iterator[Callable[[np.ndarray], None]]:
        """Yield a function that appends rows; rows are kept even if the block raises an error."""
        with self.part.open("r+b") if self.rows else open_new(self.part) as file:
            if not self.rows:
                file.write(self.header)
            file.truncate(len(self.header) + self.rows * self.row_bytes)
            file.seek(0, os.SEEK_END)
            marked = time.monotonic()

            def record() -> None:
                file.flush()
                os.fsync(file.fileno())
                write_text_file(self.mark, f"{self.rows}\n{self.notes}")

            def write(rows: np.ndarray) -> None:
                nonlocal marked
                file.write(rows.tobytes())
                self.rows += len(rows)
                if time.monotonic() - marked > _MARK_SECONDS:
                    record()
                    marked = time.monotonic()

            record()  # now, since rows of an earlier attempt may have been dropped
            try:
                yield write
            finally:
                record()

    def finish(self, header: bytes, tail: bytes) -> None:
        """Complete the file and move it to its path; the length of ``header`` must not change."""
        if self.path.suffix == ".npy":
            self.path.unlink(missing_ok=True)  # new names must never be next to old features
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
    """Return a context manager that locks a file, waiting while another process writes it."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is writing {path.name}", flush=True)
        return lock.acquire()
