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

from benchmarks import gpu
from trex_models.data import photometric

SLEEP = "timeit -n 1 -r 1 'import time; time.sleep(60)'"
PASS = "timeit -n 1 -r 1 'print(\"FAILED a/test_b.py::c[d e]\\n1 passed in 0.1s\")'"
KILL = SLEEP.replace("time;", "os, signal, time; os.kill(os.getppid(), signal.SIGTERM);")


class InThisProcess:
    def __init__(self, command: list[str], **_: Any) -> None:
        import_module(command[2]).main(command[3:])

    def wait(self, limit: float) -> int:
        return int(limit <= 0)


@pytest.mark.slow
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", InThisProcess)  # importing torch takes seconds
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(photometric, "_kernel", lambda function, _: function)  # it has a cache
    names = [part.name for part in gpu.PARTS if part.figures is not gpu._tests]
    assert gpu.main(["--output", str(tmp_path), "--dry-run", "--parts", *names]) == 0
    summary = (tmp_path / "summary.md").read_text()
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    for name, record in results.items():
        assert f"| {name} | ok | {record['seconds']} | " in summary
    step = results["step"]["result"]
    assert f"ours, images/s: {step['images_per_second']['ours']['median']:.4g}; " in summary
    assert f"| convolution | {step['profile_ours']['convolution']:.2%} | " in summary


@pytest.mark.parametrize("killed", [False, True])
def test_failures(killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {PASS: 1, KILL if killed else SLEEP: 0.01, "absent": 9, "no_module": 1}
    commands["timeit -n 1 pass"] = 1  # without a result
    parts = [gpu.Part(str(n), s, gpu._tests, c) for n, (c, s) in enumerate(commands.items())]
    monkeypatch.setattr(gpu, "PARTS", parts)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        assert gpu.main(["--output", str(tmp_path), "--dry-run"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    ends = ("interrupted", "skipped") if killed else ("time limit", "failed")
    summary = (tmp_path / "summary.md").read_text()
    for name, status in zip("01234", ("ok", ends[0], "skipped", *2 * ends[1:]), strict=True):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["status"] == status
        assert f"| {name} | {status} | {record['seconds']} | " in summary
    assert ("No module named no_module" in summary) != killed
    assert "| passed: 1; test_b.py::c[d e]:  |" in summary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dry-run --minutes 0", "--minutes must be at least 1, got 0.0"),
        ("--dry-run --output {used}", "{used} contains results; choose another folder"),
        ("--dry-run --output {used}/summary.md", "File exists: '{used}/summary.md'"),
        ("", "no CUDA device is available; use --dry-run"),
    ],
)
def test_invalid_options(
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "summary.md").touch()
    arguments = f"--output {tmp_path / 'new'} {options.format(used=tmp_path)}".split()
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert message.format(used=tmp_path) in capsys.readouterr().err
