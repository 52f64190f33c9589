"""Plots of reports: their elements and texts, not their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trex_models import plotting
from trex_models.plotting import PALETTE
from trex_models.transfer import pictures
from trex_models.transfer.published import PUBLISHED

SETS = ("digits", "flowers", "pets")


def report(label: str, score: float = 1.0, sets: tuple[str, ...] = SETS) -> dict[str, Any]:
    """Return a report with all optional entries, of a model trained on ImageNet."""
    top1 = 1 / (1 + np.exp(-score))
    data_sets: dict[str, Any] = {}
    for index, name in enumerate((*sets, "imagenet")):
        mean = top1 - 0.01 * index
        data_sets[name] = {
            "title": name.title(),
            "top1": {"mean": mean, "test_interval": [mean - 0.02, mean + 0.01]},
            "knn": {"top1": mean - 0.1},
            "geometry": {
                "train": {
                    "coding_length": 100.0 * score + index,
                    "singular_values": [0.5, 0.25 * score, 0.0],
                    "sparsity": 0.25,
                    "within_class_distance": 0.2,
                    "between_class_distance": 0.5,
                }
            },
        }
    transfer = {"mean_log_odds": score, "interval": [score - 0.1, score + 0.2]}
    return {
        "model": {"name": label, "label": label},
        "training_task": "imagenet",
        "datasets": data_sets,
        "transfer": {**transfer, "datasets": list(sets)},
    }


def texts(figure: Any) -> list[str]:
    axis = figure.axes[0]
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [text.get_text() for text in axis.texts] + legends


def points(axis: Any, hollow: bool = False) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for line in axis.lines
        if line.get_marker() != "None" and (line.get_markerfacecolor() == "none") == hollow
        for x, y in line.get_xydata()
    ]


def notes(figure: Any) -> list[str]:
    return str(figure.axes[0].get_title(loc="left")).split("\n")


def heights(axis: Any) -> list[float]:
    return [float(bar.get_height()) for bar in axis.patches]


def marks(axis: Any) -> list[float]:
    """Return the heights of the black marks, without their white outlines."""
    return [
        float(segment[0, 1])
        for lines in axis.collections
        if (lines.get_color()[0, :3] == 0).all()
        for segment in lines.get_segments()
    ]


def test_a_model_is_a_point_with_its_name_and_two_intervals() -> None:
    one, two = report("one", 1.0), report("two $x_1$", -0.5)
    figure = pictures.scatter([one, two])
    (axis,) = figure.axes
    x = [100 * r["datasets"]["imagenet"]["top1"]["mean"] for r in (one, two)]
    np.testing.assert_allclose(points(axis), [(x[0], 1.0), (x[1], -0.5)])
    ends = [line.get_xydata() for line in axis.lines if len(line.get_xydata()) == 2]
    np.testing.assert_allclose(ends[0], [[x[0] - 2, 1.0], [x[0] + 1, 1.0]])
    np.testing.assert_allclose(ends[1], [[x[0], 0.9], [x[0], 1.2]])
    assert texts(figure) == ["one", "two $x_1$"]
    assert "lines: 95 % intervals (x: over test images, y: over seeds)" in notes(figure)
    assert axis.get_xlabel() == "training task: top-1 accuracy on Imagenet, %"
    assert axis.get_ylabel() == "transfer: mean log-odds over 3 datasets"
    one["transfer"]["interval"] = None  # as with one seed
    (axis,) = pictures.scatter([one]).axes
    assert points(axis) == [(x[0], 1)]
    ends = [line.get_xydata() for line in axis.lines if len(line.get_xydata()) == 2]
    np.testing.assert_allclose(ends, [[[x[0] - 2, 1], [x[0] + 1, 1]], [[x[0], 1]] * 2])


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_points_are_hollow_and_labeled(name: str) -> None:
    figure = pictures.scatter([report("ours")], name)
    authors = PUBLISHED[name]
    expected = [(100 * point.top1, point.mean_log_odds) for point in authors.points]
    np.testing.assert_allclose(points(figure.axes[0], hollow=True), expected)
    assert texts(figure) == ["ours", *(point.name for point in authors.points)]
    shapes = [line.get_marker() for line in figure.axes[0].lines[3:]]
    assert len(set(shapes)) == len(expected)
    reported = f"hollow markers: results of the t-ReX authors ({authors.title})"
    assert reported in notes(figure)
    assert f"{authors.num_datasets} transfer datasets" in authors.title
    note = f"means over 3 and over the authors' {authors.num_datasets} datasets are not comparable"
    assert note in notes(figure)
    lines = pictures.scatter([report("t-ReX*")], name).axes[0].lines  # measured and published
    measured, published = (line for line in lines if line.get_label() == "t-ReX*")
    assert published.get_markeredgecolor() == measured.get_color()
    figure = pictures.scatter([], name)  # without reports
    np.testing.assert_allclose(points(figure.axes[0], hollow=True), expected)
    assert notes(figure) == [reported]
    assert f"over {authors.num_datasets} datasets" in figure.axes[0].get_ylabel()


def test_authors_figures_of_different_sets_stay_apart() -> None:
    assert {len(PUBLISHED[name].points) for name in ("paper", "released")} == {7, 4}
    assert [figures.num_datasets for figures in PUBLISHED.values()] == [13, 15]
    for figures in PUBLISHED.values():
        assert all(0.7 < point.top1 < 0.81 for point in figures.points)
        assert all(0.8 < point.mean_log_odds < 1.4 for point in figures.points)
    as_many = report("ours", sets=tuple(f"set{index}" for index in range(13)))
    assert "means" not in str(notes(pictures.scatter([as_many], "paper")))


def test_names_are_in_a_free_legend_or_noted_where_a_score_is_missing() -> None:
    reports = [report(f"model number {index} {'x' * 60}", 1 + 0.01 * index) for index in range(8)]
    figure: Any = pictures.scatter(reports, "paper")
    figure.draw_without_rendering()
    (axis,), (legend,) = figure.axes, figure.legends
    frame = axis.get_window_extent()
    box = legend.get_window_extent()
    assert frame.width > figure.bbox.width / 2
    assert frame.x1 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    marks = [handle.get_color() for handle in legend.legend_handles[:8]]
    assert marks == list(PALETTE[:8])
    alone, silent = report("alone"), report("silent")
    alone["training_task"], silent["transfer"] = None, None
    noted = pictures.scatter([alone, silent, report("whole")])
    assert "not shown (missing score): alone, silent" in notes(noted)
    (point,) = [line for line in noted.axes[0].lines if line.get_marker() == "o"]
    assert point.get_color() == PALETTE[2]


def test_bars_are_accuracies_and_marks_are_k_nn() -> None:
    one, two = report("one", 1.0), report("two", 2.0)
    figure = pictures.bars([one, two])
    (axis,) = figure.axes
    expected = [100 * d["top1"]["mean"] for r in (one, two) for d in r["datasets"].values()]
    assert heights(axis) == pytest.approx(expected)
    assert marks(axis) == pytest.approx([height - 10 for height in expected])
    assert [text.get_text() for text in axis.get_xticklabels()] == [
        *("Digits", "Flowers", "Pets", "Imagenet\n(training task)")
    ]
    assert texts(figure) == [*(f"{x:.1f}" for x in expected), "one", "two", "k-NN"]
    assert len({bar.get_facecolor() for bar in axis.patches[:4]}) == 1
    assert axis.get_ylim()[0] == 0


def test_missing_datasets_leave_gaps_and_many_bars_take_several_rows() -> None:
    one, two = report("one", sets=("digits",)), report("two", sets=("pets", "digits"))
    one["datasets"]["digits"]["knn"] = None
    figure = pictures.bars([one, two])
    (axis,) = figure.axes
    titles = ["Digits", "Imagenet\n(training task)", "Pets"]
    assert [text.get_text() for text in axis.get_xticklabels()] == titles
    assert (len(axis.patches), len(marks(axis))) == (5, 4)
    centers = [round(bar.get_x() + bar.get_width() / 2) for bar in axis.patches]
    assert centers == [0, 1, 0, 1, 2]
    sets = tuple(f"set{index}" for index in range(15))
    figure = pictures.bars([report(str(index), sets=sets) for index in range(12)])
    assert [len(axis.patches) for axis in figure.axes] == [72, 60, 60]
    assert not any(axis.texts for axis in figure.axes)
    colors = {bar.get_facecolor() for bar in figure.axes[0].patches}
    assert len(colors) == 12


def test_geometry_are_a_spectrum_and_three_panels() -> None:
    figure = pictures.geometry([report("one", 1.0), report("two", 2.0)])
    spectrum, length, sparsity, distance = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        *("spectrum, Digits", "coding length, nats", "sparsity: values that are zero, %"),
        "cosine distance within classes; marks: between classes",
    ]
    assert (spectrum.get_xscale(), spectrum.get_yscale()) == ("log", "log")
    lines = [line.get_xydata().tolist() for line in spectrum.lines]
    assert lines == [[[1, 0.5], [2, 0.25]], [[1, 0.5], [2, 0.5]]]  # zeros have no logarithm
    assert heights(length) == [100, 101, 102, 103, 200, 201, 202, 203]
    assert heights(sparsity) == [25] * 8
    assert (heights(distance), marks(distance)) == ([0.2] * 8, [0.5] * 8)
    assert {text.get_text() for text in distance.texts} == {"0.20"}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_geometry_of_some_models_and_datasets() -> None:
    one, two, three = report("one"), report("two"), report("three")
    for entry in (*one["datasets"].values(), *list(two["datasets"].values())[:2]):
        del entry["geometry"]
    two["datasets"]["imagenet"]["geometry"] = {}
    three["datasets"] = {"pets": three["datasets"]["pets"]}
    figure = pictures.geometry([one, two, three])
    assert figure.axes[0].get_title(loc="left") == "spectrum, Pets"
    assert [line.get_color() for line in figure.axes[0].lines] == list(PALETTE[1:3])
    assert heights(figure.axes[1]) == [102, 102]
    chosen = pictures.geometry([report("one")], "imagenet").axes[0]
    assert chosen.get_title(loc="left") == "spectrum, Imagenet"


def test_names_may_hold_any_characters(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "picture.png"
    plotting.save(pictures.scatter([report("a name \u732b $x$")], "paper"), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_incomparable_or_empty_reports_are_rejected() -> None:
    one, other, fewer = report("one"), report("other"), report("fewer", sets=("digits", "cars"))
    other["training_task"] = "digits"
    with pytest.raises(ValueError, match="one was trained on imagenet, other on digits"):
        pictures.scatter([one, other])
    with pytest.raises(ValueError, match="one and fewer differ in cars, flowers, pets; evaluate"):
        pictures.scatter([one, fewer])
    one["training_task"] = "cars"
    with pytest.raises(ValueError, match="no report has both scores; evaluate a model on"):
        pictures.scatter([one])
    bare: dict[str, Any] = {**report("one"), "datasets": {}}
    with pytest.raises(ValueError, match="the reports contain no datasets; evaluate"):
        pictures.bars([bare])
    with pytest.raises(ValueError, match="no report contains geometry; evaluate with --geometry"):
        pictures.geometry([bare])
    with pytest.raises(ValueError, match="of 'cars'; choose from digits, flowers, pets, imagenet"):
        pictures.geometry([report("one")], "cars")
