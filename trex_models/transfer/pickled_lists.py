"""Read pickled lists of names without running any code.

A pickle is a program that calls what it names. Here it can name containers, text and numbers
alone. numpy's own functions are not handed out either, since arrays can be made of bytes that are
not theirs: what a pickle of arrays calls is replaced by stand-ins, which make plain lists.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

_PLAIN = (list, dict, set, frozenset, str, int)
_DTYPE = re.compile(r"[<>|=]?([SUiufb])(\d+)")


def read_pickle(path: Path) -> Any:
    """Return what a pickle of containers, text, numbers and numpy arrays of these holds.

    Arrays become lists.

    Raises:
        ValueError: It is damaged, or asks for anything else.
    """
    with path.open("rb") as file:
        try:
            return _plain(_Unpickler(file, encoding="latin1").load())
        except MemoryError:
            raise
        except Exception as error:  # a torn pickle raises anything
            raise ValueError(f"{path} cannot be read: {error}; write it as JSON") from error


class _DType:
    """Stands in for numpy.dtype: its text, and the byte order that the state brings."""

    def __init__(self, text: str, *_: object) -> None:
        self.text, self.order = str(text), ""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.order = state[1]

    def values(self, data: bytes | str, shape: Any) -> Any:
        """Return the values of an array of bytes."""
        found = _DTYPE.fullmatch(self.text)
        if not found:
            raise ValueError(f"it holds an array of {self.text}, not of text or numbers")
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, np.dtype(self.order + found[1] + found[2])).reshape(shape)


class _Array:
    """Stands in for numpy.ndarray, until its state comes."""

    def __init__(self, *_: object) -> None:
        self.values: Any = []

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, data = state
        if isinstance(data, list):  # an array of objects
            self.values = data
        else:
            self.values = _ordered(dtype.values(data, -1), shape, columns_first)


def _ordered(values: np.ndarray, shape: Any, columns_first: object) -> list[Any]:
    return values.reshape(shape, order="F" if columns_first else "C").tolist()


def _from_buffer(data: bytes, dtype: _DType, shape: Any, order: str, *_: object) -> list[Any]:
    return _ordered(dtype.values(data, -1), shape, order == "F")


def _scalar(dtype: _DType, data: bytes | str) -> Any:
    return dtype.values(data, -1).tolist()[0]


def _encode(text: str, _: object = "latin1") -> bytes:
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand in for bytes: older protocols call it for empty ones alone."""
    return b""


_NAMES: dict[tuple[str, str], Any] = {
    **{("builtins", kind.__name__): kind for kind in _PLAIN},
    **{("__builtin__", kind.__name__): kind for kind in _PLAIN},
    ("__builtin__", "unicode"): str,
    ("__builtin__", "long"): int,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows the names above, and no module."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ValueError(f"it asks for {module}.{name}, which a list of names does not need")
        return _NAMES[module, name]


def _plain(value: Any) -> Any:
    """Return containers in which arrays are lists."""
    if isinstance(value, _Array):
        return _plain(value.values)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
