"""Processes that tests start, and a clock that they set."""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

Work = Callable[[Path], Any]


def spawn(work: Work, world_size: int, folder: Path) -> list[Any]:
    """Call a function in that many processes, set up as by torchrun; return what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_member, (work, world_size, port, folder), nprocs=world_size)
    return [pickle.loads(file.read_bytes()) for file in results(folder, world_size)]


def results(folder: Path, world_size: int) -> list[Path]:
    return [folder / f"{rank}.pickle" for rank in range(world_size)]


def _member(rank: int, work: Work, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    returned = work(folder)
    results(folder, world_size)[rank].write_bytes(pickle.dumps(returned))


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def captured(main: Callable[[list[str]], int], *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command in this process; return its status, and what it printed to each stream."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()
