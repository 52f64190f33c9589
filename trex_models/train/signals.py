"""What interrupts the steps: signals that ask a run to stop, and the time to save."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

# What schedulers send before a time limit, Ctrl-C, and a terminal that closes. Windows lacks some.
ASKING = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    if hasattr(signal, name)
]


class Stopped(Exception):  # noqa: N818  # it is no error
    """A run stopped at a signal, its state saved.

    Args:
        received: The signal.
        done: Steps done and saved.
        total: Steps of the run.
    """

    def __init__(self, received: signal.Signals, done: int, total: int) -> None:
        super().__init__(
            f"stopped by {received.name} after step {done} of {total}, saved; the same command "
            "continues"
        )
        self.number = int(received)


class Alarm:
    """Is due once in every so many seconds; never if they are 0."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def due(self) -> bool:
        """Return whether the time has come; the next time is counted from now."""
        now = time.monotonic()
        if not self._seconds or now < self._next:
            return False
        self._next = now + self._seconds
        return True


class StopSignals:
    """Notes the first signal that asks to stop while the block runs, in the main thread.

    A signal that the process ignores (as under nohup) stays ignored. Repeated signals change
    nothing (torchrun and Slurm send them twice), but for another Ctrl-C a second or more after the
    first, which ends the process at once.

    Args:
        announce: Whether to print a line when the first one comes.
    """

    def __init__(self, announce: bool = True) -> None:
        self._announce = announce
        self.received: signal.Signals | None = None
        self._interrupted: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in ASKING if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            if self._announce:  # not by print, which the signal may have interrupted
                line = f"{self.received.name}: stopping after this step, saved{again}\n"
                with suppress(OSError):
                    os.write(1, line.encode())
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > 1:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
