"""Signals that stop a run, and the alarm for checkpoints."""

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

# Sent by schedulers before a time limit, by Ctrl-C, and by closing a terminal. Some of them do not
# exist on Windows.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    if hasattr(signal, name)
]


class StoppedBySignal(Stopped):
    """Stop of a run by a signal: after ``done`` of ``total`` steps and saved, or within a step."""

    def __init__(self, received: signal.Signals, done: int = 0, total: int = 0) -> None:
        where = "within a step; run the same command to continue from the last checkpoint"
        if done:  # saved by all ranks
            where = f"after step {done} of {total} (saved); run the same command to continue"
        message = f"stopped by {received.name} {where}"
        super().__init__(message, 128 + received, on_all_ranks=bool(done))


class Alarm:
    """Alarm that fires every ``seconds``; 0 disables it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def due(self) -> bool:
        """Return True if the alarm fires, which starts the next interval."""
        now = time.monotonic()
        if not self._seconds or now < self._next:
            return False
        self._next = now + self._seconds
        return True


class StopSignals:
    """Context manager that records the first stop signal; works only in the main thread.

    The block raises StoppedBySignal if, after a signal, loading is abandoned or another process
    fails, which has probably received the same signal.

    Signals that the process ignores (as under nohup) stay ignored. Repeated signals have no effect
    (torchrun and Slurm send them twice), except a second Ctrl-C at least a second after the first,
    which ends the process immediately. If ``announce`` is set, the first signal is reported.

    If the process ``exits`` after the block, signals are ignored from then on: they would make a
    finished run look like a failed one.
    """

    def __init__(self, announce: bool = True, exits: bool = False) -> None:
        self._announce = announce
        self._exits = exits
        self.received: signal.Signals | None = None
        self._interrupted: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handled = [n for n in STOP_SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._note) for number in handled}
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
            again = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
            if self._announce:  # not with print, which the signal may have interrupted
                line = f"{self.received.name}: stopping once the state is saved{again}\n"
                with suppress(OSError):
                    os.write(1, line.encode())
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > 1:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
