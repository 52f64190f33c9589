"""Image decoding: simplejpeg for JPEG (same pixels as Pillow, faster), Pillow for the rest."""

from __future__ import annotations

import io
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    from pathlib import Path

try:
    import simplejpeg
except ImportError:  # an optional dependency: Pillow reads JPEG too
    simplejpeg = None

# Supported formats, the most common first, and their file extensions. Only formats that Pillow
# decodes itself: for EPS, for example, it would start Ghostscript.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "TGA": (".tga",),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
}
IMAGE_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

T = TypeVar("T")

Reduction = Callable[[int, int], int]
"""Function from the height and width of a JPEG to the factor that divides them: 1, 2 or 4."""

_FORMATS = tuple(FORMATS)
_MAX_BYTES = 1 << 31  # larger than any single frame within Pillow's pixel limit
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # POSIX only
_PNG_SIGNATURE, _JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_START_OF_SCAN, _APP1 = b"\xda", b"\xe1"  # JPEG markers; EXIF and XMP are in APP1
# Comments and APPn segments, except APP1 and APP14, which defines how CMYK is stored.
_JPEG_METADATA = {0xE0, *range(0xE2, 0xEE), 0xEF, 0xFE}

_TRANSPOSE = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """Error for an image that is missing, damaged, or of an unknown format or value range."""


def quoted(name: str) -> str:
    """Return the repr of a name with invisible characters or backslashes; others unchanged."""
    parts = name.replace(os.sep, "/").split("/")
    plain = name.isprintable() and all(p == p.strip() and "\\" not in p for p in parts)
    return name if plain else repr(name)


def unreadable_error(name: str, reason: object) -> UnreadableImageError:
    """Create the one-line error of an unreadable image from an exception or a phrase."""
    if isinstance(reason, UnidentifiedImageError):  # its text shows a file object
        reason = "unknown format, or not supported by the installed Pillow"
    elif isinstance(reason, OSError) and reason.strerror:  # its text repeats the path
        reason = reason.strerror
    text = " ".join(str(reason).split()) or type(reason).__name__
    problem = f"{quoted(name)} cannot be read as an image ({text})"
    return UnreadableImageError(f"{problem}; fix or replace it")


def with_skip_hint(error: Exception, option: str = "--data.unreadable") -> UnreadableImageError:
    """Add the option that skips unreadable images to an error about one."""
    return UnreadableImageError(f"{error}, or skip unreadable images with {option} skip")


def log_skipped(reasons: Sequence[str], listed: Path, log: Callable[[str], object]) -> None:
    """Log the first five reasons why images were skipped, and the file that lists all."""
    for reason in reasons[:5]:
        log(f"skipped: {reason}")
    if len(reasons) > 5:
        log(f"skipped: {len(reasons) - 5} more, listed in {listed}")


def read_image(path: str | Path, reduction: Reduction | None = None) -> np.ndarray:
    """Read and decode an image file by its content, (H, W, 3) uint8 RGB; see ``decode_image``."""
    try:
        data = _read_file(path)
    except (OSError, ValueError) as error:  # ValueError: null byte in the path
        raise unreadable_error(str(path), error) from error
    return decode_image(data, str(path), reduction)


