"""Batches from loader workers: order, errors, dead workers and signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import dataloader
from torch.utils.data._utils import signal_handling

from tests.processes import run_python
from trex_models.data import loading
from trex_models.data.loading import LoaderStalledError, load_batches

BATCHES = [[10 * batch + item for item in range(3)] for batch in range(8)]

pytestmark = pytest.mark.timeout(120)  # failures here are deadlocks


@pytest.fixture(autouse=True)
def first_loader_of_the_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let DataLoader install its SIGCHLD handler again, and check for dead workers often."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    look = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.5,))
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    signal.signal(signal.SIGCHLD, before)
    assert workers_end()


def workers_end() -> bool:
    """Return True if all workers exit in time; a fork server may still be starting some."""
    for _ in range(100):
        if not multiprocessing.active_children():
            return True
        time.sleep(0.1)
    return False


@dataclass
class Numbers:
    """Dataset of batches of keys and process IDs that causes a failure at key ``trouble``.

    A file in ``folder`` counts the failures, of which there are at most ``times``.
    """

    folder: Path
    trouble: int = -1
    kind: str = ""
    times: int = 1

    def __getitems__(self, keys: Sequence[int]) -> tuple[Tensor, int]:
        if self.trouble in keys and self.happened() < self.times:
            with (self.folder / "happened").open("a") as log:
                log.write("x")
            if self.kind == "ValueError":
                raise ValueError(f"sample {self.trouble} is torn")
            if self.kind == "RuntimeError":
                raise RuntimeError(f"defect at {self.trouble}")
            os.kill(os.getpid(), getattr(signal, self.kind))
        return torch.tensor(keys), os.getpid()

    def happened(self) -> int:
        log = self.folder / "happened"
        return log.stat().st_size if log.exists() else 0


def keys_of(batches: Iterator[Any]) -> list[list[int]]:
    return [keys.tolist() for keys, _ in batches]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_from_as_many_processes(tmp_path: Path, workers: int) -> None:
    assert list(load_batches(Numbers(tmp_path), [], workers)) == []
    made = list(load_batches(Numbers(tmp_path), BATCHES, workers))
    assert [keys.tolist() for keys, _ in made] == BATCHES
    makers = {process for _, process in made}
    assert len(makers) == max(workers, 1)
    assert (os.getpid() in makers) == (workers == 0)


def error_of(batches: Iterator[Any]) -> str:
    """Return type and message of the error that the batches raise; release the loader."""
    try:
        keys_of(batches)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they reference the loader
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_sample_that_cannot_be_read(tmp_path: Path, workers: int) -> None:
    batches = load_batches(Numbers(tmp_path, 31, "ValueError"), BATCHES, workers)
    assert [next(batches)[0].tolist() for _ in range(3)] == BATCHES[:3]
    assert error_of(batches) == "ValueError: sample 31 is torn"


@pytest.mark.parametrize("workers", [0, 1])
def test_defect_of_the_data_set_comes_out(tmp_path: Path, workers: int) -> None:
    logged: list[str] = []
    dataset = Numbers(tmp_path, 31, "RuntimeError")
    error = error_of(load_batches(dataset, BATCHES, workers, log=logged.append))
    assert error.startswith("RuntimeError: ")
    assert "defect at 31" in error
    assert dataset.happened() == 1
    assert logged == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("attempt", range(4))
def test_dead_worker_is_replaced(tmp_path: Path, workers: int, attempt: int) -> None:
    """Repeated, because tensors that a dead worker leaves in the queue fail in various ways."""
    logged: list[str] = []
    dataset = Numbers(tmp_path, BATCHES[attempt + 1][0], "SIGKILL")
    assert keys_of(load_batches(dataset, BATCHES, workers, log=logged.append)) == BATCHES
    assert dataset.happened() == 1
    (line,) = logged
    assert re.fullmatch(".*restarting the workers.*", line)


def test_deaths_at_different_batches_do_not_add_up(tmp_path: Path) -> None:
    logged: list[str] = []
    batches = load_batches(Numbers(tmp_path), BATCHES, 1, log=logged.append)
    seen = []
    for keys, maker in batches:
        seen.append(keys.tolist())
        if len(seen) in (1, 3, 5, 7):
            kill(maker)
    assert seen == BATCHES
    assert len(logged) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_that_always_dies_ends_the_loading(tmp_path: Path, workers: int) -> None:
    logged: list[str] = []
    dataset = Numbers(tmp_path, 0, "SIGKILL", times=99)
    message = error_of(load_batches(dataset, BATCHES, workers, log=logged.append))
    assert re.fullmatch("ValueError: .*died 3 times.*use fewer loader workers.*", message)
    assert dataset.happened() == 3
    assert len(logged) == 2


@pytest.mark.parametrize("kind", ["SIGINT", "SIGUSR1"])
def test_workers_leave_signals_to_the_parent(tmp_path: Path, kind: str) -> None:
    logged: list[str] = []
    dataset = Numbers(tmp_path, 31, kind)
    assert keys_of(load_batches(dataset, BATCHES, 1, log=logged.append)) == BATCHES
    assert dataset.happened() == 1
    assert logged == []


def test_worker_deaths_do_not_disturb_the_consumer(tmp_path: Path) -> None:
    logged: list[str] = []
    batches = load_batches(Numbers(tmp_path), BATCHES, 2, log=logged.append)
    keys, maker = next(batches)
    seen = [keys.tolist()]
    kill(maker)  # DataLoader's handler would raise here or in the next lines
    assert sum(range(100_000)) == 4_999_950_000
    assert logged == []
    assert seen + keys_of(batches) == BATCHES
    assert len(logged) == 1


def kill(process: int) -> None:
    """Kill a child and wait until it is dead, but do not reap it."""
    os.kill(process, signal.SIGKILL)
    while is_running(process):  # children of a fork server cannot be waited for
        time.sleep(0.01)


def test_the_sigchld_handler_is_unchanged(tmp_path: Path) -> None:
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGCHLD, own)
    batches = load_batches(Numbers(tmp_path), BATCHES, 1)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is own
    keys_of(batches)
    assert signal.signal(signal.SIGCHLD, before) is own


def test_outside_the_main_thread(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: keys_of(load_batches(Numbers(tmp_path), BATCHES, 1)))
        assert future.result() == BATCHES


@pytest.mark.parametrize("stopped", [False, True])
def test_consumer_that_stops_early_leaves_no_workers(tmp_path: Path, stopped: bool) -> None:
    batches = load_batches(Numbers(tmp_path), BATCHES, 2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    if stopped:
        stop_workers()
    del batches
    assert workers_end()


def stop_workers() -> list[int]:
    """Stop all workers, like Ctrl-Z or a hung file system; return their process IDs."""
    workers = [child.pid or 0 for child in multiprocessing.active_children()]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    return workers


def test_stopped_workers_are_reported_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_LOG_AFTER", 1.0)
    monkeypatch.setattr(loading, "_STOP_AFTER", 1.5)
    logged: list[str] = []
    batches = load_batches(Numbers(tmp_path), BATCHES, 2, False, logged.append, lambda: logged)
    next(batches)
    workers = stop_workers()
    with pytest.raises(LoaderStalledError):
        keys_of(batches)
    (line,) = logged
    assert any(f"process ID {worker}, which is stopped" in line for worker in workers)


def test_errors_of_the_consumer_are_not_caught(tmp_path: Path) -> None:
    """A RuntimeError of the consumer does not count as a dead worker, whatever its message."""
    logged: list[str] = []

    def consume() -> None:
        for _ in load_batches(Numbers(tmp_path), BATCHES, 1, log=logged.append):
            raise RuntimeError("DataLoader worker is what this happens to say")

    with pytest.raises(RuntimeError, match="happens to say"):
        consume()
    assert logged == []


ORPHANS = """
import multiprocessing, os, signal, sys, warnings
import torch
from trex_models.data import loading
from trex_models.data.loading import LoaderStalledError, load_batches

class Zeros:
    def __getitems__(self, keys):
        return torch.zeros(3)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = load_batches(Zeros(), [[index] for index in range(1000)], 2)
    next(batches)
    print([child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, start_method: str) -> None:
    """With a fork server, torch's own check and the server would wait for each other."""
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = run_python(script, start_method, fails=True, env=environment)
    assert killed.returncode == -signal.SIGKILL
    workers = json.loads(killed.stdout)
    assert len(workers) == 2
    end = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return status not in "ZX"
