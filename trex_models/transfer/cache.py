"""Features of data sets, extracted once and kept in files that are mapped into memory.

    ROOT/<architecture>-<hash>/<data set>-<split>-<hash>.safetensors

A file holds one tensor, ``features`` (N, F), and in its metadata all that the features depend on:
weights, modules, preprocessing, precision, device, versions, and the images: their list, and the
sizes and times of change of their files (which unpacking an archive restores). The names are for
people; a file is used only where its metadata are those asked for. Extraction appends to a file
beside, so that one that was cut goes on where it was.

Shapes: N images, F features.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from trex_models.atomic import open_new, sync_folder, write_whole
from trex_models.data.image_files import FileSource
from trex_models.data.sources import Source, digest
from trex_models.evaluation.features import feature_batches
from trex_models.transfer.encoders import PRECISIONS, Encoder

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_MARK_SECONDS = 30.0  # what a process that is killed loses at most
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """A folder of features.

    Raises:
        ValueError: The dtype is none of ``DTYPES``.
    """

    root: Path
    """Where; made if it is not there."""
    dtype: str = "float32"
    """How features are kept: float16 halves the space and rounds by up to 5e-4."""
    batch_size: int = 256
    """Images at a time."""
    workers: int = 0
    """Loader processes."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def features(
        self,
        encoder: Encoder,
        source: Source,
        title: str,
        identity: Mapping[str, str] | None = None,
    ) -> np.ndarray:
        """Return features of a source's images, extracting those that are not there yet.

        Args:
            encoder: What maps images to features.
            source: Labelled images.
            title: Data set and split, for the file's name and the progress bar.
            identity: As ``identity`` returns, if it is known: that looks at every file.

        Returns:
            (N, F), mapped into memory; writing to it changes no file.

        Raises:
            ValueError: An image cannot be read or has features that are not finite, the file is
                not what its name says, or the disk has no room.
            OSError: The folder cannot be written.
        """
        identity = identity or self.identity(encoder, source)
        name = f"{_slug(title)}-{_short({**identity, 'dtype': self.dtype})}.safetensors"
        path = self.folder(encoder) / name
        header = self._header(encoder, source, identity)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with alone(path):
                if not path.exists():
                    self._extract(encoder, source, title, header, path)
        return _mapped(path, header)

    def folder(self, encoder: Encoder) -> Path:
        """Return where an encoder's features are kept."""
        name = _slug(str(encoder.facts["architecture"]))
        return self.root / f"{name}-{_short(encoder.identity())}"

    def identity(self, encoder: Encoder, source: Source) -> dict[str, str]:
        """Return what features depend on; strings, as safetensors has them."""
        images = digest(source.digest(), *_stats(source))
        about = {**encoder.identity(), "images_sha256": images, "num_images": len(source)}
        return {key: as_text(value) for key, value in about.items()}

    def _header(self, encoder: Encoder, source: Source, identity: Mapping[str, str]) -> bytes:
        """Return how a file begins: the length and the JSON of safetensors' format."""
        kept = DTYPES[self.dtype]
        shape = [len(source), encoder.num_features]
        size = kept.itemsize * shape[0] * shape[1]
        described = {
            "dtype": f"F{8 * kept.itemsize}",
            "shape": shape,
            "data_offsets": [0, size],
        }
        text = json.dumps({"__metadata__": dict(identity), "features": described}, sort_keys=True)
        text += " " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text.encode()

    def _extract(
        self, encoder: Encoder, source: Source, title: str, header: bytes, path: Path
    ) -> None:
        """Write features beside ``path``, from where the last attempt ended; then move them."""
        kept = DTYPES[self.dtype]
        part = GrowingFile(path, header, kept.itemsize * encoder.num_features)
        start = part.rows
        remedy = "choose another --cache, or --cache-dtype float16"
        require_room(path, (len(source) - start) * part.row_bytes, remedy)
        batches = feature_batches(
            encoder.model,
            source,
            encoder.transform,
            self.batch_size,
            self.workers,
            PRECISIONS[encoder.precision],
            range(start, len(source)),
        )
        bar = tqdm(
            total=len(source),
            initial=start,
            desc=f"features of {title}",
            unit="image",
            dynamic_ncols=True,
            disable=None,
        )
        with part.writing() as write, bar, tf32(encoder.precision != "fp32"):
            for rows in batches:
                with np.errstate(over="ignore"):  # what is not finite is told below
                    features = rows.astype(kept, copy=False)
                remedy = "--precision fp32 and --cache-dtype float32"
                check_rows(features, lambda row: source.name(part.rows + row), encoder, remedy)
                write(features)
                bar.update(len(rows))
        part.finish()


