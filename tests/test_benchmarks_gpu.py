"""The GPU run: the dry run of its benchmarks; parts that fail, take too long or are interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, gpu
from tests.test_benchmarks_step import CONFIG
from trex_models.train.build import crop_specs

SLEEP = "timeit -n 1 -r 1 'import time; time.sleep(60)'"
KILL = SLEEP.replace("time;", "os, signal, time; os.kill(os.getppid(), signal.SIGTERM);")


class InThisProcess:
    def __init__(self, command: list[str], **_: Any) -> None:
        import_module(command[2]).main(command[3:])

    def wait(self, limit: float) -> int:
        return int(limit <= 0)


@pytest.mark.slow
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", InThisProcess)  # importing torch takes seconds
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    monkeypatch.setattr(end_to_end, "SPECS", crop_specs(CONFIG.crops))
    names = [part.name for part in gpu.PARTS if part.figures is not gpu._tests]
    assert gpu.main(["--output", str(tmp_path), "--dry-run", "--parts", *names]) == 0
    summary = (tmp_path / "summary.md").read_text()
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    for name, record in results.items():
        assert f"| {name} | ok | {record['seconds']} | " in summary
    step = results["step"]["result"]
    assert f"ours, images/s: {step['images_per_second']['ours']['median']:.4g}; " in summary
    assert f"| convolution | {step['profile_ours']['convolution']:.2%} | " in summary


@pytest.mark.parametrize(
    ("command", "statuses"),
    [(SLEEP, "ok, time limit, skipped, failed"), (KILL, "ok, interrupted, skipped, skipped")],
)
def test_failures(
    command: str, statuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("a", 1, "pytest --version"), ("b", 0.01, command), ("c", 9, SLEEP), ("d", 1, "absent")
    table = [gpu.Part(name, share, gpu._tests, module) for name, share, module in parts]
    monkeypatch.setattr(gpu, "PARTS", table)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    signal.signal(signal.SIGTERM, before)
    found = [json.loads((tmp_path / f"{part.name}.json").read_text()) for part in table]
    assert ", ".join(record["status"] for record in found) == statuses
    summary = (tmp_path / "summary.md").read_text()
    assert ("No module named absent" in summary) != (command == KILL)
