"""Scenes of shapes with exact masks: a segmentation task of any size that needs no files.

Shapes of random size, rotation and texture occlude each other on a random background. All textures
have the same distribution, so that neither color nor texture reveals the class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from trex_models.data.fractals import clouds, draw_palette
from trex_models.data.sources import digest, require_positive

_LAYOUT, _TEXTURE = 0, 1  # separate random streams
_COUNTS = (2, 3, 4)
_RADII = (0.16, 0.3)  # of the circumscribed circle, as a fraction of the side


def _half_planes(x: np.ndarray, y: np.ndarray, sides: int) -> np.ndarray:
    """Return the distance from the center along the nearest normal of a regular polygon."""
    angles = 2 * np.pi * np.arange(sides) / sides
    return np.max([np.cos(angle) * x + np.sin(angle) * y for angle in angles], axis=0)


# Functions that return which points of the plane are inside; shapes fit into the unit circle.
_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: x**2 + y**2 < 0.8,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.7,
    "triangle": lambda x, y: _half_planes(x, y, 3) < 0.5,
    "ring": lambda x, y: abs(x**2 + y**2 - 0.65) < 0.35,
    "cross": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.95) & (np.minimum(abs(x), abs(y)) < 0.25),
    # A star is the union of two triangles.
    "star": lambda x, y: np.minimum(_half_planes(x, y, 3), _half_planes(-x, y, 3)) < 0.5,
    "crescent": lambda x, y: (x**2 + y**2 < 0.95) & ((x - 0.55) ** 2 + y**2 > 0.6),
    "corner": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.7) & (np.minimum(x, y) < -0.2),
}


class SceneSource:
    """Source of scenes, which are drawn when read, and of their masks.

    A scene depends only on the seed, its number and the size.

    Args:
        count: Number of scenes, N.
        size: Side of the images in pixels, S.
        seed: Seed of the scenes; non-negative.
        first: Number of the first scene.

    Raises:
        ValueError: The count or the size is not positive.
    """

    classes = ("background", *_SHAPES)

    def __init__(self, count: int, size: int = 192, seed: int = 0, first: int = 0) -> None:
        require_positive(count=count, size=size)
        self.labels = np.zeros(count, np.int64)
        self.size, self.seed, self.first = size, seed, first

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Draw one scene, (S, S, 3) uint8 RGB."""
        rng = np.random.default_rng((_TEXTURE, self.seed, self.first + index))
        image = self._texture(rng)
        for _, inside in self._shapes(index):
            np.copyto(image, self._texture(rng), where=inside[..., None])
        return image

    def mask(self, index: int) -> np.ndarray:
        """Return the class of each pixel of a scene, (S, S) uint8."""
        mask = np.zeros((self.size, self.size), np.uint8)
        for label, inside in self._shapes(index):
            mask[inside] = label
        return mask

    @cached_property
    def targets(self) -> np.ndarray:
        """Visible classes of each scene without the background, (N, C) int8: 1 if visible."""
        labels = np.arange(1, len(self.classes))
        rows = [np.isin(labels, self.mask(index)) for index in range(len(self))]
        return np.array(rows, np.int8)

    def name(self, index: int) -> str:
        """Return the scene's name in error messages."""
        return f"scene {self.first + index}"

    def digest(self) -> str:
        """Return a hash of the arguments that determine the scenes."""
        return digest(repr((len(self), self.size, self.seed, self.first)), *self.classes)

    def _shapes(self, index: int) -> list[tuple[int, np.ndarray]]:
        """Return label and pixels, (S, S) bool, of the shapes of a scene from back to front."""
        rng = np.random.default_rng((_LAYOUT, self.seed, self.first + index))
        position = (np.arange(self.size) + 0.5) / self.size
        shapes = []
        for _ in range(rng.choice(_COUNTS)):
            label = int(rng.integers(1, len(self.classes)))
            left, top = rng.uniform(0.15, 0.85, 2)
            radius, angle = rng.uniform(*_RADII), rng.uniform(-np.pi, np.pi)
            x, y = (position - left) / radius, (position[:, None] - top) / radius
            cos, sin = np.cos(angle), np.sin(angle)
            inside = _SHAPES[self.classes[label]](cos * x + sin * y, cos * y - sin * x)
            shapes.append((label, inside))
        return shapes

    def _texture(self, rng: np.random.Generator) -> np.ndarray:
        colors = (255 * draw_palette(rng.uniform(0.1, 0.9), rng) + 0.5).astype(np.uint8)
        return colors.take((255 * clouds(self.size, rng)).astype(np.intp), axis=0)
