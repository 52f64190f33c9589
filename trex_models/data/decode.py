"""Image files to pixels: simplejpeg for JPEG (same pixels, faster), Pillow for the rest.

Shapes: H, W height and width of the image, the right way up.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    from pathlib import Path

try:
    import simplejpeg
except ImportError:  # an optional dependency: Pillow reads JPEG too
    simplejpeg = None

_START_OF_SCAN, _APP1 = 0xDA, 0xE1  # JPEG markers; EXIF and XMP stand in APP1


_TURNS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """An image is missing or torn, or its format or range of values is not known."""


def unreadable(name: str, reason: object) -> UnreadableImageError:
    """Return the error for an image, in one line.

    Args:
        name: What to call the image.
        reason: What was raised, or a phrase.
    """
    if isinstance(reason, UnidentifiedImageError):  # its text names a file object
        reason = "the format is unknown"
    elif isinstance(reason, OSError) and reason.strerror:  # its text repeats the path
        reason = reason.strerror
    text = " ".join(str(reason).split()) or type(reason).__name__
    return UnreadableImageError(f"{name} cannot be read as an image ({text}); mend or replace it")


def or_skip(error: UnreadableImageError) -> UnreadableImageError:
    """Return an error of training that tells of the other policy, too."""
    return UnreadableImageError(f"{error}, or pass over such images: --data.unreadable skip")


def read_image(path: Path) -> np.ndarray:
    """Decode an image file.

    Args:
        path: A file in any format that Pillow reads.

    Returns:
        (H, W, 3) uint8 RGB, as `decode_image` returns it.

    Raises:
        UnreadableImageError: The file is missing or is not a whole image; the message names it.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that holds a zero byte
        raise unreadable(str(path), error) from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode the content of an image file.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is reduced to its
    upper byte, and of several frames the first one counts.

    Args:
        data: In any format that Pillow reads.
        name: What to call the image in messages.

    Returns:
        (H, W, 3) uint8 RGB, writeable and contiguous.

    Raises:
        UnreadableImageError: It is not a whole image, has more pixels than Pillow's limit (twice
            `PIL.Image.MAX_IMAGE_PIXELS`), or values of no defined range (floating point, 32 bits).
    """
    try:
        if simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
            # What is not quite in order, CMYK, or too large is left to Pillow.
            with suppress(ValueError, IndexError):
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                limit = Image.MAX_IMAGE_PIXELS
                if colours in ("YCbCr", "Gray") and (not limit or height * width <= 2 * limit):
                    return _upright(simplejpeg.decode_jpeg(data), _jpeg_orientation(data))
        with warnings.catch_warnings():  # of odd metadata and of size: what matters is an error
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _upright(_pixels(image), _orientation(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins let anything out of a broken file
        raise unreadable(name, error) from error


def _pixels(image: Image.Image) -> np.ndarray:
    """Return an image as it lies in the file, (H, W, 3) uint8 RGB."""
    if image.mode == "F":
        raise ValueError("floating-point values have no defined range")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"values from {values.min()} to {values.max()} exceed 16 bits")
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 0xFF
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    # Not np.asarray: that is read-only, and crops are cut from the memory in place.
    return np.array(image.convert("RGB"))


def _jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG that has been decoded."""
    position = 2
    while (marker := data[position + 1]) not in (_START_OF_SCAN, _APP1):
        if marker == 0xFF:  # fill
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    if marker == _START_OF_SCAN:  # most images: 2 us, where Pillow takes 40
        return 1
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return _orientation(image)
    return 1


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 if there is none or its block is broken."""
    with suppress(Exception):  # a broken block raises anything, and the pixels are good
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels turned and mirrored as an EXIF orientation asks for."""
    turn = _TURNS.get(orientation)
    # Pillow turns 3-byte pixels more than twice as fast as numpy.
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
