"""Safe reading of pickles and ``torch.save`` files: no code execution, bounded memory.

A pickle is a program. This reader only builds plain containers, strings, numbers and dense tensors;
all other calls that occur in checkpoints (NumPy arrays, argparse namespaces) return None.

``torch.load(weights_only=True)`` is not strict enough: its allow-list is global to the process, the
NumPy constructors on that list can forge object pointers, tensors may be larger than the file, and
with ``mmap=True`` a record that is shorter than its tensor is read beyond its end.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

_LIMIT = 16 << 20  # bytes of a checkpoint's pickle; 100,000 class names need two million
_CONTAINERS = {tuple, list, dict}
_LONGEST_SHARED = 256  # characters of a string that a pickle may repeat by reference
_LEGACY = 0x1950A86A20F9469CFC6C, 1001  # magic number and version of torch.save before 1.6
_Records = Mapping[str, tuple[int, int]]  # storage -> start and length in the file, in bytes

_STORAGES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_PARAMETER = "torch._utils._rebuild_parameter"
_REBUILD = {"torch._utils._rebuild_tensor_v2", _PARAMETER, f"{_PARAMETER}_with_state"}
# NumPy 2 renamed the module of these functions.
_NUMPY = {"numpy.ndarray", "numpy.dtype"} | {
    f"numpy.{core}.multiarray.{name}"
    for core in ("core", "_core")
    for name in ("_reconstruct", "scalar")
}
# Calls in entries that are not weights. The arguments in official training states include a
# float64 array.
_IGNORED = _NUMPY | {
    *("argparse.Namespace", "numpy.dtypes.Float64DType"),
    *("torch.device", "torch.Size", "builtins.complex", "builtins.bytearray"),
    *map(str, _STORAGES.values()),
}


# Opcodes that allocate unlimited memory, bypass the limits of the memo, or look up objects of the
# process.
_REFUSED = {
    *(pickle.BYTEARRAY8, pickle.DUP, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4),
}


class RefusedError(ValueError):
    """The pickle uses a feature that checkpoints do not need."""


class _Memo(dict[int, Any]):
    """Memo of a pickle; ``shared`` checks each value that is read from it again."""

    def __init__(self, shared: Callable[[Any], Any]) -> None:
        self.shared = shared

    def __getitem__(self, index: int) -> Any:
        return self.shared(super().__getitem__(index))

    def __setitem__(self, index: int, value: Any) -> None:
        if index >= 1 << 32:  # larger integers could all have the same hash
            raise ValueError(f"memo index {index}")
        super().__setitem__(index, value)


class PlainUnpickler(pickle._Unpickler):
    """Unpickler for dicts, lists, tuples, strings, bytes and numbers; sets become lists."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in _REFUSED
    }
    names: ClassVar[set[str]] = {
        "collections.OrderedDict",
        "_codecs.encode",  # bytes, before protocol 3
        *("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"),
    }
    remedy = "save plain containers, strings and numbers"
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file, encoding="latin1")
        self.memo = _Memo(self.shared)

    def load(self) -> Any:
        """Return the contents of the pickle; may only be called once."""
        try:
            return super().load()
        finally:
            del self.memo  # breaks a reference cycle that would keep the file open

    def find_class(self, module: str, name: str) -> str:
        """Return the full name of an allowed callable, for `call`."""
        if f"{module}.{name}" not in self.names:
            raise RefusedError(f"the pickle calls {module}.{name}; {self.remedy}")
        return f"{module}.{name}"

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """Return the value of a call to ``name``."""
        if name == "_codecs.encode":
            return args[0].encode("latin1")
        (items,) = args or ([],)
        if type(items) is not list:
            raise ValueError(f"{name} requires a list")
        if name == "collections.OrderedDict":
            self._dict([part for key, value in items for part in (key, value)])
            return self.stack.pop()
        return items

    def shared(self, value: Any) -> Any:
        """Return a value that is referenced again, unless its size could grow exponentially."""
        if type(value) in (str, bytes) and len(value) > _LONGEST_SHARED:
            raise RefusedError(f"the pickle repeats a string of {len(value)} characters")
        if type(value) not in _CONTAINERS:
            return value
        if type(value) is tuple and len(value) <= 8 and _CONTAINERS.isdisjoint(map(type, value)):
            return tuple(map(self.shared, value))
        return self.shared_container()

    def shared_container(self) -> Any:
        """Refuse a container that is referenced again."""
        raise RefusedError("the pickle repeats a list or a dictionary")

    def load_call(self) -> None:
        """Call a name with a tuple of arguments."""
        args, name = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or name not in self.names:
            raise ValueError("a call has no name or no tuple of arguments")
        self.stack.append(self.call(name, args))

    def load_state(self) -> None:
        """Discard attributes: of ignored objects, or the module versions of a state dict."""
        self.stack.pop()

    dispatch |= {pickle.REDUCE[0]: load_call, pickle.NEWOBJ[0]: load_call}
    dispatch |= {pickle.BUILD[0]: load_state}
    dispatch |= {pickle.EMPTY_SET[0]: dispatch[pickle.EMPTY_LIST[0]]}
    dispatch |= {pickle.FROZENSET[0]: dispatch[pickle.LIST[0]]}

    def _put(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Larger integers could all have the same hash.
            if type(key) not in (str, bytes) and not (type(key) is int and abs(key) < 1 << 60):
                raise RefusedError(f"a dictionary has a key of type {type(key).__name__}")
            if type(target) is not dict:
                raise ValueError(f"items are set on a {type(target).__name__}, not a dictionary")
            target[key] = value

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items are appended to an object that is not a list")
        self.stack[-1].extend(items)

    def _dict(self, pairs: list[Any]) -> None:
        self.stack.append({})
        self._put(pairs)

    dispatch |= {
        pickle.SETITEM[0]: lambda self: self._put([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._put(self.pop_mark()),
        pickle.DICT[0]: lambda self: self._dict(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.ADDITEMS[0]: lambda self: self._extend(self.pop_mark()),
    }


class _TensorUnpickler(PlainUnpickler):
    remedy = "weights do not need this call; save model.state_dict() instead of the model"
    names: ClassVar = PlainUnpickler.names | _STORAGES.keys() | _REBUILD | _IGNORED

    def __init__(self, file: io.BytesIO, data: mmap.mmap, records: _Records | None) -> None:
        super().__init__(file)
        self.data = data  # the mapped file
        self.records = records  # None to skip tensors
        self.itemsizes: dict[str, int] = {}  # storage -> size of an item, in bytes
        self.storages: dict[str, Tensor] = {}
        self.bytes_left = 2 * len(data) + _LIMIT

    def persistent_load(self, pid: Any) -> Tensor | None:
        """Return a storage as a one-dimensional tensor."""
        kind, storage, key, _, count, *view = pid
        dtype = _STORAGES[storage]
        if kind != "storage" or type(key) is not str or view not in ([], [None]):
            raise ValueError("a storage has no name or is a view")
        self.itemsizes[key] = dtype.itemsize
        if self.records is None:
            return None
        start, size = self.records[key]
        if size != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {size} bytes, not {count} of {dtype}")
        if key not in self.storages:
            self.storages[key] = self._storage(dtype, start, size)
        return self.storages[key]

    def _storage(self, dtype: torch.dtype, start: int, size: int) -> Tensor:
        if not size:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize:  # torch before 1.6 did not align storages
            return torch.frombuffer(bytearray(self.data[start : start + size]), dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype, count=size // dtype.itemsize, offset=start)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        if name in _IGNORED:
            return None
        if name not in _REBUILD:
            return super().call(name, args)
        if name.startswith(_PARAMETER) or self.records is None:
            return args[0]
        storage, offset, size, stride, _, _, *metadata = args
        _check_view(storage, offset, size, stride)
        if any(metadata):
            raise RefusedError("a tensor is a conjugate or negative view; save a copy of it")
        return self.shared(storage.as_strided(size, stride, offset))

    def shared(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return super().shared(value)
        # Every reference counts, since callers may copy each of them.
        self.bytes_left -= value.numel() * value.itemsize
        if self.bytes_left < 0:
            raise RefusedError("the tensors share memory; copies would be larger than the file")
        return value

    def shared_container(self) -> None:
        """Return None for a repeated container, which occurs only in entries without weights."""


def _check_view(storage: Tensor, offset: int, size: Any, stride: Any) -> None:
    """Require that a view is within its storage and does not have more elements."""
    numbers = (offset, *size, *stride)
    if len(size) > 64 or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"a tensor has offset {offset} and {len(size)} dimensions")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise ValueError(f"a tensor of shape {tuple(size)} exceeds its storage of {len(storage)}")
    if 0 not in size and math.prod(size) > len(storage):
        raise RefusedError("a tensor is expanded; save a contiguous copy of it")


class _Dtype(str):
    """NumPy data type, such as i8, and its byte order."""

    order = "<"

    def read(self, data: str | bytes) -> list[Any]:
        """Return the numbers in the memory of an array; Python 2 pickled it as a string."""
        if not re.fullmatch("[iuf][1248]", self) or self.order not in "<>|":
            raise RefusedError(f"an array has the type {self.order}{self}, not a numeric one")
        raw = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(raw, np.dtype(self.order + self)).tolist()


class _Array(list[Any]):
    """NumPy array as a flat list of numbers."""


class _ArrayUnpickler(PlainUnpickler):
    names: ClassVar = PlainUnpickler.names | _NUMPY | {"__builtin__.bytes"}

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "__builtin__.bytes" and not args:  # an empty array, before protocol 3
            return b""
        if name not in _NUMPY:
            return super().call(name, args)
        if name == "numpy.dtype":
            return _Dtype(args[0])
        return _Array() if name.endswith("_reconstruct") else args[0].read(args[1])[0]

    def load_array(self) -> None:
        """Set the byte order of a data type or the contents of an array."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _Dtype:
            target.order = state[1]
        elif type(target) is _Array:
            target[:] = state[2].read(state[4])

    dispatch: ClassVar = PlainUnpickler.dispatch | {pickle.BUILD[0]: load_array}


def load_arrays(path: Path) -> Any:
    """Read a pickle of containers, strings, numbers and numeric arrays, which become flat lists.

    Other contents raise RefusedError or another ValueError; damaged files raise many types.
    """
    with path.open("rb") as file:
        return _ArrayUnpickler(file).load()


def load_torch(path: Path) -> Any:
    """Read a ``torch.save`` file onto the CPU, in the zip format or that of torch before 1.6.

    Tensors are memory-mapped; do not overwrite the file while they are in use. Unsafe contents
    raise RefusedError; damaged files raise many types, from the standard library and torch.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if data[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                return _load_zip(archive, data)
    return _load_legacy(data)


def _load_zip(archive: zipfile.ZipFile, data: mmap.mmap) -> Any:
    infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    records = {}
    for name, info in infos.items():
        method, *lengths = struct.unpack_from("<8xH16xHH", data, info.header_offset)
        if method and method == info.compress_type:
            raise RefusedError(f"record {info.filename} is compressed; zip it uncompressed, zip -0")
        if info.compress_type or info.compress_size != info.file_size:
            raise ValueError(f"the two headers of record {info.filename} differ")
        if name.startswith("data/"):
            start = info.header_offset + 30 + sum(lengths)  # of the name and an extra field
            records[name.removeprefix("data/")] = start, info.file_size
    if len(infos) != len(archive.infolist()):
        raise ValueError("a record occurs twice")
    if archive.testzip():
        raise ValueError("a record does not match its checksum")
    if "byteorder" in infos:
        _check_byteorder(archive.read(infos["byteorder"]).decode())
    if infos["data.pkl"].file_size > _LIMIT:
        raise RefusedError(f"the pickle exceeds {_LIMIT >> 20} MiB")
    return _TensorUnpickler(io.BytesIO(archive.read(infos["data.pkl"])), data, records).load()


def _load_legacy(data: mmap.mmap) -> Any:
    """Read magic number, version, machine, contents and keys, all pickles, then the storages."""
    file = io.BytesIO(data[:_LIMIT])
    magic, version, machine = (PlainUnpickler(file).load() for _ in range(3))
    if (magic, version) != _LEGACY:
        raise RefusedError("the file is a plain pickle, not written by torch.save")
    _check_byteorder("little" if machine["little_endian"] else "big")
    contents = file.tell()
    skimmed = _TensorUnpickler(file, data, None)
    skimmed.load()
    keys = PlainUnpickler(file).load()
    start, records = file.tell(), {}
    for key in keys:
        (count,) = struct.unpack_from("<q", data, start)
        size = count * skimmed.itemsizes[key]
        records[key] = start + 8, size
        start += 8 + size
    if start != len(data):
        raise ValueError(f"the storages end at byte {start} of {len(data)}")
    file.seek(contents)
    return _TensorUnpickler(file, data, records).load()


def _check_byteorder(order: str) -> None:
    if order != sys.byteorder:
        raise RefusedError(f"the file is {order}-endian; save it on a machine like this one")
