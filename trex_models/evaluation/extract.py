"""Extract features from images, into memory or into a file, with exact resume.

Loader workers decode, resize and crop the images. The uint8 crops are copied to the model's device
and normalized there. The host never waits for the current batch: while the device computes it, the
host reads the features of the previous one.

A file is identified by everything that its features depend on (``feature_identity``), not by its
name. Features are appended to a partial file next to the path, and the same call resumes it.

Shapes: N images, F features, S side of the crop in pixels.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trex_models.atomic import replacing, require_space
from trex_models.cli import progress_bar
from trex_models.data.center_crop import Transform, image_batches
from trex_models.data.decode import log_skipped
from trex_models.data.image_files import FileSource
from trex_models.data.sources import Source, digest
from trex_models.evaluation.feature_file import (
    DTYPES,
    GrowingFile,
    exclusive,
    header_and_tail,
    load,
    names_path,
    read_metadata,
)
from trex_models.evaluation.frozen_model import FrozenModel, device_of, preprocessing
from trex_models.precision import Precision, PrecisionName

_SPARE_BYTES = 64 << 20


def extract_features(
    model: nn.Module,
    source: Source,
    transform: Transform | None = None,
    batch_size: int = 256,
    workers: int = 0,
    precision: PrecisionName | None = None,
) -> np.ndarray:
    """Extract features from all images of a source, in eval mode on the model's device.

        features = extract_features(timm.create_model("trex_resnet50", pretrained=True), source)

    Args:
        model: Module that maps images, (B, 3, S, S) in channels_last format, to (B, F).
        source: Labeled images.
        transform: ``CenterCrop`` (fast), or a function from a PIL image to a tensor, (3, S, S).
            The default is the center crop of the model's configuration.
        batch_size: Images per batch.
        workers: Number of loader workers.
        precision: fp32, tf32, bf16, fp16 or auto; None leaves autocast and TF32 unchanged.

    Returns:
        Features, (N, F) float32.

    Raises:
        ValueError: The source is empty, an image cannot be read, or ``transform`` is None and the
            model has no configuration.
    """
    if not len(source):
        raise ValueError("source contains no images; pass at least one image")
    transform, device = transform or preprocessing(model), device_of(model)
    resolved = Precision.from_name(precision, device.type) if precision else None
    images = image_batches(source, transform, batch_size, workers, device)
    features, done = np.empty((0, 0), np.float32), 0
    for rows in feature_batches(model, images, resolved):
        if not done:
            features = np.empty((len(source), *rows.shape[1:]), np.float32)
        features[done : done + len(rows)] = rows
        done += len(rows)
    return features


@torch.inference_mode()
def feature_batches(
    model: nn.Module, images: Iterable[Tensor], precision: Precision | None = None
) -> Iterator[np.ndarray]:
    """Yield the features of each batch of images, (<= batch_size, F) float32, in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    pending: list[tuple[Tensor, torch.cuda.Event | None]] = []
    try:
        for batch in images:
            with (
                precision.autocast() if precision else nullcontext(),
                precision.tf32() if precision else nullcontext(),
            ):
                output = model(batch)
            copy = output.float().to("cpu", non_blocking=output.is_cuda)  # to pinned memory
            stream = torch.cuda.current_stream(output.device) if output.is_cuda else None
            pending.append((copy, stream.record_event() if stream else None))
            if len(pending) > 1:  # meanwhile, the device computes the next batch
                yield _to_numpy(*pending.pop(0))
        for last in pending:
            yield _to_numpy(*last)
    finally:
        for module, training in modes:
            module.training = training


def _to_numpy(copy: Tensor, event: torch.cuda.Event | None) -> np.ndarray:
    if event is not None:
        event.synchronize()
    return copy.numpy()


def feature_identity(
    model: FrozenModel, source: Source, require: bool = True, **extra: str
) -> dict[str, str]:
    """Return everything that the features depend on, as strings for safetensors metadata."""
    images = {"num_images": len(source), "images_sha256": images_digest(source, require)}
    identity = {**model.identity(), **extra, **images}
    return {key: as_text(value) for key, value in identity.items()}


def images_digest(source: Source, require: bool = True) -> str:
    """Return the SHA-256 of a source's digest and, for files, of their sizes and times.

    If ``require`` is True, missing and empty files raise ValueError.
    """
    stats = [source.stats(require)[:, :2]] if isinstance(source, FileSource) else []
    return digest(source.digest(), *stats)


