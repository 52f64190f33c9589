"""Atomic writes: files are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file next to ``path`` that takes its place, on the disk, unless there is an error."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with _named_errors(path), open_new(beside) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.fstat(file.fileno()).st_ino != beside.stat().st_ino:
                raise OSError(errno.EBUSY, "another process is writing it", str(path))
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing in place of what is there, without following links."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def write_safetensors(
    stream: BinaryIO, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write safetensors' format with sorted metadata, whose order safetensors leaves to chance."""
    data = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    stream.write(safetensors_header({**json.loads(data[8:start]), "__metadata__": metadata}))
    stream.write(memoryview(data)[start:])


def safetensors_header(header: Mapping[str, object]) -> bytes:
    """Return the start of a safetensors file: the header's length and the header, sorted."""
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text


def write_text_file(path: Path, text: str) -> None:
    """Write a text file as a whole."""
    with replacing(path) as file:
        file.write(text.encode())


def append(path: Path, text: str) -> None:
    """Add text to the end of a file, down to the disk."""
    with _named_errors(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def existing_folder(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def require_space(folder: Path, size: int, option: str) -> None:
    """Raise ValueError unless the disk of a folder, of an ``option``, has room for more bytes."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < size:
        room = f"{free / 1e6:.1f} MB of free space, {size / 1e6:.1f} MB are needed"
        raise ValueError(f"{folder} has {room}; free some, or choose another {option}")


def sync_folder(folder: Path) -> None:
    """Write a folder's names down to the disk, where its file system knows how."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems refuse
        os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Add the file's name to errors, which a failed write does not know."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
