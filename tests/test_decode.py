"""Decoding of image files, compared with pixels computed by hand."""

from __future__ import annotations

import io
import os
import socket
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.images import encode, picture
from trex_models.data import decode
from trex_models.data.decode import FORMATS, UnreadableImageError, decode_image, read_image

JPEG_OPTIONS: dict[str, Any] = {"quality": 100, "subsampling": 0}  # within 4 of the original
UNREADABLE = r"^x\.img cannot be read as an image \(.+\); fix or replace it$"


def over_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[:, :, None] / 255
    return colors * share + 255 * (1 - share)


def same(pixels: np.ndarray, expected: np.ndarray, tolerance: float = 0) -> None:
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(float)).max() <= tolerance


@pytest.fixture(params=["simplejpeg", "Pillow"])
def _each_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_and_their_extensions(kind: str) -> None:
    known = Image.registered_extensions()
    assert {known[extension] for extension in FORMATS[kind]} <= {kind, "MPO"}
    if kind in Image.SAVE:  # Pillow 11 reads but cannot write QOI
        assert decode_image(encode(picture(32, 32), kind), "x.img").shape == (32, 32, 3)


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_pixels_are_pillows(options: dict[str, Any]) -> None:
    for image in (picture(77, 123), picture(77, 123, channels=1)[:, :, 0]):
        data = encode(image, "JPEG", quality=85, **options)
        with Image.open(io.BytesIO(data)) as expected:
            same(decode_image(data, "x.img"), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("kind", ["444", "420", "progressive", "keep_rgb", "gray", "exif", "MPO"])
def test_reduced_jpeg(kind: str, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decoders give the same pixels, about the means of blocks of the full size."""
    image = picture(77, 122)[:, :, 0] if kind == "gray" else picture(77, 122)
    exif = oriented(5 if kind == "exif" else 1)
    options: dict[str, Any] = {kind: True} if kind in ("progressive", "keep_rgb") else {}
    options |= {"subsampling": {"444": 0, "420": 2}[kind]} if kind.startswith("4") else {}
    data = encode(image, "MPO" if kind == "MPO" else "JPEG", quality=90, exif=exif, **options)
    reduction = Mock(return_value=factor)
    reduced = decode_image(data, "x.img", reduction)
    expected = np.asarray(Image.fromarray(decode_image(data, "x.img")).reduce(factor))
    assert reduced.shape == expected.shape
    assert np.abs(reduced - expected.astype(float)).mean() < 2
    monkeypatch.setattr(decode, "simplejpeg", None)
    same(decode_image(data, "x.img", reduction), reduced)
    assert reduction.call_args_list == [call(77, 122)] * 2


@pytest.mark.usefixtures("_each_decoder")
def test_other_formats_and_damaged_jpegs_ignore_the_reduction() -> None:
    cmyk = Image.fromarray(picture(64, 64, channels=4), "CMYK")
    for data in (encode(cmyk, "JPEG"), encode(picture(64, 64), "PNG")):
        same(decode_image(data, "x.img", lambda *_: 4), decode_image(data, "x.img"))
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with pytest.raises(UnreadableImageError, match=UNREADABLE):
        decode_image(encode(noise, "JPEG")[:3000], "x.img", lambda *_: 4)


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize("transform", ["CMYK", "YCCK"])
def test_jpeg_for_print(transform: str) -> None:
    inks = picture(channels=4)
    if transform == "CMYK":  # Pillow inverts CMYK, like Adobe
        data = encode(Image.fromarray(inks, "CMYK"), "JPEG", **JPEG_OPTIONS)
    else:
        data = simplejpeg.encode_jpeg(255 - inks, 100, "CMYK", "444")
    assert simplejpeg.decode_jpeg_header(data)[2] == transform
    light = 255 - inks.astype(float)
    same(decode_image(data, "x.img"), light[:, :, :3] * light[:, :, 3:] / 255, tolerance=5)


INDICES = np.arange(12, dtype=np.uint8).reshape(3, 4)
PALETTE = picture(1, 12)[0]


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def paletted() -> Image.Image:
    image = Image.fromarray(INDICES)
    image.putpalette(PALETTE.tobytes())
    return image


def png_of_rgb16(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*parts) for parts in chunks)


def png_chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    crc = zlib.crc32(kind + data) ^ damage
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def gray16() -> np.ndarray:
    values = np.random.default_rng(1).integers(0, 65536, (6, 5), dtype=np.uint16)
    values.flat[:6] = 0, 255, 256, 257, 65279, 65535
    return values


def cases() -> Iterator[tuple[str, bytes, np.ndarray, float]]:
    """Yield a name, the file, the expected pixels and a tolerance for images of every kind."""
    colors, gray = picture(), picture(channels=1)
    bits = np.where(gray > 127, 255, 0).astype(np.uint8)
    one_bit = Image.fromarray(bits[:, :, 0]).convert("1", dither=Image.Dither.NONE)
    for kind in ("PNG", "TIFF", "BMP"):
        yield f"gray {kind}", encode(gray[:, :, 0], kind), gray.repeat(3, axis=2), 0
        yield f"one bit {kind}", encode(one_bit, kind), bits.repeat(3, axis=2), 0
    data = encode(colors, "JPEG", **JPEG_OPTIONS, keep_rgb=True)
    assert simplejpeg.decode_jpeg_header(data)[2] == "RGB"
    yield "JPEG of RGB", data, colors, 4

    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        yield f"palette {kind}", encode(paletted(), kind), PALETTE[INDICES], 0
    see_through = np.where(INDICES[:, :, None] == 5, 255, PALETTE[INDICES])
    for kind in ("PNG", "GIF"):
        yield f"one is clear {kind}", encode(paletted(), kind, transparency=5), see_through, 0
    alpha = np.linspace(0, 255, 12).astype(np.uint8)
    laid = over_white(PALETTE[INDICES], alpha[INDICES])
    data = encode(paletted(), "PNG", transparency=alpha.tobytes())
    yield "an opacity for each color", data, laid, 1

    pixels = picture(channels=4)
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        for name, opacity, tolerance in (
            ("clear", 0, 0),
            ("some", pixels[:, :, 3], 1),
            ("all", 255, 0),
        ):
            pixels[:, :, 3] = opacity
            expected = over_white(pixels[:, :, :3], pixels[:, :, 3])
            yield f"RGBA, {name} {kind}", encode(pixels, kind, **options), expected, tolerance
        yield f"RGB {kind}", encode(colors, kind, **options), colors, 0
    for kind in ("BMP", "PPM"):
        yield f"RGB {kind}", encode(colors, kind), colors, 0
    level, alpha = np.moveaxis(picture(channels=2), 2, 0)
    image = Image.merge("LA", [Image.fromarray(level), Image.fromarray(alpha)])
    expected = over_white(level[:, :, None].repeat(3, axis=2), alpha)
    for kind in ("PNG", "TIFF"):
        yield f"gray and opacity {kind}", encode(image, kind), expected, 1
    for pixels, key in ((gray, int(gray[7, 9, 0])), (colors, tuple(colors[7, 9].tolist()))):
        expected = np.where((pixels == pixels[7, 9]).all(axis=2, keepdims=True), 255, pixels)
        expected = np.broadcast_to(expected, (30, 40, 3))
        yield f"{key} is clear", encode(pixels.squeeze(), "PNG", transparency=key), expected, 0

    values = gray16()
    upper, big = (values // 256)[:, :, None].repeat(3, axis=2), values.astype(">u2")
    for name, data in {
        "PNG": encode(values, "PNG"),
        "TIFF": encode(values, "TIFF"),
        "TIFF, big-endian": encode(Image.fromarray(big), "TIFF"),
        "TIFF of 32 bits": encode(Image.fromarray(values.astype(np.int32)), "TIFF"),
        "PGM": b"P5 5 6 65535\n" + big.tobytes(),
    }.items():
        yield f"gray of 16 bits, {name}", data, upper, 0
    data = encode(values, "PNG", transparency=int(values[2, 2]))
    expected = np.where(values == values[2, 2], 255, values // 256)
    yield "gray of 16 bits, one clear", data, expected[:, :, None].repeat(3, axis=2), 0
    pixels = np.stack([values, values[::-1], values[:, ::-1]], axis=2)
    yield "RGB of 16 bits", png_of_rgb16(pixels), pixels // 256, 0


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"), [pytest.param(*rest, id=name) for name, *rest in cases()]
)
def test_pixels(data: bytes, expected: np.ndarray, tolerance: float) -> None:
    same(decode_image(data, "x.img"), expected, tolerance)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6), "floating-point"),
        (np.arange(30, dtype=np.int32).reshape(5, 6) * 9999, "values from 0 to 289971"),
        (np.arange(30, dtype=np.int32).reshape(5, 6) - 1, "values from -1 to 28"),
    ],
)
def test_values_without_a_defined_range_are_refused(values: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        decode_image(encode(values, "TIFF"), "x.img")
    caught.match(UNREADABLE)


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    0: lambda upright: upright,
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: np.rot90(upright, 2),
    4: lambda upright: upright[::-1],
    5: lambda upright: np.rot90(upright[:, ::-1], 1),
    6: lambda upright: np.rot90(upright, 1),  # shown rotated clockwise, so stored counterclockwise
    7: lambda upright: np.rot90(upright[:, ::-1], -1),
    8: lambda upright: np.rot90(upright, -1),
    9: lambda upright: upright,
}


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_orientation(orientation: int, kind: str) -> None:
    exif = oriented(orientation)
    stored = np.ascontiguousarray(TURNED[orientation](picture()))
    options: dict[str, Any] = {
        "JPEG": {**JPEG_OPTIONS, "exif": exif},
        "TIFF": {"tiffinfo": {0x0112: orientation}},
        "WEBP": {"lossless": True, "exif": exif},
        "PNG": {"exif": exif},
    }[kind]
    data = encode(stored, kind, **options)
    same(decode_image(data, "x.img"), picture(), tolerance=4 if kind == "JPEG" else 0)


def odd_blocks() -> Iterator[tuple[str, bytes, float]]:
    """Yield files of the picture with metadata that is broken or at unusual positions."""
    for block in (
        *(b"", b"II", b"nonsense", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x05\x01"),
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\0\0\xff\xff\xff\xff\0\0\0\0",
    ):
        exif = b"Exif\0\0" + block
        yield f"JPEG {block!r}", encode(picture(), "JPEG", **JPEG_OPTIONS, exif=exif), 4
        yield f"PNG {block!r}", encode(picture(), "PNG", exif=exif), 0
    stored = np.ascontiguousarray(TURNED[6](picture()))
    data = encode(stored, "JPEG", **JPEG_OPTIONS, exif=oriented(6), comment=b"\xff\xe1")
    start = data.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    block = b"\xff\xed" + (60000).to_bytes(2, "big") + b"\xff\xda" * 29999
    behind = data[:2] + block + b"\xff\xff" + data[start + 1 : end] + data[2:start] + data[end:]
    yield "orientation behind other blocks", behind, 4
    stored = np.ascontiguousarray(picture()[::-1, ::-1])
    data = encode(stored, "JPEG", **JPEG_OPTIONS, exif=oriented(3))
    for block in (b"\xe0JFIF\0\0", b"\xe2ICC_PROFILE\0\1"):
        head = struct.pack(">cBH", b"\xff", block[0], len(block) + 1)
        yield f"{block!r}", data[:2] + head + block[1:] + data[2:], 4


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize(
    ("data", "tolerance"), [pytest.param(*rest, id=name) for name, *rest in odd_blocks()]
)
def test_odd_metadata_leave_the_image_readable(data: bytes, tolerance: float) -> None:
    same(decode_image(data, "x.img"), picture(), tolerance)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_of_several_frames(kind: str) -> None:
    frames = [picture(seed=seed) for seed in (0, 1, 2)]
    images = [Image.fromarray(frame) for frame in frames]
    if kind == "GIF":
        images = [image.quantize(256) for image in images]
        frames = [np.asarray(image.convert("RGB")) for image in images]
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "MPO": JPEG_OPTIONS}.get(kind, {})
    data = encode(images[0], kind, save_all=True, append_images=images[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    same(decode_image(data, "x.img"), frames[0], tolerance=4 if kind == "MPO" else 0)


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 1), (17, 1)])
def test_tiny_and_thin(size: tuple[int, int]) -> None:
    same(decode_image(encode(picture(*size), "PNG"), "x.img"), picture(*size))
    data = encode(picture(*size), "JPEG", **JPEG_OPTIONS)
    same(decode_image(data, "x.img"), picture(*size), tolerance=4)


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_huge_images_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(30, 40), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(UnreadableImageError, match="1200 pixels") as caught:
        decode_image(data, "x.img")
    caught.match(UNREADABLE)
    for limit in (600, 1199, None):  # up to twice the limit, Pillow itself only warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode_image(data, "x.img").shape == (30, 40, 3)


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.98])
def test_torn_images_are_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    options = {"progressive": True} if kind == "progressive" else {}
    data = encode(noise, "PNG" if kind == "PNG" else "JPEG", **options)
    with pytest.raises(UnreadableImageError, match=UNREADABLE):
        decode_image(data[: int(len(data) * share)], "x.img")


@pytest.mark.usefixtures("_each_decoder")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_trailing_bytes_are_ignored(kind: str) -> None:
    data = encode(picture(), kind)
    for tail in (b"\0", b"trailing" * 100, data):
        same(decode_image(data + tail, "x.img"), decode_image(data, "x.img"))


def test_stray_bytes_that_pillow_forgives() -> None:
    data = encode(picture(), "JPEG")
    scan = data.index(b"\xff\xda")
    data = data[:scan] + b"\x00\x00\x00" + data[scan:]
    with Image.open(io.BytesIO(data)) as image:
        same(decode_image(data, "x.img"), np.asarray(image))


@pytest.mark.usefixtures("_each_decoder")
def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\x0f\x01\x02\0\xff"
    image = Image.fromarray(picture()).quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        decode_image(encode(picture(), "JPEG", exif=exif), "x.img")
        decode_image(encode(picture(), "PNG", exif=exif), "x.img")
        decode_image(encode(image, "PNG", transparency=b"\0\x80" * 8), "x.img")
    assert capfd.readouterr() == ("", "")


def test_files_and_missing_files(tmp_path: Path) -> None:
    data = encode(picture(), "JPEG")
    (tmp_path / "photo.jpg").write_bytes(data)
    same(read_image(tmp_path / "photo.jpg"), decode_image(data, "x.img"))
    for content in (b"", b"no image at all", b"\xff\xd8\xff\xe0 torn", b"\xff"):
        (tmp_path / "broken.jpg").write_bytes(content)
        with pytest.raises(UnreadableImageError, match=r"broken\.jpg cannot be .*; fix or repl"):
            read_image(tmp_path / "broken.jpg")
    for name, message in (
        ("absent.jpg", r"absent\.jpg .*\(No such file or directory\)"),
        (".", r"\(Is a directory\)"),
        ("a\0b.jpg", "cannot be read"),
    ):
        with pytest.raises(UnreadableImageError, match=message):
            read_image(tmp_path / name)


@pytest.mark.timeout(60)
def test_irregular_files_are_rejected_immediately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("fifo.jpg")
    Path("device.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        for name in ("device", "fifo"):
            with pytest.raises(UnreadableImageError, match=rf"{name}\.jpg .*\(not a regular file"):
                read_image(Path(f"{name}.jpg"))
        with pytest.raises(UnreadableImageError, match=r"socket\.jpg cannot be read"):
            read_image(Path("socket.jpg"))
    Path("large.jpg").write_bytes(encode(picture(), "JPEG"))
    monkeypatch.setattr(decode, "_MAX_BYTES", 99)
    with pytest.raises(UnreadableImageError, match="bytes exceed the limit of 99"):
        read_image(Path("large.jpg"))


@pytest.mark.parametrize("kind", ["EPS", "AVIF"])
def test_formats_that_are_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript for EPS, and may be built without AVIF."""
    data = encode(picture(), kind)
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    with pytest.raises(UnreadableImageError, match=r"\(unknown format, or not supported by"):
        decode_image(data, "x.img")


BOMB = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(png_chunk(b"zTXt", b"k\0\0" + BOMB), id="text"),
        pytest.param(png_chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB), id="unicode"),
        pytest.param(png_chunk(b"iCCP", b"k\0\0" + BOMB), id="profile"),
        pytest.param(png_chunk(b"pHYs", b"\0"), id="short"),
        pytest.param(png_chunk(b"tEXt", b"k\0value", damage=1), id="crc"),
    ],
)
def test_metadata_of_a_png_do_not_cost_the_image(chunk: bytes) -> None:
    pixels = picture(channels=1)[:, :, 0]
    expected = np.where(pixels == pixels[7, 9], 255, pixels)[::-1, ::-1]
    png = encode(pixels, "PNG", exif=oriented(3), transparency=int(pixels[7, 9]))
    for place in (33, len(png) - 12):  # after IHDR, before IEND
        data = png[:place] + chunk + png[place:]
        same(decode_image(data, "x.img"), expected[:, :, None].repeat(3, axis=2))


def test_exif_of_a_png_with_a_wrong_crc_is_ignored() -> None:
    png = encode(picture(), "PNG")
    data = png[:33] + png_chunk(b"eXIf", oriented(3).tobytes()[6:], damage=1) + png[33:]
    same(decode_image(data, "x.img"), picture())


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS"])
def test_damaged_parts_that_pixels_depend_on_are_refused(kind: bytes) -> None:
    png = bytearray(encode(Image.fromarray(picture()).quantize(16), "PNG", transparency=b"\0" * 8))
    start = png.index(kind)
    png[start + 4 + int.from_bytes(png[start - 4 : start], "big")] ^= 1  # in its CRC
    with pytest.raises(UnreadableImageError, match=UNREADABLE):
        decode_image(bytes(png), "x.img")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a/b c.jpg", "a/b c.jpg"),
        ("a /b.jpg", "'a /b.jpg'"),
        ("a.jpg ", "'a.jpg '"),
        ("a\\b.jpg", r"'a\\b.jpg'"),
        ("a\u200b.jpg", r"'a\u200b.jpg'"),
    ],
)
def test_names_show_invisible_characters(name: str, shown: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(b"", name)
    assert str(caught.value).startswith(f"{shown} cannot be read")
