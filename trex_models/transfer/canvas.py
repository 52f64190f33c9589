"""What pictures share: style, colours, groups of bars, a legend, labels that find room."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import numpy as np

Box = tuple[float, float, float, float]
"""Left, right, bottom and top."""

# Okabe and Ito's, which colour-blind people tell apart, without the yellow; then three of Tol's.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"),
    *("#882255", "#332288", "#999933"),
)
GREY = "#767676"
STYLE: Any = {"axes.titlesize": 11, "font.size": 9.5, "axes.titlelocation": "left"}
VALUES_UP_TO = 24  # bars in a panel; more leave no room for numbers over them
GAPS = (4, 8, 14, 22, 32, 44, 60)  # between a point and its label, in points of 1/72 inch
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """Give a figure, its size in inches, and the style while it is drawn.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install trex-models[transfer]") from None

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        figure: Any = Figure((width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
        yield figure


def bare(axis: Any) -> None:
    """Take from axes what does not help to read them."""
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def colors_of(count: int) -> Sequence[Any]:
    """Return a colour for each of some models."""
    if count <= len(PALETTE):
        return PALETTE[:count]
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def shortened(text: str, length: int) -> str:
    """Return a text whose middle is left out where it is longer."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def grouped_bars(
    axis: Any, titles: Sequence[str], heights: np.ndarray, marks: np.ndarray, form: str
) -> None:
    """Draw groups of bars, one bar a model.

    Args:
        axis: Where.
        titles: Of the groups.
        heights: (models, groups); NaN for no bar.
        marks: Drawn across the bars, likewise.
        form: Of the numbers over the bars, where there is room for them.
    """
    models = len(heights)
    for index, color in enumerate(colors_of(models)):
        x = np.arange(len(titles)) + (index - (models - 1) / 2) * 0.84 / models
        drawn = np.isfinite(heights[index])
        axis.bar(x[drawn], heights[index][drawn], 0.78 / models, color=color)
        there = np.isfinite(marks[index])
        half = 0.39 / models
        for line, tint in ((3.6, "white"), (1.6, "black")):
            places = marks[index][there], x[there] - half, x[there] + half
            axis.hlines(*places, color=tint, lw=line)
        if heights.size > VALUES_UP_TO:
            continue
        near = marks[index] < heights[index] + 0.1 * np.nanmax(heights)
        tops = np.where(near, np.fmax(heights[index], marks[index]), heights[index])
        for place, height, top in zip(x[drawn], heights[index][drawn], tops[drawn], strict=True):
            text, above = form.format(height), (0, 4)
            axis.annotate(text, (place, top), above, textcoords="offset points", ha="center")
    bare(axis)
    axis.grid(visible=False, axis="x")
    axis.set_xlim(-0.6, len(titles) - 0.4)
    axis.margins(y=0.1)
    longest = max(len(line) for title in titles for line in title.split("\n"))
    slant = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
    room = axis.figure.get_figwidth() / axis.get_subplotspec().get_gridspec().ncols
    crowded = len(titles) * (longest + 2) > 11 * room  # characters of an inch
    axis.set_xticks(range(len(titles)), titles, parse_math=False, **(slant if crowded else {}))


def width_of(groups: int, models: int) -> float:
    """Return a width for groups of bars, in inches."""
    return float(np.clip(2 + groups * (0.5 + 0.28 * models), 8, 14))


def legend(figure: Any, names: Sequence[str], marks: Sequence[str] = ()) -> None:
    """Name the models by their colours, and the marks on their bars, below all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color) for color in colors_of(len(names))]
    handles += [Line2D([], [], color="black", lw=1.6) for _ in marks]
    texts = [*(shortened(name, 44) for name in names), *marks]
    columns = int(13 * figure.get_figwidth() / (max(map(len, texts)) + 6))
    columns = min(max(columns, 1), len(texts))
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    for text in figure.legend(handles, texts, **place).get_texts():
        text.set_parse_math(False)


class Label(NamedTuple):
    """What is to be written beside a point."""

    x: float
    y: float
    text: str
    color: Any


def place_labels(
    axis: Any, labels: Sequence[Label], lines: Sequence[tuple[Sequence[float], Sequence[float]]]
) -> None:
    """Write labels beside their points, each where it covers least of what is there already.

    The last to be done to a figure: its layout is fixed here.

    Args:
        axis: Where the points are drawn.
        labels: In the order of their rights.
        lines: Level or upright ones to keep off, the x of both ends and the y.
    """
    figure = axis.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # room is allotted; labels must not move it
    points = 72 / figure.dpi
    frame = axis.get_window_extent()
    inside = (points * frame.x0, points * frame.x1, points * frame.y0, points * frame.y1)
    taken = []
    for ends in [*lines, *(((x, x), (y, y)) for x, y, _, _ in labels)]:
        (left, low), (right, high) = axis.transData.transform(np.transpose(ends)) * points
        margin = 5 if (left, low) == (right, high) else 1
        taken.append((left - margin, right + margin, low - margin, high + margin))
    style = {"textcoords": "offset points", "ha": "center", "va": "center", "parse_math": False}
    for x, y, text, color in labels:
        place = axis.transData.transform((x, y)) * points
        written = axis.annotate(text, (x, y), (0, 0), color=color, **style)
        extent = written.get_window_extent()
        size = np.array([extent.width, extent.height]) * points
        best = (np.inf, 0, (0, 0))
        for gap, side in product(GAPS, SIDES):
            box = _box(place + side * (gap + size / 2), size)
            outside = size.prod() - _overlap(box, inside)
            cost = gap + 10 * outside + sum(_overlap(box, other) for other in taken)
            if cost < best[0]:
                best = (cost, gap, side)
        _, gap, side = best
        offset = side * (gap + size / 2)
        written.set_position(offset)
        taken.append(_box(place + offset, size))
        if gap > 8:
            leader = (place + np.outer((4, gap), side)) / points
            leader = axis.transData.inverted().transform(leader)
            axis.plot(*leader.T, color=GREY, lw=0.6, scalex=False, scaley=False)


def _box(centre: np.ndarray, size: np.ndarray) -> Box:
    (left, low), (right, high) = centre - size / 2, centre + size / 2
    return left, right, low, high


def _overlap(one: Box, two: Box) -> float:
    width = min(one[1], two[1]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[2], two[2])
    return max(0.0, width) * max(0.0, height)
