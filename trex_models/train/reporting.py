"""Reports of a run: progress, metrics.jsonl, TensorBoard files, diagnostics, a summary.

Shapes: B batch, C classes, D embedding, Q bank size.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from trex_models.atomic import append, write_text_file
from trex_models.cli import progress_bar
from trex_models.data.multicrop import EpochSampler
from trex_models.distributed import Process, gather
from trex_models.method.objectives import Objective

T = TypeVar("T")

# Entries of metrics.jsonl that differ when the same run is repeated.
TIMINGS = ("images_per_second", "waiting_for_data")
_TRAINED = ("loss", "accuracy", "cosine", "unreadable")
_VALIDATED = ("val_top1", "val_top5", "val_knn", "val_rank")
_BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Meter:
    """Mean loss and accuracy, or cosine, since the last ``read``, accumulated on the device."""

    def __init__(self, process: Process, predicts_labels: bool = True) -> None:
        self._process = process
        self._score = "accuracy" if predicts_labels else "cosine"
        self._sums = torch.zeros(3, device=process.device)  # loss, score, steps

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step: its loss, labels, (B,), and first logits, (B, C), or similarities, (B,)."""
        scores = logits if self._score == "cosine" else logits.argmax(1) == labels
        score = scores.float().mean()
        self._sums += torch.stack([loss.float(), score, torch.ones_like(score)])

    def read(self) -> dict[str, float]:
        """Return the means over steps and ranks and reset them; waits for the device."""
        loss, score, steps = self.gathered().sum(0).tolist()
        self._sums.zero_()
        return {"loss": loss / steps, self._score: score / steps}

    def gathered(self) -> Tensor:
        """Return the sums of all ranks, (ranks, 3); all ranks must call this method."""
        return gather(self._sums[None])

    def load_state_dict(self, sums: Tensor) -> None:
        """Restore this rank's row of ``gathered``, or the mean if the number of ranks changed."""
        process = self._process
        same = len(sums) == process.world_size
        self._sums.copy_(sums[process.rank] if same else sums.mean(0))


