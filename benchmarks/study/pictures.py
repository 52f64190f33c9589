"""Figures of the study, with 95 % intervals as bars and bands.

Intervals of accuracy and transfer exclude effects of a seed that all configurations share. All
others are Student's intervals over seeds, for curves those of the mean logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.cells import CELLS
from benchmarks.study.claims import (
    DEPTH,
    LOCAL_CROPS,
    MEASURES,
    Estimate,
    Measure,
    Results,
    Tested,
    accuracy,
    among_cells,
    by_dataset,
    estimate,
    found_effects,
    list_datasets,
)
from benchmarks.study.images import TITLES
from benchmarks.study.runs import TRAINING_TASK
from trex_models.plotting import GRAY, PALETTE, new_figure, save

COLORS = dict(zip(("softmax", "cosine", "ocm", "look"), PALETTE, strict=False))
VERDICTS = {
    "holds": "#009E73",
    "weakly holds": "#8CCFBC",
    "within noise": GRAY,
    "weakly fails": "#EDB489",
    "fails": "#D55E00",
}
_POINTS = 40  # points per curve
_LEAST = 1e-12  # lower bound for logarithms


def _style(name: str) -> dict[str, Any]:
    """Return a marker style: color by objective, hollow without local crops, shape by depth."""
    cell = CELLS[name]
    color = COLORS[cell.objective]
    marks = {None: "o", 0: "v", 1: "s", 2: "D", 3: "^"}
    return {
        "color": color,
        "marker": marks[cell.layers],
        "mfc": color if cell.local else "white",
        "mec": color,
    }


def _line(name: str) -> dict[str, Any]:
    """Return a line style: color by objective, dotted if deep, pale without local crops."""
    cell = CELLS[name]
    deep = (cell.layers or 0) > 1
    return {
        "color": COLORS[cell.objective],
        "ls": (0, (1, 1)) if deep else "-",
        "lw": 2.2 if deep else 1.6,
        "alpha": 1.0 if cell.local else 0.5,
    }


def _scaled(measure: Measure, found: Estimate) -> Estimate:
    """Convert an estimate to the unit of display."""
    return Estimate(*(measure.scale * value for value in found))


def _interval(
    axis: Any,
    found: Estimate,
    row: float,
    name: str,
    alpha: float = 1.0,
    label: str | None = None,
) -> None:
    """Draw an estimate in a row, in the style of a configuration."""
    style = _style(name)
    _bar(axis, found, row, color=style["color"], lw=1.6, alpha=alpha)
    axis.plot(found.mean, row, ls="", ms=7, alpha=alpha, label=label, **style)


def _rows(axis: Any, cells: Sequence[str]) -> None:
    """Label the rows with the titles of configurations, from top to bottom."""
    axis.set_yticks(range(len(cells)), [CELLS[cell].title for cell in cells])
    axis.set_ylim(len(cells) - 0.4, -0.6)


def _bar(axis: Any, across: Estimate, up: float, vertical: bool = False, **style: Any) -> None:
    """Draw an interval as a line."""
    ends, constant = (across.low, across.high), (up, up)
    axis.plot(*((constant, ends) if vertical else (ends, constant)), **style)


def _curve(axis: Any, places: Any, curves: np.ndarray, name: str) -> None:
    """Draw the curves of a configuration, (seeds, points), averaged on a logarithmic scale.

    The line is the geometric mean, the band is the interval of the mean logarithm.
    """
    logs = np.log10(np.maximum(curves, _LEAST))
    style = _line(name)
    axis.plot(places, 10 ** logs.mean(0), label=CELLS[name].title, **style)
    ends = [estimate(list(column)) for column in logs.T]
    _, low, high = 10 ** np.array(ends).T
    axis.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)


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
        for title, dashes in ((DEPTH, ":"), (LOCAL_CROPS, "--")):
            for after, before in found_effects(results).get(title, {}).values():
                places = [(points[n][0].mean, points[n][1].mean) for n in (before, after)]
                color = _style(after)["color"]
                axis.plot(*zip(*places, strict=True), color=color, ls=dashes, lw=1.2, alpha=0.7)
        for name, (x, y) in points.items():
            style = _style(name)
            axis.plot(x.mean, y.mean, ls="", ms=8, zorder=3, label=CELLS[name].title, **style)
            if x.has_interval:
                _bar(axis, x, y.mean, color=style["color"], lw=1.2)
                _bar(axis, y, x.mean, vertical=True, color=style["color"], lw=1.2)
        sets = len(list_datasets(results)) - 1
        axis.set_xlabel("training task: top-1 accuracy on new images, %")
        axis.set_ylabel(f"transfer: mean log-odds over {sets} datasets")
        axis.set_title(
            "Effect of projector depth, local crops and objective\n"
            "hollow: no local crops; dashed: adding local crops; dotted: from 1 to 3 hidden layers",
            fontsize=10,
        )
        figure.legend(loc="outside right upper")
    return figure


def differences(tested: Sequence[Tested]) -> Any:
    """Plot the difference and interval of each claim, in one panel per measure."""
    from matplotlib.lines import Line2D

    panels = {key: [test for test in tested if test.claim.measure == key] for key in MEASURES}
    panels = {key: rows for key, rows in panels.items() if rows}
    with new_figure(9.5, 1.6 + 0.34 * len(tested) + 0.5 * len(panels)) as figure:
        axes = figure.subplots(
            len(panels), 1, height_ratios=[len(rows) + 0.6 for rows in panels.values()]
        )
        for axis, (key, rows) in zip(np.atleast_1d(axes), panels.items(), strict=True):
            measure = MEASURES[key]
            for place, test in enumerate(rows):
                color = VERDICTS[test.verdict]
                scaled = _scaled(measure, test.difference)
                _bar(axis, scaled, place, color=color, lw=2)
                axis.plot(scaled.mean, place, "o", color=color, ms=7)
            axis.axvline(0, color="black", lw=0.9)
            axis.set_yticks(range(len(rows)), [test.claim.text for test in rows])
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.set_title(f"{measure.title} (positive: as claimed)", fontsize=9.5)
        marks = [Line2D([], [], color=color, marker="o", label=v) for v, color in VERDICTS.items()]
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
    return figure


def datasets(results: Results) -> Any:
    """Plot accuracy, in one panel per dataset and one row per configuration."""
    names = list_datasets(results)
    cells = list(results)
    columns = 4
    rows = -(-len(names) // columns)
    with new_figure(13, 0.8 + rows * (0.9 + 0.26 * len(cells))) as figure:
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axis, name in zip(axes, names, strict=False):
            for place, cell in enumerate(cells):
                found = among_cells(results, accuracy(name), cell)
                _interval(axis, _scaled(accuracy(name), found), place, cell)
            _rows(axis, cells)
            axis.set_title(TITLES[name])
            axis.set_xlabel("top-1, %")
        for axis in axes[len(names) :]:
            axis.remove()
    return figure


def effects(results: Results) -> Any:
    """Plot the effect of changes on accuracy, in one panel per change and one row per dataset."""
    names = list_datasets(results)
    panels = found_effects(results)
    with new_figure(13, 1.2 + 0.42 * len(names)) as figure:
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (title, pairs) in zip(axes, panels.items(), strict=True):
            offsets = np.linspace(-0.2, 0.2, len(pairs)) if len(pairs) > 1 else [0.0]
            for offset, (kind, pair) in zip(offsets, pairs.items(), strict=True):
                for row, (name, found) in enumerate(by_dataset(results, pair).items()):
                    scaled = _scaled(accuracy(name), found)
                    label = None if row else kind
                    _interval(axis, scaled, row + offset, pair[0], label=label)
            axis.axvline(0, color="black", lw=0.9)
            axis.set_yticks(range(len(names)), [TITLES[name] for name in names])
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_title(title)
            axis.set_xlabel("difference in top-1, points")
            axis.legend(fontsize=9, loc="center right", bbox_to_anchor=(1, 0.7))
    return figure


def geometry(results: Results) -> Any:
    """Plot coding length, effective rank and spectrum of the training images' features."""
    cells = list(results)
    found = {
        cell: [run["datasets"][TRAINING_TASK]["geometry"] for run in runs]
        for cell, runs in results.items()
    }
    with new_figure(13, 4.6) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        for axis, key, title in (
            (left, "coding_length", "coding length, nats (eps 0.5)"),
            (middle, "effective_rank", "effective rank"),
        ):
            for place, cell in enumerate(cells):
                numbers = [analysis[key] for analysis in found[cell]]
                _interval(axis, estimate(numbers), place, cell)
            _rows(axis, cells)
            axis.set_xlabel(title)
        middle.tick_params(labelleft=False)
        spectra = {
            cell: np.maximum([analysis["singular_values"] for analysis in runs], _LEAST)
            for cell, runs in found.items()
        }
        reference = np.exp(np.log(spectra[cells[0]]).mean(0))
        for cell, rows in spectra.items():
            _curve(right, np.arange(1, rows.shape[1] + 1), rows / reference, cell)
        right.set(xscale="log", yscale="log", xlabel="principal axis")
        right.set_ylabel(f"singular value / that of {CELLS[cells[0]].title}", fontsize=8)
        right.legend(fontsize=8)
        figure.suptitle("L2-normalized features of the training images", fontsize=11)
    return figure


