"""The training loop: from the first step of a run to its export."""

from __future__ import annotations

from pathlib import Path
from signal import Signals

from trex_models import distributed
from trex_models.data.loading import LoaderStalledError, load_batches, to_device
from trex_models.data.multicrop import augment
from trex_models.train.config import Config
from trex_models.train.export import export_checkpoint
from trex_models.train.reporting import Reporter, class_directions, head_health, summarize
from trex_models.train.run import Run
from trex_models.train.setup import setup_run
from trex_models.train.signals import Alarm, StoppedBySignal, StopSignals
from trex_models.train.step import NonFiniteLossError, seed_step, training_step
from trex_models.train.validation import Validator


def train(config: Config, exits: bool = False) -> list[Path]:
    """Start or resume the run in ``config.output``, finish it, and export the models.

    Returns the exported folders on rank 0. Set ``exits`` if the process exits afterwards: later
    signals are then ignored.

    Raises:
        ValueError: The config, data or output directory is invalid, a checkpoint cannot be
            written, or the loss is no longer finite. The message names the remedy.
        StoppedBySignal: A signal stopped the run.
        PeerError: Another process failed.
    """
    with (
        distributed.process_group(config.system.device, config.system.backend) as process,
        StopSignals(process.is_main, exits) as signals,
        setup_run(config, process) as run,
        Reporter(
            run.folder / "metrics.jsonl",
            run.sampler,
            config.optim.batch_size,
            process,
            run.folder / "tensorboard" if config.system.tensorboard else None,
        ) as reporter,
    ):
        # Not printed earlier: the progress bar would overwrite these lines.
        for message in run.messages:
            reporter.log(message)
        _train_steps(run, signals, reporter)
        if not process.is_main:
            return []
        # From the file, not from memory, so that a later export of the run is identical.
        exported = export_checkpoint(run.folder, run.folder / "export", run.config.license)
        reporter.finish()
        validated = len(run.validation.source) if run.validation else 0
        for line in summarize(run.folder, config.optim.batch_size, exported, validated):
            reporter.log(line)
        return exported


def _train_steps(run: Run, signals: StopSignals, reporter: Reporter) -> None:
    process, system, sampler = run.process, run.config.system, run.sampler
    if sampler.start_step == sampler.total_steps:
        return
    validator = _build_validator(run, signals, reporter)
    steps_between_validations = run.config.validation.every * sampler.steps_per_epoch
    flags, alarm = distributed.SharedFlags(2), Alarm(60 * system.save_minutes)
    pinned = process.device.type == "cuda"  # copies of page-locked batches overlap with steps
    log, asked = reporter.log_on_any_rank, lambda: signals.received
    if validator and run.neighbors and sampler.start_step == 0:
        with reporter.untimed():
            start = validator.measure_start(run.method, calibrate=not run.config.init_from)
            reporter.report_start(start)
    batches = reporter.timed(load_batches(run.dataset, sampler, run.workers, pinned, log, asked))

    parts = run.model, run.method, run.optimizer, run.precision
    clip_grad = run.config.optim.clip_grad
    for step in range(sampler.start_step, sampler.total_steps):
        try:
            batch = next(batches)
        except (ValueError, LoaderStalledError) as error:
            if process.world_size == 1 and step > sampler.start_step:
                run.save(step)  # with several ranks, the others would not take part
                if isinstance(error, LoaderStalledError) and signals.received:
                    raise StoppedBySignal(signals.received, step, sampler.total_steps) from error
            raise
        run.unreadable.training |= batch.unreadable  # of this rank; exchanged at reports
        # Random numbers of a step depend only on (seed, step, rank), so resuming is exact.
        seed_step(run.config.seed, step, process.rank)
        crops = augment(batch, process.device, system.compile)
        labels, indices = to_device([batch.labels, batch.indices], process.device)
        rate = float(run.lr_schedule[step])

        done = step + 1
        last = done == sampler.total_steps
        reports = last or done % system.log_every == 0
        # head_health compares these with the prototypes after the step.
        before = class_directions(run.method.objective) if reports else None
        try:
            loss, logits = training_step(*parts, crops, labels, indices, rate, clip_grad)
        except NonFiniteLossError:  # raised before any weight changes: the step can be replayed
            raise ValueError(run.save_failed_step(step, crops, labels, indices)) from None
        # Stays on the device: reading the loss would wait for the step. The first B rows are the
        # logits of the first global crop.
        run.meter.update(loss, logits[: len(labels)], labels)
        reporter.advance()

        measured: dict[str, float] = {}
        if reports:  # besides the check of the loss, the only wait for the device
            measured |= run.meter.read() | {"learning_rate": rate}
            measured |= head_health(run.method.objective, before)
        if validator and (last or done % steps_between_validations == 0):
            try:
                with reporter.untimed():
                    measured |= validator.measure(run.method)
            except (ValueError, LoaderStalledError) as error:
                # All ranks raise a ValueError, so that they can save together before they end.
                if isinstance(error, ValueError) or process.world_size == 1:
                    run.save(done)
                raise
        if measured:
            _report(run, reporter, done, measured)

        # Rank 0 keeps the time and any rank may receive a signal, but all ranks must act at the
        # same step. The exchange overlaps with the next step, so its result is one step old.
        due, stop = flags.exchange(process.is_main and alarm.due(), signals.received or 0)
        if last or stop or due or (system.save_steps and done % system.save_steps == 0):
            with reporter.untimed():
                run.save(done)
        if stop and not last:  # after the last step, the run is exported
            flags.finish()  # a rank that exits during an exchange would hang
            raise StoppedBySignal(Signals(stop), done, sampler.total_steps)
    flags.finish()


def _build_validator(run: Run, signals: StopSignals, reporter: Reporter) -> Validator | None:
    if run.validation is None:
        return None
    return Validator(
        run.validation,
        run.process,
        run.precision,
        run.config.optim.batch_size // run.process.world_size,
        run.workers,
        neighbors=run.neighbors,
        log=reporter.log_on_any_rank,
        should_stop=lambda: signals.received,
        with_progress=reporter.with_progress,
        on_skip=run.unreadable.validation.update,
        on_skip_reference=run.unreadable.training.update,
    )


def _report(run: Run, reporter: Reporter, done: int, measured: dict[str, float]) -> None:
    run.exchange_unreadable(reporter.log)
    run.report_changed_files(reporter.log)
    if run.unreadable.training:
        measured["unreadable"] = len(run.unreadable.training)
    reporter.report(done, measured)
    if message := run.unreadable.error_message():
        run.save(done)
        raise distributed.SharedError(message)
