"""All output of a run: the console's progress, metrics.jsonl, and TensorBoard's files."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from trex_models.atomic import append, write_whole
from trex_models.train.distributed import Process, gather

T = TypeVar("T")

# Of a line of metrics.jsonl, what is not the same when the same run is repeated.
TIMINGS = ("images_per_second", "waiting_for_data")
_TRAINED = ("loss", "accuracy", "unreadable")
_VALIDATED = ("val_top1", "val_top5", "val_knn")
_BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Meter:
    """Means over the steps since the last reading, kept on the device until they are read.

    Args:
        process: This process; losses and logits are on its device.
    """

    def __init__(self, process: Process) -> None:
        self._rank = process.rank
        self._world_size = process.world_size
        self._sums = torch.zeros(3, device=process.device)  # loss, accuracy, steps

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step.

        Args:
            loss: Of the step, a scalar.
            logits: Of the first global crop, (B, C).
            labels: (B,).
        """
        correct = (logits.argmax(1) == labels).float().mean()
        self._sums += torch.stack([loss.float(), correct, torch.ones_like(correct)])

    def read(self) -> dict[str, float]:
        """Return the means over steps and processes, and start anew; waits for the device."""
        loss, correct, steps = self.gathered().sum(0).tolist()
        self._sums.zero_()
        return {"loss": loss / steps, "accuracy": correct / steps}

    def gathered(self) -> Tensor:
        """Return the sums of all processes, (processes, 3); all of them must call it."""
        return gather(self._sums[None])

    def load_state_dict(self, sums: Tensor) -> None:
        """Restore this process's part of ``gathered``; the mean if the number of them changed."""
        own = sums[self._rank] if len(sums) == self._world_size else sums.mean(0)
        self._sums.copy_(own)


class Reporter:
    """Progress with rate, remaining time and waiting for data, and one JSON line per report.

    On a terminal the progress is a bar, with a line above it for each validation; elsewhere it is
    a line per report. Processes other than the main one stay silent.

    Args:
        path: The metrics file; lines of steps from ``start_step`` on, which an interrupted run
            left behind, are cut off.
        start_step: First step of this process's life.
        total_steps: Steps of the run.
        steps_per_epoch: Steps of an epoch.
        images_per_step: Global batch size.
        process: This process.
        tensorboard: Folder for TensorBoard's files; None for none.
    """

    def __init__(
        self,
        path: Path,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        process: Process,
        tensorboard: Path | None = None,
    ) -> None:
        self._path = path
        self._total = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._images_per_step = images_per_step
        self._process = process
        self._enabled = enabled = process.is_main
        self._started = self._last_time = time.monotonic()
        self._start_step = self._last_step = start_step
        self._waited = self._set_aside = 0.0
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            bar_format=_BAR,
            disable=not enabled or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._writer: Any = None
        if enabled:
            if tensorboard is not None:
                self._writer = _tensorboard_writer(tensorboard, start_step)
            _truncate(path, start_step)

    def say(self, message: str) -> None:
        """Print one line above the progress bar."""
        if self._enabled:
            tqdm.write(message)

    def say_from_any(self, message: str) -> None:
        """Print one line of this process, main or not, above the progress bar."""
        rank = "" if self._enabled else f"process {self._process.rank}: "
        tqdm.write(rank + message)

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches, and count the time that is spent waiting for them."""
        while True:
            started = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - started
            yield batch

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of the block, in which nothing is trained, out of the rates."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._set_aside += time.monotonic() - started

    def watched(self, batches: Iterator[T], count: int, name: str) -> Iterator[T]:
        """Yield the batches under a second progress bar, which vanishes at the end.

        Args:
            batches: What to yield.
            count: How many there are.
            name: What is done with them.
        """
        return iter(
            tqdm(
                batches,
                name,
                count,
                leave=False,
                unit="batch",
                disable=bool(self._bar.disable),
                dynamic_ncols=True,
            )
        )

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def report(self, done: int, metrics: dict[str, float]) -> None:
        """Show and record the metrics after ``done`` steps.

        Args:
            done: Steps done so far in the run.
            metrics: Numbers by name.
        """
        if not self._enabled:
            return
        now = time.monotonic()
        seconds = max(now - self._last_time, 1e-9)
        training = max(seconds - self._set_aside, 1e-9)
        rate = (done - self._last_step) * self._images_per_step / training
        waiting = self._waited / training
        remaining = (now - self._started) / (done - self._start_step) * (self._total - done)
        self._last_time, self._last_step = now, done
        self._waited = self._set_aside = 0.0
        epoch = done / self._steps_per_epoch
        line: dict[str, Any] = {"step": done, "epoch": round(epoch, 4), **metrics}
        line |= {"images_per_second": float(f"{rate:.4g}"), "waiting_for_data": round(waiting, 4)}
        append(self._path, json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(name, value, done)
            self._writer.flush()
        trained, validated = (_shown(metrics, names) for names in (_TRAINED, _VALIDATED))
        speed = f"{rate:.0f} images/s, {waiting:.0%} waiting for data"
        if self._bar.disable:
            print(
                f"step {done}/{self._total} epoch {epoch:.2f} {trained}{validated}{speed}, "
                f"{duration(remaining)} left",
                flush=True,
            )
        else:
            if validated:
                self.say(f"epoch {epoch:g}: {validated.rstrip()}")
            self._bar.set_postfix_str(f"{speed}, {trained.rstrip()}")

    def finish(self) -> None:
        """Leave the bar as it is; what is said from now on stands below it."""
        self._bar.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        if self._writer is not None:
            self._writer.close()


def _shown(metrics: dict[str, float], names: Sequence[str]) -> str:
    return "".join(f"{name} {metrics[name]:.4g} " for name in names if name in metrics)


def _tensorboard_writer(folder: Path, start_step: int) -> Any:
    """Open a writer; what earlier lives of the run wrote of later steps is hidden."""
    from torch.utils.tensorboard import SummaryWriter  # takes seconds

    return SummaryWriter(str(folder), purge_step=start_step + 1)


def _truncate(path: Path, start_step: int) -> None:
    """Drop the lines of steps after ``start_step`` and torn ones."""
    kept = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= start_step:
                    kept.append(line + "\n")
            except (KeyError, TypeError, ValueError):
                continue
    write_whole(path, "".join(kept))


def duration(seconds: float) -> str:
    """Return a duration as H:MM:SS or M:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
