"""Draw the curves of training runs into one picture.

    python -m trex_models.plot RUN... [--output FILE] [--x epoch|step|hours]

A RUN is the folder that a training wrote (metrics.jsonl and config.json); it may still be
running. Writes RUN/curves.png for one run, ./curves.png for several, and prints a table. The
suffix of FILE chooses png, svg or pdf. The hours are those of training: the pauses of a run that
was interrupted do not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trex_models import cli
from trex_models.atomic import replacing
from trex_models.train.config import flatten

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's, which colour-blind people tell apart, without the yellow.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
SMOOTH_FROM = 100  # points; a longer noisy curve is drawn pale, with its running mean over it
DRAWN_POINTS = 1500  # of a curve, about one a pixel
PER_ROW = 4  # small panels
CROWD = 3  # runs from which on the accuracies take two panels
# Fields that say where and how a run was carried out, not what was learned.
UNTOLD = ("output", "license", "system.", "validation.")
ESSENTIALS = {
    "data.path": "{}",
    "model.backbone": "{}",
    "objective.name": "{}",
    "model.hidden_layers": "hidden layers {}",
    "optim.epochs": "epochs {}",
    "optim.batch_size": "batch {}",
    "seed": "seed {}",
}


@dataclass(frozen=True)
class Curve:
    """How a number of the metrics is drawn."""

    key: str
    name: str = ""
    style: str = "-"
    marker: str = ""
    width: float = 1.6


@dataclass(frozen=True)
class Panel:
    """Curves that share axes; ``scale`` multiplies their numbers."""

    title: str
    curves: tuple[Curve, ...]
    scale: float = 1.0
    noisy: bool = True
    from_zero: bool = True
    orders: bool = False
    """Whether to use a logarithmic axis where the numbers span orders of magnitude."""


LOSS = Panel("training loss", (Curve("loss"),), from_zero=False)
TRAINED = (
    Curve("accuracy", "training", width=0.9),
    Curve("val_top1", "val top-1", "-", "o"),
)
OTHERS = (
    Curve("val_top5", "val top-5", "--", "^"),
    Curve("val_knn", "val k-NN", ":", "s"),
)
LARGE = (LOSS, Panel("accuracy, %", TRAINED + OTHERS, scale=100))
LARGE_OF_MANY = (
    LOSS,
    Panel("accuracy, %", TRAINED, scale=100),
    Panel("further accuracies, %", OTHERS, scale=100),
)
SMALL = (
    Panel("learning rate", (Curve("learning_rate"),), noisy=False),
    Panel("change of class vectors per step", (Curve("prototype_change"),), orders=True),
    Panel("images per second", (Curve("images_per_second"),)),
    Panel("waiting for data, % of the time", (Curve("waiting_for_data"),), scale=100),
    Panel(
        "memory bank, %",
        (
            Curve("bank_classes", "classes with an entry"),
            Curve("bank_initial", "entries still initial", "--"),
        ),
        scale=100,
        noisy=False,
    ),
    Panel("classes without a prototype", (Curve("empty_prototypes"),), noisy=False),
    Panel("mean age of the bank's entries, steps", (Curve("bank_age"),), noisy=False),
)


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Args:
        folder: Where.
        columns: The numbers of metrics.jsonl by key, NaN where a line has none; steps ascend.
        config: Of config.json, as dotted names; empty where there is none.
    """

    folder: Path
    columns: dict[str, np.ndarray]
    config: dict[str, Any]

    def values(self, key: str) -> np.ndarray:
        """Return the finite numbers of a key, of which there may be none."""
        column = self.columns.get(key, np.empty(0))
        return column[np.isfinite(column)]

    def x(self, unit: str) -> np.ndarray:
        """Return each line's place on the x axis.

        Args:
            unit: epoch, step or hours.

        Raises:
            ValueError: The hours cannot be told.
        """
        if unit != "hours":
            return self.columns[unit]
        batch_size = self.config.get("optim.batch_size")
        steps, rates = self.columns["step"], self.values("images_per_second")
        if not batch_size or len(rates) < len(steps) or not (rates > 0).all():
            raise ValueError(
                f"{self.folder} does not tell its hours (optim.batch_size in config.json, and "
                "images_per_second in each line of metrics.jsonl); use --x step"
            )
        return np.cumsum(np.diff(steps, prepend=0) * batch_size / rates) / 3600