def image_size(path: str | Path) -> tuple[int, int]:
    """Return the height and width of an image, upright, from the header of its file."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            is_turned = _orientation(image) in (5, 6, 7, 8)
    except (OSError, ValueError) as error:
        raise unreadable_error(str(path), error) from error
    return (width, height) if is_turned else (height, width)


def _read_file(path: str | Path) -> bytes:
    # fstat of the open file: on a network file system, stat by path costs another round trip.
    with open(path, "rb", buffering=0, opener=_open) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > _MAX_BYTES:
            raise ValueError(f"{status.st_size:,} bytes exceed the limit of {_MAX_BYTES:,}")
        return file.read()


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | _NONBLOCK)  # otherwise opening a FIFO waits for its writer


def decode_image(data: bytes, name: str, reduction: Reduction | None = None) -> np.ndarray:
    """Decode the bytes of an image file in one of ``FORMATS``, (H, W, 3) uint8 RGB, writeable.

    Pixels are converted as in ``rgb_pixels``. Only the first frame of an animation is decoded. With
    ``reduction``, JPEGs except CMYK are decoded at a fraction of their size, rounded up, which is
    faster. Other formats keep their size.

    Raises:
        UnreadableImageError: The image is damaged or incomplete, has more pixels than twice
            `PIL.Image.MAX_IMAGE_PIXELS`, or has values without a defined range.
    """
    try:
        if simplejpeg is not None and data.startswith(_JPEG_SIGNATURE):
            # CMYK, damaged and too large images are left to Pillow.
            with suppress(ValueError, IndexError):
                height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
                limit = Image.MAX_IMAGE_PIXELS
                if colors in ("YCbCr", "Gray") and (not limit or height * width <= 2 * limit):
                    factor = reduction(height, width) if reduction else 1
                    # Of libjpeg's sizes (m/8), simplejpeg selects the smallest above the minimum.
                    least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
                    pixels = simplejpeg.decode_jpeg(data, **least)
                    return _upright(pixels, _jpeg_orientation(data))
        return _with_pillow(partial(_reduced_pixels, reduction), data)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise any type of error for broken files
        raise unreadable_error(name, error) from error


def _with_pillow(read: Callable[[Image.Image], T], data: bytes) -> T:
    """Open an image and call ``read`` on it; if that fails, retry without metadata."""
    try:
        with warnings.catch_warnings():  # about metadata and size; only errors matter here
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return read(image)
    except Exception:
        essential = _without_metadata(data)
        if len(essential) == len(data):
            raise
        return _with_pillow(read, essential)


def _without_metadata(data: bytes) -> bytes:
    """Return a PNG or JPEG file reduced to EXIF and the parts that its pixels depend on."""
    if data.startswith(_PNG_SIGNATURE):
        return _PNG_SIGNATURE + b"".join(c for c in _png_chunks(data) if _is_essential(c))
    if data.startswith(_JPEG_SIGNATURE):
        segments = list(_jpeg_segments(data))
        rest = data[2 + sum(map(len, segments)) :]
        return data[:2] + b"".join(s for s in segments if s[1] not in _JPEG_METADATA) + rest
    return data


def _png_chunks(data: bytes) -> Iterator[bytes]:
    start = len(_PNG_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start:end]
        start = end


def _is_essential(chunk: bytes) -> bool:
    kind = chunk[4:8]
    if kind == b"eXIf":
        return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
    return kind[:1].isupper() or kind == b"tRNS"


def _reduced_pixels(reduction: Reduction | None, image: Image.Image) -> np.ndarray:
    if reduction and image.mode in ("RGB", "L"):
        factor = reduction(image.height, image.width)
        image.draft(None, (image.width // factor, image.height // factor))  # ignored unless JPEG
    return rgb_pixels(image)


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode to (H, W, 3) uint8 RGB, writeable and contiguous.

    EXIF orientation is applied, transparency is composited on white, and 16-bit gray is reduced to
    its upper byte. Values without a defined range (floating point, 32 bits) raise a ValueError.
    """
    image.load()  # first: it may change mode and EXIF
    return _upright(_pixels(image), _orientation(image))


def _pixels(image: Image.Image) -> np.ndarray:
    """Convert a PIL image to (H, W, 3) uint8 RGB, without its EXIF orientation."""
    if image.mode == "F":
        raise ValueError("floating-point values have no defined range")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"values from {values.min()} to {values.max()} exceed 16 bits")
        gray = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            gray[values == image.info["transparency"]] = 0xFF
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(foreground)
    # np.asarray would be read-only, which torch does not support.
    return np.array(image.convert("RGB"))


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """Yield the segments of a JPEG file before the first scan: marker, length and content."""
    start = 2
    while data[start + 1 : start + 2] not in (b"", _START_OF_SCAN):
        end = start + 1  # a fill byte
        if data[end] != 0xFF:
            end += 1 + int.from_bytes(data[end + 1 : end + 3], "big")
        yield data[start:end]
        start = end


def _jpeg_orientation(data: bytes) -> int:
    if not any(segment[1:2] == _APP1 for segment in _jpeg_segments(data)):
        return 1  # most images: 5 us instead of Pillow's 40 us
    with suppress(Exception):
        return _with_pillow(_orientation, data)
    return 1


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # broken EXIF raises any type of error, but the pixels are valid
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    method = _TRANSPOSE.get(orientation)
    # Pillow transposes 3-byte pixels more than twice as fast as numpy.
    return pixels if method is None else np.array(Image.fromarray(pixels).transpose(method))
