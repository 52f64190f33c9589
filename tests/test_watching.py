"""Reports of a run: lines, TensorBoard files and the summary."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import Clock
from tests.runs import logged, refused, run
from trex_models.data.multicrop import EpochSampler
from trex_models.distributed import Process
from trex_models.train import reporting
from trex_models.train.reporting import Reporter, summarize

METRICS = ["--validation.images-per-class", "4", "--validation.neighbors", "3"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reporting, "time", clock)
    return clock


def reporter(folder: Path, start_step: int = 0, tensorboard: Path | None = None) -> Reporter:
    sampler = EpochSampler(64, 16, epochs=2, start_step=start_step)
    alone = Process(0, 1, torch.device("cpu"))
    return Reporter(folder / "metrics.jsonl", sampler, 16, alone, tensorboard)


def slow(clock: Clock, seconds: float) -> Iterator[int]:
    for number in itertools.count():
        clock.now += seconds
        yield number


def test_rate_waiting_and_time_left(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporter(tmp_path) as report:
        batches = report.timed(slow(clock, 1.0))
        for _ in range(2):
            next(batches)
            clock.now += 3.0  # the step
        with report.untimed():
            clock.now += 12.0  # a validation
        report.report(2, {"loss": 2.5, "accuracy": 0.25, "learning_rate": 0.1})
        next(batches)
        report.report(3, {"loss": 2.0})
    first, second = (json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {
        "step": 2,
        "epoch": 0.5,
        "loss": 2.5,
        "accuracy": 0.25,
        "learning_rate": 0.1,
        "images_per_second": 4.0,
        "waiting_for_data": 0.25,
    }
    assert (second["images_per_second"], second["waiting_for_data"]) == (16.0, 1.0)
    shown = capsys.readouterr().out.splitlines()[0]
    assert shown == (
        "step 2/8 epoch 0.50 loss 2.5 accuracy 0.25 4 images/s, 25% waiting for data, 1:00 left"
    )


def test_on_a_terminal_it_is_a_bar(
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with reporter(tmp_path) as report:
        batches = report.timed(slow(clock, 1.0))
        next(batches)
        clock.now += 1.0
        report.advance()
        report.log("a message")
        list(report.with_progress(iter(range(3)), 3, "validation"))
        report.report(1, {"loss": 2.5, "bank_age": 3.0})
        report.report(2, {"loss": 2.5, "val_top1": 0.5, "val_knn": 0.25})
    captured = capsys.readouterr()
    # With a bar, only validations print lines.
    assert captured.out == "a message\nepoch 0.5: val_top1 0.5 val_knn 0.25\n"
    assert "validation" in captured.err
    bar = next(x for x in captured.err.split("\r") if "waiting" in x)
    assert "step 1/8" in bar
    assert "8 images/s, 50% waiting for data, loss 2.5" in bar
    assert "bank_age" not in bar  # only the most important metrics


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    assert run(folder, *METRICS, "--system.tensorboard") == 0
    return folder


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_metrics(watched: Path) -> None:
    shown = scalars(watched)
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    for name in {name for line in lines for name in line} - {"step"}:
        expected = {
            line["step"]: pytest.approx(line[name], rel=1e-6) for line in lines if name in line
        }
        assert shown[name] == expected, name


def test_tensorboard_hides_repeated_steps(tmp_path: Path) -> None:
    for start, value in ((0, 1.0), (2, 2.0)):
        with reporter(tmp_path, start_step=start, tensorboard=tmp_path / "tensorboard") as report:
            for done in range(start + 1, 5):
                report.report(done, {"loss": value})
    assert scalars(tmp_path)["loss"] == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}


def test_every_line_contains_the_heads_health(watched: Path) -> None:
    last = logged(watched)[-1]
    expected: dict[str, float] = {"bank_classes": 1, "bank_initial": 0, "empty_prototypes": 0}
    expected |= {"bank_age": 1.5, "bank_oldest": 3}  # 32 entries of batches of 8
    assert last.items() >= expected.items()
    assert 0 < last["prototype_change"] < 2
    assert {"val_top1", "val_top5", "val_knn"} <= last.keys()
    start, *lines = logged(watched)
    assert start["step"] == 0
    assert start.keys() == {"step", "epoch", "val_top1", "val_top5", "val_knn", "val_rank"}
    assert [line["bank_initial"] for line in lines] == [0.5, 0, 0, 0]


def test_summary(watched: Path) -> None:
    folders = [watched / "export/backbone", watched / "export/cls"]
    first, *rest = summarize(watched, 8, folders, 40)
    assert re.match(
        r"finished: 8 steps, 2 epochs, 64 images in 0:\d\d \(\d+ images/s, \d+% wai", first
    )
    last = logged(watched)[-1]
    best = max(line["val_top1"] for line in logged(watched)[1:] if "val_top1" in line)
    for expected in (
        f"training: loss {last['loss']:.4g}, accuracy {last['accuracy']:.1%}",
        f"top-1 {last['val_top1']:.1%} (best {best:.1%}",
        f"k-NN {last['val_knn']:.1%}",
        f"of the starting weights; effective rank {last['val_rank']:.4g}, ",
        f"python -m trex_models.plot {watched}",
        f'timm.create_model("local-dir:{folders[0]}", pretrained=True)',
        f"python -m hub build {folders[0]} --output",
    ):
        assert expected in "\n".join(rest)


@pytest.mark.parametrize(
    ("after", "images", "verdict"),
    [(0.6, 500, "is better"), (0.4, 500, "is worse"), (0.6, 50, "does not differ sig")],
)
def test_summary_compares_with_the_starting_weights(
    tmp_path: Path, after: float, images: int, verdict: str
) -> None:
    accuracies = {"val_top1": 0.1, "val_top5": 0.2}
    lines = [
        {"step": 0, "epoch": 0, "val_knn": 0.5, "val_rank": 9.0, **accuracies},
        {"step": 6, "epoch": 1, "val_knn": after, "val_rank": 21.5, **accuracies}
        | {"images_per_second": 4.0, "waiting_for_data": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sentence = summarize(tmp_path, 16, [tmp_path], images)[2]
    assert sentence.startswith(f"features: k-NN {after:.1%} {verdict}")
    assert sentence.endswith("50.0% of the starting weights; effective rank 21.5, 9 at the start")


def test_tensorboard_is_only_required_if_enabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install '.[train]' in a clone" in refused(tmp_path / "with", "--system.tensorboard")
    assert not (tmp_path / "with").exists()
    assert run(tmp_path / "without", "--optim.epochs", "1") == 0


def test_time_of_a_run_that_was_interrupted(tmp_path: Path) -> None:
    """No line contains the time between the report of step 2 and the checkpoint of step 3."""
    lines = [
        {"step": 2, "epoch": 0.5, "images_per_second": 8.0, "waiting_for_data": 0.5},
        {"step": 6, "epoch": 1.5, "images_per_second": 4.0, "waiting_for_data": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = summarize(tmp_path, 16, [tmp_path], 0)[0]
    # 32 images at 8 images/s, then 64 at 4 images/s; 2 of 20 seconds waiting
    assert first == (
        "finished: 6 steps, 1.5 epochs, 96 images in 0:20 (5 images/s, 10% waiting for data)"
    )
