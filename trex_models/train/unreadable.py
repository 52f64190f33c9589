"""Images that could not be read and were passed over: counted, listed, and not too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from trex_models.atomic import write_whole
from trex_models.train.distributed import gather_objects

_SHOWN = 5  # at once; all are in the file


class UnreadableImages:
    """What is wrong with the images that could not be read, of all processes, by index.

    Args:
        path: The list's file, written when there is something to list.
        num_images: Of the training images.
        ceiling: Share of them that may be unreadable.
    """

    def __init__(self, path: Path, num_images: int, ceiling: float) -> None:
        self.path = path
        self._ceiling = int(num_images * ceiling + 1e-6)  # 0.29 * 100 is just below 29
        self._of_training: dict[int, str] = {}
        self._of_validation: dict[int, str] = {}
        self._listed: set[str] = set()

    def __len__(self) -> int:
        """Return how many training images this process knows of; of all, after ``exchange``."""
        return len(self._of_training)

    @property
    def indices(self) -> list[int]:
        """Which training images, for a checkpoint."""
        return sorted(self._of_training)

    @property
    def too_many(self) -> bool:
        """Whether more training images are unreadable than may be."""
        return len(self._of_training) > self._ceiling

    def add(self, reasons: Mapping[int, str]) -> None:
        """Note what is wrong with some training images; each reason names its image."""
        self._of_training |= reasons

    def add_of_validation(self, reasons: Mapping[int, str]) -> None:
        """Note what is wrong with some validation images."""
        self._of_validation |= reasons

    def exchange(self, writes: bool, say: Callable[[str], object]) -> None:
        """Share what every process found; all of them must call it.

        Args:
            writes: Whether this process writes the list.
            say: What to do with a line about images that are new to it.
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
        if new and writes:
            for reason in new[:_SHOWN]:
                say(f"skipped: {reason}")
            if len(new) > _SHOWN:
                say(f"skipped: {len(new) - _SHOWN} more, listed in {self.path}")
        if writes and reasons and set(reasons) != self._listed:
            write_whole(self.path, "".join(f"{reason}\n" for reason in reasons))
        elif writes and not reasons:
            self.path.unlink(missing_ok=True)  # of an earlier life; they have been mended
        self._listed = set(reasons)

    def trouble(self) -> str:
        """Return the message of the error that ends a run."""
        return (
            f"{len(self)} training images cannot be read, {self._ceiling} may be "
            f"(data.max_unreadable), such as: {next(iter(self._of_training.values()))}, or raise "
            "--data.max-unreadable; then the same command goes on"
        )
