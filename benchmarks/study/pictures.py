"""Figure of the study: training task against transfer, with pooled 95 % intervals."""

from __future__ import annotations

from typing import Any

from benchmarks.study.cells import CELLS
from benchmarks.study.claims import MEASURES, Estimate, Measure, Results, among_cells
from trex_models.plotting import PALETTE, new_figure

COLORS = dict(zip(("softmax", "cosine", "ocm", "look"), PALETTE, strict=False))
_LINES = (
    ("cosine-1-global", "cosine-3-global", ":"),
    ("cosine-1", "cosine-3", ":"),
    ("ocm-1", "ocm-3", ":"),
    ("cosine-1-global", "cosine-1", "--"),
    ("cosine-3-global", "cosine-3", "--"),
)
"""Pairs of configurations to connect: one and three hidden layers, without and with local crops."""


def _style(name: str) -> dict[str, Any]:
    """Return a marker style: color by objective, hollow without local crops, shape by depth."""
    cell = CELLS[name]
    color = COLORS[cell.objective]
    marks = {None: "o", 1: "s", 3: "^"}
    return {
        "color": color,
        "marker": marks[cell.layers],
        "mfc": color if cell.local else "white",
        "mec": color,
    }


def _scaled(measure: Measure, found: Estimate) -> Estimate:
    """Convert an estimate to the unit of display."""
    return Estimate(*(measure.scale * value for value in found))


def _bar(axis: Any, across: Estimate, up: float, vertical: bool = False, **style: Any) -> None:
    """Draw an interval as a line."""
    ends, constant = (across.low, across.high), (up, up)
    axis.plot(*((constant, ends) if vertical else (ends, constant)), **style)


def tradeoff(results: Results) -> Any:
    """Plot training task against transfer, one point per configuration, as in the paper.

    Dotted lines connect one and three hidden layers, dashed lines no local crops and local crops.
    """
    measures = MEASURES["task"], MEASURES["transfer"]
    points = {
        name: [_scaled(measure, among_cells(results, measure, name)) for measure in measures]
        for name in results
    }
    with new_figure(10.5, 6.2) as figure:
        axis = figure.add_subplot()
        axis.margins(0.08)
        for before, after, dashes in _LINES:
            if {before, after} <= points.keys():
                places = [(points[n][0].mean, points[n][1].mean) for n in (before, after)]
                color = _style(after)["color"]
                axis.plot(*zip(*places, strict=True), color=color, ls=dashes, lw=1.2, alpha=0.7)
        for name, (x, y) in points.items():
            style = _style(name)
            axis.plot(x.mean, y.mean, ls="", ms=8, zorder=3, label=CELLS[name].title, **style)
            if x.has_interval:
                _bar(axis, x, y.mean, color=style["color"], lw=1.2)
                _bar(axis, y, x.mean, vertical=True, color=style["color"], lw=1.2)
        sets = len(next(iter(results.values()))[0]["datasets"]) - 1  # without the training task
        axis.set_xlabel("training task: top-1 accuracy on new images, %")
        axis.set_ylabel(f"transfer: mean log-odds over {sets} datasets")
        axis.set_title(
            "Effect of projector depth, local crops and objective\n"
            "hollow: no local crops; dashed: adding local crops; dotted: from 1 to 3 hidden layers",
            fontsize=10,
        )
        figure.legend(loc="outside right upper")
    return figure
