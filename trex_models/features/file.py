"""Files of features: what they hold, how they begin and end, and how they are read.

NAME.safetensors holds two tensors, ``features`` (N, F) or (N, F, H, W), and ``names``, the bytes
of a JSON list: in the header a million names would be above what safetensors allows. Its metadata
are strings. NAME.npy holds the features alone; names and metadata are in NAME.npy.json.

Shapes: N images, F features, H, W height and width of a feature map.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMATS = (".safetensors", ".npy")
KIND = "trex_models.features 1"
"""What the metadata say under ``format``."""
_SPARE = 64  # bytes in a header for numbers that grow
_TYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


class Features(NamedTuple):
    """What a file of features holds."""

    features: np.ndarray
    """(N, F) or (N, F, H, W), mapped into memory, read-only."""
    names: list[str]
    """N names: paths of the images below ``metadata["root"]``, with slashes."""
    metadata: dict[str, str]
    """What made them; see docs/features.md."""


def load(path: str | Path) -> Features:
    """Read a file of features; as much memory is taken as the names need.

    Args:
        path: NAME.safetensors, or NAME.npy with NAME.npy.json beside it.

    Raises:
        ValueError: There is no such file, or it is not one of features, or not whole.
    """
    path = Path(path)
    _require_format(path)
    try:
        read = _read_npy if path.suffix == ".npy" else _read_safetensors
        found = read(path)
        whole = len(found.names) == len(found.features)
    except OSError as error:
        raise ValueError(
            f"{error.filename or path} cannot be read ({error.strerror}); name a file that "
            "python -m trex_models.features wrote"
        ) from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise _foreign(path) from error
    if not whole:
        raise _foreign(path)
    return found


def read_metadata(path: Path) -> dict[str, str] | None:
    """Return what a file says of itself, be it whole or not; None where it is no file of ours."""
    try:
        if path.suffix == ".npy":
            found = json.loads(names_path(path).read_text())["metadata"]
        else:
            with path.open("rb") as file:
                found = _header(file.read(8), file.read)["__metadata__"]
        return dict(found) if found["format"] == KIND else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def head(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    metadata: dict[str, str],
    names: bytes,
    length: int = 0,
) -> bytes:
    """Return how a file begins, before its features.

    Args:
        path: The file; its suffix is the format.
        shape: Of the features.
        dtype: Of the features.
        metadata: What made them.
        names: What follows the features.
        length: Of the result; 0 for what it needs and a little more.

    Raises:
        ValueError: The suffix is no format.
    """
    _require_format(path)
    if path.suffix == ".npy":  # numpy leaves room for N to grow
        file = io.BytesIO()
        about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        return file.getvalue()
    size = dtype.itemsize * int(np.prod(shape))
    kind = next(kind for kind, known in _TYPES.items() if known == dtype)
    tensors = {
        "__metadata__": metadata,
        "features": {"dtype": kind, "shape": shape, "data_offsets": [0, size]},
        "names": {
            "dtype": "U8",
            "shape": [len(names)],
            "data_offsets": [size, size + len(names)],
        },
    }
    text = json.dumps(tensors, sort_keys=True).encode()
    text = text.ljust(length - 8 if length else (len(text) + _SPARE) // 8 * 8 + 8)
    return len(text).to_bytes(8, "little") + text


def names_path(path: Path) -> Path:
    """Return where the names and metadata of NAME.npy are."""
    return path.with_name(f"{path.name}.json")


def _read_safetensors(path: Path) -> Features:
    with path.open("rb") as file:
        header = _header(file.read(8), file.read)
        start = file.tell()
    about, names = header["features"], header["names"]
    kind, shape = _TYPES[about["dtype"]], tuple(about["shape"])
    first, last = names["data_offsets"]
    if path.stat().st_size != start + last:
        raise ValueError("not whole")
    features = np.memmap(path, kind, "r", start, shape)
    with path.open("rb") as file:
        file.seek(start + first)
        return Features(features, json.loads(file.read(last - first)), header["__metadata__"])


def _read_npy(path: Path) -> Features:
    features = np.load(path, mmap_mode="r")
    beside = json.loads(names_path(path).read_text())
    return Features(features, beside["names"], beside["metadata"])


def _header(length: bytes, read: Any) -> dict[str, Any]:
    size = int.from_bytes(length, "little")
    if size > 100_000_000:  # safetensors' own limit
        raise ValueError("no header of safetensors")
    return dict(json.loads(read(size)))


def _require_format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: features are in files that end in {' or '.join(FORMATS)}")


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"{path} is no whole file of features; write it by python -m trex_models.features"
    )
