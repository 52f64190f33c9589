"""Plots of reports: scatter plot of the two scores, bars, geometry, and few-shot curves.

Accuracies are fractions in reports and percentages in plots. A model has one color in all plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np

from trex_models import plotting
from trex_models.transfer.published import PUBLISHED
from trex_models.transfer.report import task_scores

Report = dict[str, Any]
BARS_PER_ROW = 64
VALUES_UP_TO = 24  # bars in a panel; with more, numbers above the bars would overlap
MARKERS = "s^dvP<>"  # one per published point
# Measures in `geometry`: title, keys of bars and marks, scale, and number format.
DISTANCES = "cosine distance within classes; marks: between classes"
MEASURES = (
    ("coding length, nats", "coding_length", "", 1, "{:.0f}"),
    ("sparsity: values that are zero, %", "sparsity", "", 100, "{:.1f}"),
    (DISTANCES, "within_class_distance", "between_class_distance", 1, "{:.2f}"),
)


def scatter(reports: Sequence[Report], published: str | None = None) -> Any:
    """Draw the scatter plot of the paper: training-task accuracy against mean transfer score.

    Models without one of the scores are listed above the plot. ``published`` is a key of
    ``PUBLISHED``, whose points are added; without reports, the plot shows only these points.
    """
    authors = PUBLISHED[published] if published else None
    missing = [_label(report) for report in reports if not _has_both_scores(report)]
    notes = []
    if authors and not reports:
        title, count = "ImageNet-1K", authors.num_datasets
    else:
        first = _first_comparable([report for report in reports if _has_both_scores(report)])
        title = first["datasets"][first["training_task"]]["title"]
        count = len(first["transfer"]["datasets"])
        notes.append("lines: 95 % intervals (x: over test images, y: over seeds)")
        if authors and first["training_task"] != "imagenet":
            raise ValueError(
                f"the authors' models were trained on ImageNet-1K, {_label(first)} on {title}; "
                "omit --published"
            )
    if missing:
        notes.append(plotting.shorten(f"not shown (missing score): {', '.join(missing)}", 110))
    if authors:
        notes.append(f"hollow markers: results of the t-ReX authors ({authors.title})")
        if authors.num_datasets != count:
            means = f"{count} and over the authors' {authors.num_datasets} datasets"
            notes.append(f"means over {means} are not comparable")
    with plotting.new_figure(10.5, 6.2) as figure:
        axis = figure.add_subplot()
        axis.margins(0.1)
        axis.set_xlabel(f"training task: top-1 accuracy on {title}, %", parse_math=False)
        axis.set_ylabel(f"transfer: mean log-odds over {count} dataset{'s' * (count > 1)}")
        own_colors = dict(zip(map(_label, reports), plotting.colors(len(reports)), strict=False))
        for report in reports:
            if _has_both_scores(report):
                color = own_colors[_label(report)]
                top1 = report["datasets"][report["training_task"]]["top1"]
                x, y = 100 * top1["mean"], report["transfer"]["mean_log_odds"]
                ends = [100 * end for end in top1["test_interval"]]
                axis.plot(ends, (y, y), color=color, lw=1.3)
                axis.plot((x, x), report["transfer"]["interval"] or (y, y), color=color, lw=1.3)
                name = plotting.shorten(_label(report), 36)
                axis.plot(x, y, "o", color=color, ms=7, mec="white", mew=0.8, zorder=3, label=name)
        unused_colors = islice(cycle(plotting.PALETTE), len(reports), None)
        for point, marker in zip(authors.points if authors else (), MARKERS, strict=False):
            position = 100 * point.top1, point.mean_log_odds
            color = own_colors.get(point.name) or next(unused_colors)  # of the measured model
            axis.plot(*position, marker, mfc="none", mec=color, ms=8, label=point.name)
        axis.set_title("\n".join(notes), fontsize=9, color=plotting.GRAY, parse_math=False)
        for text in figure.legend(loc="outside right upper").get_texts():
            text.set_parse_math(False)
    return figure


def _has_both_scores(report: Report) -> bool:
    return bool(report["datasets"].get(report["training_task"]) and report["transfer"])


def _first_comparable(reports: Sequence[Report]) -> Report:
    """Return the first of reports with both scores; all must have the same datasets."""
    if not reports:
        raise ValueError(
            "no report has both scores; evaluate a model on its --training-task and other datasets"
        )
    first = reports[0]
    for other in reports[1:]:
        if other["training_task"] != first["training_task"]:
            raise ValueError(
                f"{_label(first)} was trained on {first['training_task']}, {_label(other)} on "
                f"{other['training_task']}; plot only models with the same training task"
            )
        mine, theirs = (set(report["transfer"]["datasets"]) for report in (first, other))
        if mine != theirs:
            differing = ", ".join(sorted(mine ^ theirs))
            raise ValueError(
                f"the datasets of {_label(first)} and {_label(other)} differ in {differing}; "
                "evaluate all models on the same datasets"
            )
    return first


def bars(reports: Sequence[Report]) -> Any:
    """Draw top-1 accuracies on all datasets as bars, and k-NN accuracies as marks on the bars."""
    rows = _rows(reports)
    if not rows:
        raise ValueError("the reports contain no datasets; evaluate a model first")
    with plotting.new_figure(_width(len(rows[0]), len(reports)), 3.6 * len(rows) + 0.8) as figure:
        draw_bars(figure, reports)
    return figure


def draw_bars(figure: Any, reports: Sequence[Report]) -> None:
    """Draw `bars` into a figure or a subfigure."""
    tasks = {report["training_task"] for report in reports}
    titles = _titles(reports)
    marked = False
    rows = _rows(reports)
    for axis, names in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        entries = [[report["datasets"].get(name, {}) for name in names] for report in reports]
        accuracy = _table([[entry.get("top1") for entry in row] for row in entries], "mean")
        knn = _table([[entry.get("knn") for entry in row] for row in entries], "top1")
        marked |= bool(np.isfinite(knn).any())
        labels = [titles[name] + "\n(training task)" * (name in tasks) for name in names]
        _grouped_bars(axis, labels, 100 * accuracy, 100 * knn, "{:.1f}")
        axis.set(ylim=(0, 108), yticks=range(0, 101, 20), ylabel="top-1 accuracy, %")
    plotting.legend(figure, [_label(report) for report in reports], ["k-NN"] if marked else [])


def _rows(reports: Sequence[Report]) -> list[list[str]]:
    names = list(_titles(reports))
    rows = min(-(-len(names) * len(reports) // BARS_PER_ROW), len(names))
    return [list(part) for part in np.array_split(np.array(names, object), rows)] if rows else []


def tasks(reports: Sequence[Report]) -> Any:
    """Draw the first score of all tasks but classification as bars."""
    found = [task_scores(report) for report in reports]
    keys = list(dict.fromkeys(key for part in found for key in part))
    if not keys:
        raise ValueError("no report contains other tasks than classification; use --kind bars")
    titles, values = [], np.full((len(reports), len(keys)), np.nan)
    for column, key in enumerate(keys):
        for row, part in enumerate(found):
            if key in part:
                title, (name, first) = part[key]["title"], next(iter(part[key]["scores"].items()))
                values[row, column] = 100 * first["value"]
        titles.append(f"{title}\n{key[0]}\n{name}")
    with plotting.new_figure(_width(len(keys), len(reports)), 4.8) as figure:
        axis = figure.add_subplot()
        _grouped_bars(axis, titles, values, np.full_like(values, np.nan), "{:.1f}")
        axis.set(ylim=(0, 108), yticks=range(0, 101, 20), ylabel="score, %")
        plotting.legend(figure, [_label(report) for report in reports])
    return figure


def shots(reports: Sequence[Report]) -> Any:
    """Draw few-shot accuracies over the number of shots, a panel per dataset."""
    found = [report["tasks"].get("few-shot", {}) for report in reports]
    names = {name: entry["title"] for part in found for name, entry in part.items()}
    if not names:
        raise ValueError("no report contains the task few-shot; evaluate with --shots 1,2,5,10")
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    with plotting.new_figure(4.4 * columns + 0.6, 3.6 * rows + 0.8) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axis, name in zip(panels, names, strict=False):
            for part, color in zip(found, plotting.colors(len(reports)), strict=True):
                if name in part:
                    _draw_shots(axis, part[name], color)
            axis.set_title(names[name], parse_math=False)
            axis.set(xscale="log", xlabel="training images per class", ylabel="accuracy, %")
            ticks = sorted({k for part in found if name in part for k in part[name]["shots"]})
            axis.set_xticks(ticks, map(str, ticks))
            axis.set_xticks([], minor=True)
        for axis in panels[len(names) :]:
            axis.remove()
        plotting.legend(figure, [_label(report) for report in reports])
        title = "solid: logistic regression; dashed: nearest class mean; bands: 95 % over episodes"
        figure.suptitle(title, fontsize=9, color=plotting.GRAY)
    return figure


def _draw_shots(axis: Any, entry: Mapping[str, Any], color: Any) -> None:
    for classifier, style in zip(entry["classifiers"], ("-", "--"), strict=True):
        scores = [entry["scores"][f"{classifier}, {k}-shot"] for k in entry["shots"]]
        values = [100 * score["value"] for score in scores]
        axis.plot(entry["shots"], values, style, marker="o", ms=4, color=color)
        ends = np.array([score["interval"] or [score["value"]] * 2 for score in scores])
        axis.fill_between(entry["shots"], *(100 * ends.T), color=color, alpha=0.15, lw=0)


def geometry(reports: Sequence[Report], dataset: str | None = None) -> Any:
    """Draw the spectra of the training features of one dataset, and other measures of all."""
    titles = _titles(reports)
    names = [name for name in titles if any(_measures(report, name) for report in reports)]
    if not names:
        raise ValueError("no report contains geometry; evaluate with --geometry")
    dataset = dataset or names[0]
    if dataset not in names:
        raise ValueError(f"no report has geometry of {dataset!r}; choose from {', '.join(names)}")
    rows = [[_measures(report, name) for name in names] for report in reports]
    labels = [titles[name] for name in names]
    many = len(names) * len(reports) > BARS_PER_ROW // 2
    shape, width = ((4, 1), _width(len(names), len(reports))) if many else ((2, 2), 13.0)
    with plotting.new_figure(width, 3.6 * shape[0] + 0.8) as figure:
        spectra, *panels = figure.subplots(*shape).flat
        _draw_spectra(spectra, [row[names.index(dataset)] for row in rows])
        spectra.set_title(f"spectrum, {titles[dataset]}", parse_math=False)
        for axis, (title, key, mark, scale, form) in zip(panels, MEASURES, strict=True):
            _grouped_bars(axis, labels, scale * _table(rows, key), _table(rows, mark), form)
            axis.set_title(title)
        plotting.legend(figure, [_label(report) for report in reports])
    return figure


def _measures(report: Report, name: str) -> dict[str, Any] | None:
    return ((report["datasets"].get(name) or {}).get("geometry") or {}).get("train")


def _draw_spectra(axis: Any, measures: Sequence[dict[str, Any] | None]) -> None:
    for entry, color in zip(measures, plotting.colors(len(measures)), strict=True):
        if entry:
            values = np.array(entry["singular_values"])
            values = values[values > 0]  # zeros have no logarithm
            style = "o" if len(values) == 1 else "-"
            axis.loglog(np.arange(1, len(values) + 1), values, style, color=color)
    axis.set_xlabel("principal axis of the unit-length features")
    axis.set_ylabel("singular value / sqrt(images)")


def _grouped_bars(
    axis: Any, titles: Sequence[str], heights: np.ndarray, marks: np.ndarray, form: str
) -> None:
    """Draw bars with numbers in format ``form``, and marks; (models, groups), NaN for none."""
    models = len(heights)
    near = 0.1 * np.nanmax(heights)  # a mark this close above a bar would overlap its number
    for index, color in enumerate(plotting.colors(models)):
        offset, half = (index - (models - 1) / 2) * 0.84 / models, 0.39 / models
        for x, height, mark in zip(
            np.arange(len(titles)) + offset, heights[index], marks[index], strict=True
        ):
            if np.isfinite(height):
                axis.bar(x, height, 2 * half, color=color)
            if np.isfinite(mark):
                axis.hlines(mark, x - half, x + half, color="white", lw=3.6)
                axis.hlines(mark, x - half, x + half, color="black", lw=1.6)
            if np.isfinite(height) and heights.size <= VALUES_UP_TO:
                top = mark if height < mark < height + near else height
                above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
                axis.annotate(form.format(height), (x, top), **above)
    axis.grid(visible=False, axis="x")
    axis.set_xlim(-0.6, len(titles) - 0.4)
    axis.margins(y=0.1)
    longest = max(len(line) for title in titles for line in title.split("\n"))
    columns = axis.get_subplotspec().get_gridspec().ncols
    inches = axis.figure.bbox.width / axis.figure.dpi / columns
    rotated = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
    crowded = len(titles) * (longest + 2) > 11 * inches  # 11 characters per inch
    axis.set_xticks(range(len(titles)), titles, parse_math=False, **(rotated if crowded else {}))


def _width(groups: int, models: int) -> float:
    return float(np.clip(2 + groups * (0.5 + 0.28 * models), 8, 14))


def _label(report: Report) -> str:
    return report["model"]["label"]


def _titles(reports: Sequence[Report]) -> dict[str, str]:
    return {n: entry["title"] for report in reports for n, entry in report["datasets"].items()}


def _table(cells: Sequence[Sequence[dict[str, Any] | None]], key: str) -> np.ndarray:
    return np.array([[(cell or {}).get(key, np.nan) for cell in row] for row in cells], float)
