"""What interrupts the steps: signals that ask a run to stop, and the time to save."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from trex_models import cli
from trex_models.data.loading import GaveUpError
from trex_models.train.distributed import is_peer_failure

# What schedulers send before a time limit, Ctrl-C, and a terminal that closes. Windows lacks some.
ASKING = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    if hasattr(signal, name)
]


class Stopped(cli.Stopped):
    """A run stopped at a signal.

    Args:
        received: The signal.
        done: Steps done and saved; None if the stop came in the middle of a step.
        total: Steps of the run.
    """

    def __init__(
        self, received: signal.Signals, done: int | None = None, total: int | None = None
    ) -> None:
        where = f"after step {done} of {total}, saved; the same command continues"
        if done is None:
            where = "within a step; the same command continues from the last checkpoint"
        super().__init__(
            f"stopped by {received.name} {where}",
            status=128 + received,
            on_all_ranks=done is not None,  # all processes save at the same step
        )
        self.received = received


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

    If loading gave up after such a signal, or another process failed, which probably got it, too,
    the block raises Stopped.

    A signal that the process ignores (as under nohup) stays ignored. Repeated signals change
    nothing (torchrun and Slurm send them twice), but for another Ctrl-C a second or more after the
    first, which ends the process at once.

    Args:
        announce: Whether to print a line when the first one comes.
        exits: Whether the process exits after the block. The signals are then ignored from its
            end on: one of them would turn a run that has finished into one that failed.
    """

    def __init__(self, announce: bool = True, exits: bool = False) -> None:
        self._announce = announce
        self._exits = exits
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
        ended = self._exits and (error is None or isinstance(error, Stopped))
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ended else handler)
        if self.received and (isinstance(error, GaveUpError) or is_peer_failure(error)):
            raise Stopped(self.received) from error

    def asked(self) -> bool:
        """Return whether a signal came."""
        return self.received is not None

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
