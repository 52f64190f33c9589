"""Images of running text, labeled by typeface, from font packages of Debian.

    python -m benchmarks.typefaces --output DATA

downloads the packages to DATA/packages, or reuses those that are there, and writes class folders:

- DATA/typefaces/task/train, task/test and held-out: typefaces to train on, with different text.
- DATA/typefaces/unseen/train and unseen/test: other typefaces.
- DATA/typefaces/fonts.json: packages, font files, and typefaces that were left out.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from string import ascii_letters

import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from benchmarks.package_images import fetch, run_tool
from trex_models import cli
from trex_models.atomic import write_text_file
from trex_models.evaluation.splits import hashed_order
from trex_models.pretrained.timm_folder import replaced_folder, temporary_folder

FONTS = ("fonts-aenigma", "texlive-fonts-extra")
PACKAGES = {f"{name}_*.deb": f"apt-get download {name}" for name in FONTS}
STYLES = ("Regular", "Book", "Roman", "Medium", "Normal")  # of a family, by preference
SIDE, OVERSAMPLING, INK, PAPER = 64, 2, (0, 60), (215, 256)
CAP_HEIGHT, SPACING = (8.0, 12.0), (1.6, 2.2)  # pixels; line spacing per height of capitals
MIN_LIKENESS, MAX_LIKENESS = 0.25, 0.8  # correlation with the mean font, and with another font
# First image number, and number of images per typeface.
TASK = {"task/train": (0, 100), "held-out": (1000, 20), "task/test": (2000, 20)}
UNSEEN = {"unseen/train": (0, 30), "unseen/test": (2000, 30)}
# Kerning would depend on an optional library.
open_font = partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC)


def letter_shapes(file: Path) -> np.ndarray:
    """Return the shapes of all letters in their bounding boxes, as a unit vector of mean 0."""
    font, shapes = open_font(file, 32), []
    for letter in ascii_letters:
        image = Image.new("L", (128, 128))
        ImageDraw.Draw(image).text((40, 30), letter, fill=255, font=font)
        if (box := image.getbbox()) is None:
            raise ValueError(f"{letter} is blank")
        shapes.append(np.asarray(image.crop(box).resize((12, 12), Image.Resampling.BOX), float))
    vector = np.stack(shapes).ravel() - np.mean(shapes)
    return np.asarray(vector / np.linalg.norm(vector))


def find_fonts(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return one font file per usable family, and the reasons for leaving out the others."""
    files: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    left_out, shapes = {}, {}
    for file in sorted(path for path in folder.rglob("*.[ot]tf") if path.is_file()):
        font = FT2Font(str(file))
        name = re.sub(r"\W+", "-", font.family_name, flags=re.ASCII).strip("-")
        if missing := set(ascii_letters) - set(map(chr, font.get_charmap())):
            left_out[name] = f"no glyph for {min(missing)}"
        else:
            rank = STYLES.index(font.style_name) if font.style_name in STYLES else len(STYLES)
            files[name].append((rank, file))
    for name in sorted(files):
        left_out.pop(name, None)  # another style has all glyphs
        try:
            shapes[name] = letter_shapes(min(files[name])[1])
        except ValueError as error:
            left_out[name] = str(error)
    mean = sum(shapes.values(), np.zeros(1))
    usable: dict[str, Path] = {}
    for name, shape in shapes.items():
        alike = next((known for known in usable if shape @ shapes[known] > MAX_LIKENESS), None)
        if shape @ mean < MIN_LIKENESS * np.linalg.norm(mean):
            left_out[name] = "its letters are symbols or hard to recognize"
        elif alike:
            left_out[name] = f"similar to {alike}"
        else:
            usable[name] = min(files[name])[1]
    return usable, left_out


def random_word(rng: np.random.Generator) -> str:
    """Return a pronounceable word of one to three syllables, a third of them capitalized."""
    word = ""
    for _ in range(rng.integers(1, 4)):
        word += "bcdfghjklmnpqrstvwxyz"[rng.integers(21)] + "aeiou"[rng.integers(5)]
    word += ["", *"dlnrst"][rng.integers(7)]
    return word.capitalize() if rng.random() < 1 / 3 else word


def draw_text(file: Path, rng: np.random.Generator) -> Image.Image:
    """Draw a detail of a page of random words, at a random size and position."""
    top, bottom = open_font(file, 100).getbbox("H")[1::2]
    height = rng.uniform(*CAP_HEIGHT) * OVERSAMPLING
    font = open_font(file, 100 * height / (bottom - top))
    image = Image.new("L", (SIDE * OVERSAMPLING,) * 2, int(rng.integers(*PAPER)))
    ink, spacing = int(rng.integers(*INK)), height * rng.uniform(*SPACING)
    for y in np.arange(rng.uniform(0, spacing), image.height + height, spacing).tolist():
        text = " ".join(random_word(rng) for _ in range(6))  # more than fit
        place = (-rng.uniform(0, 2 * height), y)
        ImageDraw.Draw(image).text(place, text, fill=ink, font=font, anchor="ls")
    return image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGB")


def write_images(fonts: Path, output: Path, families: int, unseen: int) -> None:
    """Write all class folders; the output is complete or unchanged."""
    usable, left_out = find_fonts(fonts)
    print(*(f"left out: {name}: {reason}" for name, reason in left_out.items()), sep="\n")
    if (needed := families + unseen) > len(usable):
        raise ValueError(f"{len(usable)} fonts are usable, but {needed} needed; lower --families")
    names = [sorted(usable)[index] for index in hashed_order(sorted(usable))[:needed]]
    with replaced_folder(output) as new, cli.progress_bar(needed, "text", "typeface") as bar:
        for position, name in enumerate(names):
            for part, (first, count) in (TASK if position < families else UNSEEN).items():
                (path := new / part / name).mkdir(parents=True)
                for number in range(first, first + count):
                    rng = np.random.default_rng((zlib.crc32(name.encode()), number))
                    draw_text(usable[name], rng).save(path / f"{number:04d}.bmp")  # decodes fast
            bar.update()
        files = {name: usable[name].relative_to(fonts).as_posix() for name in names}
        write_text_file(new / "fonts.json", json.dumps({"files": files, "left_out": left_out}))


def typefaces(*, output: Path, families: int = 96, unseen: int = 90) -> None:
    """Download the fonts and write the images.

    Args:
        output: Folder of the data.
        families: Number of typefaces to train on.
        unseen: Number of other typefaces.
    """
    (cache := output / "packages").mkdir(parents=True, exist_ok=True)
    with temporary_folder(cache, "unpacked") as unpacked:
        for package in [fetch(cache, pattern, PACKAGES) for pattern in PACKAGES]:
            print("unpacking", package.name, flush=True)
            run_tool(unpacked, "dpkg-deb", "-x", str(package.absolute()), ".")
        write_images(unpacked, output / "typefaces", families, unseen)


if __name__ == "__main__":
    name = "python -m benchmarks.typefaces"
    sys.exit(cli.main(typefaces, sys.argv[1:], prog=name, extra="benchmarks"))
