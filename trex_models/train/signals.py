"""Signals that ask a run to stop, and the alarm for checkpoints."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from trex_models.cli import Stopped
from trex_models.data.loading import LoaderStalledError
from trex_models.distributed import is_peer_failure

# Sent by schedulers before a time limit, by Ctrl-C, and by a terminal that closes. Windows lacks
# some.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    if hasattr(signal, name)
]


class StoppedBySignal(Stopped):
    """A run stopped at a signal: after ``done`` steps of ``total``, saved, or within a step."""

    def __init__(self, received: signal.Signals, done: int = 0, total: int = 0) -> None:
        where = "within a step; the same command continues from the last checkpoint"
        if done:  # saved by all ranks
            where = f"after step {done} of {total}, saved; the same command continues"
        message = f"stopped by {received.name} {where}"
        super().__init__(message, 128 + received, on_all_ranks=bool(done))


class Alarm:
    """Fires every ``seconds``; disabled if 0."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def due(self) -> bool:
        """Return whether it fires; the next interval starts now."""
        now = time.monotonic()
        if not self._seconds or now < self._next:
            return False
        self._next = now + self._seconds
        return True


class StopSignals:
    """Records the first signal that asks to stop while the block runs, in the main thread.

    If loading gave up after such a signal, or another process failed, which probably received it,
    too, the block raises StoppedBySignal.

    A signal that the process ignores (as under nohup) stays ignored. Repeated signals have no
    effect (torchrun and Slurm send them twice), except a second Ctrl-C at least a second after the
    first, which ends the process at once. The first signal is announced by a line.

    If the process ``exits`` after the block, signals are ignored from its end on: one of them would
    make a finished run look like a failed one.
    """

    def __init__(self, announce: bool = True, exits: bool = False) -> None:
        self._announce = announce
        self._exits = exits
        self.received: signal.Signals | None = None
        self._interrupted: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in STOP_SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        ended = self._exits and (error is None or isinstance(error, StoppedBySignal))
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ended else handler)
        if self.received and (isinstance(error, LoaderStalledError) or is_peer_failure(error)):
            raise StoppedBySignal(self.received) from error

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            if self._announce:  # not by print, which the signal may have interrupted
                line = f"{self.received.name}: stopping once the state is saved{again}\n"
                with suppress(OSError):
                    os.write(1, line.encode())
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > 1:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