class GrowingFile:
    """A file of rows that grows beside its place, and how many of them are on the disk for certain.

    Args:
        path: Its place.
        header: How it begins; what lies there and begins otherwise is begun again.
        row_bytes: Of one row.

    Attributes:
        rows: How many there are; a lower number, set before ``writing``, drops the last ones.
        notes: Text that is kept with that number.
    """

    def __init__(self, path: Path, header: bytes, row_bytes: int) -> None:
        self.path, self.header, self.row_bytes = path, header, row_bytes
        self.part = path.with_name(f".{path.name}.part")
        self.mark = path.with_name(f".{path.name}.rows")
        self.rows, self.notes = self._done()

    def _done(self) -> tuple[int, str]:
        """Return no rows unless what lies there began as this file does."""
        if not (self.part.is_file() and self.mark.is_file()):
            return 0, ""
        with self.part.open("rb") as file:
            if file.read(len(self.header)) != self.header:
                return 0, ""
        marked, _, notes = self.mark.read_bytes().partition(b"\n")
        whole = (self.part.stat().st_size - len(self.header)) // self.row_bytes
        return (min(int(marked), whole), notes.decode()) if marked.isdigit() else (0, "")

    @contextmanager
    def writing(self) -> Iterator[Callable[[np.ndarray], None]]:
        """Give what appends rows; however the block ends, those that were appended are kept."""
        with self.part.open("r+b") if self.rows else open_new(self.part) as file:
            if not self.rows:
                file.write(self.header)
            file.truncate(len(self.header) + self.rows * self.row_bytes)
            file.seek(0, os.SEEK_END)
            marked = time.monotonic()

            def keep() -> None:
                file.flush()
                os.fsync(file.fileno())
                notes = f"\n{self.notes}" if self.notes else ""
                write_whole(self.mark, f"{self.rows}{notes}")

            def write(rows: np.ndarray) -> None:
                nonlocal marked
                file.write(rows.tobytes())
                self.rows += len(rows)
                if time.monotonic() - marked > _MARK_SECONDS:
                    keep()
                    marked = time.monotonic()

            keep()  # what an earlier attempt marked may hold no more
            try:
                yield write
            finally:
                keep()

    def finish(self, header: bytes | None = None, tail: bytes = b"") -> None:
        """Move the whole file to its place.

        Args:
            header: To begin with in place of the first one, and as long; None for no other.
            tail: What follows the rows.
        """
        if header or tail:
            with self.part.open("r+b") as file:
                file.write(header or self.header)
                file.seek(0, os.SEEK_END)
                file.write(tail)
                file.flush()
                os.fsync(file.fileno())
        self.part.replace(self.path)
        self.mark.unlink()
        sync_folder(self.path.parent)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process extracts the same features."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which extracts {path.name}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Say whether CUDA may compute float32 convolutions and products in TF32."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def _mapped(path: Path, header: bytes) -> np.ndarray:
    """Map a file's features into memory.

    Raises:
        ValueError: It begins otherwise than asked for, or is not whole.
    """
    size = int.from_bytes(header[:8], "little")
    described = json.loads(header[8 : 8 + size])["features"]
    with path.open("rb") as file:
        found = file.read(len(header))
    if found != header:
        differing = ", ".join(_differences(found, header)) or "its header"
        raise ValueError(
            f"{path} holds other features than its name says ({differing} differs); delete the "
            "file, and the features are extracted again"
        )
    if path.stat().st_size != len(header) + described["data_offsets"][1]:
        raise ValueError(
            f"{path} is {path.stat().st_size} bytes long, not "
            f"{len(header) + described['data_offsets'][1]}: it is not whole; delete it, and the "
            "features are extracted again"
        )
    kept = next(kept for kept in DTYPES.values() if f"F{8 * kept.itemsize}" == described["dtype"])
    return np.memmap(path, kept, "c", len(header), tuple(described["shape"]))


def _differences(found: bytes, expected: bytes) -> list[str]:
    """Return which metadata of two headers differ."""
    try:
        texts = [json.loads(data[8:])["__metadata__"] for data in (found, expected)]
    except (ValueError, KeyError, TypeError):
        return []
    return [key for key in texts[1] if texts[0].get(key) != texts[1][key]]


def require_room(path: Path, size: int, remedy: str) -> None:
    """Check that the disk has room for some bytes more.

    Raises:
        ValueError: It has not; the message ends in the remedy.
    """
    free = shutil.disk_usage(path.parent).free
    if size + _SPARE_BYTES > free:
        raise ValueError(
            f"{path.parent} has {free / 1e9:.2f} GB left, but {path.name} needs "
            f"{(size + _SPARE_BYTES) / 1e9:.2f} GB with some to spare: free some, {remedy}"
        )


def check_rows(rows: np.ndarray, name: Callable[[int], str], encoder: Encoder, remedy: str) -> None:
    """Check features, (B, ...).

    Args:
        rows: Of some images.
        name: Returns what an image is called, by its place among them.
        encoder: What made them.
        remedy: Options to try.

    Raises:
        ValueError: Some are not finite; the message names the image.
    """
    finite = np.isfinite(rows.reshape(len(rows), -1)).all(1)
    if not finite.all():
        raise ValueError(
            f"{encoder.name} gives features that are not finite for {name(int(np.argmin(finite)))} "
            f"({encoder.precision}, kept as {rows.dtype}): try {remedy}; if it was so, the weights "
            "are damaged"
        )


def _stats(source: Source) -> list[np.ndarray]:
    """Return sizes and times of the files behind a source: other images of their names differ."""
    return [source.stats()[:, :2]] if isinstance(source, FileSource) else []


def _short(identity: Mapping[str, object]) -> str:
    return digest(json.dumps(identity, sort_keys=True))[:12]


def as_text(value: object) -> str:
    """Return a value as safetensors' metadata have it: text, or the JSON of another."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _slug(name: str) -> str:
    """Return a name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "model"