def read_run(folder: Path) -> Run:
    """Read a run's files.

    Raises:
        ValueError: The folder is not a run's, or nothing has been reported yet.
        OSError: A file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that a training wrote")
    metrics, config = folder / "metrics.jsonl", folder / "config.json"
    if not metrics.is_file():
        raise ValueError(f"{folder} has no metrics.jsonl; is it a run's folder?")
    lines = _read_lines(metrics)
    if not lines:
        raise ValueError(
            f"{metrics} has no line: nothing to draw yet; "
            "wait for the first report (system.log_every)"
        )
    try:
        saved = json.loads(config.read_text()) if config.exists() else {}
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{config} is not a run's configuration; restore it, or move it away")
    keys = dict.fromkeys(key for line in lines for key in line)
    columns = {key: np.array([line.get(key, np.nan) for line in lines], float) for key in keys}
    return Run(folder, columns, flatten(saved))


def _read_lines(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file; what a resumed run did anew replaces the old."""
    *whole, rest = path.read_text(errors="replace").split("\n")
    lines: list[dict[str, float]] = []
    for number, text in enumerate([*whole, rest], start=1):
        if number > len(whole) and (not text or (text[0] == "{" and text[-1] != "}")):
            continue  # the end, or a line that is being written
        line = _numbers(text)
        if line is None:
            raise ValueError(
                f"{path}, line {number} is not one of a run's metrics ({_shortened(text, 40)!r}); "
                "delete the line, or give another folder"
            )
        while lines and lines[-1]["step"] > line["step"]:
            lines.pop()
        if lines and lines[-1]["step"] == line["step"]:
            line = lines.pop() | line
        lines.append(line)
    return lines


