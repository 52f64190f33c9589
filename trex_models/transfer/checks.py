"""What can be wrong with a data set and needs no image decoded: found before hours are spent."""

from __future__ import annotations

import numpy as np

from trex_models.data.image_files import FileSource
from trex_models.data.sources import Source


def check_parts(
    train: Source,
    test: Source,
    num_classes: int | None,
    num_train: int | tuple[int, int] | None,
    num_test: int | None,
) -> None:
    """Check the images to fit on and those to test on; each look costs more than the one before.

    Args:
        train: To fit on.
        test: To test on.
        num_classes: What there should be; None: any number.
        num_train: Of images to fit on, or the least and the most; None: any.
        num_test: Of images to test on; None: any.

    Raises:
        ValueError: A number is another one, the classes differ, a class has fewer than two images
            to fit on, an image is in both parts, or a file is missing or empty.
    """
    classes = list(train.classes)
    if classes != list(test.classes):
        odd = sorted(set(classes) ^ set(test.classes))
        raise ValueError(
            f"the training images have {len(classes)} classes and the test images "
            f"{len(test.classes)} (one part alone has {', '.join(odd[:3])}); both need the same"
        )
    for what, expected, found in (
        ("classes", num_classes, len(classes)),
        ("training images", num_train, len(train)),
        ("test images", num_test, len(test)),
    ):
        if expected is not None:
            _check_number(what, expected, found)
    counts = np.bincount(train.labels, minlength=len(classes))
    scarce = np.flatnonzero(counts < 2)
    if len(scarce):
        raise ValueError(
            f"{len(scarce)} classes have fewer than 2 training images and cannot be divided into "
            f"training and validation, the first is {classes[scarce[0]]}; add images or remove them"
        )
    if isinstance(train, FileSource) and isinstance(test, FileSource):
        places = [list(map(tuple, part.stats()[:, 2:].tolist())) for part in (train, test)]
        fitted = set(places[0])
        both = [index for index, place in enumerate(places[1]) if place in fitted]
        if both:
            raise ValueError(
                f"{len(both)} files are among the training and the test images (by name or by "
                f"link), such as {test.name(both[0])}; list each once"
            )


def _check_number(what: str, expected: int | tuple[int, int], found: int) -> None:
    low, high = expected if isinstance(expected, tuple) else (expected, expected)
    if not low <= found <= high:
        span = f"{low}" if low == high else f"{low} to {high}"
        remedy = "unpack or copy all of it again" if found < low else "remove what was added"
        raise ValueError(
            f"{found} {what} where {span} are expected: it is "
            f"{'incomplete' if found < low else 'more than was published'}, or another version; "
            f"{remedy}"
        )
