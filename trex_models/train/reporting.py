"""All output of a run: the console's progress line and metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trex_models.files import append, write_whole
from trex_models.train.distributed import Process, gather


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

    def restore(self, sums: Tensor) -> None:
        """Take on this process's part of ``gathered``; the mean where there were more or fewer."""
        own = sums[self._rank] if len(sums) == self._world_size else sums.mean(0)
        self._sums.copy_(own)


class Reporter:
    """Progress with rate and remaining time, and one JSON line per report.

    On a terminal the progress is a bar, elsewhere a line per report. Processes other than the
    main one stay silent.

    Args:
        path: The metrics file; lines of steps from ``start_step`` on, which an interrupted run
            left behind, are cut off.
        start_step: First step of this process's life.
        total_steps: Steps of the run.
        steps_per_epoch: Steps of an epoch.
        images_per_step: Global batch size.
        enabled: Whether this is the main process.
    """

    def __init__(
        self,
        path: Path,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        enabled: bool,
    ) -> None:
        self._path = path
        self._total = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._images_per_step = images_per_step
        self._enabled = enabled
        self._started = self._last_time = time.monotonic()
        self._start_step = self._last_step = start_step
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not enabled or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        if enabled:
            _truncate(path, start_step)

    def say(self, message: str) -> None:
        """Print one line above the progress bar."""
        if self._enabled:
            tqdm.write(message)

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
        rate = (done - self._last_step) * self._images_per_step / max(now - self._last_time, 1e-9)
        remaining = (now - self._started) / (done - self._start_step) * (self._total - done)
        self._last_time, self._last_step = now, done
        epoch = done / self._steps_per_epoch
        line: dict[str, Any] = {"step": done, "epoch": round(epoch, 4), **metrics}
        append(self._path, json.dumps(line | {"images_per_second": round(rate, 1)}) + "\n")
        shown = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self._bar.disable:
            print(
                f"step {done}/{self._total} epoch {epoch:.2f} {shown} "
                f"{rate:.0f} images/s, {_duration(remaining)} left",
                flush=True,
            )
        else:
            self._bar.set_postfix_str(f"{shown} {rate:.0f} images/s")

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
