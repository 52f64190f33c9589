"""Batch loading that survives crashes of loader workers, and copies to the device."""

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

from trex_models.data.decode import UnreadableImageError

_MAX_DEATHS = 3
_LOG_AFTER, _STOP_AFTER = 60.0, 10.0  # seconds: log a long wait; give up after a request to stop
_PREFETCHED = 2  # batches that each worker loads ahead
# Buffers per worker, reused in turn: each worker loads at most _PREFETCHED batches ahead of the one
# in use, so that no batch is overwritten while it is used.
NUM_BUFFERS = _PREFETCHED + 1


class LoaderStalledError(Exception):
    """No batch arrived within ten seconds of a request to stop."""


class BatchDataset(Protocol):
    """Dataset that returns complete batches; equal keys must give equal batches."""

    def __getitems__(self, keys: Sequence[Any], /) -> Any:
        """Load a batch; raise a ValueError for an unreadable sample."""
        ...


def load_batches(
    dataset: BatchDataset,
    batches: Iterable[Sequence[Any]],
    workers: int = 0,
    pin_memory: bool = False,
    log: Callable[[str], object] = print,
    should_stop: Callable[[], object] = lambda: False,
) -> Iterator[Any]:
    """Yield a dataset's batches in order; each is valid until the next one is requested.

    If a worker process dies (for example, killed by the system because memory ran out), the workers
    are restarted and loading continues with the same batch, so that a long run does not fail.

        sampler = EpochSampler(len(source), batch_size=256, epochs=100)
        for batch in load_batches(MultiCropDataset(source), sampler, workers=8): ...

    Args:
        dataset: Dataset that returns batches, such as ``MultiCropDataset``.
        batches: Keys of every batch. Must yield the same keys each time it is iterated.
        workers: Number of worker processes; 0 loads in this process.
        pin_memory: Copy the batches to page-locked memory.
        log: Callback for messages: a worker has died, or a batch takes longer than a minute.
        should_stop: Callback. Once it returns True, waiting for a worker ends after ten seconds.

    Raises:
        LoaderStalledError: A batch took longer than ten seconds after a request to stop.
        ValueError: A sample cannot be read, or workers keep dying on the same batch.
    """
    done, deaths = 0, 0
    while True:
        loader: DataLoader[Any] = DataLoader(
            _ReturnErrors(dataset),
            batch_sampler=map(list, islice(batches, done, None)),
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            collate_fn=_identity,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
        )
        watchdog = _Watchdog(log, should_stop)
        try:
            for batch in watchdog.timed(_start(loader)):
                if isinstance(batch, ValueError):
                    raise batch
                yield batch
                done, deaths = done + 1, 0
        except (RuntimeError, OSError, EOFError) as error:
            # A dead worker causes "DataLoader worker exited", a broken connection, or an error in
            # the pinning thread. torch prefixes errors raised by the dataset with "Caught".
            if not workers or str(error).startswith("Caught "):
                raise
            if watchdog.gave_up:
                raise LoaderStalledError from error
            deaths += 1
            reason = f"{type(error).__name__}: {error}"
            if deaths == _MAX_DEATHS:
                raise ValueError(
                    f"loader workers died {deaths} times on the same batch ({reason}); the machine "
                    "may have run out of memory (see dmesg): use fewer loader workers"
                ) from error
            log(f"a loader worker died ({reason}); restarting the workers from the same batch")
        else:
            return


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers without DataLoader's SIGCHLD handler.

    The handler may interrupt the main thread at any line, even in the middle of a step.
    Without the handler, the loader raises the error within 5 seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    previous = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if previous is not None:  # None: a handler installed by a C library
        signal.signal(signal.SIGCHLD, previous)
    return batches


class _Watchdog(threading.Thread):
    """Thread that times the workers; the main thread blocks while it waits for a batch."""

    def __init__(self, log: Callable[[str], object], should_stop: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.gave_up = False
        self._log = log
        self._should_stop = should_stop
        self._since = math.inf
        self._ended = threading.Event()

    def timed(self, batches: Any) -> Iterator[Any]:
        """Yield the batches of a DataLoader's iterator, with or without workers."""
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
                    os.kill(worker.pid, signal.SIGCONT)  # a stopped process cannot exit

    def run(self) -> None:
        """Log a long wait once, and kill the workers if asked to stop."""
        logged, asked = -math.inf, math.inf
        while not self._ended.wait(1):
            now, since = time.monotonic(), self._since
            if self._should_stop():
                asked = min(asked, now)
            with suppress(AttributeError, KeyError):  # the batch arrived, or it was the last one
                if now - since > _LOG_AFTER and since != logged:
                    logged = since
                    self._log(
                        f"no batch for {now - since:.0f} s: waiting for the loader worker with "
                        f"process ID {self._awaited()}, which is stopped or reads from slow or "
                        "unresponsive storage"
                    )
                if now - max(since, asked) > _STOP_AFTER:
                    self.gave_up = True
                    for worker in self._batches._workers:
                        worker.kill()

    def _awaited(self) -> int:
        worker, *_ = self._batches._task_info[self._batches._rcvd_idx]
        return self._batches._workers[worker].pid


def _init_worker(_: int) -> None:
    """Ignore the signals that the parent handles, and exit when the parent exits.

    SIGTERM is not ignored, because DataLoader ends its workers with it. DataLoader's own check
    of the parent fails if the parent was killed before the first check or uses a fork server.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):  # sent to all processes of a job
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.excepthook = _suppress_lost_parent
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _suppress_lost_parent(error: threading.ExceptHookArgs) -> None:
    """Suppress the errors of threads that send batches to a parent that has exited."""
    if not issubclass(error.exc_type, (OSError, EOFError)):
        threading.__excepthook__(error)


class _ReturnErrors(Dataset[Any]):
    """Dataset that returns ValueErrors, because DataLoader adds a traceback to raised ones."""

    def __init__(self, dataset: BatchDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return self._dataset.__getitems__(keys)
        except ValueError as error:
            kind = UnreadableImageError if isinstance(error, UnreadableImageError) else ValueError
            return kind(str(error))


def _identity(batch: Any) -> Any:
    return batch


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device; on CUDA, page-locked tensors are copied asynchronously.

    The copies run on a separate stream and overlap with work that is already queued on the current
    stream; work that is queued later waits for the copies. The CPU does not wait.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    current, copying = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copying):
        copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
    current.wait_stream(copying)
    for tensor in copies:
        tensor.record_stream(current)  # no reuse of its memory before this stream is done
    return copies


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
