"""What interrupts the steps: signals that ask a run to stop, and the time to save."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# What schedulers send before a time limit, and Ctrl-C. Windows has no SIGUSR1.
ASKING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
]


class Stopped(Exception):  # noqa: N818  # it is no error
    """A run stopped at a signal, its state saved.

    Args:
        received: The signal; None if it reached another process.
        done: Steps done and saved.
        total: Steps of the run.
    """

    def __init__(self, received: signal.Signals | None, done: int, total: int) -> None:
        name = received.name if received else "a signal to another process"
        super().__init__(
            f"stopped by {name} after step {done} of {total}, saved; the same command continues"
        )
        self.number = int(received or signal.SIGTERM)


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
    """Notes the first of SIGTERM, SIGUSR1 and SIGINT while the block runs, in the main thread.

    Repeated signals change nothing (torchrun and Slurm send them twice), but for another Ctrl-C a
    second or more after the first, which ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > 1:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
