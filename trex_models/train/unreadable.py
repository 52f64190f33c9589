"""Image files: unreadable ones, and ones that changed since a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trex_models.atomic import write_whole
from trex_models.data.decode import log_skipped
from trex_models.data.image_files import FileSource
from trex_models.data.sources import Source
from trex_models.distributed import gather_objects


class UnreadableImages:
    """Unreadable images that were skipped, and why: counted, listed in a file, and limited.

    Args:
        path: File of the list, written if there are any.
        num_images: Number of training images.
        ceiling: Share of them that may be unreadable.
    """

    def __init__(self, path: Path, num_images: int, ceiling: float) -> None:
        self.path = path
        self._ceiling = int(num_images * ceiling + 1e-6)  # 0.29 * 100 is just below 29
        self._of_training: dict[int, str] = {}
        self._of_validation: dict[int, str] = {}
        self._listed: set[str] = set()

    def __len__(self) -> int:
        """Number of training images that this rank knows of; after ``exchange``, of all ranks."""
        return len(self._of_training)

    @property
    def indices(self) -> list[int]:
        """Indices of the training images, for a checkpoint."""
        return sorted(self._of_training)

    @property
    def too_many(self) -> bool:
        """Whether more training images are unreadable than allowed."""
        return len(self._of_training) > self._ceiling

    def add(self, reasons: Mapping[int, str]) -> None:
        """Add {index: reason} of training images; each reason names its image."""
        self._of_training |= reasons

    def add_validation(self, reasons: Mapping[int, str]) -> None:
        """Add {index: reason} of validation images."""
        self._of_validation |= reasons

    def exchange(self, writes: bool, log: Callable[[str], object]) -> None:
        """Share the images of all ranks; every rank must call it.

        Args:
            writes: Write the list, and log images that are new to it.
            log: Receives lines to print.
        """
        for of_training, of_validation in gather_objects((self._of_training, self._of_validation)):
            self._of_training |= of_training
            self._of_validation |= of_validation
        reasons = [
            found[index]
            for found in (self._of_training, self._of_validation)
            for index in sorted(found)
        ]
        new = [reason for reason in reasons if reason not in self._listed]
        if writes:
            log_skipped(new, self.path, log)
            if reasons and set(reasons) != self._listed:
                write_whole(self.path, "".join(f"{reason}\n" for reason in reasons))
            elif not reasons:
                self.path.unlink(missing_ok=True)  # of an earlier start; they were fixed
        self._listed = set(reasons)

    def trouble(self) -> str:
        """Return the message of the error that ends a run."""
        return (
            f"{len(self)} training images are unreadable, {self._ceiling} may be "
            f"(data.max_unreadable), such as: {next(iter(self._of_training.values()))}, or raise "
            "--data.max-unreadable; then the same command continues"
        )


class ImageFiles:
    """Compares sizes and times of image files with those that a checkpoint was trained on.

    A thread reads them: 1.28 million local files take 4 seconds, network storage many minutes.
    A checkpoint keeps 4 bytes a file.

    Args:
        sources: Images by purpose, such as training.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = {k: s for k, s in sources.items() if isinstance(s, FileSource)}
        self._now: dict[str, Tensor] = {}
        self._before: Mapping[str, Tensor] = {}
        self._checkpoint: Path | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        found = {k: source.fingerprint() for k, source in self._sources.items()}
        self._now = {k: torch.from_numpy(pairs.view(np.int16)) for k, pairs in found.items()}

    def compare_with(self, state: Mapping[str, Tensor], checkpoint: Path) -> None:
        """Compare the files with the state in a checkpoint."""
        self._before, self._checkpoint = state, checkpoint

    def state(self, seconds: float = 1.0) -> dict[str, Tensor]:
        """Return the state for a checkpoint, (N, 2) int16 by purpose; empty if not yet known."""
        self._thread.join(seconds)
        return self._now

    def warnings(self) -> list[str]:
        """Return a line for each kind of change, once, as soon as the files are known."""
        if not self._now:
            return []
        before, self._before = self._before, {}
        lines = [self._changes(name, pairs) for name, pairs in before.items() if name in self._now]
        return [line for found in lines for line in found]

    def _changes(self, name: str, before: Tensor) -> list[str]:
        source, now = self._sources[name], self._now[name]
        since = f"since {self._checkpoint} was saved"
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
