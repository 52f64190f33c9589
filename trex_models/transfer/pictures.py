"""Pictures of reports: the two scores of models, their accuracies, analyses of their features.

A report is what ``python -m trex_models.transfer`` writes of a model, as a dictionary. Its
accuracies are shares, drawn in percent; its intervals are of 95 %. Models keep their order, and so
their colours, in all pictures of the same reports.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trex_models.atomic import replacing
from trex_models.transfer.canvas import (
    GREY,
    Label,
    bare,
    colors_of,
    drawing,
    grouped_bars,
    legend,
    place_labels,
    shortened,
    width_of,
)
from trex_models.transfer.published import PUBLISHED, Figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]

FORMATS = ("png", "svg", "pdf")
BARS_A_ROW = 64


class Scores(NamedTuple):
    """A model's place in the scatter plot: percent, and log-odds."""

    x: float
    y: float
    across: tuple[float, float]
    """Interval of x; x twice where there is none."""
    up: tuple[float, float]


def scatter(reports: Sequence[Report], published: str | None = None) -> Figure:
    """Draw the paper's picture: accuracy on the training task against mean transfer score.

    Models that have not both scores are named below the picture.

    Args:
        reports: One a model.
        published: Whose points are drawn too, a name in ``PUBLISHED``; None for no others.

    Raises:
        ValueError: No report has both scores, reports differ in their training task or in the
            data sets of their transfer scores, ``published`` is unknown or of another training
            task, or matplotlib is missing.
    """
    if published is not None and published not in PUBLISHED:
        raise ValueError(f"published must be one of {', '.join(PUBLISHED)}, got {published!r}")
    authors = None if published is None else PUBLISHED[published]
    scores = [_scores(report) for report in reports]
    whole = [report for report, found in zip(reports, scores, strict=True) if found]
    task, data_sets = _common(whole)
    if authors is not None and whole[0]["training_task"] != "imagenet":
        raise ValueError(
            f"the authors' models were trained on ImageNet-1K, {_label(whole[0])} on {task}: their "
            "accuracies do not compare; draw the picture without the published points"
        )
    colors = colors_of(len(reports))
    with drawing(8.5, 6.5) as figure:
        axis = figure.add_subplot()
        bare(axis)
        axis.margins(0.14)
        axis.set_xlabel(f"training task: top-1 accuracy on {task}, %", parse_math=False)
        count = f"{len(data_sets)} data set{'s' * (len(data_sets) > 1)}"
        axis.set_ylabel(f"transfer: mean log-odds over {count}")
        labels: list[Label] = []
        lines: list[tuple[Sequence[float], Sequence[float]]] = []
        for report, found, color in zip(reports, scores, colors, strict=True):
            if found:
                x, y, across, up = found
                lines += [(across, (y, y)), ((x, x), up)]
                for line in lines[-2:]:
                    axis.plot(*line, color=color, lw=1.3)
                axis.plot(x, y, "o", color=color, ms=7, mec="white", mew=0.8, zorder=3)
                labels.append(Label(x, y, shortened(_label(report), 36), color))
        if authors is not None:
            theirs = [Label(100 * x, y, name, GREY) for name, x, y in authors.points]
            places = [point.x for point in theirs], [point.y for point in theirs]
            name = f"authors' figures ({authors.title})"
            axis.plot(*places, "o", mfc="none", mec=GREY, ms=7, label=name)
            labels += theirs
        if any(found and found.across[0] < found.across[1] for found in scores):
            axis.plot([], [], "_", color="black", ms=12, label="95 % interval, test images")
        if any(found and found.up[0] < found.up[1] for found in scores):
            axis.plot([], [], "|", color="black", ms=12, label="95 % interval, seeds")
        notes = _notes(reports, scores, len(data_sets), authors)
        if notes:
            figure.suptitle("\n".join(notes), fontsize=9, color="#444444", parse_math=False)
        if axis.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        place_labels(axis, labels, lines)
    return figure


def _scores(report: Report) -> Scores | None:
    task = report["datasets"].get(report["training_task"])
    transfer = report["transfer"]
    if not task or not transfer:
        return None
    top1, score = 100 * task["top1"]["mean"], transfer["mean_log_odds"]
    left, right = task["top1"].get("test_interval") or (task["top1"]["mean"],) * 2
    low, high = transfer.get("interval") or (score, score)
    return Scores(top1, score, (100 * left, 100 * right), (low, high))


def _common(reports: Sequence[Report]) -> tuple[str, list[str]]:
    """Return the title of the training task, and the data sets of the transfer score."""
    if not reports:
        raise ValueError(
            "no report has both scores, on the training task and of transfer: evaluate a model on "
            "the data set that it was trained on too, and say which one that is"
        )
    first = reports[0]
    for other in reports[1:]:
        if other["training_task"] != first["training_task"]:
            raise ValueError(
                f"{_label(first)} was trained on {first['training_task']}, {_label(other)} on "
                f"{other['training_task']}: draw models of one training task"
            )
        mine, theirs = (set(report["transfer"]["datasets"]) for report in (first, other))
        if mine != theirs:
            raise ValueError(
                f"mean scores over other data sets do not compare, but {_label(first)} and "
                f"{_label(other)} differ in {', '.join(sorted(mine ^ theirs))}: evaluate all "
                "models on the same ones"
            )
    task = first["datasets"][first["training_task"]]
    return task["title"], first["transfer"]["datasets"]


