"""A training run, from its first step to its export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trex_models.data.loading import load_batches
from trex_models.data.multicrop import augment
from trex_models.train import build, checkpointing, distributed
from trex_models.train.config import Config
from trex_models.train.reporting import Reporter
from trex_models.train.run import Run, prepared
from trex_models.train.signals import Alarm, Stopped, StopSignals
from trex_models.train.step import NonFiniteLossError, seed_step, training_step
from trex_models.train.validation import validate


def train(config: Config) -> list[Path]:
    """Train, or continue the run that ``config.output`` holds, to the end; then export.

    Returns:
        The exported folders (of the main process; empty for the others).

    Raises:
        ValueError: The configuration, the data or the output folder will not do, a checkpoint
            cannot be written, or the loss is no longer finite. The message says what to do.
        Stopped: A signal asked for it; the state is saved.
        PeerError: Another process failed.
    """
    with (
        distributed.process_group(config.system.device, config.system.backend) as process,
        StopSignals() as signals,
        prepared(config, process) as run,
        Reporter(
            run.folder / "metrics.jsonl",
            start_step=run.sampler.start_step,
            total_steps=run.sampler.total_steps,
            steps_per_epoch=run.sampler.steps_per_epoch,
            images_per_step=config.optim.batch_size,
            enabled=process.is_main,
        ) as reporter,
    ):
        for message in run.messages:
            reporter.say(message)
        _steps(run, signals, reporter)
        if not process.is_main:
            return []
        return build.export_checkpoint(run.folder, run.folder / "export", config.license)


def _steps(run: Run, signals: StopSignals, reporter: Reporter) -> None:
    """Take the steps that are left: batch, step, report, validation, checkpoint."""
    process, system, sampler = run.process, run.config.system, run.sampler
    if system.compile:
        run.method.encoder.compile()
    model = distributed.data_parallel(run.method, process, system.sync_batchnorm)
    workers, pinned = build.num_workers(run.config), process.device.type == "cuda"
    flags, alarm = distributed.SharedFlags(2), Alarm(60 * system.save_minutes)
    say = reporter.say

    batches = load_batches(run.dataset, sampler, workers, pinned, say)
    for step, batch in enumerate(batches, start=sampler.start_step):
        seed_step(run.config.seed, step, process.rank)
        crops = augment(batch, process.device)
        labels = batch.labels.to(process.device, non_blocking=True)
        rate = float(run.rates[step])
        try:
            loss, logits = training_step(
                model, run.method, run.optimizer, run.precision, crops, labels, rate
            )
        except NonFiniteLossError:
            raise ValueError(_keep_for_study(run, step, crops, labels)) from None
        run.meter.update(loss, logits[: len(labels)], labels)
        reporter.advance()

        done = step + 1
        last = done == sampler.total_steps
        measured: dict[str, float] = {}
        if last or done % system.log_every == 0:
            measured |= run.meter.read() | {"learning_rate": rate}
        if run.validation and done % run.steps_between_validations == 0:
            measured |= validate(
                run.method, run.validation, process, run.precision, len(labels), workers, say
            )
        if measured:
            reporter.report(done, measured)

        # The main process knows the time, any one may be told to stop: all act at the same step.
        due, stop = flags.exchange(process.is_main and alarm.due(), signals.received is not None)
        if last or stop or due or (system.save_steps and done % system.save_steps == 0):
            _save(run, done)
        if stop and not last:
            flags.finish()
            raise Stopped(signals.received, done, sampler.total_steps)
    flags.finish()


def _save(run: Run, done: int) -> None:
    """Check that all processes agree on what is saved, and that it is finite; then save it."""
    distributed.check_identical(run.shared_tensors())
    if not torch.stack([p.isfinite().all() for p in run.method.parameters()]).all():
        raise ValueError(
            f"weights are no longer finite after step {done}, and are not saved; {_REMEDY}"
        )
    state = run.state_after(done) | {"meter": run.meter.gathered()}
    if run.process.is_main:
        checkpointing.save(run.folder, state)
    distributed.barrier()  # a process that ends early would have the others ended, too


_REMEDY = "lower optim.base_lr, lengthen optim.warmup_epochs, or take --precision bf16 or fp32"


def _keep_for_study(run: Run, step: int, crops: list[Tensor], labels: Tensor) -> str:
    """Save a step whose loss is not finite: its inputs, and the state before it."""
    rank = run.process.rank
    path = run.folder / f"nonfinite_step_{step}_process_{rank}.pt"
    inputs = {"process": rank, "crops": [c.cpu() for c in crops], "labels": labels.cpu()}
    trouble = f"the loss of step {step} is no longer finite; {_REMEDY}"
    try:
        run.folder.mkdir(parents=True, exist_ok=True)  # another machine's
        checkpointing.write(path, run.state_after(step) | inputs)
    except (OSError, ValueError) as error:
        return f"{trouble} ({error})"
    return (
        f"{trouble}. Its inputs and state: method, crops, labels, precision = "
        f"trex_models.train.build.load_step({str(path)!r})"
    )
