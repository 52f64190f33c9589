"""Sources of labeled images: random access to decoded pixels and labels."""

from __future__ import annotations

import copy
import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from trex_models.data.decode import Reduction


class Source(Protocol):
    """Interface of labeled images with random access by index."""

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
        """Return the sample's name in error messages: a path or a description."""
        ...

    def digest(self) -> str:
        """Return a hash of the samples and their order; a resumed run compares it."""
        ...


class EncodedSource:
    """Base class of sources of encoded images, whose ``read`` applies ``reduction`` to JPEGs."""

    reduction: Reduction | None = None

    def reduced(self, reduction: Reduction) -> Self:
        """Return a source of the same images that decodes JPEGs at reduced size."""
        source = copy.copy(self)  # shares the arrays
        source.reduction = reduction
        return source


class ArraySource:
    """Source of images in memory.

    Args:
        images: N images, (H, W, 3) uint8 RGB; their sizes may differ.
        labels: N labels in [0, len(classes)).
        classes: Class names, by label.

    Raises:
        ValueError: The lengths differ, a label is out of range, or an image is not uint8 RGB.
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
        """Return the sample's name in error messages."""
        return f"{self.classes[self.labels[index]]} image {index}"

    def digest(self) -> str:
        """Return a hash of pixels, labels and classes."""
        return digest(self.labels, *self.classes, *self.images)


def checked_labels(
    labels: Sequence[int] | np.ndarray, count: int, num_classes: int, where: str = ""
) -> np.ndarray:
    """Return labels as (N,) int64; raise a ValueError if one is missing or out of range."""
    checked = np.asarray(labels, dtype=np.int64)
    if checked.shape != (count,):
        raise ValueError(f"{where}need {count} labels, one per image, got shape {checked.shape}")
    if count and not 0 <= checked.min() <= checked.max() < num_classes:
        values = f"{checked.min()} to {checked.max()}"
        raise ValueError(f"{where}labels must be in [0, {num_classes}), got {values}")
    return checked


def encode_labels(
    names: Sequence[str], classes: Sequence[str] | None, where: str, describe: Callable[[int], str]
) -> tuple[list[str], np.ndarray]:
    """Encode class names as labels; return the classes and the labels, (N,) int64.

    By default, the classes are the distinct names, sorted (numerically if all are integers).

    Raises:
        ValueError: There are fewer than 2 classes, or a name is not one of them.
    """
    if classes is None:
        classes = sorted(set(names))
        with suppress(ValueError):
            classes = sorted(classes, key=int)
    if len(classes) < 2:
        raise ValueError(
            f"{where}: every label is {classes[0]!r}, but at least 2 classes are required; "
            "add images of another class, or choose another label column"
        )
    position = {name: label for label, name in enumerate(classes)}
    for index, name in enumerate(names):
        if name not in position:
            raise ValueError(
                f"{where}: {describe(index)} has the label {name!r}, which is none of the "
                f"{len(classes)} classes of the training set; fix or remove it"
            )
    return list(classes), np.array([position[name] for name in names], dtype=np.int64)


def spread_indices(source: Source, count: int) -> list[int]:
    """Return at most ``count`` indices of images, spread over the source."""
    return np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()


def require_positive(**arguments: int) -> None:
    """Raise a ValueError for an argument below 1."""
    for argument, value in arguments.items():
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")


def require_rgb(image: np.ndarray, name: str = "image") -> None:
    """Raise a ValueError for an array that is not (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"{name} must be uint8 (H, W, 3), got {image.dtype} {image.shape}")


def digest(*parts: np.ndarray | bytes | str) -> str:
    """Return the SHA-256 of the parts and their lengths as 64 hexadecimal digits."""
    sha256 = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else part
        data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
        sha256.update(len(data).to_bytes(8, "little"))
        sha256.update(data)
    return sha256.hexdigest()
