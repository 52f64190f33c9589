"""From images to a file of features, which goes on where an earlier attempt was cut.

Rows are appended to a file beside, which takes its place when it is whole. Beside the number of
rows that are on the disk for certain stands what was left out.

Shapes: N images, F features.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trex_models.atomic import replacing, write_whole
from trex_models.data.sources import digest
from trex_models.evaluation.features import feature_batches
from trex_models.features import file as features_file
from trex_models.features.images import Images, shown
from trex_models.transfer.cache import (
    DTYPES,
    GrowingFile,
    alone,
    as_text,
    check_rows,
    require_room,
    tf32,
)
from trex_models.transfer.encoders import PRECISIONS, Encoder

_SHOWN = 5  # unreadable images told at once; all are in the list


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How features are extracted."""

    out: Path
    """The file, .safetensors or .npy."""
    dtype: str = "float32"
    """How they are kept: a key of ``DTYPES``."""
    batch_size: int = 256
    """Images at a time."""
    workers: int = 0
    """Loader processes."""
    skip: bool = False
    """Whether images that cannot be read are left out and listed; otherwise they are errors."""
    overwrite: bool = False
    """Whether other features in the file may be replaced."""


def extract(
    encoder: Encoder, shape: tuple[int, ...], images: Images, plan: Plan, about: Mapping[str, str]
) -> bool:
    """Write features of images, unless they are there.

    Args:
        encoder: What maps images to features.
        shape: Of one image's features.
        images: Whose.
        plan: How.
        about: What else the metadata say.

    Returns:
        Whether it was written; False if it was there.

    Raises:
        ValueError: The file holds other features, an image cannot be read or all are left out,
            features are not finite, or the disk has no room.
        OSError: The file cannot be written.
    """
    try:
        stats = images.source.stats(require=not plan.skip)
    except ValueError as error:
        raise ValueError(f"{error}, or leave them out by --unreadable skip") from error
    identity = _identity(encoder, images, stats, plan, about["output"])
    metadata = {**about, **identity, "root": str(images.source.root)}
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with alone(plan.out):
        if _is_there(plan, identity):
            return False
        key = digest(*identity.values())
        _Extraction(encoder, shape, images, plan, metadata, key).run()
    return True


def _identity(
    encoder: Encoder, images: Images, stats: np.ndarray, plan: Plan, output: str
) -> dict[str, str]:
    """Return what the features depend on; strings, as safetensors has them."""
    found = {
        **encoder.identity(),
        "output": output,
        "dtype": plan.dtype,
        "num_images": len(images.source),
        "images_sha256": digest(images.source.digest(), stats[:, :2]),
    }
    return {key: as_text(value) for key, value in found.items()}


def _is_there(plan: Plan, identity: Mapping[str, str]) -> bool:
    """Return whether the features are there.

    Raises:
        ValueError: Others are, and may not be replaced.
    """
    found = features_file.read_metadata(plan.out)
    place = plan.out
    if not place.exists() and place.suffix == ".npy" and found is None:
        place = features_file.names_path(place)  # a name that users have for their own
    if not place.exists():
        return False
    differing = _difference(plan, identity, found)
    if not differing:
        return True
    if plan.overwrite:
        return False
    raise ValueError(
        f"{place} is there, and {differing}; choose another --out, or replace it by --overwrite"
    )


def _difference(plan: Plan, identity: Mapping[str, str], found: Mapping[str, str] | None) -> str:
    """Return what tells a file that is there from the wanted one; empty where nothing does."""
    if found is None:
        return "it is no file of features"
    names = [key for key, value in identity.items() if found.get(key) != value]
    if not plan.skip and found.get("skipped", "0") != "0":
        names.append("skipped")
    if names:
        verb = "differ" if len(names) > 1 else "differs"
        return f"holds something else ({', '.join(names)} {verb})"
    try:
        features_file.load(plan.out)
    except ValueError:
        return "it is damaged: cut short, or its names are not those of its features"
    return ""


