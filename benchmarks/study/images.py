"""Images of the study: fractals in class folders, for training and evaluation.

Transfer is evaluated on unseen classes and on properties that the training labels ignore: the
variant of a class's shape, the rotation of the shape, and its color.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from colorsys import rgb_to_hsv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from trex_models.atomic import write_text_file
from trex_models.data.fractals import Fractal, draw_fractal

Part = Iterator[tuple[str, np.ndarray]]
"""Pairs of a class name and an image."""

TITLES = {
    "task": "Training classes, new images",
    "unseen": "Unseen classes",
    "individuals": "Variants of a shape",
    "turns": "Rotations of a shape",
    "hues": "Hues",
    "digits": "Digits",
    "photographs": "Photographs",
}
"""Names and titles of the evaluation datasets, starting with the training task."""
REAL_SETS = ("digits", "photographs")
"""Datasets of real images, which are not generated here."""

_UNSEEN = 40  # training images per unseen class
_INDIVIDUALS = 4  # variants per class
_TURNS = np.radians([-45, -15, 15, 45])
_TURN_SPREAD = np.radians(8)  # in either direction
_HUES = 6
_LEAST_CHROMA = 0.35  # difference between the largest and the smallest of red, green and blue
_LATER = 10_000  # first image number of the datasets with other labels
_MOST_NUMBERS = 1000  # images to try for one rotation of a class


@dataclass(frozen=True, kw_only=True)
class Images:
    """Sizes of the study's images.

    Args:
        num_classes: Number of training classes; there are as many unseen classes.
        per_class: Number of training images per class.
        size: Height and width in pixels.
        variation: Variation within a class, as in ``draw_fractal``.
        few_classes: Number of training classes in the datasets of variants and rotations.
        held_out: Number of further images per training class, for the selection of settings.
        new: Number of further images per class, for testing.
    """

    num_classes: int
    per_class: int
    size: int
    variation: float = 1.0
    few_classes: int = 16
    held_out: int = 40
    new: int = 40

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the evaluation datasets, keys of ``TITLES``, starting with the training task."""
        return tuple(TITLES)

    def parts(self) -> dict[str, Callable[[], Part]]:
        """Return functions that generate the images, by folder."""
        used = self.per_class + self.held_out
        return {
            "train": lambda: self._classes(0, 0, self.per_class),
            "held-out/train": lambda: self._classes(0, 0, self.per_class),
            "held-out/test": lambda: self._classes(0, self.per_class, self.held_out),
            "task/train": lambda: self._classes(0, 0, self.per_class),
            "task/test": lambda: self._classes(0, used, self.new),
            "unseen/train": lambda: self._classes(self.num_classes, 0, _UNSEEN),
            "unseen/test": lambda: self._classes(self.num_classes, _UNSEEN, self.new),
            "individuals/train": lambda: self._individuals(0, 30),
            "individuals/test": lambda: self._individuals(30, 20),
            "turns/train": lambda: self._turns(_LATER, 30),
            "turns/test": lambda: self._turns(2 * _LATER, 20),
            "hues/train": lambda: self._hues(3 * _LATER, 200),
            "hues/test": lambda: self._hues(4 * _LATER, 100),
        }

    def write(self, folder: Path) -> None:
        """Write the missing parts of a folder; each part is complete or absent."""
        folder.mkdir(parents=True, exist_ok=True)
        described, drawn = folder / "images.json", asdict(self)
        if described.exists() and (known := json.loads(described.read_text())) != drawn:
            raise ValueError(f"{folder} has images for {known}, not {drawn}; use another --folder")
        if not described.exists() and any((folder / name).exists() for name in self.parts()):
            raise ValueError(f"{folder} has images but no {described.name}; use another --folder")
        write_text_file(described, json.dumps(drawn) + "\n")
        for name, images in self.parts().items():
            part = folder / name
            if part.is_dir():
                continue
            temporary = part.with_name(f".{part.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            bar = tqdm(images(), desc=f"images {name}", unit=" images", disable=None)
            for number, (label, pixels) in enumerate(bar):
                (temporary / label).mkdir(parents=True, exist_ok=True)
                # Uncompressed, since training decodes each image hundreds of times.
                Image.fromarray(pixels).save(temporary / label / f"{number:05d}.bmp")
            temporary.rename(part)

    def _draw(self, number: int, image: int, **options: Any) -> Fractal:
        """Draw one image of a class."""
        return draw_fractal(number, image, self.size, variation=self.variation, **options)

    def _classes(self, first_class: int, first_image: int, count: int) -> Part:
        """Yield images labeled by class."""
        for number in range(first_class, first_class + self.num_classes):
            for image in range(first_image, first_image + count):
                yield f"{number:04d}", self._draw(number, image).image

    def _individuals(self, first_image: int, count: int) -> Part:
        """Yield images of some training classes, labeled by class and variant of its shape."""
        for number in range(self.few_classes):
            for individual in range(_INDIVIDUALS):
                for image in range(first_image, first_image + count):
                    drawn = self._draw(number, image, individual=individual)
                    yield f"{number:04d}-{individual}", drawn.image

    def _turns(self, first_image: int, count: int) -> Part:
        """Yield unmirrored images of some training classes, labeled by class and rotation."""
        for number in range(self.few_classes):
            for label, turn in enumerate(_TURNS.tolist()):
                # Separate images for each rotation.
                upright = self._upright(number, turn, first_image + label * _MOST_NUMBERS)
                for _ in range(count):
                    yield f"{number:04d}-{label}", next(upright).image

    def _upright(self, number: int, turn: float, first_image: int) -> Iterator[Fractal]:
        """Yield images of a class with about the given rotation, except mirrored ones."""
        for image in range(first_image, first_image + _MOST_NUMBERS):
            spread = np.random.default_rng((number, image)).uniform(-1, 1) * _TURN_SPREAD
            drawn = self._draw(number, image, rotation=turn + float(spread))
            if not drawn.mirrored:
                yield drawn

    def _hues(self, first_image: int, count: int) -> Part:
        """Yield images of all training classes alternately, labeled by the hue of the shape."""
        counts = [0] * _HUES
        for image in range(first_image, first_image + _LATER):
            for number in range(self.num_classes):
                drawn = self._draw(number, image)
                label = int(rgb_to_hsv(*drawn.color)[0] * _HUES)
                if np.ptp(drawn.color) < _LEAST_CHROMA or counts[label] == count:
                    continue
                counts[label] += 1
                yield f"hue-{label}", drawn.image
                if min(counts) == count:
                    return


class Text(Images):
    """Text that ``benchmarks.typefaces`` has rendered beforehand, labeled by typeface."""

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the evaluation datasets."""
        return ("task", "unseen", *REAL_SETS)

    def write(self, folder: Path) -> None:
        """Link the folders of the rendered images, which are next to the folder."""
        links = {
            "train": "task/train",
            "held-out/train": "task/train",
            "held-out/test": "held-out",
            "task": "task",
            "unseen": "unseen",
        }
        rendered = folder.parent.absolute() / "typefaces"
        if not rendered.is_dir():
            raise ValueError(
                f"{rendered} does not exist; run python -m benchmarks.typefaces --output "
                f"{folder.parent}"
            )
        for link, target in links.items():
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / link).exists():
                (folder / link).symlink_to(rendered / target)
