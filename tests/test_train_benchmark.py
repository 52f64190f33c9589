"""Measurements, advice and side effects of --benchmark. No test depends on timings."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.images import save_classes
from tests.processes import Forked, captured, environments
from tests.runs import TINY, run
from trex_models.train import benchmark as module
from trex_models.train.__main__ import main, parse
from trex_models.train.config import Config
from trex_models.train.step import training_step


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_classes(tmp_path / "images", 8)


def measure(*overrides: str) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr."""
    return captured(main, "smoke", *TINY, "--benchmark", *overrides)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_table_bottleneck_and_duration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = measure("--system.workers", str(workers))
    assert (status, err) == (0, "")
    assert re.match(r".+, \d+ cores; torch 2\.", out)
    figure = r"[\d.,]+"
    for row in ("loader only", "step only", "both"):
        assert re.search(rf"^{row} +{figure} +{figure}  .+$", out, re.M), row
    assert re.search(r"augmentation takes \d+% of the step", out)
    assert re.search(r"waiting for data \d+% of the time", out)
    assert re.search(rf"^loader / step = {figure}\. (The|Loading|Combined),? ", out, re.M)
    assert re.search(
        r"^The complete run takes [\d.e-]+ hours \(0:\d\d\): 2 epochs, 64 images at ", out, re.M
    )
    assert ("in the training process itself" in out) == (workers == 0)
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_more_steps_than_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has 8 steps; no weight changes."""
    weights = []

    def counting(model: Any, method: Any, *rest: Any) -> Any:
        weights.append(next(method.encoder.parameters()).detach().clone())
        return training_step(model, method, *rest)

    monkeypatch.setattr(module, "training_step", counting)
    monkeypatch.setattr(module, "_MIN_REPEATS", 12)
    assert measure()[0] == 0
    assert len(weights) >= 2 + 12 + 2 + 12
    assert torch.equal(weights[0], weights[-1])


def test_class_folder(images: Path, tmp_path: Path) -> None:
    source = ["--data.source", "folder", "--data.path", str(images), "--objective.bank-size", "16"]
    source += ["--output", str(tmp_path / "run"), "--data.unreadable", "skip"]
    for _ in range(2):
        before = contents(tmp_path)
        assert "16 images of 2 classes" in measure(*source)[1]
        assert contents(tmp_path) == before
        (images / "a" / "3.jpg").write_bytes(b"torn")  # skipped, and not listed


def test_runs_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    assert run(tmp_path / "finished") == 0
    shutil.copytree(tmp_path / "finished", tmp_path / "unfinished")
    (tmp_path / "unfinished/checkpoints/step_8.pt").unlink()
    shutil.rmtree(tmp_path / "unfinished/export")
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in before}
    for name in ("finished", "unfinished"):
        assert measure("--output", str(tmp_path / name), "--seed", "3")[0] == 0
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in before} == times


def test_an_image_that_cannot_be_read_is_an_error_of_one_line(images: Path) -> None:
    (images / "a" / "3.jpg").write_bytes(b"torn")
    source = ["--data.source", "folder", "--data.path", str(images), "--objective.bank-size", "16"]
    status, _, err = measure(*source)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "3.jpg cannot be read as an image" in err


def test_the_benchmark_flag_may_be_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(module, "benchmark", asked.append)
    output = ["--output", str(tmp_path)]
    assert main(["smoke", *TINY, "--benchmark", *output]) == 0
    assert main(["smoke", *TINY, *output, "--benchmark"]) == 0
    assert asked == [parse("smoke", [*TINY, *output])] * 2
    assert measure()[0] == 0
    assert asked[2] == replace(asked[0], output="")
    with pytest.raises(SystemExit):  # only recipes have it
        main(["export", str(tmp_path), *output, "--benchmark"])
    with pytest.raises(SystemExit):  # otherwise --output is required
        main(["smoke", *TINY])
    assert len(asked) == 3


def test_interrupted_it_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_run", Mock(side_effect=KeyboardInterrupt))
    assert measure() == (130, "", "interrupted; run the same command again to continue\n")


def test_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["smoke", "--help"])
    assert "\nAdd --benchmark to measure" in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.parametrize("workers", ["0", "2"])
def test_on_cuda(tmp_path: Path, workers: str) -> None:
    output = ["--output", str(tmp_path / "run")]
    status, out, _ = measure("--system.device", "cuda:0", "--system.workers", workers, *output)
    assert status == 0
    assert re.search(r"^Device memory: [\d.]+ of \d+ GB$", out, re.M)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes() -> None:
    code = (
        "import sys; from trex_models.train import benchmark; benchmark.SECONDS = 0.1; "
        "from trex_models.train.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["-c", code, "smoke", *TINY, "--benchmark", "--system.workers", "1"]
    processes = [
        Forked(*command, environment=os.environ | variables) for variables in environments(2)
    ]
    assert [process.end() for process in processes] == [0, 0]
    assert "1 worker for each of 2 processes" in processes[0].out
    assert "".join(process.out for process in processes).count("The complete run takes") == 1


@pytest.mark.parametrize(
    ("rates", "workers", "cuda", "expected"),
    [
        ((400, 1000, 390), 4, True, "The loader is the bottleneck: the step waits for it 60%"),
        ((400, 1000, 390), 4, True, "Try --system.workers 8: there are 8 cores"),
        ((900, 1000, 890), 4, True, "Try --system.workers 5: there are 8 cores"),
        ((400, 1000, 390), 8, True, "all 8 cores; 22 cores would keep the step busy"),
        ((1500, 1000, 990), 4, True, "The step is the bottleneck. Try --precision bf16"),
        ((1500, 1000, 990), 4, False, "The step is the bottleneck. Try a CUDA device"),
        ((2000, 1000, 600), 4, False, "they share cores. Try --system.workers 3"),
        ((2000, 1000, 600), 1, False, "60% of the step's rate"),
        ((2000, 1000, 600), 1, False, "More cores would help, or training on a CUDA device"),
        ((2000, 1000, 660), 0, False, "alternate in one process. Try --system.workers 1"),
    ],
)
def test_advice(rates: tuple[float, float, float], workers: int, cuda: bool, expected: str) -> None:
    line = module.describe_throughput(*rates, workers=workers, cores=8, cuda=cuda)
    assert expected in line
    assert line.startswith(f"loader / step = {rates[0] / rates[1]:.3g}. ")
