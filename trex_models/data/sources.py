"""Sources of labeled images: anything indexed that yields decoded pixels and labels."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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
            require_rgb(image, f"image {index}")

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
    """Return labels as (N,) int64; raise a ValueError if one is missing or has no class."""
    checked = np.asarray(labels, dtype=np.int64)
    if checked.shape != (count,):
        raise ValueError(f"{where}need one label an image: {count} images, labels {checked.shape}")
    if count and not 0 <= checked.min() <= checked.max() < num_classes:
        span = f"[{checked.min()}, {checked.max()}]"
        raise ValueError(f"{where}labels span {span}, outside the {num_classes} classes")
    return checked


def encode_labels(
    names: Sequence[str],
    classes: Sequence[str] | None,
    where: str,
    place: Callable[[int], str],
) -> tuple[list[str], np.ndarray]:
    """Return the classes and the position in them of each class name, (N,) int64.

    By default the classes are the distinct names, sorted; as numbers if all are integers.

    Raises:
        ValueError: There are fewer than 2 classes, or the name at a ``place`` is none of them.
    """
    if classes is None:
        classes = sorted(set(names))
        with suppress(ValueError):
            classes = sorted(classes, key=int)
    if len(classes) < 2:
        raise ValueError(
            f"{where}: every label is {classes[0]!r}, at least 2 classes are needed; "
            "add images of another class, or name another column of labels"
        )
    position = {name: label for label, name in enumerate(classes)}
    for index, name in enumerate(names):
        if name not in position:
            raise ValueError(
                f"{where}: {place(index)} has the label {name!r}, none of the {len(classes)} "
                "classes of the training set; correct or remove it"
            )
    return list(classes), np.array([position[name] for name in names], dtype=np.int64)


def require_positive(**arguments: int) -> None:
    """Raise a ValueError for an argument below 1."""
    for argument, value in arguments.items():
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, not {value}")


def require_rgb(image: np.ndarray, name: str = "image") -> None:
    """Raise a ValueError for an array that is not (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"{name} must be uint8 (H, W, 3), not {image.dtype} {image.shape}")


def digest(*parts: np.ndarray | bytes | str) -> str:
    """Return the SHA-256 of parts, each with its length, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else part
        data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()
