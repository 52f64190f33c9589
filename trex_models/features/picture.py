"""Nearest neighbors as a picture: a row per query, similarity and name below each image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from trex_models import plotting
from trex_models.data.decode import read_image
from trex_models.features.images import shown
from trex_models.features.neighbors import Neighbors

_CELL = 1.5  # inches
_SIDE = 220  # pixels of a thumbnail
_LINE, _LINES = 22, 3  # characters in a line, lines of a name


def draw_neighbors(found: Sequence[Neighbors], root: Path, title: str) -> Any:
    """Draw a row per query: the query in a frame, then its neighbors, which are below ``root``."""
    columns = 1 + max(len(row.names) for row in found)
    with plotting.drawing(_CELL * columns + 0.3, (_CELL + 0.75) * len(found) + 0.5) as figure:
        figure.suptitle(plotting.shorten(title, 16 * columns), parse_math=False)
        for number, row in enumerate(found):
            nearest = zip(row.names, row.similarities, strict=True)
            cells = [(row.query, row.path, "query")]
            cells += [(name, root / name, f"{cosine:.3f}") for name, cosine in nearest]
            for place, (name, path, heading) in enumerate(cells, 1):
                axis = figure.add_subplot(len(found), columns, number * columns + place)
                color = plotting.GRAY if place > 1 else plotting.PALETTE[0]
                image = Image.fromarray(read_image(path))
                axis.imshow(ImageOps.pad(image, (_SIDE, _SIDE), color="white"))
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=place == 1, color=color, linewidth=2)
                text = plotting.shorten(shown(name), _LINE * _LINES)
                text = textwrap.fill(text, _LINE, break_on_hyphens=False)
                axis.set_xlabel(f"{heading}\n{text}", fontsize=7, color=color, parse_math=False)
    return figure


def format_neighbors(found: Sequence[Neighbors]) -> str:
    """Return the same as text: a query, then its neighbors, a line each."""
    lines = []
    for row in found:
        lines.append(shown(row.query))
        nearest = zip(row.names, row.similarities, strict=True)
        lines += [f"  {cosine:6.3f}  {shown(name)}" for name, cosine in nearest]
    return "\n".join(lines)
