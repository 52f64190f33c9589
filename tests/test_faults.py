"""Runs that are killed, asked to stop, or run out of disk end bit for bit like undisturbed ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGSTOP, SIGTERM, SIGUSR1, Signals

import pytest

from tests.fault_injection import (
    Life,
    Setting,
    Tormentor,
    compare,
    members,
    names_of_checkpoints,
    undisturbed,
)
from trex_models.train import checkpointing
from trex_models.train.signals import STOP_SIGNALS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

# Saves at its end, and when it is asked to stop.
LONG = Setting(epochs=6, log_every=1, save_steps=100)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], Path]:
    """Return the folder of an undisturbed run of a setting."""
    found: dict[Setting, Path] = {}

    def get(setting: Setting) -> Path:
        if setting not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            undisturbed(setting, folder)
            found[setting] = folder / "run"
        return found[setting]

    return get


def assert_finishes_like(
    reference: Path, setting: Setting, folder: Path, mounts: int | None = None
) -> Life:
    """Start the command once more, and compare what it leaves."""
    life = Life(setting, folder, mounts)
    assert life.end() == [0] * setting.processes, life.err()
    assert compare(life.run, reference, setting.total_steps) == []
    return life


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "kills"),
    [(Setting(), 6), (Setting(workers=1, save_steps=2), 4), (Setting(processes=3), 5)],
    ids=["one process", "with a loader worker", "three processes"],
)
def test_killed_at_random_moments(tmp_path: Path, setting: Setting, kills: int) -> None:
    tormentor = Tormentor(setting, tmp_path)
    tormentor.until(kills, signals=0)
    assert not tormentor.wrong
    assert tormentor.kills >= kills
    assert tormentor.comparisons > 0


@pytest.mark.slow
def test_command_gives_what_a_forked_run_gives(
    reference: Callable[[Setting], Path], tmp_path: Path
) -> None:
    """Otherwise nothing that is shown here would hold for the command."""
    command = [sys.executable, "-m", "trex_models.train", *Setting().command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert compare(tmp_path / "run", reference(Setting()), Setting().total_steps) == []


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1], ids=lambda number: number.name)
def test_stops_when_asked_to(
    reference: Callable[[Setting], Path], tmp_path: Path, number: Signals
) -> None:
    life = stopped_life(LONG, tmp_path, number, 0)
    step = stopped_at(life, number.name)
    life = assert_finishes_like(reference(LONG), LONG, tmp_path)
    assert f"continues from run/checkpoints/step_{step}.pt" in life.out()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_signals_during_export_and_exit_change_nothing(tmp_path: Path, processes: int) -> None:
    life = Life(Setting(processes), tmp_path)
    assert life.await_(life.all_steps_saved)
    while life.ranks_alive():
        for number in STOP_SIGNALS:
            if number != SIGINT:  # the second one ends the process at once
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


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(
    reference: Callable[[Setting], Path], tmp_path: Path
) -> None:
    setting = Setting(processes=2, epochs=6)
    life = stopped_life(setting, tmp_path, SIGTERM, 1)
    stopped_at(life, "SIGTERM")
    assert life.out(1) == life.err(1) == ""
    assert_finishes_like(reference(setting), setting, tmp_path)


def stopped_life(setting: Setting, folder: Path, number: Signals, rank: int) -> Life:
    """Start a run, and send a signal to one of its processes after step 2."""
    life = Life(setting, folder)
    assert life.await_(lambda: "step 2/" in life.out())
    life.send(number, [rank])
    assert life.end() == [128 + number] * setting.processes, life.err()
    return life


def stopped_at(life: Life, reason: str) -> int:
    """Return the step that a run says it stopped at; it is its last checkpoint, without errors."""
    last = life.out().splitlines()[-1]
    said = re.fullmatch(
        rf"stopped by {reason} after step (\d+) of \d+, saved; the same command continues", last
    )
    assert said, last
    assert life.err() == ""
    assert checkpointing.files(life.run)[-1].name == f"step_{said[1]}.pt"
    return int(said[1])


def test_second_process_is_refused(reference: Callable[[Setting], Path], tmp_path: Path) -> None:
    setting = Setting()
    first = Life(setting, tmp_path)
    assert first.await_(first.out)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "run").symlink_to(tmp_path / "run")
    second = Life(setting, tmp_path / "beside")
    assert second.end() == [2]
    assert re.fullmatch(r"error: another process is training in run; wait .*\n", second.err())
    assert first.end() == [0]
    assert compare(first.run, reference(setting), setting.total_steps) == []


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[int]:
    """Mount a small file system at ``folder``/disk, and make ``folder``/run a folder of it.

    Yields:
        A process in whose mount namespace it is. It vanishes with the process.
    """
    (folder / "disk").mkdir()
    (folder / "run").symlink_to("disk/run")
    mount = f"mount -t tmpfs -o size={megabytes}m none disk && mkdir disk/run && echo && read end"
    for options in ("-m", "-rm"):  # as root, or as anybody where the system permits it
        with subprocess.Popen(
            ["unshare", options, "sh", "-c", mount],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as holder:
            assert holder.stdout
            if holder.stdout.readline():
                yield holder.pid
                return
    pytest.skip("unshare -m and unshare -rm are not permitted here")


def fill(ballast: Path) -> None:
    """Take what is left of a file system, to the last byte."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "begins", "message"),
    [
        (Setting(), "step 4/", r"run/checkpoints/step_\d+\.pt cannot be written \({}\); make .*"),
        # Its metrics.jsonl outgrows a page of the file system.
        (LONG, "", r"\[Errno 28\] {}: '{}'"),
    ],
    ids=["checkpoint", "metrics"],
)
def test_full_disk(
    reference: Callable[[Setting], Path],
    tmp_path: Path,
    setting: Setting,
    begins: str,
    message: str,
) -> None:
    with small_disk(tmp_path, megabytes=8) as mounts:
        life = Life(setting, tmp_path, mounts)
        ballast = Path(f"/proc/{mounts}/root{tmp_path}/disk/ballast")
        assert life.await_(lambda: life.out() and begins in life.out())
        while life.ranks_alive():  # it may free some room in between
            fill(ballast)
        assert life.end() == [2]
        pattern = message.format("No space left on device", "run/metrics.jsonl")
        assert re.fullmatch(f"error: {pattern}\n", life.err()), life.err()
        assert "Traceback" not in life.out()
        saved = checkpointing.files(life.run)
        assert frozenset(path.name for path in saved) == names_of_checkpoints(life.run)
        assert bool(saved) == (setting.save_steps == 1)
        for path in saved:
            checkpointing.load(path)
        assert not list(life.run.glob(".*.tmp"))
        ballast.unlink()
        assert_finishes_like(reference(setting), setting, tmp_path, mounts)
