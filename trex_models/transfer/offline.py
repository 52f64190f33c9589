"""The data sets that need no download: those of the demo, and of its recipe's images."""

from __future__ import annotations

from pathlib import Path

from trex_models.data.fractals import FractalSource
from trex_models.data.samples import digits as _digits
from trex_models.data.samples import photographs as _photographs
from trex_models.data.sources import Source

# The recipe demo trains on images 0 to 149 of fractal classes 0 to 39, at this variation.
NUM_CLASSES, IMAGES_PER_CLASS, SIZE, VARIATION = 40, 150, 64, 0.4
TRAIN_PER_CLASS, TEST_PER_CLASS = 50, 25


def fractals(_root: Path) -> tuple[Source, Source]:
    """Fractals of the demo's training classes; the test images are new to its network."""
    return _fractals(0)


def fractals_unseen(_root: Path) -> tuple[Source, Source]:
    """Fractals of classes that the demo is not trained on."""
    return _fractals(NUM_CLASSES)


def digits(_root: Path) -> tuple[Source, Source]:
    """Return scikit-learn's handwritten digits."""
    return _digits(SIZE)


def photographs(_root: Path) -> tuple[Source, Source]:
    """Patches of 20 photographs that scikit-image and scikit-learn ship."""
    return _photographs(SIZE)


def _fractals(first_class: int) -> tuple[Source, Source]:
    train, test = (
        FractalSource(
            NUM_CLASSES,
            count,
            SIZE,
            first_class=first_class,
            first_image=first_image,
            variation=VARIATION,
        )
        for first_image, count in ((0, TRAIN_PER_CLASS), (IMAGES_PER_CLASS, TEST_PER_CLASS))
    )
    return train, test
