"""A training run, from its first step to its export."""

from __future__ import annotations

from pathlib import Path
from signal import Signals

from trex_models.data.loading import GaveUpError, load_batches, to_device
from trex_models.data.multicrop import augment
from trex_models.train import build, distributed, saved
from trex_models.train.config import Config
from trex_models.train.health import class_directions, head_health
from trex_models.train.reporting import Reporter
from trex_models.train.run import Run, prepared
from trex_models.train.signals import Alarm, Stopped, StopSignals
from trex_models.train.step import NonFiniteLossError, seed_step, training_step
from trex_models.train.summary import summarize
from trex_models.train.validation import Validator


def train(config: Config, exits: bool = False) -> list[Path]:
    """Train, or continue the run that ``config.output`` holds, to the end; then export.

    Args:
        config: The configuration.
        exits: Whether the process exits afterwards, as ``StopSignals``.

    Returns:
        The exported folders (of the main process; empty for the others).

    Raises:
        ValueError: The configuration, the data or the output folder will not do, a checkpoint
            cannot be written, or the loss is no longer finite. The message says what to do.
        Stopped: A signal asked for it.
        PeerError: Another process failed.
    """
    with (
        distributed.process_group(config.system.device, config.system.backend) as process,
        StopSignals(process.is_main, exits) as signals,
        prepared(config, process) as run,
        Reporter(
            run.folder / "metrics.jsonl",
            start_step=run.sampler.start_step,
            total_steps=run.sampler.total_steps,
            steps_per_epoch=run.sampler.steps_per_epoch,
            images_per_step=config.optim.batch_size,
            process=process,
            tensorboard=run.folder / "tensorboard" if config.system.tensorboard else None,
        ) as reporter,
    ):
        for message in run.messages:
            reporter.say(message)
        _steps(run, signals, reporter)
        if not process.is_main:
            return []
        exported = saved.export_checkpoint(run.folder, run.folder / "export", run.config.license)
        reporter.finish()
        for line in summarize(run.folder, config.optim.batch_size, exported):
            reporter.say(line)
        return exported


def _steps(run: Run, signals: StopSignals, reporter: Reporter) -> None:
    """Take the steps that are left: batch, step, report, validation, checkpoint."""
    process, system, sampler = run.process, run.config.system, run.sampler
    if sampler.start_step == sampler.total_steps:
        return
    if system.compile:
        run.method.encoder.compile()
    model = distributed.data_parallel(run.method, process, system.sync_batchnorm)
    with run.precision.autocast():
        distributed.rehearse(model, *run.blank_inputs())
    workers, pinned = build.num_workers(run.config), process.device.type == "cuda"
    validator = _validator(run, workers, signals, reporter)
    flags, alarm = distributed.SharedFlags(2), Alarm(60 * system.save_minutes)
    batches = reporter.timed(
        load_batches(run.dataset, sampler, workers, pinned, reporter.say_from_any, signals.asked)
    )

    for step in range(sampler.start_step, sampler.total_steps):
        try:
            batch = next(batches)
        except (ValueError, GaveUpError) as error:
            if process.world_size == 1 and step > sampler.start_step:
                run.save(step)  # so that nothing is lost; of many processes, one alone is here
                if isinstance(error, GaveUpError) and signals.received:
                    raise Stopped(signals.received, step, sampler.total_steps) from error
            raise
        run.unreadable.add(batch.unreadable)
        seed_step(run.config.seed, step, process.rank)
        crops = augment(batch, process.device, system.compile)
        labels, ids = to_device([batch.labels, batch.ids], process.device)
        rate = float(run.rates[step])

        done = step + 1
        last = done == sampler.total_steps
        reports = last or done % system.log_every == 0
        before = class_directions(run.method.objective) if reports else None
        try:
            loss, logits = training_step(
                model, run.method, run.optimizer, run.precision, crops, labels, ids, rate
            )
        except NonFiniteLossError:
            raise ValueError(run.keep_step(step, crops, labels, ids)) from None
        run.meter.update(loss, logits[: len(labels)], labels)
        reporter.advance()

        measured: dict[str, float] = {}
        if reports:
            measured |= run.meter.read() | {"learning_rate": rate}
            measured |= head_health(run.method.objective, before)
        if validator and (last or done % run.steps_between_validations == 0):
            try:
                with reporter.aside():
                    measured |= validator.measure(run.method)
            except (ValueError, GaveUpError) as error:
                if isinstance(error, ValueError) or process.world_size == 1:
                    run.save(done)  # errors are those of all processes
                raise
        if measured:
            _report(run, reporter, done, measured)

        # The main process knows the time, any one may be told to stop: all act at the same step.
        due, stop = flags.exchange(process.is_main and alarm.due(), signals.received or 0)
        if last or stop or due or (system.save_steps and done % system.save_steps == 0):
            with reporter.aside():
                run.save(done)
        if stop and not last:
            flags.finish()
            raise Stopped(Signals(stop), done, sampler.total_steps)
    flags.finish()


def _validator(
    run: Run, workers: int, signals: StopSignals, reporter: Reporter
) -> Validator | None:
    if run.validation is None:
        return None
    return Validator(
        run.validation,
        run.process,
        run.precision,
        run.config.optim.batch_size // run.process.world_size,
        workers,
        neighbors=run.neighbors,
        say=reporter.say_from_any,
        asked_to_stop=signals.asked,
        watch=reporter.watched,
        pass_over=run.unreadable.add_of_validation,
        pass_over_reference=run.unreadable.add,
    )


def _report(run: Run, reporter: Reporter, done: int, measured: dict[str, float]) -> None:
    """Report, and end the run where too many images cannot be read, after saving it."""
    run.share_unreadable(reporter.say)
    run.report_changed_files(reporter.say)
    if run.unreadable:
        measured["unreadable"] = len(run.unreadable)
    reporter.report(done, measured)
    if run.unreadable.too_many:
        run.save(done)
        raise distributed.SharedError(run.unreadable.trouble())
