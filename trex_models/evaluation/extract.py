"""Extract features of images: in memory, or once into a file that survives interruptions.

Workers decode, resize and crop; uint8 crops travel to the model's device and are normalized there.
The host never waits for the current batch: it takes the features of one while the device computes
the next.

A file is identified by everything that its features depend on (``feature_identity``), not by its
name. It grows next to its path, and the same call continues it.

Shapes: N images, F features, S side in pixels.
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
    ends,
    exclusive,
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
    """Run a model over a source, in eval mode on the device that it is on.

        features = extract_features(timm.create_model("trex_resnet50", pretrained=True), source)

    Args:
        model: Any module that maps (B, 3, S, S), in channels_last format, to (B, F).
        source: Labeled images.
        transform: A center crop (fast), or a function from a PIL image to a tensor, (3, S, S).
            None for the center crop that the model itself asks for.
        batch_size: Images per batch.
        workers: Loader processes.
        precision: fp32, tf32, bf16, fp16 or auto; None leaves autocast and TF32 as they are.

    Returns:
        (N, F) float32.

    Raises:
        ValueError: An image cannot be read, there are no images, or ``transform`` is None and the
            model has no configuration.
    """
    if not len(source):
        raise ValueError("there are no images to extract features of")
    transform, device = transform or preprocessing(model), device_of(model)
    formats = Precision.from_name(precision, device.type) if precision else None
    images = image_batches(source, transform, batch_size, workers, device)
    features, done = np.empty((0, 0), np.float32), 0
    for rows in feature_batches(model, images, formats):
        if not done:
            features = np.empty((len(source), *rows.shape[1:]), np.float32)
        features[done : done + len(rows)] = rows
        done += len(rows)
    return features


@torch.inference_mode()
def feature_batches(
    model: nn.Module, images: Iterable[Tensor], precision: Precision | None = None
) -> Iterator[np.ndarray]:
    """Yield a model's output in eval mode for batches of images, (<= batch_size, F) float32."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    waiting: list[tuple[Tensor, torch.cuda.Event | None]] = []
    try:
        for batch in images:
            with (
                precision.autocast() if precision else nullcontext(),
                precision.tf32() if precision else nullcontext(),
            ):
                output = model(batch)
            copy = output.float().to("cpu", non_blocking=output.is_cuda)  # into page-locked memory
            stream = torch.cuda.current_stream(output.device) if output.is_cuda else None
            waiting.append((copy, stream.record_event() if stream else None))
            if len(waiting) > 1:  # the device computes the next batch meanwhile
                yield _array(*waiting.pop(0))
        for last in waiting:
            yield _array(*last)
    finally:
        for module, training in modes:
            module.training = training


def _array(copy: Tensor, copied: torch.cuda.Event | None) -> np.ndarray:
    if copied is not None:
        copied.synchronize()
    return copy.numpy()


def feature_identity(
    model: FrozenModel, source: Source, require: bool = True, **further: str
) -> dict[str, str]:
    """Return everything that features depend on, as strings, as in safetensors' metadata."""
    images = {"num_images": len(source), "images_sha256": images_digest(source, require)}
    about = {**model.identity(), **further, **images}
    return {key: as_text(value) for key, value in about.items()}


def images_digest(source: Source, require: bool = True) -> str:
    """Return the SHA-256 of a source's digest and, if they are files, their sizes and times.

    With ``require`` missing and empty files are errors. Unpacking an archive restores the times.
    """
    stats = [source.stats(require)[:, :2]] if isinstance(source, FileSource) else []
    return digest(source.digest(), *stats)


