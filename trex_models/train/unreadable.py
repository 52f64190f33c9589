"""Image files: unreadable ones, and ones that changed since a checkpoint."""

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
    """Unreadable images that were skipped: counted, listed in a file if there are any, limited.

    The ceiling is a share of the training images.
    """

    def __init__(self, path: Path, num_images: int, ceiling: float) -> None:
        self.training: dict[int, str] = {}
        """Reasons by index, each of which names its image; after ``exchange`` of all ranks."""
        self.validation: dict[int, str] = {}
        self._path = path
        self._ceiling = int(num_images * ceiling + 1e-6)  # 0.29 * 100 is just below 29
        self._listed: dict[str, None] = {}

    def exchange(self, writes: bool, log: Callable[[str], object]) -> None:
        """Share the images of all ranks; every rank must call it.

        With ``writes`` it writes the list, and logs the images that are new to it.
        """
        for training, validation in gather_objects((self.training, self.validation)):
            self.training |= training
            self.validation |= validation
        found = sorted(self.training.items()), sorted(self.validation.items())
        reasons = dict.fromkeys(reason for part in found for _, reason in part)
        if writes:
            log_skipped([r for r in reasons if r not in self._listed], self._path, log)
            if not reasons:
                self._path.unlink(missing_ok=True)  # of an earlier start; they were fixed
            elif reasons != self._listed:
                write_text_file(self._path, "".join(f"{reason}\n" for reason in reasons))
        self._listed = reasons

    def trouble(self) -> str:
        """Return the error that ends a run; empty unless too many training images are skipped."""
        if len(self.training) <= self._ceiling:
            return ""
        return (
            f"{len(self.training)} training images are unreadable, {self._ceiling} may be "
            f"(data.max_unreadable), such as: {next(iter(self.training.values()))}, or raise "
            "--data.max-unreadable; then the same command continues"
        )


class ImageFiles:
    """Compares sizes and times of image files with those that a checkpoint was trained on.

    A thread reads them: 1.28 million local files take 4 seconds, network storage many minutes.
    A checkpoint keeps 4 bytes a file. Sources are by purpose, such as training; ``before`` is the
    state in the checkpoint, if there is one.
    """

    def __init__(
        self, sources: Mapping[str, Source], before: Mapping[str, Tensor], checkpoint: Path | None
    ) -> None:
        self._sources = {k: s for k, s in sources.items() if isinstance(s, FileSource)}
        self._now: dict[str, Tensor] = {}
        self._before = before
        self._since = f"since {checkpoint} was saved"
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        found = {k: source.fingerprint() for k, source in self._sources.items()}
        self._now = {k: torch.from_numpy(pairs.view(np.int16)) for k, pairs in found.items()}

    def state(self, seconds: float = 1.0) -> dict[str, Tensor]:
        """Return the state for a checkpoint, (N, 2) int16 by purpose; empty if not yet known."""
        self._thread.join(seconds)
        return self._now

    def warnings(self) -> list[str]:
        """Return a line for each kind of change, once, as soon as the files are known."""
        if not self._now:
            return []
        before, self._before = self._before, {}
        known = [name for name in before if name in self._now]
        return [line for name in known for line in self._changes(name, before[name])]

    def _changes(self, name: str, before: Tensor) -> list[str]:
        source, now, since = self._sources[name], self._now[name], self._since
        if before.shape != now.shape:
            return [f"warning: {len(now):,} {name} images, {len(before):,} before: changed {since}"]
        sizes, times = (before != now).T
        times &= ~sizes
        if times.all():
            return [f"all {name} images have other modification times {since}, but no other sizes"]
        return [
            f"warning: {int(changed.sum()):,} of {len(now):,} {name} images have {what} {since}, "
            f"such as {source.name(int(changed.nonzero()[0]))}"
            for changed, what in ((sizes, "other sizes"), (times, "other modification times"))
            if changed.any()
        ]
