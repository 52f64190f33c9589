"""The study's images: fractals in class folders, for training and for evaluation.

Transfer is tried on classes that nobody trained on, and on what the training labels ignore: which
variant of a class's shape an image shows, how far the shape is turned, its colors.
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
"""Names of classes and images."""

TITLES = {
    "task": "Training classes, new images",
    "unseen": "Unseen classes",
    "individuals": "Variants of a shape",
    "turns": "Turns of a shape",
    "hues": "Hues",
    "digits": "Digits",
    "photographs": "Photographs",
}
"""Names and titles of the sets to evaluate on, the training task first."""
REAL_SETS = ("digits", "photographs")
"""Those that are not drawn here."""

_UNSEEN = 40  # images of each unseen class to fit on
_INDIVIDUALS = 4  # of a class
_TURNS = np.radians([-45, -15, 15, 45])
_TURN_SPREAD = np.radians(8)  # either way
_HUES = 6
_LEAST_CHROMA = 0.35  # between the largest and the least of red, green and blue
_LATER = 10_000  # image numbers of the sets that are not of the training task
_MOST_NUMBERS = 1000  # of images that are looked at for one turn of a class


@dataclass(frozen=True, kw_only=True)
class Images:
    """Sizes of the study's images.

    Args:
        num_classes: Number of training classes, and of unseen ones.
        per_class: Training images of each class.
        size: Side in pixels.
        variation: Difference between the images of a class, as for ``draw_fractal``.
        few_classes: Training classes of the sets whose labels are a class and something else.
        held_out: Further images of each training class, to choose settings by.
        new: Further images of each class, to test on.
    """

    num_classes: int
    per_class: int
    size: int
    variation: float = 1.0
    few_classes: int = 16
    held_out: int = 40
    new: int = 40

    def parts(self) -> dict[str, Callable[[], Part]]:
        """Return what draws the images of each folder."""
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
        """Write the parts that a folder lacks, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        described, drawn = folder / "images.json", asdict(self)
        if described.exists() and (known := json.loads(described.read_text())) != drawn:
            raise ValueError(f"{folder} has images of {known}, not {drawn}: name another --folder")
        if not described.exists() and any((folder / name).exists() for name in self.parts()):
            raise ValueError(f"{folder} has images and no {described.name}: name another --folder")
        write_text_file(described, json.dumps(drawn) + "\n")
        for name, images in self.parts().items():
            part = folder / name
            if part.is_dir():
                continue
            beside = part.with_name(f".{part.name}.tmp")
            shutil.rmtree(beside, ignore_errors=True)
            bar = tqdm(images(), desc=f"images {name}", unit=" images", disable=None)
            for number, (label, pixels) in enumerate(bar):
                (beside / label).mkdir(parents=True, exist_ok=True)
                # Uncompressed: a training process decodes each of them dozens of times.
                Image.fromarray(pixels).save(beside / label / f"{number:05d}.bmp")
            beside.rename(part)

    def _draw(self, number: int, image: int, **options: Any) -> Fractal:
        """Draw an image of a class."""
        return draw_fractal(number, image, self.size, variation=self.variation, **options)

    def _classes(self, first_class: int, first_image: int, count: int) -> Part:
        """Yield images labelled by class."""
        for number in range(first_class, first_class + self.num_classes):
            for image in range(first_image, first_image + count):
                yield f"{number:04d}", self._draw(number, image).image

    def _individuals(self, first_image: int, count: int) -> Part:
        """Yield images of few training classes, labelled by the variant of the class's shape."""
        for number in range(self.few_classes):
            for individual in range(_INDIVIDUALS):
                for image in range(first_image, first_image + count):
                    drawn = self._draw(number, image, individual=individual)
                    yield f"{number:04d}-{individual}", drawn.image

    def _turns(self, first_image: int, count: int) -> Part:
        """Yield images of few training classes, not mirrored, labelled by class and turn."""
        for number in range(self.few_classes):
            for label, turn in enumerate(_TURNS.tolist()):
                # Each turn has images of its own.
                upright = self._upright(number, turn, first_image + label * _MOST_NUMBERS)
                for _ in range(count):
                    yield f"{number:04d}-{label}", next(upright).image

    def _upright(self, number: int, turn: float, first_image: int) -> Iterator[Fractal]:
        """Yield images of a class near a turn, leaving out those that are mirrored."""
        for image in range(first_image, first_image + _MOST_NUMBERS):
            spread = np.random.default_rng((number, image)).uniform(-1, 1) * _TURN_SPREAD
            drawn = self._draw(number, image, turn=turn + float(spread))
            if not drawn.mirrored:
                yield drawn

    def _hues(self, first_image: int, count: int) -> Part:
        """Yield images of the training classes in turn, labelled by the hue of the shape."""
        found = [0] * _HUES
        for image in range(first_image, first_image + _LATER):
            for number in range(self.num_classes):
                drawn = self._draw(number, image)
                label = int(rgb_to_hsv(*drawn.color)[0] * _HUES)
                if np.ptp(drawn.color) < _LEAST_CHROMA or found[label] == count:
                    continue
                found[label] += 1
                yield f"hue-{label}", drawn.image
                if min(found) == count:
                    return
