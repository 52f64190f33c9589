"""What --benchmark measures, advises, and leaves alone. No test looks at a time."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.images import save_classes
from tests.processes import Forked, environments
from tests.runs import TINY, run
from trex_models.data.multicrop import CropSpec
from trex_models.data.photometric import GLOBAL_LAW, LOCAL_LAW
from trex_models.train import benchmark as module
from trex_models.train.__main__ import main, parse
from trex_models.train.advice import Rates, Setting, advice
from trex_models.train.config import Config
from trex_models.train.step import training_step

SETTING = Setting(
    workers=4,
    cores=8,
    queued=0.0,
    blocked=0.0,
    files=True,
    simplejpeg=True,
    side=375,
    needed_side=448,
    cuda=True,
    bf16=False,
    channels_last=True,
    compiled=True,
    recomputes=False,
    idle_devices=0,
    memory=0.9,
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_classes(tmp_path / "images", 8)


def measure(*overrides: str) -> int:
    return main(["smoke", *TINY, "--benchmark", *overrides])


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_table_bottleneck_and_duration(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert measure("--system.workers", str(workers)) == 0
    out, err = capsys.readouterr()
    assert not err
    assert re.match(r".+, \d+ cores; python 3\.\d+\.\d+; torch 2\.", out)
    figure = r"[\d.,]+"
    for row in ("loader alone", "step alone", "both"):
        assert re.search(rf"^{row} +{figure} +{figure}  .+$", out, re.M), row
    assert re.search(r"augmentation is \d+% of it", out)
    assert re.search(r"\d+% of the time waiting for data", out)
    assert re.search(rf"^loader / step = {figure}\. (The|Loading) ", out, re.M)
    assert re.search(
        r"^The whole run takes [\d.e-]+ hours \(0:\d\d\): 2 epochs, 64 images at ", out, re.M
    )
    assert ("A worker loads" in out) == (workers > 0)
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_more_steps_than_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is of 8 steps; no weight moves."""
    taken, weights = 0, []

    def counting(model: Any, method: Any, *rest: Any) -> Any:
        nonlocal taken
        taken += 1
        weights.append(next(method.encoder.parameters()).detach().clone())
        return training_step(model, method, *rest)

    monkeypatch.setattr(module, "training_step", counting)
    monkeypatch.setattr(module, "_LEAST", 12)
    assert measure() == 0
    assert taken >= 2 + 12 + 2 + 12
    assert torch.equal(weights[0], weights[-1])


def test_class_folder(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--data.source", "folder", "--data.path", str(images), "--objective.bank-size", "16"]
    before = contents(images)
    assert measure(*source) == 0
    assert "16 images of 2 classes" in capsys.readouterr().out
    assert contents(images) == before


def test_runs_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    assert run(tmp_path / "finished") == 0
    shutil.copytree(tmp_path / "finished", tmp_path / "unfinished")
    (tmp_path / "unfinished/checkpoints/step_8.pt").unlink()
    shutil.rmtree(tmp_path / "unfinished/export")
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in before}
    for name in ("finished", "unfinished"):
        assert measure("--output", str(tmp_path / name), "--seed", "3") == 0
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in before} == times


def test_output_is_not_written_with_images_that_are_skipped(images: Path, tmp_path: Path) -> None:
    (images / "a" / "3.jpg").write_bytes(b"torn")
    source = ["--data.source", "folder", "--data.path", str(images), "--objective.bank-size", "16"]
    assert measure("--output", str(tmp_path / "run"), *source, "--data.unreadable", "skip") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.source", "folder"], "data.path is not set"),
        (["--data.source", "folder", "--data.path", "/absent"], "/absent cannot be listed"),
        (["--optim.batch-size", "33"], "exceeds the data set's 32 images"),
        (["--model.backbone", "resnet51"], "timm has no model 'resnet51'"),
        (["--precision", "fp16"], "precision fp16 needs CUDA"),
        (["--objective.bank-size", "64"], "bank_size 64 exceeds the data set's 32 images"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert measure(*overrides) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_unreadable_image_is_one_line(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "a" / "3.jpg").write_bytes(b"torn")
    assert measure("--data.source", "folder", "--data.path", str(images)) == 2
    err = capsys.readouterr().err
    assert "3.jpg cannot be read as an image" in err


def test_unknown_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        measure("--optim.lr", "3")
    assert exit_.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err


def test_ctrl_c_promises_no_continuation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "training_step", interrupted)
    assert measure() == 130
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted"


def test_flag_is_of_the_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(module, "benchmark", asked.append)
    output = ["--output", str(tmp_path)]
    assert main(["smoke", *TINY, "--benchmark", *output]) == 0
    assert main(["smoke", *TINY, *output, "--benchmark"]) == 0
    assert asked == [parse("smoke", [*TINY, *output])] * 2
    assert measure() == 0
    assert asked[2] == replace(asked[0], output="")
    with pytest.raises(SystemExit):  # it is of recipes alone
        main(["export", str(tmp_path), *output, "--benchmark"])
    with pytest.raises(SystemExit):  # without it, the output is required
        main(["smoke", *TINY])
    assert len(asked) == 3


def test_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "--benchmark" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["smoke", "--help"])
    assert "--benchmark" in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_on_cuda(capsys: pytest.CaptureFixture[str], workers: str) -> None:
    assert measure("--system.device", "cuda", "--system.workers", workers) == 0
    assert re.search(
        r"^Memory, at most: cuda:0 [\d.]+ GB of \d+ GB, ", capsys.readouterr().out, re.M
    )


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
    assert "".join(process.out for process in processes).count("The whole run takes") == 1


