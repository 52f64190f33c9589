"""Image files that are unreadable, or that changed since a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trex_models.atomic import write_text_file
from trex_models.data.decode import log_skipped
from trex_models.data.image_files import FileSource
from trex_models.data.sources import Source
from trex_models.distributed import gather_objects


class UnreadableImages:
    """Skipped unreadable images, which are counted and listed in a file.

    ``max_share`` is the largest permitted share of the training images.
    """

    def __init__(self, path: Path, num_images: int, max_share: float) -> None:
        self.training: dict[int, str] = {}
        """{index: reason}; a reason names its image. ``exchange`` adds those of other ranks."""
        self.validation: dict[int, str] = {}
        self._path = path
        self._limit = int(num_images * max_share + 1e-6)  # 0.29 * 100 is just below 29
        self._listed: dict[str, None] = {}

    def exchange(self, writes: bool, log: Callable[[str], object]) -> None:
        """Exchange the images among all ranks, which must all call this method.

        With ``writes``, write the list and log the images that are new to it.
        """
        for training, validation in gather_objects((self.training, self.validation)):
            self.training |= training
            self.validation |= validation
        parts = sorted(self.training.items()), sorted(self.validation.items())
        reasons = dict.fromkeys(reason for part in parts for _, reason in part)
        if writes:
            log_skipped([r for r in reasons if r not in self._listed], self._path, log)
            if not reasons:
                self._path.unlink(missing_ok=True)  # from an earlier start
            elif reasons != self._listed:
                write_text_file(self._path, "".join(f"{reason}\n" for reason in reasons))
        self._listed = reasons

    def error_message(self) -> str:
        """Return the error that ends the run if too many training images are skipped, or ''."""
        if len(self.training) <= self._limit:
            return ""
        return (
            f"{len(self.training)} training images are unreadable (the limit is {self._limit}), "
            f"such as: {next(iter(self.training.values()))}, or raise "
            "--data.max-unreadable; then run the same command to continue"
        )


class ImageFiles:
    """Comparison of the sizes and modification times of image files with those in a checkpoint.

    A thread reads them: 1.28 million local files take 4 seconds, network storage many minutes. A
    checkpoint stores 4 bytes per file. The keys of ``sources`` and ``before`` are purposes, such as
    training; ``before`` is the state in the checkpoint, if there is one.
    """

    def __init__(
        self, sources: Mapping[str, Source], before: Mapping[str, Tensor], checkpoint: Path | None
    ) -> None:
        self._sources = {k: s for k, s in sources.items() if isinstance(s, FileSource)}
        self._now: dict[str, Tensor] = {}
        self._before = before
        self._since = f"since {checkpoint} was saved"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        prints = {k: source.fingerprint() for k, source in self._sources.items()}
        self._now = {k: torch.from_numpy(pairs.view(np.int16)) for k, pairs in prints.items()}

    def state(self, seconds: float = 1.0) -> dict[str, Tensor]:
        """Return the state for a checkpoint, {purpose: (N, 2) int16}; empty if not yet known."""
        self._thread.join(seconds)
        return self._now

    def warnings(self) -> list[str]:
        """Return a line per kind of change, only once, when the thread has read all files."""
        if not self._now:
            return []
        before, self._before = self._before, {}
        known = [name for name in before if name in self._now]
        return [line for name in known for line in self._changes(name, before[name])]

    def _changes(self, name: str, before: Tensor) -> list[str]:
        source, now, since = self._sources[name], self._now[name], self._since
        if before.shape != now.shape:
            return [f"warning: number of {name} images: {len(before):,} -> {len(now):,} {since}"]
        sizes, times = (before != now).T
        times &= ~sizes
        if times.all():
            return [f"all {name} images have new modification times {since}, but the same sizes"]
        return [
            f"warning: {int(changed.sum()):,} of {len(now):,} {name} images have {what} {since}, "
            f"such as {source.name(int(changed.nonzero()[0]))}"
            for changed, what in ((sizes, "new sizes"), (times, "new modification times"))
            if changed.any()
        ]
