"""Where labelled images come from: anything indexed that yields decoded pixels and labels."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Source(Protocol):
    """Labelled images by index, in random access."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; a name's position is its label."""
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
        """Return what an error message calls the sample: a path, or a phrase."""
        ...

    def digest(self) -> str:
        """Return a hash of what each index stands for, for a run that goes on to compare."""
        ...


class ArraySource:
    """Images that are already in memory.

    Args:
        images: N images of (H, W, 3) uint8 RGB; the sizes may differ.
        labels: N labels in [0, len(classes)).
        classes: Class names; a name's position is its label.

    Raises:
        ValueError: If the lengths differ, a label has no class, or an image is not RGB bytes.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
    ) -> None:
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = classes
        if self.labels.shape != (len(images),):
            raise ValueError(
                f"need one label an image: {len(images)} images, labels {self.labels.shape}"
            )
        if len(images) and not 0 <= self.labels.min() <= self.labels.max() < len(classes):
            raise ValueError(
                f"labels span [{self.labels.min()}, {self.labels.max()}], "
                f"outside the {len(classes)} classes"
            )
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