class _Extraction:
    """One file's."""

    def __init__(
        self,
        encoder: Encoder,
        shape: tuple[int, ...],
        images: Images,
        plan: Plan,
        metadata: dict[str, str],
        key: str,
    ) -> None:
        self.encoder, self.shape, self.images, self.plan = encoder, shape, images, plan
        self.metadata, self.key = metadata, key
        self.kept = DTYPES[plan.dtype]
        self.names = images.names
        header, tail = self._ends(self.names, {})
        self.part = GrowingFile(plan.out, header, self.kept.itemsize * math.prod(shape))
        self.skipped = self._resume()
        self.part.notes = self._notes()
        self.tail_bytes = len(tail)

    def run(self) -> None:
        """Extract what is missing."""
        plan, part, source = self.plan, self.part, self.images.source
        start = _image_of(part.rows, self.skipped)
        missing = (len(source) - start) * part.row_bytes + self.tail_bytes
        require_room(plan.out, missing, "choose another --out, or --dtype float16")
        if start:
            print(f"going on from image {start:,} of {len(source):,}", flush=True)
        bar = tqdm(
            total=len(source),
            initial=start,
            desc="features",
            unit="image",
            dynamic_ncols=True,
            disable=None,  # where stderr is no terminal
        )

        def skipped(reasons: Mapping[int, str]) -> None:
            self.skipped |= reasons
            part.notes = self._notes()
            bar.update(len(reasons))

        began = time.monotonic()
        batches = feature_batches(
            self.encoder.model,
            source,
            self.encoder.transform,
            plan.batch_size,
            plan.workers,
            PRECISIONS[self.encoder.precision],
            range(start, len(source)),
            skipped if plan.skip else None,
        )
        with part.writing() as write, bar, tf32(self.encoder.precision != "fp32"):
            for batch in batches:
                with np.errstate(over="ignore"):  # what is not finite is told below
                    rows = batch.astype(self.kept, copy=False)
                check_rows(rows, self._name, self.encoder, "--precision fp32 and --dtype float32")
                write(rows)
                bar.update(len(rows))
        seconds = time.monotonic() - began
        self._finish()
        done = len(source) - start
        print(f"{done:,} images in {seconds:.1f} s ({done / seconds:,.0f} a second)", flush=True)

    def _resume(self) -> dict[int, str]:
        """Return what an earlier attempt at the same file left out; forget one at another."""
        found = json.loads(self.part.notes or "{}")
        if found.get("key") != self.key:
            self.part.rows = 0
        skipped = {int(index): reason for index, reason in found.get("skipped", {}).items()}
        if not self.part.rows:
            skipped = {}
        if skipped and not self.plan.skip:  # they are errors now, or have become readable
            self.part.rows = min(self.part.rows, min(skipped))
            skipped = {}
        start = _image_of(self.part.rows, skipped)
        return {index: reason for index, reason in skipped.items() if index < start}

    def _notes(self) -> str:
        return json.dumps({"key": self.key, "skipped": self.skipped})

    def _name(self, row: int) -> str:
        return self.images.source.name(_image_of(self.part.rows + row, self.skipped))

    def _ends(
        self, names: list[str], skipped: Mapping[int, str], length: int = 0
    ) -> tuple[bytes, bytes]:
        """Return what goes before the features, and after them."""
        metadata = {**self.metadata, "skipped": str(len(skipped))}
        shape = (len(names), *self.shape)
        listed = json.dumps(names).encode()
        header = features_file.head(self.plan.out, shape, self.kept, metadata, listed, length)
        return header, b"" if self.plan.out.suffix == ".npy" else listed

    def _finish(self) -> None:
        """Complete the file with what is known at the end."""
        out, part = self.plan.out, self.part
        names = [name for index, name in enumerate(self.names) if index not in self.skipped]
        if not names:
            raise ValueError(
                f"none of {len(self.names)} images can be read, such as: {self.skipped[0]}"
            )
        header, tail = self._ends(names, self.skipped, len(part.header))
        self._list_skipped()
        if out.suffix == ".npy":
            out.unlink(missing_ok=True)  # names of these features beside others would mislead
            metadata = {**self.metadata, "skipped": str(len(self.skipped))}
            write_whole(
                features_file.names_path(out),
                json.dumps({"metadata": metadata, "names": names}, indent=1) + "\n",
            )
        part.finish(header, tail)

    def _list_skipped(self) -> None:
        """Tell which images were left out, and keep the whole list beside the file."""
        path = self.plan.out.with_name(f"{self.plan.out.name}.skipped.txt")
        reasons = [self.skipped[index] for index in sorted(self.skipped)]
        if not reasons:
            path.unlink(missing_ok=True)  # of an earlier attempt
            return
        for reason in reasons[:_SHOWN]:
            print(f"skipped: {shown(reason)}")
        print(f"skipped {len(reasons)} of {len(self.names)} images, all listed in {path}")
        with replacing(path) as file:
            file.write("".join(f"{reason}\n" for reason in reasons).encode(errors="replace"))


def _image_of(row: int, skipped: Mapping[int, str]) -> int:
    """Return which image a row is of, or will be."""
    for index in sorted(skipped):
        if index > row:
            break
        row += 1
    return row
