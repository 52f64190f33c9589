"""Atomic writes: a file is complete or absent, even if writing it is interrupted."""

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
from huggingface_hub import constants
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` on disk if the block raises no error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _named_errors(path), open_new(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.fstat(file.fileno()).st_ino != temporary.stat().st_ino:
                raise OSError(errno.EBUSY, "another process is writing this file", str(path))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_new(path: Path) -> BinaryIO:
    """Create a file for writing; replace an existing file or link."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def write_safetensors(
    stream: BinaryIO, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with sorted metadata; the order of safetensors.save varies."""
    data = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    stream.write(safetensors_header({**json.loads(data[8:start]), "__metadata__": metadata}))
    stream.write(memoryview(data)[start:])


def safetensors_header(header: Mapping[str, object]) -> bytes:
    """Return the start of a safetensors file: the header's length and the sorted header."""
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # align the tensors
    return len(text).to_bytes(8, "little") + text


def write_text_file(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def append(path: Path, text: str) -> None:
    """Append text to a file and flush it to disk."""
    with _named_errors(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def existing_folder(path: Path) -> Path:
    """Return the path, or its nearest parent folder that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def require_space(folder: Path, size: int, option: str) -> None:
    """Raise a ValueError if the disk of an option's folder has fewer free bytes than ``size``."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < size:
        space = f"{free / 1e6:.1f} MB of free space, but {size / 1e6:.1f} MB are required"
        raise ValueError(f"{folder} has {space}; delete files or choose another {option}")


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Return our cache's folder: TREX_MODELS_CACHE, or a folder next to the Hub's cache."""
    chosen = os.environ.get("TREX_MODELS_CACHE")
    if cache_dir is None and chosen:
        return Path(chosen).expanduser()
    return Path(cache_dir or constants.HF_HOME) / "trex_models"


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk if its file system supports it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems do not support it
        os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Add the file's path to errors of failed writes, which lack it."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
