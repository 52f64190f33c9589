"""Batches from worker processes, in order, whatever happens to the workers, and onto the device."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from multiprocessing import parent_process
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_MOST_DEATHS = 3
_LONG, _TOO_LONG = 60.0, 10.0  # seconds without a batch: to report, and to wait if asked to stop
_PREFETCHED = 2  # batches that a worker is ahead by
# A worker may write over a batch of its own when so many later ones have been begun: the last of
# them is asked of it when the batch that follows this one is handed out.
LIVE_BATCHES = _PREFETCHED + 1


class LoaderStalledError(Exception):
    """No batch came for ten seconds, and ``load_batches`` was asked to stop."""


class BatchDataset(Protocol):
    """A dataset that makes complete batches; a batch is a function of its keys."""

    def __getitems__(self, keys: Sequence[Any], /) -> Any:
        """Return the batch of some samples; ValueError names one that cannot be read."""
        ...


def load_batches(
    dataset: BatchDataset,
    batches: Iterable[Sequence[Any]],
    workers: int = 0,
    pin_memory: bool = False,
    log: Callable[[str], object] = print,
    asked_to_stop: Callable[[], object] = lambda: False,
) -> Iterator[Any]:
    """Yield the dataset's batches in order; each holds until the next one is asked for.

    When a worker process dies (the system ends one when memory runs out), loading starts again
    from the batch that was awaited: a run of days should not end for it.

        sampler = EpochSampler(len(source), batch_size=256, epochs=100)
        for batch in load_batches(MultiCropDataset(source), sampler, workers=8): ...

    Args:
        dataset: Maker of batches, such as ``MultiCropDataset``.
        batches: Keys of every batch; the same ones each time that it is iterated.
        workers: Number of worker processes; 0 loads in this process.
        pin_memory: Copy the batches to page-locked memory.
        log: Receives a line when a worker dies, or when a batch takes longer than a minute.
        asked_to_stop: Returns whether to give up on a batch that takes longer than ten seconds.

    Raises:
        LoaderStalledError: A batch took too long.
        ValueError: A sample cannot be read, or workers keep dying on the same batch.
    """
    done, deaths = 0, 0
    while True:
        loader: DataLoader[Any] = DataLoader(
            _Quoting(dataset),
            batch_sampler=map(list, islice(batches, done, None)),
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            worker_init_fn=_depend_on_parent,
        )
        watch = _Watch(log, asked_to_stop)
        try:
            for batch in watch.timed(_started(loader)):
                if isinstance(batch, ValueError):
                    raise batch
                yield batch
                done, deaths = done + 1, 0
        except (RuntimeError, OSError, EOFError) as error:
            # A death shows as "DataLoader worker exited", as a broken connection, or in the thread
            # that pins. What the dataset itself raised, torch marks.
            if not workers or str(error).startswith("Caught "):
                raise
            if watch.gave_up:
                raise LoaderStalledError from error
            deaths += 1
            reason = f"{type(error).__name__}: {error}"
            if deaths == _MOST_DEATHS:
                raise ValueError(
                    f"loader workers died {deaths} times over one batch ({reason}); the machine "
                    "may be short of memory (see dmesg): lower --system.workers"
                ) from error
            log(f"a loader worker died ({reason}); loading starts again from the awaited batch")
        else:
            return


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers, without DataLoader's handler of their deaths.

    It raises its error at any line of the main thread, in the middle of a step, too. Without it
    the error comes out of the loader, within 5 seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    previous = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if previous is not None:  # not one of a C library
        signal.signal(signal.SIGCHLD, previous)
    return batches


class _Watch(threading.Thread):
    """Watches how long workers take, from a thread: to receive from a stopped one blocks."""

    def __init__(self, log: Callable[[str], object], asked_to_stop: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.gave_up = False
        self._log = log
        self._asked_to_stop = asked_to_stop
        self._since = math.inf
        self._ended = threading.Event()

    def timed(self, batches: Any) -> Iterator[Any]:
        """Yield the batches of a DataLoader's iterator, which may have no workers."""
        self._batches = batches
        if workers := getattr(batches, "_workers", []):
            self.start()
        try:
            while True:
                self._since = time.monotonic()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self._since = math.inf
                yield batch
        finally:
            self._ended.set()
            del self._batches
            for worker in workers:
                if worker.is_alive() and hasattr(signal, "SIGCONT"):
                    os.kill(worker.pid, signal.SIGCONT)  # a stopped one would not end

    def run(self) -> None:
        """Report a long wait once, and end it when asked to stop."""
        reported, asked = -math.inf, math.inf
        while not self._ended.wait(1):
            now, since = time.monotonic(), self._since
            if self._asked_to_stop():
                asked = min(asked, now)
            with suppress(AttributeError, KeyError):  # the batch came, or was the last one
                if now - since > _LONG and since != reported:
                    reported = since
                    self._log(
                        f"no batch for {now - since:.0f} s: waiting for loader worker "
                        f"{self._awaited()}, which is stopped or reads from storage that is slow "
                        "or does not answer"
                    )
                if now - max(since, asked) > _TOO_LONG:
                    self.gave_up = True
                    for worker in self._batches._workers:
                        worker.kill()

    def _awaited(self) -> int:
        """Return the process that makes the next batch."""
        worker, *_ = self._batches._task_info[self._batches._rcvd_idx]
        return self._batches._workers[worker].pid


def _depend_on_parent(_: int) -> None:
    """Leave it to the parent when to stop, and end with it.

    SIGTERM is DataLoader's own means of ending its workers. Its watch over the parent misses one
    that was killed before it began, and one behind a fork server.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):  # which reach all processes of a job
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.excepthook = _without_parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _without_parent(error: threading.ExceptHookArgs) -> None:
    """Let threads that hand batches over end in silence where nobody takes them any more."""
    if not issubclass(error.exc_type, (OSError, EOFError)):
        threading.__excepthook__(error)


class _Quoting(Dataset[Any]):
    """Returns a ValueError, not raises it: DataLoader would bury it under a worker's traceback."""

    def __init__(self, dataset: BatchDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return self._dataset.__getitems__(keys)
        except ValueError as error:
            return ValueError(str(error))


def _as_is(batch: Any) -> Any:
    return batch


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device; on CUDA on a stream of its own, where they are page-locked.

    Their copying overlaps with all that the current stream still has to do, and what is queued
    there from now on waits for it. The CPU waits for nothing.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    current, copying = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copying):
        copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
    current.wait_stream(copying)
    for tensor in copies:
        tensor.record_stream(current)  # its memory is not to be reused before
    return copies


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