def change(results: Results) -> Any:
    """Plot the change of prototypes per step, and the heads' accuracy on seen and new images."""
    with new_figure(13, 4.4) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        for name, runs in results.items():
            if "prototype_change" not in runs[0]["curves"]:
                continue
            curves = np.array([run["curves"]["prototype_change"] for run in runs])
            blocks = np.array_split(np.arange(curves.shape[1]), _POINTS)
            steps = [np.mean([runs[0]["curves"]["step"][i] for i in block]) for block in blocks]
            _curve(left, steps, np.stack([curves[:, b].mean(1) for b in blocks], 1), name)
        left.set(xlabel="step", ylabel="change of normalized prototypes per step", yscale="log")
        left.set_ylim(bottom=1e-5)
        left.set_title("Prototypes")
        left.legend(fontsize=8)
        cells = [name for name, runs in results.items() if runs[0]["head"]]
        for place, name in enumerate(cells):
            for key, offset, alpha in (("fit", -0.14, 0.45), ("new", 0.14, 1.0)):
                found = _scaled(MEASURES[key], among_cells(results, MEASURES[key], name))
                _interval(right, found, place + offset, name, alpha=alpha)
        _rows(right, cells)
        right.set_xlabel("top-1, % (pale: training images; solid: new images)")
        right.set_title("Training heads")
    return figure


def draw_all(results: Results, tested: Sequence[Tested], folder: Path) -> list[Path]:
    """Draw all figures into a folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: Mapping[str, Any] = {
        "tradeoff": tradeoff(results),
        "datasets": datasets(results),
        "geometry": geometry(results),
        "change": change(results),
        **({"effects": effects(results)} if found_effects(results) else {}),
        **({"claims": differences(tested)} if tested else {}),
    }
    files = []
    for name, figure in figures.items():
        files.append(folder / f"study_{name}.png")
        save(figure, files[-1])
    return files
