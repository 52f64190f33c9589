"""Image files to pixels: simplejpeg for JPEG (same pixels, faster), Pillow for the rest."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from pathlib import Path

try:
    import simplejpeg
except ImportError:  # an optional dependency: Pillow reads JPEG too
    simplejpeg = None


def read_image(path: Path) -> np.ndarray:
    """Decode an image file.

    Args:
        path: A file in any format that Pillow reads.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: The file is missing or is not a whole image; the message names it.
    """
    try:
        with path.open("rb") as file:
            if simplejpeg is not None and file.read(3) == b"\xff\xd8\xff":
                file.seek(0)
                data = file.read()
                # What is not quite in order, or CMYK, is left to Pillow.
                with suppress(ValueError):
                    if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray"):
                        return simplejpeg.decode_jpeg(data)
            file.seek(0)
            with Image.open(file) as image:
                # Not np.asarray: that is read-only, and crops are cut from the memory in place.
                return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its text names a file object
        reason = "the format is unknown" if unknown else error
        raise ValueError(
            f"{path} cannot be read as an image ({reason}); replace it or remove it"
        ) from error
