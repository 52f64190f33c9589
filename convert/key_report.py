"""Report of a conversion: a tab-separated file with new name and checksum of every key."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convert import source


class KeyRow(NamedTuple):
    """One row of the report: a key of the file and its key in the converted models."""

    key: str
    shape: str
    dtype: str
    sha256: str
    """First 16 hexadecimal digits of the hash of the tensor's bytes, in row-major order."""
    new_key: str
    """Key in the converted models, or the reason why there is none."""


def rows(contents: Mapping[str, Any], new_keys: Mapping[str, str]) -> list[KeyRow]:
    """Return one row for every key of a file, in the file's order."""
    return [_row(key, value, new_keys[key]) for key, value in source.entries(contents)]


def _row(key: str, value: Any, new_key: str) -> KeyRow:
    if not isinstance(value, Tensor):
        return KeyRow(key, "-", type(value).__name__, "-", new_key)
    data = value.contiguous().view(-1).view(torch.uint8).numpy().data  # numpy has no bfloat16
    shape = "x".join(map(str, value.shape)) or "scalar"
    dtype = str(value.dtype).removeprefix("torch.")
    return KeyRow(key, shape, dtype, hashlib.sha256(data).hexdigest()[:16], new_key)


def counts(rows: Iterable[KeyRow]) -> Counter[str]:
    """Count the converted keys by part of the model, and the others by reason."""
    return Counter(_kind(row.new_key) for row in rows)


def _kind(new_key: str) -> str:
    if ":" in new_key:
        return new_key
    parts = {"proj": "projector", "fc": "classifier weights"}
    return parts.get(new_key.partition(".")[0], "backbone")


def write_rows(path: Path, metadata: Mapping[str, object], rows: Iterable[KeyRow]) -> None:
    """Write a report, with metadata about the file as a header."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, "excel-tab", lineterminator="\n")
        writer.writerows((f"# {name}", value) for name, value in metadata.items())
        writer.writerow(("key", "shape", "dtype", "sha256_16", "new_key"))
        writer.writerows(rows)
