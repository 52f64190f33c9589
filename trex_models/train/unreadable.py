"""Images that could not be read and were passed over: counted, listed, and not too many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from trex_models.files import write_whole
from trex_models.train.distributed import gather_objects

_SHOWN = 5  # at once; all are in the file


class UnreadableImages:
    """What is wrong with the images that could not be read, of all processes.

    Args:
        path: The list's file, written when there is something to list.
        num_images: Of the training images.
        ceiling: Share of them that may be unreadable.
    """

    def __init__(self, path: Path, num_images: int, ceiling: float) -> None:
        self.path = path
        self._ceiling = int(num_images * ceiling)
        self._of_training: set[str] = set()
        self._of_validation: set[str] = set()
        self._listed: list[str] = []

    def __len__(self) -> int:
        """Return how many training images this process knows of; of all, after ``exchange``."""
        return len(self._of_training)

    def add(self, reasons: Iterable[str]) -> None:
        """Note what is wrong with some training images; each reason names its image."""
        self._of_training.update(reasons)

    def add_of_validation(self, reasons: Iterable[str]) -> None:
        """Note what is wrong with some validation images."""
        self._of_validation.update(reasons)

    def exchange(self, writes: bool, say: Callable[[str], object]) -> bool:
        """Share what every process found; all of them must call it.

        Args:
            writes: Whether this process writes the list.
            say: What to do with a line about images that are new to it.

        Returns:
            Whether more training images are unreadable than may be.
        """
        found = gather_objects((self._of_training, self._of_validation))
        for of_training, of_validation in found:
            self._of_training |= of_training
            self._of_validation |= of_validation
        reasons = sorted(self._of_training | self._of_validation)
        new = [reason for reason in reasons if reason not in self._listed]
        if new and writes:
            for reason in new[:_SHOWN]:
                say(f"skipped: {reason}")
            if len(new) > _SHOWN:
                say(f"skipped: {len(new) - _SHOWN} more, listed in {self.path}")
            write_whole(self.path, "".join(f"{reason}\n" for reason in reasons))
        self._listed = reasons
        return len(self._of_training) > self._ceiling

    def too_many(self) -> str:
        """Return the message of the error that ends a run."""
        return (
            f"{len(self._of_training)} training images cannot be read, {self._ceiling} may be "
            f"(data.max_unreadable); they are listed in {self.path}: replace or remove them, or "
            "raise --data.max-unreadable; then the same command goes on"
        )

    def state(self) -> list[str]:
        """Return the reasons that concern training images, for a checkpoint."""
        return sorted(self._of_training)
