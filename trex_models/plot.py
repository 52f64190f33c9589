"""Plot the metrics of training runs in one picture: ``python -m trex_models.plot RUN...``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trex_models import cli, plotting
from trex_models.train.config import flatten

Unit = Literal["epoch", "step"]
SMOOTH_FROM = 100  # points; longer noisy curves are drawn pale, with their running mean on top
DRAWN_POINTS = 1500  # maximum number of points per curve, about one per pixel
# Settings that do not influence training; differences in them are not shown.
UNCOMPARED = ("output", "license", "system.", "validation.")
ESSENTIALS = (
    *("data.source", "data.path", "model.backbone", "objective.name", "model.hidden_layers"),
    *("optim.epochs", "optim.batch_size", "seed"),
)


class Panel(NamedTuple):
    """Panel of one or two curves that share axes."""

    title: str
    keys: tuple[str, ...]
    """Keys of metrics.jsonl; the second curve is dashed."""
    scale: float = 1.0
    smooth: bool = True
    y_axis: Literal["from zero", "close", "log"] = "from zero"


LARGE = (
    Panel("training loss", ("loss",), y_axis="close"),
    Panel("accuracy, %: training; dashed: validation", ("accuracy", "val_top1"), 100),
    Panel("cosine similarity to the teacher", ("cosine",)),
    Panel("validation, %: top-5; dashed: k-NN", ("val_top5", "val_knn"), 100),
)
RATES = (
    Panel("learning rate", ("learning_rate",), smooth=False),
    Panel("effective rank of features", ("val_rank",), smooth=False),
    Panel("prototype change per step", ("prototype_change",), y_axis="log"),
    Panel("images per second", ("images_per_second",)),
    Panel("waiting for data, % of time", ("waiting_for_data",), 100),
)
BANK = "bank, %: classes with an entry; dashed: initial entries"
HEAD = (
    Panel(BANK, ("bank_classes", "bank_initial"), 100, smooth=False),
    Panel("classes without a prototype", ("empty_prototypes",), smooth=False),
    Panel("mean age of the bank's entries, steps", ("bank_age",)),
)

LAST, MEDIAN = itemgetter(-1), np.median
# Columns of the table: header, key, reduction of the run's values to a number, format.
COLUMNS: tuple[tuple[str, str, Callable[[np.ndarray], float], str], ...] = (
    ("step", "step", LAST, "{:,.0f}"),
    ("epoch", "epoch", LAST, "{:.2f}"),
    ("loss", "loss", LAST, "{:.4g}"),
    ("accuracy", "accuracy", LAST, "{:.1%}"),
    ("val top-1", "val_top1", LAST, "{:.1%}"),
    ("(best)", "val_top1", np.max, "{:.1%}"),
    ("val k-NN", "val_knn", LAST, "{:.1%}"),
    ("rank", "val_rank", LAST, "{:.4g}"),
    ("images/s", "images_per_second", MEDIAN, "{:,.0f}"),
    ("waiting", "waiting_for_data", MEDIAN, "{:.1%}"),
)


@dataclass(frozen=True)
class RunMetrics:
    """Metrics and settings of a training run."""

    folder: Path
    columns: dict[str, np.ndarray]
    """Values of metrics.jsonl by key, in order of steps; NaN where a line lacks the key."""
    config: dict[str, Any]
    """Settings of config.json by dotted name; empty if there is no such file."""

    def values(self, key: str) -> np.ndarray:
        """Return the finite values of a key; empty if there are none."""
        column = self.columns.get(key, np.empty(0))
        return column[np.isfinite(column)]


def read_run(folder: Path) -> RunMetrics:
    """Read the metrics and settings in a run folder."""
    metrics, config = folder / "metrics.jsonl", folder / "config.json"
    if not metrics.is_file():
        missing = "has no metrics.jsonl" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {missing}; specify the folder of a training run")
    lines = _read_lines(metrics)
    if not lines:
        raise ValueError(f"{metrics} has no complete line yet; wait for one (system.log_every)")
    try:
        settings = flatten(json.loads(config.read_text())) if config.exists() else {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not the config of a run; restore or remove it") from error
    keys = {key for line in lines for key in line}
    columns = {key: np.array([line.get(key, np.nan) for line in lines], float) for key in keys}
    return RunMetrics(folder, columns, settings)


def _read_lines(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file; steps repeated after a resume replace older ones."""
    *texts, rest = path.read_text(errors="replace").split("\n")
    if rest and (rest[0] != "{" or rest[-1] == "}"):  # otherwise it is still being written
        texts.append(rest)
    lines: dict[float, dict[str, float]] = {}
    for number, text in enumerate(texts, start=1):
        try:
            line = {k: v for k, v in json.loads(text).items() if type(v) in (int, float)}
            step, _ = line["step"], line["epoch"]
        except (ValueError, AttributeError, KeyError):
            raise ValueError(
                f"{path}, line {number} does not contain a run's metrics "
                f"({plotting.shorten(text, 40)!r}); delete the line or specify another folder"
            ) from None
        while lines and next(reversed(lines)) > step:
            lines.popitem()
        lines[step] = lines.get(step, {}) | line
    return list(lines.values())


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' paths without their common parent."""
    paths = [folder.resolve() for folder in folders]
    parent = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(parent)) for path in paths]