def _numbers(text: str) -> dict[str, float] | None:
    """Return the numbers of a line, None if it has no step and epoch."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict):
        return None
    numbers = {key: value for key, value in line.items() if type(value) in (int, float)}
    return numbers if {"step", "epoch"} <= numbers.keys() else None


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many parents as make them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    names = [path[-1:] for path in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        counts = Counter(names)
        names = [p[-depth:] if counts[n] > 1 else n for p, n in zip(parts, names, strict=True)]
    return ["/".join(name) for name in names]


def headline(runs: Sequence[Run]) -> str:
    """Say what the one run is, or in what the configurations of several differ."""
    if len(runs) == 1:
        return ", ".join(_essentials(runs[0]))
    keys = dict.fromkeys([*ESSENTIALS, *(key for run in runs for key in run.config)])
    values = {
        key: [_value(run.config.get(key)) for run in runs]
        for key in keys
        if not key.startswith(UNTOLD)
    }
    differing = [
        f"{key}: {_listed(list(dict.fromkeys(texts)), 6, ' | ')}"
        for key, texts in values.items()
        if len(set(texts)) > 1
    ]
    return _listed(differing, 3, "      ") or "equal configurations"


def _essentials(run: Run) -> list[str]:
    config = run.config
    told = [form.format(_value(config[key])) for key, form in ESSENTIALS.items() if config.get(key)]
    if config.get("data.source") == "fractals":
        told.insert(0, "fractals")
    step, epoch = (run.columns[key][-1] for key in ("step", "epoch"))
    return [*told, f"at step {step:,.0f} (epoch {epoch:.4g})"]


def _value(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return _shortened(text, 32) or "none"


def _listed(items: Sequence[str], most: int, separator: str) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def _shortened(text: str, length: int) -> str:
    """Return a text whose middle is left out where it is longer."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred running mean over a window that is cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(len(values))
    low, high = np.maximum(ends - window // 2, 0), np.minimum(ends + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw(runs: Sequence[Run], unit: str = "epoch") -> Any:
    """Return a matplotlib figure, 14 inches wide, with a panel for what any run has.

    Args:
        runs: One or several.
        unit: Of the x axis: epoch, step or hours.

    Raises:
        ValueError: matplotlib is missing, the hours cannot be told, or there is nothing to draw.
    """
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install trex-models[train]") from None

    colors: Sequence[Any] = PALETTE
    if len(runs) > len(PALETTE):
        colors = list(colormaps["viridis"](np.linspace(0, 0.9, len(runs))))
    places = [run.x(unit) for run in runs]
    large = _present(LARGE if len(runs) < CROWD else LARGE_OF_MANY, runs)
    rows = [*([large] if large else []), *_even_rows(_present(SMALL, runs))]
    if not rows:
        raise ValueError(f"{runs[0].folder} has no figure to draw in its metrics.jsonl")
    with rc_context({"axes.titlesize": 11, "font.size": 9.5, "axes.titlelocation": "left"}):
        heights = [4.0 if row is large else 2.4 for row in rows]
        figure: Any = Figure((14, sum(heights) + 1.0), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
        grid = figure.add_gridspec(len(rows), 1, height_ratios=heights)
        for row, panels in enumerate(rows):
            cells = grid[row].subgridspec(1, len(panels))
            for column, panel in enumerate(panels):
                axis = figure.add_subplot(cells[column])
                for index, (run, x) in enumerate(zip(runs, places, strict=True)):
                    for curve in panel.curves:
                        _draw_curve(axis, panel, curve, run, x, colors[index], index / len(runs))
                _finish(axis, panel, runs, unit, last=row == len(rows) - 1)

        names = [_shortened(name, 70) for name in labels([run.folder for run in runs])]
        title = headline(runs)
        if len(runs) == 1:
            title = f"{names[0]}\n{title}"
        else:
            handles = [Line2D([], [], color=c, lw=3) for c, _ in zip(colors, runs, strict=False)]
            columns = max(1, min(len(runs), 160 // (max(map(len, names)) + 7)))
            legend = figure.legend(
                handles, names, loc="outside lower center", ncols=columns, frameon=False
            )
            for text in legend.get_texts():
                text.set(fontsize=10.5, parse_math=False)
        figure.suptitle(title, fontsize=12, linespacing=1.5, parse_math=False)
    return figure


def _present(panels: Iterable[Panel], runs: Iterable[Run]) -> list[Panel]:
    """Return the panels for which any run has a number."""
    keys = {key for run in runs for key in run.columns if len(run.values(key))}
    return [panel for panel in panels if any(curve.key in keys for curve in panel.curves)]


def _even_rows(panels: Sequence[Panel]) -> list[Sequence[Panel]]:
    rows = -(-len(panels) // PER_ROW)
    ends = [len(panels) - len(panels) * row // rows for row in range(rows, -1, -1)] if rows else []
    return [panels[start:end] for start, end in pairwise(ends)]


def _draw_curve(
    axis: Any, panel: Panel, curve: Curve, run: Run, x: np.ndarray, color: Any, shift: float
) -> None:
    """Draw a curve; ``shift``, from 0 to 1, keeps the runs' markers off each other."""
    values = run.values(curve.key)
    if not len(values):
        return
    x, values = x[np.isfinite(run.columns[curve.key])], panel.scale * values
    few = np.unique(np.linspace(0, len(values) - 1, DRAWN_POINTS).round().astype(int))
    if panel.noisy and not curve.marker and len(values) > SMOOTH_FROM:
        axis.plot(x[few], values[few], color=color, linewidth=0.5, alpha=0.25, zorder=1)
        values = smoothed(values, max(8, len(values) // 50))
    every = max(1, len(few) // 12)
    axis.plot(
        x[few],
        values[few],
        color=color,
        linestyle=curve.style,
        linewidth=curve.width,
        marker=curve.marker or ("." if len(values) < 10 else ""),
        markersize=4.5,
        markevery=(int(shift * every), every),
    )


def _finish(axis: Any, panel: Panel, runs: Sequence[Run], unit: str, last: bool) -> None:
    """Label a panel and choose its scales."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    axis.set_title(panel.title)
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)
    axis.set_xlim(left=0)
    if last:
        axis.set_xlabel(unit)
    if unit == "step":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))

    drawn = [c for c in panel.curves if any(len(run.values(c.key)) for run in runs)]
    values = panel.scale * np.concatenate([run.values(c.key) for run in runs for c in drawn])
    low, high = values.min(), values.max()
    if panel.orders and low > 0 and high > 30 * low:
        axis.set_yscale("log")
    elif panel.from_zero and low >= 0:
        top = high or 1.0
        axis.set_ylim(-0.03 * top, 1.05 * top)
    if drawn[0].name:
        keys = [
            Line2D([], [], color="#555555", ls=c.style, lw=c.width, marker=c.marker, ms=4.5)
            for c in drawn
        ]
        # Many would cover the curves: they go beside the title.
        place: dict[str, Any] = {"loc": "best", "framealpha": 0.85}
        if len(drawn) > 2:
            place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(drawn)}
            place |= {"frameon": False, "borderaxespad": 0.2, "columnspacing": 1.2}
        axis.legend(keys, [c.name for c in drawn], fontsize=9, **place)


def table(runs: Sequence[Run]) -> str:
    """Render the runs' last, best and typical numbers as text; shares in percent."""
    header = ["", "step", "epoch", "loss", "accuracy", "val top-1", "(best)", "val k-NN"]
    header += ["images/s", "waiting"]
    rows = [header]
    for run, name in zip(runs, labels([run.folder for run in runs]), strict=True):
        top1 = run.values("val_top1")
        rows.append(
            [
                name,
                f"{run.columns['step'][-1]:,.0f}",
                f"{run.columns['epoch'][-1]:.2f}",
                _cell(run.values("loss")[-1:], "{:.4g}"),
                _percent(run.values("accuracy")[-1:]),
                _percent(top1[-1:]),
                _percent(np.sort(top1)[-1:]),
                _percent(run.values("val_knn")[-1:]),
                _cell(run.values("images_per_second"), "{:,.0f}"),
                _percent(run.values("waiting_for_data")),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def _cell(values: np.ndarray, form: str) -> str:
    """Render the median of some numbers, a dash if there are none."""
    return form.format(np.median(values)) if len(values) else "-"


def _percent(values: np.ndarray) -> str:
    return _cell(100 * values, "{:.1f}%")


def plot(folders: Sequence[Path], output: Path | None = None, unit: str = "epoch") -> str:
    """Draw runs into a file; the file is whole or absent.

    Args:
        folders: Of the runs; one that is given twice counts once.
        output: Where to write; by default curves.png, in the folder of a single run.
        unit: Of the x axis: epoch, step or hours.

    Returns:
        The table, and a line that names the file.

    Raises:
        ValueError: A folder is not a run's, the suffix is unknown, or matplotlib is missing.
        OSError: A file cannot be read or written.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    output = output or (folders[0] if len(folders) == 1 else Path()) / "curves.png"
    suffix = output.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"{output} must end in .{', .'.join(FORMATS)} to be drawn")
    runs = [read_run(folder) for folder in folders]
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent} is not a folder; make it, or choose another --output")
    figure = draw(runs, unit)
    with replacing(output) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        figure.savefig(file, format=suffix)
    return f"{table(runs)}\nwrote {output}"


def main(arguments: Sequence[str]) -> int:
    """Draw from the command line; return 0, or 2 with a short message on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m trex_models.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .png, .svg or .pdf file")
    parser.add_argument("--x", choices=("epoch", "step", "hours"), default="epoch")

    def work(arguments: Sequence[str]) -> None:
        options = parser.parse_args(arguments)
        print(plot(options.runs, options.output, options.x))

    return cli.run(work, arguments, "train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
