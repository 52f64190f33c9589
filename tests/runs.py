"""Training runs that take seconds, and their files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

import trex_models  # noqa: F401  # registers the models
from trex_models.train import checkpointing
from trex_models.train.__main__ import main
from trex_models.train.reporting import TIMINGS

# Options of a run of two epochs with four steps, which takes seconds.
TINY = """--data.num-classes 4 --data.images-per-class 8 --data.image-size 32
    --optim.epochs 2 --optim.batch-size 8 --objective.bank-size 32 --system.workers 0
    --crops.local-crops 2 --model.hidden-dim 16 --model.embedding-dim 8
    --model.backbone-args channels=(8,8,16,16) --validation.images-per-class 1
    --system.log-every 2 --system.save-steps 4""".split()


def run(output: Path, *overrides: str, recipe: str = "smoke") -> int:
    return main([recipe, "--output", str(output), *TINY, *overrides])


def output_of(output: Path, *overrides: str) -> str:
    """Train to the end; return the output."""
    with redirect_stdout(io.StringIO()) as out:
        assert run(output, *overrides) == 0
    return out.getvalue()


def refused(output: Path, *overrides: str) -> str:
    """Start a run that must fail; return its error, which is one line."""
    with redirect_stderr(io.StringIO()) as errors:
        assert run(output, *overrides) == 2
    (line,) = errors.getvalue().splitlines()
    return line


def status_of(command: Callable[..., int], *arguments: Any) -> object:
    """Return the exit status of a command, whether returned or raised by the parser."""
    try:
        return command(*arguments)
    except SystemExit as ended:
        return ended.code


def last_state(folder: Path) -> dict[str, Any]:
    return checkpointing.load(checkpointing.list_checkpoints(folder)[-1])


def assert_same_state(a: Any, b: Any, where: str = "state") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def logged(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