def advised(rates: Rates, **changes: Any) -> tuple[str, list[str]]:
    told, *helps = advice(rates, replace(SETTING, **changes))
    assert all(line.startswith("- ") for line in helps)
    return told, [line.removeprefix("- ") for line in helps]


SLOW_LOADER = Rates(loader=400, step=1000, both=390)
SLOW_STEP = Rates(loader=1500, step=1000, both=990)


def test_slow_loader_wants_workers() -> None:
    told, helps = advised(SLOW_LOADER)
    assert told == (
        "loader / step = 0.4. The loader is the bottleneck: the step waits for it 60% of the time."
    )
    assert helps == ["--system.workers 8: there are 8 cores (the step could use 11 workers)"]
    assert advised(SLOW_LOADER, cores=32)[1] == ["--system.workers 11: there are 32 cores"]
    assert advised(SLOW_LOADER, cores=32, cuda=False)[1] == [
        "--system.workers 11: there are 32 cores, which the step uses, too"
    ]
    assert advised(SLOW_LOADER, cores=4)[1] == [
        "more cores: the workers use all 4 of each training process, its step could use 11 workers"
    ]


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"simplejpeg": False}, "pip install simplejpeg"),
        ({"side": 1500}, "smaller files: the images' shorter side is 1500 pixels (median), these"),
        ({"blocked": 0.6}, "faster storage, such as a local disk: the workers wait, most"),
        ({"queued": 0.5}, "cores for this alone: the workers wait for one 50% of the time"),
    ],
)
def test_slow_loader_wants_less_work(changes: dict[str, Any], start: str) -> None:
    helps = advised(SLOW_LOADER, **changes)[1]
    assert len(helps) == 2
    assert helps[1].startswith(start)
    assert not any(line.startswith(start) for line in advised(SLOW_STEP, **changes)[1])


def test_generated_images_have_no_files() -> None:
    changes = {"files": False, "simplejpeg": False, "side": 1500, "blocked": 0.6}
    assert len(advised(SLOW_LOADER, **changes)[1]) == 1


def test_more_workers_than_cores_queue_by_themselves() -> None:
    assert len(advised(SLOW_LOADER, workers=16, queued=0.5)[1]) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["more or faster GPUs"]),
        ({"bf16": True}, ["--precision bf16", "more or faster GPUs"]),
        ({"channels_last": False}, ["--system.channels-last", "more or faster GPUs"]),
        ({"compiled": False}, ["--system.compile, which takes minutes at the start",
                               "more or faster GPUs"]),
        ({"idle_devices": 3}, ["torchrun --nproc-per-node: 3 CUDA devices are idle"]),
        ({"cuda": False, "memory": 1.0}, ["training on a CUDA device"]),
        ({"cuda": False, "memory": 1.0, "bf16": True},
         ["--precision bf16", "training on a CUDA device"]),
    ],
)  # fmt: skip
def test_slow_step(changes: dict[str, Any], expected: list[str]) -> None:
    told, helps = advised(SLOW_STEP, **changes)
    assert told == "loader / step = 1.5. The step is the bottleneck."
    assert helps == expected


def test_room_in_memory() -> None:
    assert advised(SLOW_STEP, memory=0.2)[1][0].startswith("a larger --optim.batch-size: 20% of")
    helps = advised(SLOW_STEP, memory=0.2, recomputes=True)[1]
    assert helps[0].startswith("--system.no-checkpoint-activations")
    assert not any("batch-size" in line for line in helps)


def test_nearly_as_slow_a_loader() -> None:
    told, _ = advised(Rates(loader=1050, step=1000, both=990))
    assert told.endswith("The step is the bottleneck, but the loader has little to spare.")


def test_loader_and_step_on_the_same_cores() -> None:
    rates = Rates(loader=2000, step=1000, both=600)
    told, helps = advised(rates, cuda=False)
    assert "The cores are the bottleneck: both together reach 60% of the rate" in told
    assert helps == [
        "--system.workers 3 would be enough for the step",
        "more cores, or training on a CUDA device",
    ]
    assert advised(rates, workers=1)[1] == ["more cores"]
    told, helps = advised(replace(rates, loader=20_000))
    assert "The step is the bottleneck. (Training reached 60% of the step's own rate" in told


def test_no_workers() -> None:
    told, helps = advised(Rates(loader=500, step=1000, both=330), workers=0, side=1500)
    assert told.endswith("Loading and training take turns in one process.")
    assert helps[0] == "--system.workers 3: there are 8 cores"
    assert helps[1].startswith("smaller files")
    assert len(advised(Rates(loader=2000, step=1000, both=660), workers=0, side=1500)[1]) == 1
    told, helps = advised(Rates(loader=9000, step=1000, both=900), workers=0)
    assert told == "loader / step = 9. The step is the bottleneck."
    assert helps[0] == "--system.workers 1: it loads beside the step"


def test_side_that_crops_need() -> None:
    specs = [CropSpec(1, 224, (0.25, 1.0), GLOBAL_LAW), CropSpec(8, 96, (0.05, 0.25), LOCAL_LAW)]
    assert module._needed_side(specs) == 448
    assert module._needed_side([replace(specs[0], size=112), specs[1]]) == pytest.approx(
        429.3, 1e-3
    )


def test_system_that_tells_nothing_of_processes() -> None:
    assert module._scheduled([-1]) == (0, 0)
    assert module._peak_memory([-1]) == 0
    assert str(module._Worker(120.0)) == "A worker loads 120 images/s"