def as_text(value: object) -> str:
    """Return a value as in metadata: text, or the JSON of anything else."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


@dataclass(kw_only=True)
class Extraction:
    """Features of images in a file, which is written once and continues after interruptions."""

    model: FrozenModel
    source: Source
    path: Path
    identity: Mapping[str, str]
    """Result of ``feature_identity``; metadata of the file."""
    title: str = "images"
    names: Sequence[str] | None = None
    """Names of the images in the file; None for no names."""
    about: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    batch_size: int = 256
    workers: int = 0
    skip: bool = False
    """Whether to skip and list unreadable images; otherwise they are errors."""
    overwrite: bool = False
    """Whether to replace a file that holds something else."""
    remedy: str = "delete it, and the features are extracted again"
    """What to do about such a file, for the message."""

    def run(self) -> bool:
        """Write the file, unless it is there; return whether it was written."""
        if self._is_there():
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path):
            if self._is_there():  # another process wrote it
                return False
            self._resume()
            self._extract()
            self._finish()
        return True

    def _is_there(self) -> bool:
        place = self.path
        found = read_metadata(place)
        if not place.exists() and place.suffix == ".npy" and found is None:
            place = names_path(place)  # users may have a file of this name
        if not place.exists():
            return False
        problem = self._difference(found)
        if problem and not self.overwrite:
            raise ValueError(f"{place} is there, and {problem}; {self.remedy}")
        return not problem

    def _difference(self, found: Mapping[str, str] | None) -> str:
        """Return how an existing file differs from the wanted one; empty if it does not."""
        if found is None:
            return "it is no file of features"
        names = [key for key, value in self.identity.items() if found.get(key) != value]
        if not self.skip and found.get("skipped", "0") != "0":
            names.append("skipped")
        if names:
            return f"it holds something else (other {', '.join(names)})"
        try:
            load(self.path)
        except ValueError:
            return "it is damaged: cut short, or its names are not those of its features"
        return ""

    def _resume(self) -> None:
        """Continue what an earlier attempt at the same file left, and nothing else."""
        self.skipped: dict[int, str] = {}
        header, tail = self._ends()
        row_bytes = DTYPES[self.dtype].itemsize * math.prod(self.model.shape)
        self.part = GrowingFile(self.path, header, row_bytes)
        self.key = digest(*self.identity.values())
        found = json.loads(self.part.notes or "{}")
        is_other = found.get("key", self.key) != self.key  # .npy's header alone does not say
        if is_other or (found.get("skipped") and not self.skip):  # errors now, or readable
            self.part.rows, found = 0, {}
        skipped = {int(index): reason for index, reason in found.get("skipped", {}).items()}
        self.start = _image_of(self.part.rows, skipped) if self.part.rows else 0
        self._on_skip({i: reason for i, reason in skipped.items() if i < self.start})
        missing = (len(self.source) - self.start) * row_bytes + len(tail) + _SPARE_BYTES
        require_space(self.path.parent, missing, "place, or use --dtype float16")

    def _on_skip(self, reasons: Mapping[int, str]) -> None:
        self.skipped |= reasons
        self.part.notes = json.dumps({"key": self.key, "skipped": self.skipped})

    def _extract(self) -> None:
        model, count, start, part = self.model, len(self.source), self.start, self.part
        if start:
            print(f"{self.title}: continuing from image {start:,} of {count:,}", flush=True)
        began = time.monotonic()
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
                with np.errstate(over="ignore"):  # reported next
                    rows = batch.astype(DTYPES[self.dtype], copy=False)
                finite = np.isfinite(rows.reshape(len(rows), -1)).all(1)
                if not finite.all():
                    first = _image_of(part.rows + int(np.argmin(finite)), self.skipped)
                    raise ValueError(
                        f"features of {self.source.name(first)} are not finite "
                        f"({model.precision.name}, kept as {rows.dtype}): use --precision fp32 and "
                        "--dtype float32; if that changes nothing, the weights are damaged"
                    )
                write(rows)
                bar.update(part.rows + len(self.skipped) - bar.n)
        seconds = time.monotonic() - began
        rate = f"{(count - start) / seconds:,.0f} images/s"
        print(f"{self.title}: {count - start:,} images in {seconds:.1f} s ({rate})", flush=True)

    def _ends(self, length: int = 0) -> tuple[bytes, bytes]:
        """Return the bytes before the features, and those after them."""
        metadata, names = {**self.about, **self.identity}, None
        if self.names is not None:
            metadata["skipped"] = str(len(self.skipped))
            names = [name for i, name in enumerate(self.names) if i not in self.skipped]
        shape = (len(self.source) - len(self.skipped), *self.model.shape)
        return ends(self.path, shape, DTYPES[self.dtype], metadata, names, length)

    def _finish(self) -> None:
        """List the skipped images, and complete the file."""
        count = len(self.source)
        if len(self.skipped) == count:
            raise ValueError(f"none of {count} images can be read, such as: {self.skipped[0]}")
        listed = self.path.with_name(f"{self.path.name}.skipped.txt")
        listed.unlink(missing_ok=True)  # of an earlier attempt
        if self.skipped:
            reasons = [self.skipped[index] for index in sorted(self.skipped)]
            log_skipped(reasons, listed, print)
            print(f"skipped {len(reasons)} of {count} images, all listed in {listed}")
            with replacing(listed) as file:
                file.write("".join(f"{reason}\n" for reason in reasons).encode(errors="replace"))
        self.part.finish(*self._ends(len(self.part.header)))


def _image_of(row: int, skipped: Mapping[int, str]) -> int:
    """Return the index of the image that a row belongs, or will belong, to."""
    for index in sorted(skipped):
        if index <= row:
            row += 1
    return row
