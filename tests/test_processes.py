"""Two training processes: one that fails stops both with its error shown; none trains apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.images import save_classes
from tests.processes import Forked, environments
from tests.runs import TINY
from trex_models.data.multicrop import EpochSampler

FOLDER = ["--data.source", "folder", "--data.path"]


def run_two(first: list[str], second: list[str]) -> list[tuple[int, str]]:
    """Return status and standard error of both processes."""
    processes = [
        Forked("-m", "trex_models.train", "smoke", *arguments, environment=os.environ | variables)
        for arguments, variables in zip((first, second), environments(2), strict=True)
    ]
    return [(process.end(), process.err) for process in processes]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_classes(tmp_path / "images", 40, name="{:02}.jpg")


@pytest.mark.slow
def test_an_error_of_one_process_ends_both_and_is_shown(images: Path, tmp_path: Path) -> None:
    """An image that the second process alone reads, and not before the first step."""
    keys = next(iter(EpochSampler(80, 8, 1, seed=0, rank=1, world_size=2)))
    index = next(i for _, i in keys if i not in np.linspace(0, 79, 16).astype(int))
    torn = images / "ab"[index // 40] / f"{index % 40:02}.jpg"
    torn.write_bytes(b"torn")
    arguments = ["--output", str(tmp_path / "run"), *TINY, *FOLDER, str(images)]
    (status, errors), (other_status, other_errors) = run_two(arguments, arguments)
    assert other_status == 2
    assert f"error: process 1 of 2: {torn} cannot be read as an image" in other_errors
    assert status == 1
    assert "error: process 0 of 2: another process failed" in errors
    assert "Traceback" not in errors + other_errors


@pytest.mark.slow
def test_processes_that_would_train_apart_do_not_start(images: Path, tmp_path: Path) -> None:
    other = images.with_name("other")
    (images / "a/notes.txt").touch()
    shutil.copytree(images, other)
    (other / "a/03.jpg").rename(other / "a/99.jpg")
    arguments = ["--output", str(tmp_path / "run"), *TINY, *FOLDER]
    ends = run_two([*arguments, str(images)], [*arguments, str(other), "--optim.base-lr", "3"])
    assert [status for status, _ in ends] == [2, 2]
    assert ends[0][1] == (
        f"{images}: 1 file(s) ignored (1 with extension '.txt')\n"
        "error: process 1: this process differs from rank 0 in optim.base_lr: 0.8 -> 3.0; the "
        "images; start all processes with the same command and the same data\n"
    )
    assert ends[1][1] == ""
    assert not (tmp_path / "run").exists()
