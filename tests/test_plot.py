"""Curves of runs: what is read, what is drawn, what is said."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from tests.processes import captured
from trex_models import plot, plotting
from trex_models.train.config import Config, ObjectiveConfig, to_json
from trex_models.train.recipes import demo, trex

Line = dict[str, float]
Make = Callable[..., Path]


def lines(count: int, every: int = 20) -> list[Line]:
    """What a run with everything on reports."""
    constant = {"learning_rate": 0.1, "seconds": 2.0, "images_per_second": 1000.0}
    constant |= {"waiting_for_data": 0.02, "bank_classes": 0.9, "bank_age": 16.0}
    constant |= {"empty_prototypes": 3, "unreadable": 0, "cosine": 0.5}
    validated = {"val_top1": 0.5, "val_top5": 0.75, "val_knn": 0.25, "val_rank": 9.5}
    return [
        constant
        | {"step": index * every, "epoch": index / 10, "loss": 7 / index + 0.1 * (index % 2)}
        | {"accuracy": 1 - 1 / index, "bank_initial": 1 / index, "prototype_change": 0.5**index}
        | (validated if index % 10 == 0 else {})
        for index in range(1, count + 1)
    ]


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    def make(name: str, metrics: Iterable[Line], config: Config | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in metrics)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "config.json").write_text(to_json(config or trex(str(folder))))
        return folder

    return make


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_one_run_is_drawn_into_its_folder(make_run: Make) -> None:
    folder = make_run("first", lines(40))
    status, out, _ = captured(plot.main, folder, f"{folder}{os.sep}")  # twice the same
    assert status == 0
    with Image.open(folder / "curves.png") as picture:
        assert picture.width >= 1400
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    header, row, last = out.splitlines()
    assert header.split()[:4] == ["step", "epoch", "loss", "accuracy"]
    loss = f"{lines(40)[-1]['loss']:.4g}"
    assert row.split() == [
        *("first", "800", "4.00", loss, "97.5%", "50.0%", "50.0%", "25.0%", "9.5", "1,000", "2.0%")
    ]
    assert last == f"wrote {folder / 'curves.png'}"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "curves.png", "metrics.jsonl")
    ]


def test_panels_and_their_curves(make_run: Make) -> None:
    full = plot.read_run(make_run("full", lines(40)))
    bare = [{"step": 1, "epoch": 0.1, "loss": 2.0}, {"step": 2, "epoch": 0.2, "loss": 1.0}]
    small = plot.read_run(make_run("small", bare))
    expected = [panel.title for panel in plot.LARGE + plot.RATES + plot.HEAD]
    assert titles(plot.draw_curves([full])) == expected
    assert titles(plot.draw_curves([small, full])) == expected
    assert titles(plot.draw_curves([small])) == ["training loss"]
    figure = plot.draw_curves([full])
    for axis, panel in zip(figure.axes, plot.LARGE + plot.RATES + plot.HEAD, strict=True):
        styles = [line.get_linestyle() for line in axis.lines]
        assert styles == ["-", "--"][: len(panel.keys)]
        assert ("dashed" in panel.title) == (len(panel.keys) == 2)
    validation = figure.axes[1].lines[1]
    assert validation.get_xydata().tolist() == [[1, 50], [2, 50], [3, 50], [4, 50]]
    assert validation.get_marker() == "o"


def test_several_runs_have_one_color_each_and_a_legend(
    make_run: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("a/_run", "b/_run", "$x$")
    folders = [make_run(name, lines(20)) for name in names]
    figure = plot.draw_curves([plot.read_run(folder) for folder in folders])
    for axis in figure.axes:
        assert {line.get_color() for line in axis.lines} == set(plotting.PALETTE[:3])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(names)
    monkeypatch.chdir(tmp_path)
    assert plot.main([str(folder) for folder in folders]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("suffix", "head"), [(".svg", b"<?xml"), (".PDF", b"%PDF"), (".png", b"\x89PNG")]
)
def test_the_suffix_chooses_the_format(
    make_run: Make, tmp_path: Path, suffix: str, head: bytes
) -> None:
    metrics = [{"step": 1, "epoch": 0.1, "loss": 2.0}]
    output = tmp_path / f"picture{suffix}"
    assert plot.main([str(make_run("run", metrics)), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(head)


def test_a_picture_that_fails_leaves_the_old_one(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("run", lines(3))
    (folder / "curves.png").write_text("old")
    error = OSError(28, "No space left on device")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", Mock(side_effect=error))
    assert "No space left" in captured(plot.main, folder)[2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = captured(plot.main, folder)
    assert status == 2
    assert "pip install '.[train]' in a clone" in err
    assert (folder / "curves.png").read_text() == "old"
    assert len(list(folder.iterdir())) == 3


def test_long_runs_are_thinned_and_smoothed(make_run: Make) -> None:
    rng = np.random.default_rng(0)
    run = plot.read_run(make_run("run", [{"step": 1, "epoch": 1, "loss": 1.0}]))
    steps = np.arange(1.0, 50_001)
    columns = {"step": steps, "epoch": steps / 500, "loss": 3 + rng.normal(size=len(steps))}
    (axis,) = plot.draw_curves([replace(run, columns=columns)]).axes
    raw, smooth = axis.lines
    for line in (raw, smooth):
        assert 1000 < len(line.get_xdata()) <= plot.DRAWN_POINTS
        assert line.get_xdata()[[0, -1]].tolist() == [1 / 500, 100]
    assert np.std(raw.get_ydata()) > 0.9
    assert np.std(smooth.get_ydata()) < 0.1
    assert np.mean(smooth.get_ydata()) == pytest.approx(3, abs=0.02)
    values = np.array([1.0, 2.0, 6.0, 3.0, 8.0])
    np.testing.assert_allclose(plot.smoothed(values, 3), [1.5, 3, 11 / 3, 17 / 3, 5.5])
    np.testing.assert_allclose(plot.smoothed(values, 100), [4] * 5)


def test_unfinished_resumed_and_torn(make_run: Make) -> None:
    """A line being written is left out; steps taken again replace what was there."""
    losses = ((10, 5.0), (20, 4.0), (30, 3.0), (20, 4.5), (30, math.nan))
    metrics = [{"step": step, "epoch": step / 100, "loss": loss} for step, loss in losses]
    metrics.insert(4, {"step": 25, "epoch": 0.25, "val_top1": 0.5})
    folder = make_run("run", metrics)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "epo')
    run = plot.read_run(folder)
    assert run.columns["step"].tolist() == [10, 20, 25, 30]
    assert run.values("loss").tolist() == [5.0, 4.5]
    assert run.values("val_top1").tolist() == [0.5]
    assert run.values("accuracy").tolist() == []
    assert "50.0%" in plot.format_summary([run])
    plot.draw_curves([run])


def test_axis_is_in_the_unit_asked_for(make_run: Make) -> None:
    run = plot.read_run(make_run("run", lines(3)))
    for unit in get_args(plot.Unit):
        axis = plot.draw_curves([run], unit).axes[0]
        assert axis.get_xlabel() == unit
        assert axis.lines[0].get_xdata().tolist() == run.columns[unit].tolist()


def test_labels_are_distinct(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x/run", "b/x/run", "b/y/run", "c")]
    assert plot.labels(folders) == ["a/x/run", "b/x/run", "b/y/run", "c"]
    assert plot.labels([Path()]) == [Path.cwd().name]


def test_headline_shows_the_differences(make_run: Make) -> None:
    one = trex("x")
    two = replace(one, output="y", objective=ObjectiveConfig(name="cosine"))
    first, second = (
        plot.read_run(make_run(name, lines(2), config)) for name, config in (("1", one), ("2", two))
    )
    assert plot.headline([first, second]) == "objective.name: ocm | cosine"
    assert plot.headline([first, first]) == "identical configurations"
    assert plot.headline([second]) == (
        "source folder, backbone resnet50, objective cosine, hidden layers 3, epochs 100, "
        "batch size 256, at step 40 (epoch 0.2)"
    )
    other = plot.read_run(make_run("3", lines(2), demo("z")))
    text = plot.headline([first, other, second])
    assert text.startswith("data.source: folder | fractals      model.backbone: resnet50 | resnet")
    assert text.endswith(" more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], r"missing is not a folder; specify the folder of a training run"),
        (["empty"], r"empty has no metrics.jsonl; specify the folder of a training run"),
        (["new"], r"has no complete line yet; wait for one \(system.log_every\)"),
        (["torn"], "has no complete line yet"),
        (["csv"], r"metrics.jsonl, line 1 does not contain a run's metrics \('step,loss'\)"),
        (["other"], "line 2 does not contain a run's metrics"),
        (["list"], r"line 1 does not contain a run's metrics \('\[1, 2\]'\); delete the line or"),
        (["config"], "config.json is not the config of a run; restore"),
        (["missing", "--output", "a.jpg"], r"must be a .png or .svg or .pdf file, got a.jpg"),
        (["good", "--output", "a"], r"--output must be a .png .* file, got a"),
        (["good", "--output", "file/a.png"], r"file/a.png cannot be written \(Not a directory\)"),
    ],
)
def test_errors_are_one_line_that_helps(
    make_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    good = '{"step": 1, "epoch": 1, "loss": 1}\n'
    files = {"new": "", "torn": '{"step": 1', "csv": "step,loss\n1,2\n", "good": good}
    files |= {"list": "[1, 2]\n", "config": good}
    files |= {"other": good + '{"step": 2, "loss": 1}\n'}
    for name, text in files.items():
        folder = make_run(name, [])
        (folder / "metrics.jsonl").write_text(text)
    (tmp_path / "config" / "config.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, _, err = captured(plot.main, *arguments)
    assert status == 2
    assert re.fullmatch(f"error: .*{message}.*\n", err)
    assert sorted(tmp_path.rglob("*")) == before
