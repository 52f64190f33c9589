"""Shared plotting helpers: palette, style, figures, legends and saving."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trex_models import cli
from trex_models.atomic import replacing

FORMATS = (".png", ".svg", ".pdf")
# Colors that colorblind readers can distinguish: those of Okabe and Ito without yellow, then three
# of Paul Tol.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"),
    *("#882255", "#332288", "#999933"),
)
GRAY = "#767676"
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler(color={list(PALETTE)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.dpi": 130,
    "font.size": 9.5,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """Create a matplotlib figure, size in inches, and apply the style within the block."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE), _without_glyph_warnings():
        figure: Any = Figure((width, height), layout="constrained")
        FigureCanvasAgg(figure)  # requires no display; pyplot would keep figures in memory
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
        yield figure


def colors(count: int) -> Sequence[Any]:
    """Return distinct colors: from the palette, or from viridis if it has too few."""
    if count <= len(PALETTE):
        return PALETTE[:count]
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def shorten(text: str, length: int) -> str:
    """Replace the middle of a text that exceeds a length with three dots."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def legend(figure: Any, names: Sequence[str], marks: Sequence[str] = ()) -> None:
    """Add a legend of the models' or runs' colors and of black marks below all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color) for color in colors(len(names))]
    handles += [Line2D([], [], color="black", lw=1.6) for _ in marks]
    texts = [*(shorten(name, 60) for name in names), *marks]
    inches = figure.bbox.width / figure.dpi
    columns = int(13 * inches / (max(map(len, texts)) + 6))  # 13 characters per inch
    columns = min(max(columns, 1), len(texts))
    placed = figure.legend(handles, texts, loc="outside lower center", ncols=columns)
    for text in placed.get_texts():
        text.set_parse_math(False)  # a name may contain dollar signs


def require_picture(output: Path) -> None:
    """Check that ``--output`` is a writable picture, in lower or upper case."""
    cli.require_writable(output.with_suffix(output.suffix.lower()), *FORMATS)


def save(figure: Any, output: Path) -> None:
    """Save a figure atomically, in the format of the file's extension."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file, _without_glyph_warnings():
        figure.savefig(file, format=output.suffix.lower().removeprefix("."))


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Ignore warnings about characters missing from the font, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
