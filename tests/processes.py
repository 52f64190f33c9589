"""Helpers that start processes, and a clock for tests.

Importing torch takes seconds. What does not test an import, a start-up or a launcher runs in a
process that is forked from a server which has imported everything, and has computed nothing.
"""

from __future__ import annotations

import io
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

Work = Callable[[Path], Any]

forkserver = get_context("forkserver")
# These imports start no threads, which must not exist when a process is forked.
forkserver.set_forkserver_preload(["trex_models.train.loop", "tyro", "torch._dynamo"])


def run_python(
    *arguments: object, fails: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter, and require status 0 unless it ``fails``."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert fails or not done.returncode, done.stdout + done.stderr
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environments(world_size: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank on this host, as set by torchrun."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def start_processes(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Call a function with a rank and arguments in new processes, like ``mp.spawn``."""
    mp.start_processes(function, args, nprocs, start_method="forkserver")


def spawn(work: Work, world_size: int, folder: Path) -> list[Any]:
    """Call a function in several processes, set up like torchrun's; return their results."""
    start_processes(_member, (work, environments(world_size), folder), world_size)
    return [pickle.loads(file.read_bytes()) for file in results(folder, world_size)]


def results(folder: Path, world_size: int) -> list[Path]:
    return [folder / f"{rank}.pickle" for rank in range(world_size)]


def _member(rank: int, work: Work, variables: list[dict[str, str]], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= variables[rank]
    returned = work(folder)
    results(folder, len(variables))[rank].write_bytes(pickle.dumps(returned))


class Forked:
    """Forked process that runs ``python -c CODE ARGUMENTS`` or ``python -m MODULE ARGUMENTS``."""

    def __init__(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> None:
        self.command = command
        self.out = self.err = ""
        """Standard output and standard error, available once the process has ended."""
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._files:
            file.touch()
        self.process = forkserver.Process(
            target=_interpret,
            args=(command, dict(environment or os.environ), cwd or Path.cwd(), self._files),
            kwargs={"start_method": get_start_method()},
        )
        self.process.start()

    def end(self, seconds: float = 240) -> int:
        """Wait until the process ends; return its exit status, or minus the signal's number."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
        with self._folder:
            self.out, self.err = (file.read_text() for file in self._files)
        if status is None:
            raise TimeoutError(f"{self.command} has not ended: {self.out} {self.err}")
        return status

    def send(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)


def output_to(*files: Path) -> None:
    """Redirect standard output and standard error of this process to two files."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)


def _interpret(
    command: tuple[str, ...],
    environment: dict[str, str],
    cwd: Path | str,
    files: list[Path],
    start_method: str,
) -> None:
    set_start_method(start_method, force=True)  # of loader workers: the default, not ours
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    output_to(*files)
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read before the fork
    option, code, *arguments = command
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Clock:
    """Clock whose time is set by tests."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def captured(main: Callable[[list[str]], int], *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command in this process; return its status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()
