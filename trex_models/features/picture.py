"""Nearest neighbors as a picture: a row a query, with similarity and name below each image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from trex_models.data.decode import read_image
from trex_models.features.images import shown
from trex_models.features.neighbors import Neighbors
from trex_models.transfer.canvas import GREY, PALETTE, drawing, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 1.5  # inches
_SIDE = 220  # pixels of a thumbnail
_LINE, _LINES = 22, 3  # characters of a line, lines of a name


def draw(found: Sequence[Neighbors], root: Path, title: str) -> Figure:
    """Draw queries, the first in each row, and their neighbors, the nearest first.

    Args:
        found: Of each query.
        root: Where the images of the file are.
        title: Above the picture.

    Raises:
        ValueError: An image cannot be read, or matplotlib is missing.
    """
    columns = 1 + max(len(row.names) for row in found)
    with drawing(_CELL * columns + 0.3, (_CELL + 0.75) * len(found) + 0.5) as figure:
        figure.suptitle(shortened(title, 16 * columns), parse_math=False)
        for number, row in enumerate(found):
            first = number * columns + 1
            axis = figure.add_subplot(len(found), columns, first)
            _cell(axis, row.path, "query", row.query, PALETTE[0])
            for place, (name, cosine) in enumerate(
                zip(row.names, row.similarities, strict=True), 1
            ):
                axis = figure.add_subplot(len(found), columns, first + place)
                _cell(axis, root / name, f"{cosine:.3f}", name, None)
    return figure


def _cell(axis: Any, path: Path, heading: str, name: str, frame: str | None) -> None:
    """Draw an image, the whole of it in a square, and what it is called."""
    image = Image.fromarray(read_image(path))
    axis.imshow(ImageOps.pad(image, (_SIDE, _SIDE), color="white"))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(visible=frame is not None, color=frame, linewidth=2)
    called = shortened(shown(name), _LINE * _LINES)
    text = f"{heading}\n{textwrap.fill(called, _LINE, break_on_hyphens=False)}"
    axis.set_xlabel(text, fontsize=7, color=frame or GREY, parse_math=False)


def table(found: Sequence[Neighbors]) -> str:
    """Return the same as text: a query, then its neighbors, a line each."""
    lines = []
    for row in found:
        lines.append(shown(row.query))
        lines += [
            f"  {cosine:6.3f}  {shown(name)}"
            for name, cosine in zip(row.names, row.similarities, strict=True)
        ]
    return "\n".join(lines)
