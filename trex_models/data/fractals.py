"""Fractals as labeled images: a training task of any size that needs no files.

As in FractalDB (Kataoka et al., "Pre-training without Natural Images", ACCV 2020), a class is an
iterated function system, and each image renders a perturbed version of it. As in Anderson and
Farrell ("Improving Fractal Pre-training", WACV 2022), maps are sampled by their singular values,
which sets how much each map contracts, and each image has random colors and a random background.
Points are colored by their orbit as in fractal flames (Draves, 2003).

Shapes: maps N, words (compositions of maps) W, points P, image side S in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from trex_models.data.sources import digest, require_positive

_SYSTEM, _INSTANCE, _INDIVIDUAL = 0, 1, 2  # separate random streams
_WORD_LENGTH = 5
_BURN_IN = 24
_MAX_TURN = np.pi / 12  # in either direction, at variation 1
_MIN_MAPS, _MAX_MAPS = 2, 5
_MAX_SINGULAR_VALUE = 0.92
_OVERSAMPLING = 2  # histogram cells per pixel along each axis
_PROBE = 48  # side of the grid on which a new system is tested
_CACHE_BYTES = 2**27  # images that a source keeps


class _System(NamedTuple):
    """An iterated function system x -> R(theta) diag(scales) R(phi) diag(signs) x + shift."""

    theta: np.ndarray  # (N,), radians
    phi: np.ndarray  # (N,), radians
    scales: np.ndarray  # (N, 2), singular values
    signs: np.ndarray  # (N, 2), +-1
    shift: np.ndarray  # (N, 2)


@dataclass(eq=False)
class FractalSource:
    """Source of fractal images that are rendered when read.

    Each process keeps up to 128 MiB of images, which must not be modified.

    An image depends only on seed, class number, image number, size and variation. Sources whose
    `first_class` differs by `num_classes` or more contain disjoint classes, and sources whose
    `first_image` differs by `images_per_class` or more contain disjoint images of the same classes.
    The first `images_per_class` indices belong to label 0, the next ones to label 1, and so on.
    Colors and background are drawn for each image, independently of its class.

    Args:
        num_classes: Number of classes.
        images_per_class: Number of images of each class.
        size: Side of the images in pixels, S.
        seed: Seed of the classes and images; non-negative.
        first_class: Number of the class with label 0.
        first_image: Number of the first image of each class.
        variation: Amount of variation in shape and rotation within a class. At 0, images differ
            only in position, scale, mirroring and colors; above 1, classes are harder to learn.

    Raises:
        ValueError: A count or the size is not positive, or another argument is negative.
    """

    num_classes: int = 40
    images_per_class: int = 150
    size: int = 64
    seed: int = 0
    first_class: int = 0
    first_image: int = 0
    variation: float = 1.0

    def __post_init__(self) -> None:
        counts = ("num_classes", "images_per_class", "size")
        require_positive(**{name: getattr(self, name) for name in counts})
        for name in ("seed", "variation", "first_class", "first_image"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be finite and non-negative, got {value}")
        labels = np.arange(self.num_classes, dtype=np.int64)
        self.classes = [f"fractal {self.first_class + label:04d}" for label in labels]
        self.labels = np.repeat(labels, self.images_per_class)
        self._images: dict[tuple[int, int], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the images, which other processes render if they need them."""
        return vars(self) | {"_images": {}}

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (S, S, 3) uint8 RGB."""
        numbers = self._numbers(index)
        if (image := self._images.get(numbers)) is None:
            image = draw_fractal(*numbers, self.size, self.seed, self.variation).image
            if (len(self._images) + 1) * image.nbytes <= _CACHE_BYTES:
                self._images[numbers] = image
        return image

    def name(self, index: int) -> str:
        """Return the sample's name in error messages: its class and image numbers."""
        class_number, image_number = self._numbers(index)
        return f"fractal class {class_number} image {image_number}"

    def digest(self) -> str:
        """Return a hash of the labels and the arguments that determine the images."""
        numbers = (self.seed, self.first_class, self.first_image, self.size, self.variation)
        return digest(self.labels, repr(numbers))

    def _numbers(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        label, image = divmod(int(index), self.images_per_class)
        return self.first_class + label, self.first_image + image


class Fractal(NamedTuple):
    """Rendered fractal and those of its attributes that do not depend on the class."""

    image: np.ndarray  # (S, S, 3) uint8 RGB
    rotation: float  # rotation of the shape in radians, before mirroring
    mirrored: bool  # flipped left to right
    color: tuple[float, float, float]  # mean RGB of the shape, in [0, 1]


def draw_fractal(
    class_number: int,
    image_number: int,
    size: int = 64,
    seed: int = 0,
    variation: float = 1.0,
    *,
    rotation: float | None = None,
    individual: int | None = None,
) -> Fractal:
    """Render one image of a class, the same as ``FractalSource.read``.

    ``rotation`` is the rotation in radians, random by default. ``individual`` is the number of a
    variant of the class; shapes of images of one variant differ only by a fifth of ``variation``.
    By default, each image has its own random shape.
    """
    system = _system(seed, class_number)
    key: tuple[int, ...] = (_INSTANCE, seed, class_number, image_number)
    if individual is not None:
        individual_rng = np.random.default_rng((_INDIVIDUAL, seed, class_number, individual))
        system = _perturbed(system, variation, individual_rng)
        variation /= 5
        key = (_INDIVIDUAL, seed, class_number, individual, image_number)
    rng = np.random.default_rng(key)
    system = _perturbed(system, variation, rng)
    random_rotation = variation * rng.uniform(-_MAX_TURN, _MAX_TURN)
    return _render(system, random_rotation if rotation is None else rotation, size, rng)


@lru_cache(maxsize=8192)  # a few hundred bytes each; forked workers inherit the entries
def _system(seed: int, class_number: int) -> _System:
    """Return a class's system: the first one of its random stream that is rich enough."""
    rng = np.random.default_rng((_SYSTEM, seed, class_number, 0))
    while True:
        system = _draw_system(rng)
        if _is_rich(system, rng):  # true for one in ten
            return system


def _draw_system(rng: np.random.Generator) -> _System:
    """Draw a system whose singular values satisfy the criterion of Anderson and Farrell.

    The criterion is that sum_i (s_i1 + 2 s_i2) is in [(5 + N) / 2, (6 + N) / 2].
    """
    n = int(rng.integers(_MIN_MAPS, _MAX_MAPS + 1))
    target = rng.uniform(5 + n, 6 + n) / 2
    while True:  # two of three draws pass
        scales = np.sort(rng.uniform(0.05, _MAX_SINGULAR_VALUE, (n, 2)))[:, ::-1]
        scales = scales * (target / (scales @ (1.0, 2.0)).sum())
        if scales.max() <= _MAX_SINGULAR_VALUE:
            break
    return _System(
        theta=rng.uniform(-np.pi, np.pi, n),
        phi=rng.uniform(-np.pi, np.pi, n),
        scales=scales,
        signs=rng.choice((-1.0, 1.0), (n, 2)),
        shift=rng.uniform(-1, 1, (n, 2)),
    )


def _perturbed(system: _System, variation: float, rng: np.random.Generator) -> _System:
    n = len(system.theta)
    return system._replace(
        theta=system.theta + variation * rng.normal(0, 0.025, n),
        phi=system.phi + variation * rng.normal(0, 0.025, n),
        scales=np.minimum(system.scales * np.exp(variation * rng.normal(0, 0.015, (n, 2))), 0.95),
        shift=system.shift + variation * rng.normal(0, 0.02, (n, 2)),
    )


def _rotation(angle: np.ndarray | float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


class _Attractor(NamedTuple):
    """Samples of an attractor: each of W words applied to each of P points.

    The points are samples of the attractor because each has played a short chaos game. A word of
    maps, drawn with the maps' probabilities, transforms them into further samples. Thus W * P
    samples cost only W compositions, P short games and one outer product.
    """

    points: np.ndarray  # (P, 2)
    tones: np.ndarray  # (P,), in [0, 1]
    linear: np.ndarray  # (W, 2, 2)
    shift: np.ndarray  # (W, 2)
    word_tones: np.ndarray  # (W,), in [0, 1]

    def spread(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x, y and tone of all samples, (W, P) float32 each."""
        x, y = self.points.T.astype(np.float32)
        m = self.linear.astype(np.float32)[..., None]
        o = self.shift.astype(np.float32)[..., None]
        # Elementwise, not BLAS, whose rounding may vary with the machine and thread count.
        return (
            m[:, 0, 0] * x + (m[:, 0, 1] * y + o[:, 0]),
            m[:, 1, 0] * x + (m[:, 1, 1] * y + o[:, 1]),
            (self.tones * 0.5**_WORD_LENGTH).astype(np.float32)
            + self.word_tones.astype(np.float32)[:, None],
        )


def _attractor(
    system: _System, num_points: int, map_tones: np.ndarray, rng: np.random.Generator
) -> _Attractor:
    """Draw about ``num_points`` samples, colored by the maps' tones, (N,) in [0, 1]."""
    linear = (_rotation(system.theta) * system.scales[:, None, :]) @ _rotation(system.phi)
    linear = linear * system.signs[:, None, :]
    # Probabilities by area cover the attractor evenly; the minimum keeps thin maps visible.
    area = np.maximum(system.scales.prod(1), 0.02)
    cumulative = (area / area.sum()).cumsum()
    num_words = max(16, round(np.sqrt(num_points / 8)))
    num_points = -(-num_points // num_words)

    def letters(rows: int, columns: int) -> np.ndarray:
        # Stratified: the count of each map in a row is within one of its expected count.
        levels = (np.arange(columns) + rng.random((rows, 1))) / columns
        drawn = np.searchsorted(cumulative, levels).clip(max=len(cumulative) - 1)
        return rng.permuted(drawn, axis=1)

    a, b, c, d = (linear[:, i, j] for i in (0, 1) for j in (0, 1))
    x, y = rng.uniform(-1, 1, (2, num_points))
    tones = np.full(num_points, 0.5)
    for k in letters(_BURN_IN, num_points):
        across, down = system.shift[k].T
        x, y = a[k] * x + b[k] * y + across, c[k] * x + d[k] * y + down
        tones = (tones + map_tones[k]) / 2

    words = np.broadcast_to(np.eye(2), (num_words, 2, 2))
    offsets = np.zeros((num_words, 2))
    word_tones = np.zeros(num_words)
    for k in letters(_WORD_LENGTH, num_words):
        words = linear[k] @ words
        offsets = (linear[k] @ offsets[..., None])[..., 0] + system.shift[k]
        word_tones = (word_tones + map_tones[k]) / 2
    return _Attractor(np.stack([x, y], 1), tones, words, offsets, word_tones)


def _is_rich(system: _System, rng: np.random.Generator) -> bool:
    """Return True if a system's attractor is not just scattered points, a line or a blob."""
    x, y, _ = _attractor(system, 6 * _PROBE**2, np.zeros(len(system.theta)), rng).spread()
    minor, major = np.linalg.eigvalsh(np.cov(x.ravel(), y.ravel()))
    if minor < 0.08 * major:
        return False
    cell = max(np.ptp(x), np.ptp(y)) / (_PROBE - 1)
    column = ((x - x.min()) / cell).astype(np.intp)
    row = ((y - y.min()) / cell).astype(np.intp)
    counts = np.bincount((row * _PROBE + column).ravel(), minlength=_PROBE**2)
    covered = counts.reshape(_PROBE, _PROBE) > 0
    # The share of borders between covered and empty cells measures how intricate the shape is.
    border = (covered[1:] != covered[:-1]).mean() + (covered[:, 1:] != covered[:, :-1]).mean()
    return bool(0.12 < covered.mean() < 0.6 and border > 0.2)


def _render(system: _System, rotation: float, size: int, rng: np.random.Generator) -> Fractal:
    num_maps = len(system.theta)
    map_tones = rng.permutation(np.arange(num_maps) / (num_maps - 1))
    attractor = _attractor(system, max(4096, 8 * size**2), map_tones, rng)

    # The histogram has a margin of one cell that collects the points outside the frame.
    fine = size * _OVERSAMPLING
    side = rng.choice((-1.0, 1.0))
    view = _rotation(rotation) * np.array([[side], [1.0]])
    # Percentiles, because the outermost points of some systems are far from the rest.
    low, high = np.percentile(attractor.points @ view.T, (1, 99), axis=0)
    zoom = fine * rng.uniform(0.7, 1.0) / max((high - low).max(), 1e-6)
    center = 1 + fine * (0.5 + rng.uniform(-0.08, 0.08, 2))
    matrix, shift = zoom * view, center - zoom * (low + high) / 2
    x, y, tone = attractor._replace(
        linear=matrix @ attractor.linear, shift=attractor.shift @ matrix.T + shift
    ).spread()
    width = fine + 2
    column = x.clip(0, width - 1).astype(np.int32)
    row = y.clip(0, width - 1).astype(np.int32)
    cell = (row * np.int32(width) + column).ravel()

    count = np.bincount(cell, minlength=width**2)
    tones = np.bincount(cell, tone.ravel(), minlength=width**2)
    mean_tone = _pixel_sums(tones, size) / np.maximum(_pixel_sums(count, size), 1)
    full = rng.uniform(2, 6)  # number of points that makes a cell opaque
    ramp = (np.minimum(np.arange(7), full) / full) ** 0.5
    opacity = _pixel_sums(ramp[np.minimum(count, 6)], size) / _OVERSAMPLING**2

    light, dark = rng.uniform(0.6, 1.0), rng.uniform(0.0, 0.4)
    front, back = (light, dark) if rng.random() < 0.5 else (dark, light)
    ink = draw_palette(front, rng)[(mean_tone * 255).astype(np.intp)]
    paper = draw_palette(back, rng)[(clouds(size, rng) * 255).astype(np.intp)]
    image = (255 * (paper + opacity[..., None] * (ink - paper)) + 0.5).astype(np.uint8)
    red, green, blue = np.einsum("ij,ijc->c", opacity, ink) / max(opacity.sum(), 1e-6)
    return Fractal(image, rotation, side < 0, (float(red), float(green), float(blue)))


def _pixel_sums(cells: np.ndarray, size: int) -> np.ndarray:
    """Sum the cells of each pixel of a histogram without its margin, (S, S)."""
    side = size * _OVERSAMPLING + 2
    inner = cells.reshape(side, side)[1:-1, 1:-1]
    parts = [inner[row::_OVERSAMPLING] for row in range(_OVERSAMPLING)]
    return np.sum([p[:, c::_OVERSAMPLING] for p in parts for c in range(_OVERSAMPLING)], axis=0)


def draw_palette(lightness: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a gradient of colors, (256, 3) in [0, 1]."""
    hue = rng.random() + rng.uniform(-0.35, 0.35) * np.linspace(-1, 1, 4)
    chroma = rng.uniform(0.05, 0.6)
    phase = 2 * np.pi * (hue[:, None] + np.array([0, 1 / 3, 2 / 3]))
    level = lightness + rng.uniform(-0.15, 0.15, (4, 1))
    anchors = level + chroma * 0.5 * np.cos(phase)
    stops = np.linspace(0, 1, 4)
    steps = np.linspace(0, 1, 256)
    return np.stack([np.interp(steps, stops, channel) for channel in anchors.T], 1).clip(0, 1)


def clouds(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw smooth noise, (S, S) in [0, 1], as a sum of bilinearly interpolated grids."""
    total = np.zeros((size, size))
    roughness = rng.uniform(0.3, 0.7)
    for octave in range(4):
        cells = 2 ** (octave + 1)
        grid = rng.random((cells + 1, cells + 1))
        position = (np.arange(size) + 0.5) / size * cells
        # Matrix that interpolates linearly between grid nodes, along rows as along columns.
        weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells + 1)))
        for top in range(0, size, 32):  # so few rows that OpenBLAS does not start threads
            rows = slice(top, top + 32)
            total[rows] += roughness**octave * (weight[rows] @ grid @ weight.T)
    low, high = total.min(), total.max()
    return (total - low) / max(high - low, 1e-6)
