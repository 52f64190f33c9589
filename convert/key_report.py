"""Report of a conversion: the fate of every key, with checksums, as a tab-separated file."""

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
    """A key of the file and its fate, a line of the report."""

    key: str
    shape: str
    dtype: str
    sha256: str
    """First 16 hexadecimal digits, of the tensor's bytes in row-major order."""
    fate: str
    """The key in the converted models, or why there is none."""


def rows(contents: Mapping[str, Any], fates: Mapping[str, str]) -> list[KeyRow]:
    """Describe every key of a file, in the file's order."""
    return [_row(key, value, fates[key]) for key, value in source.entries(contents)]


def _row(key: str, value: Any, fate: str) -> KeyRow:
    if not isinstance(value, Tensor):
        return KeyRow(key, "-", type(value).__name__, "-", fate)
    data = value.contiguous().view(-1).view(torch.uint8).numpy().data  # numpy has no bfloat16
    shape = "x".join(map(str, value.shape)) or "scalar"
    dtype = str(value.dtype).removeprefix("torch.")
    return KeyRow(key, shape, dtype, hashlib.sha256(data).hexdigest()[:16], fate)


def counts(rows: Iterable[KeyRow]) -> Counter[str]:
    """Count the keys by fate; those that are kept, by part of the model."""
    return Counter(_kind(row.fate) for row in rows)


def _kind(fate: str) -> str:
    if ":" in fate:
        return fate
    parts = {"proj": "projector", "fc": "class weights"}
    return parts.get(fate.partition(".")[0], "backbone")


def write_rows(path: Path, metadata: Mapping[str, object], rows: Iterable[KeyRow]) -> None:
    """Write a report, headed by metadata about the file."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, "excel-tab", lineterminator="\n")
        writer.writerows((f"# {name}", value) for name, value in metadata.items())
        writer.writerow(("key", "shape", "dtype", "sha256_16", "fate"))
        writer.writerows(rows)