class Reporter:
    """Progress with rate, remaining time and time spent waiting; metrics as one JSON line a report.

    On a terminal, progress is a bar, with a line above it for each validation; otherwise it is a
    line per report. Only rank 0 prints and writes.

    Args:
        path: Metrics file. Lines of later steps, left by an interrupted run, are removed.
        sampler: Sampler of the run, whose ``start_step`` is the first step since this start.
        images_per_step: Global batch size.
        process: This process.
        tensorboard: Folder for TensorBoard files; None disables them.
    """

    def __init__(
        self,
        path: Path,
        sampler: EpochSampler,
        images_per_step: int,
        process: Process,
        tensorboard: Path | None = None,
    ) -> None:
        self._path = path
        self._sampler = sampler
        self._images_per_step = images_per_step
        self._process = process
        self._started = self._last_time = time.monotonic()
        self._last_step = start_step = sampler.start_step
        self._waited = self._untimed = 0.0
        self._bar = progress_bar(
            sampler.total_steps,
            "",
            "step",
            initial=start_step,
            bar_format=_BAR,
            disable=not process.is_main or not sys.stderr.isatty(),
        )
        self._writer: Any = None
        if process.is_main and tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow import

            # purge_step hides later steps, which an interrupted run wrote.
            purge_step = start_step + 1 if start_step else 0
            self._writer = SummaryWriter(str(tensorboard), purge_step=purge_step)
        if process.is_main:
            _truncate(path, start_step)

    def log(self, message: str) -> None:
        """Print a line above the progress bar, on rank 0 only."""
        if self._process.is_main:
            tqdm.write(message)

    def log_on_any_rank(self, message: str) -> None:
        """Print a line above the progress bar, on any rank."""
        rank = "" if self._process.is_main else f"process {self._process.rank}: "
        tqdm.write(rank + message)

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches, and measure the time spent waiting for them."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.monotonic() - started
            yield batch

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the duration of a block, such as a validation, from the rates."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._untimed += time.monotonic() - started

    def with_progress(self, batches: Iterator[T], count: int, name: str) -> Iterator[T]:
        """Yield the batches with a second progress bar, which disappears at the end."""
        hidden = bool(self._bar.disable)
        with progress_bar(count, name, "batch", leave=False, disable=hidden) as bar:
            for batch in batches:
                yield batch
                bar.update()

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def report_start(self, metrics: dict[str, float]) -> None:
        """Record the validation of the weights before the first step."""
        if self._process.is_main:
            self._write({"step": 0, "epoch": 0.0, **metrics})
            k, rank = metrics["val_knn"], metrics["val_rank"]
            self.log(f"starting weights: k-NN {k:.1%}, effective rank of features {rank:.4g}")

    def report(self, done: int, metrics: dict[str, float]) -> None:
        """Print and record the metrics after ``done`` steps of the run."""
        if not self._process.is_main:
            return
        now = time.monotonic()
        training = max(now - self._last_time - self._untimed, 1e-9)
        rate = (done - self._last_step) * self._images_per_step / training
        waiting = self._waited / training
        total, taken = self._sampler.total_steps, done - self._sampler.start_step
        remaining = (now - self._started) / taken * (total - done)
        self._last_time, self._last_step = now, done
        self._waited = self._untimed = 0.0
        epoch = done / self._sampler.steps_per_epoch
        line: dict[str, Any] = {"step": done, "epoch": round(epoch, 4), **metrics}
        line |= {"images_per_second": float(f"{rate:.4g}"), "waiting_for_data": round(waiting, 4)}
        self._write(line)
        trained, validated = (
            "".join(f"{name} {metrics[name]:.4g} " for name in names if name in metrics)
            for names in (_TRAINED, _VALIDATED)
        )
        speed = f"{rate:.0f} images/s, {waiting:.0%} waiting for data"
        if self._bar.disable:
            progress = f"step {done}/{total} epoch {epoch:.2f} {trained}{validated}{speed}"
            print(f"{progress}, {duration(remaining)} left", flush=True)
        else:
            if validated:
                self.log(f"epoch {epoch:g}: {validated.rstrip()}")
            self._bar.set_postfix_str(f"{speed}, {trained.rstrip()}")

    def _write(self, line: dict[str, Any]) -> None:
        append(self._path, json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()

    def finish(self) -> None:
        """Close the progress bar: later lines are printed below it."""
        self._bar.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        if self._writer is not None:
            self._writer.close()


def _truncate(path: Path, start_step: int) -> None:
    """Remove lines of steps after ``start_step`` and incomplete lines."""
    kept = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                if start_step and json.loads(line)["step"] <= start_step:
                    kept.append(line + "\n")
            except (KeyError, TypeError, ValueError):
                continue
    write_text_file(path, "".join(kept))


def duration(seconds: float) -> str:
    """Format a duration in seconds as H:MM:SS or M:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@torch.no_grad()
def class_directions(objective: Objective) -> Tensor | None:
    """Return normalized classifier weights or prototypes, (C, D); None if there are none."""
    weights = objective.classifier_weights()
    return None if weights is None else F.normalize(weights.float(), dim=1)


def head_health(objective: Objective, before: Tensor | None) -> dict[str, float]:
    """Return diagnostics of the head after a step (see docs/training.md); waits for the device.

    ``before`` is the result of ``class_directions`` before the step: t-ReX section 5 compares the
    drift of prototypes (Eq. 2) and of learned weights (Eq. 1).
    """
    measured: dict[str, float] = {}
    after = class_directions(objective)
    if before is not None and after is not None:
        measured["prototype_change"] = (after - before).norm(dim=1).mean().item()
        measured["empty_prototypes"] = int((~after.any(1)).sum())
    bank = objective.bank
    if bank is not None:
        own = bank.written >= 0  # written by this run, unlike the initial entries
        ages = bank.batches - 1 - bank.written[own]
        measured |= {
            "bank_classes": len(bank.labels[own].unique()) / bank.num_classes,
            "bank_age": ages.double().mean().item() if len(ages) else 0.0,
            "bank_oldest": int(ages.max()) if len(ages) else 0,
            "bank_initial": 1 - len(ages) / len(own),
        }
    return measured


def _compare(first: dict[str, Any], last: dict[str, Any], images: int) -> str:
    """Say whether k-NN on the trained features is more accurate than on the initial ones."""
    before, after = first["val_knn"], last["val_knn"]
    error = ((before * (1 - before) + after * (1 - after)) / images) ** 0.5
    verdict = "is better than" if after > before else "is worse than"
    if abs(after - before) <= 2 * error:
        verdict = f"does not differ significantly ({images} images) from"
    return (
        f"features: k-NN {after:.1%} {verdict} {before:.1%} of the starting weights; "
        f"effective rank {last['val_rank']:.4g}, {first['val_rank']:.4g} at the start"
    )


def summarize(
    folder: Path, images_per_step: int, exported: Sequence[Path], validation_images: int
) -> list[str]:
    """Return a summary of a finished run in lines: time, rates, metrics and next steps.

    Time and rates are totals over all starts, without validation and checkpoints.
    """
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    start = metrics.pop(0) if metrics and not metrics[0]["step"] else None
    lines = []
    if metrics:
        # Computed from the rates, so that time lost by an interruption does not count.
        seconds = waited = 0.0
        images = 0
        for line in metrics:
            before, images = images, line["step"] * images_per_step
            span = (images - before) / line["images_per_second"]
            seconds += span
            waited += span * line["waiting_for_data"]
        lines.append(
            f"finished: {metrics[-1]['step']} steps, {metrics[-1]['epoch']:g} epochs, "
            f"{images:,} images in {duration(seconds)} ({images / seconds:.0f} images/s, "
            f"{waited / seconds:.0%} waiting for data)"
        )
    if trained := [line for line in metrics if "loss" in line]:
        last = trained[-1]
        score = f"cosine {last['cosine']:.3f}" if "cosine" in last else ""
        score = score or f"accuracy {last['accuracy']:.1%}"
        lines.append(f"training: loss {last['loss']:.4g}, {score} (global crop)")
    measured = [line for line in metrics if "val_knn" in line]
    if validated := [line for line in metrics if "val_top1" in line]:
        last, best = validated[-1], max(validated, key=lambda line: line["val_top1"])
        nearest = f", k-NN {last['val_knn']:.1%}" if "val_knn" in last else ""
        lines.append(
            f"validation: top-1 {last['val_top1']:.1%} (best {best['val_top1']:.1%} at epoch "
            f"{best['epoch']:g}), top-5 {last['val_top5']:.1%}{nearest}"
        )
    elif measured:
        knn = [line["val_knn"] for line in measured]
        lines.append(f"validation: k-NN {knn[-1]:.1%} (best {max(knn):.1%})")
    if start and measured:
        lines.append(_compare(start, measured[-1], validation_images))
    listed = folder / "unreadable.txt"
    if listed.exists():
        count = len(listed.read_text().splitlines())
        lines.append(f"{count} unreadable images were skipped; see {listed}")
    backbone = exported[0]
    return [
        *lines,
        f"plot the curves: python -m trex_models.plot {folder}",
        *(f"exported {path}" for path in exported),
        f'load the backbone: timm.create_model("local-dir:{backbone}", pretrained=True)',
        f"prepare it for the Hub, in a checkout of the repository: python -m hub build {backbone} "
        "--output HUB --name NAME --owner YOU --namespace YOU [--license ID]",
    ]