def headline(runs: Sequence[RunMetrics]) -> str:
    """Describe a single run, or the settings in which several runs differ."""
    if len(runs) == 1:
        config, columns = runs[0].config, runs[0].columns
        shown = {key.removesuffix(".name").split(".")[-1]: config.get(key) for key in ESSENTIALS}
        settings = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value]
        step = f"at step {columns['step'][-1]:,.0f} (epoch {columns['epoch'][-1]:.4g})"
        return ", ".join([*settings, step])
    differing = []
    for key in dict.fromkeys([*ESSENTIALS, *(key for run in runs for key in run.config)]):
        texts = dict.fromkeys(str(run.config.get(key)) or "none" for run in runs)
        if len(texts) > 1 and not key.startswith(UNCOMPARED):
            differing.append(plotting.shorten(f"{key}: {' | '.join(texts)}", 60))
    more = f"      and {len(differing) - 3} more" if len(differing) > 3 else ""
    return "      ".join(differing[:3]) + more or "identical configurations"


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centered running mean; the window is truncated at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw_curves(runs: Sequence[RunMetrics], unit: Unit = "epoch") -> Any:
    """Draw a panel for each metric that at least one run has logged."""
    logged = {key for run in runs for key in run.columns if len(run.values(key))}
    panels = [[p for p in row if logged & {*p.keys}] for row in (LARGE, RATES, HEAD)]
    rows = [row for row in panels if row]
    if not rows:
        raise ValueError(f"{runs[0].folder}/metrics.jsonl contains no metrics that can be plotted")
    heights = [4.0 if row[0] in LARGE else 2.4 for row in rows]
    with plotting.new_figure(14, sum(heights) + 1) as figure:
        parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            for axis, panel in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
                draw_panel(axis, panel, runs, unit)
        plotting.legend(figure, labels([run.folder for run in runs]))
        figure.suptitle(headline(runs), fontsize=12, parse_math=False)
    return figure


def draw_panel(axis: Any, panel: Panel, runs: Sequence[RunMetrics], unit: Unit = "epoch") -> None:
    """Draw a panel's curves of all runs, one color per run."""
    for run, color in zip(runs, plotting.colors(len(runs)), strict=True):
        for key in (key for key in panel.keys if len(run.values(key))):
            x, y = run.columns[unit][np.isfinite(run.columns[key])], panel.scale * run.values(key)
            subset = np.unique(np.linspace(0, len(y) - 1, DRAWN_POINTS).round().astype(int))
            if panel.smooth and len(y) > SMOOTH_FROM:
                axis.plot(x[subset], y[subset], color=color, lw=0.5, alpha=0.25, zorder=1)
                y = smoothed(y, max(8, len(y) // 50))
            style = ("o" if len(y) < 25 else "") + ("-" if key == panel.keys[0] else "--")
            axis.plot(x[subset], y[subset], style, color=color, ms=3.5)
    axis.set(title=panel.title, xlabel=unit)
    axis.margins(x=0.02)
    axis.set_xlim(left=0)
    low, high = axis.dataLim.intervaly
    if panel.y_axis == "log" and low > 0 and high > 30 * low:
        axis.set_yscale("log")
    elif panel.y_axis != "close" and low >= 0:
        axis.set_ylim(-0.03 * (high or 1), 1.05 * (high or 1))


def format_summary(runs: Sequence[RunMetrics]) -> str:
    """Format the last, best or median metrics of runs as a table."""
    rows = [["", *(header for header, *_ in COLUMNS)]]
    for run, name in zip(runs, labels([run.folder for run in runs]), strict=True):
        numbers = [
            form.format(reduce(run.values(key))) if len(run.values(key)) else "-"
            for _, key, reduce, form in COLUMNS
        ]
        rows.append([name, *numbers])
    return "\n".join(cli.align_columns(rows))


def plot(runs: list[Path], /, *, output: Path | None = None, x: Unit = "epoch") -> None:
    """Plot the metrics of training runs, finished or not, and print a table of them.

    Example: python -m trex_models.plot runs/softmax runs/ocm --output curves.png

    Args:
        runs: Folders of training runs.
        output: Picture to write, .png, .svg or .pdf; by default curves.png in the run folder, or
            in the current folder if there are several runs.
        x: Unit of the x axis.
    """
    folders = list({folder.resolve(): folder for folder in runs}.values())
    output = output or (folders[0] if len(folders) == 1 else Path()) / "curves.png"
    plotting.require_picture(output)
    contents = [read_run(folder) for folder in folders]
    plotting.save(draw_curves(contents, x), output)
    print(f"{format_summary(contents)}\nwrote {output}")


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status; see `cli.main`."""
    return cli.main(plot, arguments, prog="python -m trex_models.plot", extra="train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
