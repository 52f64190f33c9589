"""Runs that are killed or stopped end bit for bit like undisturbed ones."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from signal import SIGINT, SIGSTOP, SIGTERM, SIGUSR1, Signals

import pytest

from tests.fault_injection import (
    Life,
    Setting,
    Tormentor,
    compare,
    members,
    undisturbed,
)
from trex_models.train import checkpointing
from trex_models.train.signals import STOP_SIGNALS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

# Saves only at its end, and when it is stopped.
LONG = Setting(epochs=6, log_every=1, save_steps=100)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], Path]:
    """Return a function from settings to the folder of an undisturbed run."""

    @cache
    def get(setting: Setting) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        undisturbed(setting, folder)
        return folder / "run"

    return get


def assert_finishes_like(reference: Path, setting: Setting, folder: Path) -> Life:
    """Start the command again, and compare its files with the reference."""
    life = Life(setting, folder)
    assert life.end() == [0] * setting.processes, life.err()
    assert compare(life.run, reference, setting.total_steps) == []
    return life


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "kills"),
    [
        pytest.param(Setting(), 6, id="one process"),
        pytest.param(Setting(workers=1, save_steps=2), 4, id="with a loader worker"),
        pytest.param(Setting(processes=3), 5, id="three processes", marks=pytest.mark.client),
    ],
)
def test_killed_at_random_moments(tmp_path: Path, setting: Setting, kills: int) -> None:
    tormentor = Tormentor(setting, tmp_path)
    tormentor.until(kills)
    assert not tormentor.wrong
    assert tormentor.kills >= kills
    assert tormentor.comparisons > 0


@pytest.mark.parametrize(
    ("setting", "number", "rank"),
    [
        (LONG, SIGTERM, 0),
        (LONG, SIGUSR1, 0),
        pytest.param(Setting(processes=2, epochs=6), SIGTERM, 1, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "SIGUSR1", "two processes"],
)
def test_stops_when_asked_to(
    reference: Callable[[Setting], Path],
    tmp_path: Path,
    setting: Setting,
    number: Signals,
    rank: int,
) -> None:
    """A signal to one process after step 2 stops all processes at the same step."""
    life = Life(setting, tmp_path)
    assert life.await_(lambda: "step 2/" in life.out())
    life.send(number, [rank])
    assert life.end() == [128 + number] * setting.processes, life.err()
    step = stopped_at(life, number.name)
    assert all(life.out(other) == life.err(other) == "" for other in range(1, setting.processes))
    life = assert_finishes_like(reference(setting), setting, tmp_path)
    assert f"continues from run/checkpoints/step_{step}.pt" in life.out()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_signals_during_export_and_exit_change_nothing(tmp_path: Path, processes: int) -> None:
    life = Life(Setting(processes), tmp_path)
    assert life.await_(life.all_steps_saved)
    while life.ranks_alive():
        for number in STOP_SIGNALS:
            if number != SIGINT:  # a second one ends the process immediately
                life.send(number, range(processes))
        time.sleep(0.001)
    assert life.end() == [0] * processes, life.err()
    assert "exported run/export/cls" in life.out()


@pytest.mark.slow
def test_stops_while_a_loader_worker_is_stopped(
    reference: Callable[[Setting], Path], tmp_path: Path
) -> None:
    setting = replace(LONG, workers=1)
    life = Life(setting, tmp_path)
    assert life.await_(lambda: "step 2/" in life.out())
    leader = life.processes[0].pid or 0
    for worker in {*members(leader)} - {leader}:
        os.kill(worker, SIGSTOP)
    life.send(SIGTERM, [0])
    assert life.end(60) == [143]
    stopped_at(life, "SIGTERM")
    assert_finishes_like(reference(setting), setting, tmp_path)


def stopped_at(life: Life, reason: str) -> int:
    """Return the reported last step of a stopped run; check its checkpoint and errors."""
    last = life.out().splitlines()[-1]
    said = re.fullmatch(
        rf"stopped by {reason} after step (\d+) of \d+ \(saved\); run the same command .*", last
    )
    assert said, last
    assert life.err() == ""
    assert checkpointing.list_checkpoints(life.run)[-1].name == f"step_{said[1]}.pt"
    return int(said[1])


def test_second_process_is_refused(reference: Callable[[Setting], Path], tmp_path: Path) -> None:
    setting = Setting()
    first = Life(setting, tmp_path)
    assert first.await_(first.out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run").symlink_to(tmp_path / "run")
    second = Life(setting, tmp_path / "other")
    assert second.end() == [2]
    assert re.fullmatch(r"error: another process is training in run; wait .*\n", second.err())
    assert first.end() == [0]
    assert compare(first.run, reference(setting), setting.total_steps) == []