def as_text(value: object) -> str:
    """Return a metadata value: strings unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


@dataclass(kw_only=True)
class Extraction:
    """Resumable extraction of features into a file."""

    model: FrozenModel
    source: Source
    path: Path
    identity: Mapping[str, str]
    """Result of ``feature_identity``, stored in the file's metadata."""
    title: str = "images"
    names: Sequence[str] | None = None
    """Names of the images to store in the file; None to store no names."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    batch_size: int = 256
    workers: int = 0
    skip: bool = False
    """If True, skip and list unreadable images; otherwise they raise an error."""
    overwrite: bool = False
    """If True, replace an existing file that differs from the requested one."""
    remedy: str = "delete it to extract the features again"
    """Advice for the error message about a file that differs."""

    def run(self) -> bool:
        """Write the file unless it exists; return True if it was written."""
        if self._exists():
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path):
            if self._exists():  # another process has written it
                return False
            self._resume()
            self._extract()
            self._finish()
        return True

    def _exists(self) -> bool:
        path = self.path
        metadata = read_metadata(path)
        if not path.exists() and path.suffix == ".npy" and metadata is None:
            path = names_path(path)  # may be a file of the user
        if not path.exists():
            return False
        problem = self._difference(metadata)
        if problem and not self.overwrite:
            raise ValueError(f"{path} exists, but {problem}; {self.remedy}")
        return not problem

    def _difference(self, metadata: Mapping[str, str] | None) -> str:
        """Return how an existing file differs from the requested one; empty if it matches."""
        if metadata is None:
            return "is not a feature file"
        keys = [key for key, value in self.identity.items() if metadata.get(key) != value]
        if not self.skip and metadata.get("skipped", "0") != "0":
            keys.append("skipped")
        if keys:
            return f"differs from the requested features in {', '.join(keys)}"
        try:
            load(self.path)
        except ValueError:
            return "is damaged: it is truncated, or its names do not match its features"
        return ""

    def _resume(self) -> None:
        self.skipped: dict[int, str] = {}
        header, tail = self._header_and_tail()
        row_bytes = DTYPES[self.dtype].itemsize * math.prod(self.model.shape)
        self.part = GrowingFile(self.path, header, row_bytes)
        self.key = digest(*self.identity.values())
        notes = json.loads(self.part.notes or "{}")
        is_other = notes.get("key", self.key) != self.key  # not in the header of an .npy file
        if is_other or (notes.get("skipped") and not self.skip):  # then start over
            self.part.rows, notes = 0, {}
        skipped = {int(index): reason for index, reason in notes.get("skipped", {}).items()}
        self.start = _image_index(self.part.rows, skipped) if self.part.rows else 0
        self._on_skip({i: reason for i, reason in skipped.items() if i < self.start})
        size = (len(self.source) - self.start) * row_bytes + len(tail) + _SPARE_BYTES
        require_space(self.path.parent, size, "folder, or use --dtype float16")

    def _on_skip(self, reasons: Mapping[int, str]) -> None:
        self.skipped |= reasons
        self.part.notes = json.dumps({"key": self.key, "skipped": self.skipped})

    def _extract(self) -> None:
        model, count, start, part = self.model, len(self.source), self.start, self.part
        if start:
            print(f"{self.title}: continuing from image {start:,} of {count:,}", flush=True)
        started = time.monotonic()
        images = image_batches(
            self.source,
            model.transform,
            self.batch_size,
            self.workers,
            device_of(model.model),
            range(start, count),
            self._on_skip if self.skip else None,
        )
        bar = progress_bar(count, f"features of {self.title}", "image", initial=start)
        with part.writing() as write, bar:
            for batch in feature_batches(model.model, images, model.precision):
                with np.errstate(over="ignore"):  # reported below
                    rows = batch.astype(DTYPES[self.dtype], copy=False)
                finite = np.isfinite(rows.reshape(len(rows), -1)).all(1)
                if not finite.all():
                    first = _image_index(part.rows + int(np.argmin(finite)), self.skipped)
                    raise ValueError(
                        f"features of {self.source.name(first)} are not finite "
                        f"({model.precision.name}, stored as {rows.dtype}); use --precision fp32 "
                        "and --dtype float32; if the error persists, the weights are damaged"
                    )
                write(rows)
                bar.update(part.rows + len(self.skipped) - bar.n)
        seconds = time.monotonic() - started
        rate = f"{(count - start) / seconds:,.0f} images/s"
        print(f"{self.title}: {count - start:,} images in {seconds:.1f} s ({rate})", flush=True)

    def _header_and_tail(self, length: int = 0) -> tuple[bytes, bytes]:
        metadata, names = {**self.metadata, **self.identity}, None
        if self.names is not None:
            metadata["skipped"] = str(len(self.skipped))
            names = [name for i, name in enumerate(self.names) if i not in self.skipped]
        shape = (len(self.source) - len(self.skipped), *self.model.shape)
        return header_and_tail(self.path, shape, DTYPES[self.dtype], metadata, names, length)

    def _finish(self) -> None:
        count = len(self.source)
        if len(self.skipped) == count:
            raise ValueError(f"all {count} images are unreadable; first error: {self.skipped[0]}")
        listed = self.path.with_name(f"{self.path.name}.skipped.txt")
        listed.unlink(missing_ok=True)  # left by an earlier attempt
        if self.skipped:
            reasons = [self.skipped[index] for index in sorted(self.skipped)]
            log_skipped(reasons, listed, print)
            print(f"skipped {len(reasons)} of {count} images, listed in {listed}")
            with replacing(listed) as file:
                file.write("".join(f"{reason}\n" for reason in reasons).encode(errors="replace"))
        self.part.finish(*self._header_and_tail(len(self.part.header)))


def _image_index(row: int, skipped: Mapping[int, str]) -> int:
    """Return the index of the image whose features are, or will be, in a row."""
    for index in sorted(skipped):
        if index <= row:
            row += 1
    return row
