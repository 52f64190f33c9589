"""Sources of labeled images: anything indexed that yields decoded pixels and labels."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Source(Protocol):
    """Labeled images by index, in random access."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, by label."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Labels, (N,) int64."""
        ...

    def __len__(self) -> int:
        """Return N, the number of images."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Return one decoded image, (H, W, 3) uint8 RGB."""
        ...

    def name(self, index: int) -> str:
        """Return the sample's name in error messages: a path, or a phrase."""
        ...

    def digest(self) -> str:
        """Return a hash of the samples in their order, which a resumed run compares."""
        ...


class ArraySource:
    """Images that are already in memory.

    Args:
        images: N images of (H, W, 3) uint8 RGB; the sizes may differ.
        labels: N labels in [0, len(classes)).
        classes: Class names; a name's position is its label.

    Raises:
        ValueError: The lengths differ, a label has no class, or an image is not RGB bytes.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
    ) -> None:
        self.images = images
        self.labels = checked_labels(labels, len(images), len(classes))
        self.classes = classes
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"image {index} is {image.dtype} {image.shape}, not uint8 (H, W, 3)"
                )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (H, W, 3) uint8 RGB; a view, not a copy."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Return the sample's name in messages."""
        return f"{self.classes[self.labels[index]]} image {index}"

    def digest(self) -> str:
        """Return a hash of pixels, labels and classes."""
        return digest(self.labels, *self.classes, *self.images)


def checked_labels(
    labels: Sequence[int] | np.ndarray, count: int, num_classes: int, where: str = ""
) -> np.ndarray:
    """Return labels as (N,) int64.

    Args:
        labels: N labels in [0, num_classes).
        count: Number of images, N.
        num_classes: Number of classes.
        where: Start of error messages.

    Raises:
        ValueError: The numbers differ, or a label has no class.
    """
    checked = np.asarray(labels, dtype=np.int64)
    if checked.shape != (count,):
        raise ValueError(f"{where}need one label an image: {count} images, labels {checked.shape}")
    if count and not 0 <= checked.min() <= checked.max() < num_classes:
        raise ValueError(
            f"{where}labels span [{checked.min()}, {checked.max()}], outside the {num_classes} "
            "classes"
        )
    return checked


def require_positive(**arguments: int) -> None:
    """Check arguments by name.

    Raises:
        ValueError: One is below 1.
    """
    for argument, value in arguments.items():
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, not {value}")


def digest(*parts: np.ndarray | bytes | str) -> str:
    """Return the SHA-256 of parts, each with its length, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else part
        data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()


def sorted_classes(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels in sorted order; as numbers if all are integers."""
    names = sorted(set(labels))
    try:
        return sorted(names, key=int)
    except ValueError:
        return names