def _notes(
    reports: Sequence[Report],
    scores: Sequence[Scores | None],
    data_sets: int,
    authors: Figures | None,
) -> list[str]:
    absent = [_label(r) for r, found in zip(reports, scores, strict=True) if not found]
    notes = []
    if absent:
        notes.append(shortened(f"Without one of the scores: {', '.join(absent)}", 110))
    if authors is not None and authors.num_datasets != data_sets:
        notes.append(
            f"Means over {data_sets} and over the authors' {authors.num_datasets} data sets do "
            "not compare."
        )
    return notes


def bars(reports: Sequence[Report]) -> Figure:
    """Draw top-1 accuracies on all data sets, with the k-NN classifier's as a mark on each bar.

    Data sets come in the order in which the reports name them; a model that was not evaluated on
    one leaves a gap.

    Raises:
        ValueError: There is nothing to draw, or matplotlib is missing.
    """
    tasks = {report["training_task"] for report in reports}
    titles = {
        name: found["title"] + "\n(training task)" * (name in tasks)
        for report in reports
        for name, found in report["datasets"].items()
    }
    names = list(titles)
    if not names:
        raise ValueError("no report has a data set to draw")
    rows = -(-len(names) * len(reports) // BARS_A_ROW)
    parts = [list(part) for part in np.array_split(np.array(names, object), min(rows, len(names)))]
    width = width_of(len(parts[0]), len(reports))
    with drawing(width, 3.6 * len(parts) + 0.8) as figure:
        marked = False
        for row, part in enumerate(parts):
            axis = figure.add_subplot(len(parts), 1, row + 1)
            found = [[report["datasets"].get(name, {}) for name in part] for report in reports]
            accuracy = _table([[x.get("top1") for x in row] for row in found], "mean")
            knn = _table([[x.get("knn") for x in row] for row in found], "top1")
            marked |= bool(np.isfinite(knn).any())
            grouped_bars(axis, [titles[name] for name in part], 100 * accuracy, 100 * knn, "{:.1f}")
            axis.set_ylim(0, 108)
            axis.set_yticks(range(0, 101, 20))
            axis.set_ylabel("top-1 accuracy, %")
        legend(figure, [_label(report) for report in reports], ["k-NN"] if marked else [])
    return figure


def analyses(reports: Sequence[Report], data_set: str | None = None) -> Figure:
    """Draw the spectra of a data set's training features, and other analyses of all data sets.

    Args:
        reports: One a model; one without analyses leaves a gap.
        data_set: Of the spectra; the first one by default.

    Raises:
        ValueError: No report has analyses, or none has them of ``data_set``, or matplotlib is
            missing.
    """
    titles = {n: d["title"] for report in reports for n, d in report["datasets"].items()}
    names = [name for name in titles if any(_found(report, name) for report in reports)]
    if not names:
        raise ValueError("no report has analyses to draw; make them with --analyses")
    data_set = data_set or names[0]
    if data_set not in names:
        raise ValueError(f"no report has analyses of {data_set!r}; they are of {', '.join(names)}")
    found = [[_found(report, name) for name in names] for report in reports]
    labels = [titles[name] for name in names]
    many = len(names) * len(reports) > BARS_A_ROW // 2
    shape, width = ((4, 1), width_of(len(names), len(reports))) if many else ((2, 2), 13.0)
    with drawing(width, 3.6 * shape[0] + 0.8) as figure:
        axis = figure.add_subplot(*shape, 1)
        _spectra(axis, [row[names.index(data_set)] for row in found])
        axis.set_title(f"spectrum, {titles[data_set]}", parse_math=False)
        panels = (
            ("coding length, nats", "coding_length", None, 1, "{:.0f}"),
            ("values that are zero, % (sparsity)", "sparsity", None, 100, "{:.1f}"),
            (
                "cosine distance within classes; marks: between classes",
                *("within_class_distance", "between_class_distance", 1, "{:.2f}"),
            ),
        )
        for place, (title, key, mark, scale, form) in enumerate(panels, 2):
            axis = figure.add_subplot(*shape, place)
            heights = scale * _table(found, key)
            marks = _table(found, mark) if mark else np.full_like(heights, np.nan)
            grouped_bars(axis, labels, heights, marks, form)
            axis.set_title(title)
        legend(figure, [_label(report) for report in reports])
    return figure


def _found(report: Report, name: str) -> dict[str, Any] | None:
    """Return the analysis of a data set's training features, if there is one."""
    return ((report["datasets"].get(name) or {}).get("geometry") or {}).get("train")


def _spectra(axis: Any, found: Sequence[dict[str, Any] | None]) -> None:
    for analysis, color in zip(found, colors_of(len(found)), strict=True):
        if analysis:
            values = np.array(analysis["singular_values"])
            values = values[values > 0]
            few = len(values) == 1
            axis.loglog(np.arange(1, len(values) + 1), values, "o" if few else "-", color=color)
    bare(axis)
    axis.set_xlabel("principal axis of the unit-length features")
    axis.set_ylabel("singular value / sqrt(images)")


def _label(report: Report) -> str:
    return report["model"]["label"]


def _table(cells: Sequence[Sequence[dict[str, Any] | None]], key: str) -> np.ndarray:
    """Return a number of each cell, (models, data sets); NaN where there is none."""
    return np.array([[(cell or {}).get(key, np.nan) for cell in row] for row in cells], float)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; the file is whole or absent.

    Args:
        figure: What to write.
        path: Its suffix chooses png, svg or pdf.

    Raises:
        ValueError: The suffix is another one, or the folder is none.
        OSError: The file cannot be written.
    """
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"{path} must end in .{', .'.join(FORMATS)} to be drawn")
    if not path.parent.is_dir():
        raise ValueError(
            f"{path.parent} is not a folder; make it, or choose another for {path.name}"
        )
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        figure.savefig(file, format=suffix)
