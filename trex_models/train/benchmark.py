"""Benchmark of a run on this machine: data loading, the training step, and both combined.

    python -m trex_models.train RECIPE --benchmark [--OPTION VALUE ...]

The learning rate is 0 and no file is written; ``config.output`` may be empty.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from trex_models import distributed
from trex_models.data.loading import NUM_BUFFERS, load_batches, to_device
from trex_models.data.multicrop import Batch, augment
from trex_models.precision import free_cores, processor
from trex_models.train.build import available_cores, build_sampler
from trex_models.train.config import Config
from trex_models.train.reporting import duration
from trex_models.train.run import Run
from trex_models.train.setup import build_run, wrap_model
from trex_models.train.step import training_step

SECONDS = 12.0  # duration of each measurement, after a warm-up of a quarter of it
_MIN_REPEATS = 3  # steps or batches per measurement
_ENDLESS = 10**9  # epochs


def benchmark(config: Config) -> None:
    """Measure for about a minute; rank 0 prints a table, the bottleneck and its remedy.

    All ranks must call this function.
    """
    with distributed.process_group(config.system.device, config.system.backend) as process:
        run = build_run(config, process)

        def log(line: str) -> None:
            if process.is_main:
                tqdm.write(line)
                sys.stdout.flush()

        bench = _Bench(run, log)
        if bench.is_cuda:
            log(f"{torch.cuda.get_device_name(process.device)}, CUDA {torch.version.cuda}")
        log(f"{processor()}, {free_cores()} cores; torch {torch.__version__}")
        for line in run.messages:
            log(line)
        run.model = wrap_model(run)
        log(f"\n{'':<14}{'images/s':>10}{'ms/batch':>12}")
        loader = bench.loader()
        step = bench.step()
        both = bench.both(loader < step)
        cores = available_cores()
        log("\n" + describe_throughput(loader, step, both, run.workers, cores, bench.is_cuda))
        if bench.is_cuda:
            used = torch.cuda.max_memory_allocated(process.device) / 1e9
            total = torch.cuda.get_device_properties(process.device).total_memory / 1e9
            log(f"Device memory: {used:.1f} of {total:.0f} GB")
        images = run.sampler.total_steps * config.optim.batch_size
        epochs, seconds = config.optim.epochs, images / both
        log(
            f"The complete run takes {format_number(seconds / 3600)} hours ({duration(seconds)}): "
            f"{epochs} epoch{'s' * (epochs != 1)}, {images:,} images at {format_number(both)} "
            "images/s; validation and checkpoints take additional time"
        )


def describe_throughput(
    loader: float, step: float, both: float, workers: int, cores: int, cuda: bool
) -> str:
    """Return one line that names the bottleneck and the most effective remedy.

    The rates of the loader, of the step, and of both combined are in images per second; ``workers``
    and ``cores`` are numbers per training process.
    """
    ratio = loader / step
    enough = max(1, math.ceil(1.1 * max(workers, 1) / ratio))  # slightly faster than the step
    line = f"loader / step = {format_number(ratio)}. "
    if ratio < 1:
        line += f"The loader is the bottleneck: the step waits for it {1 - ratio:.0%} of the time. "
        if workers < cores:
            return line + f"Try --system.workers {min(enough, cores)}: there are {cores} cores"
        return line + f"The workers use all {cores} cores; {enough} cores would keep the step busy"
    if both < 0.8 * step and workers == 0 and ratio < 5:
        return line + "Loading and training alternate in one process. Try --system.workers 1"
    if both < 0.8 * step:
        line += f"Combined, both reach {both / step:.0%} of the step's rate: they share cores. "
        if enough < workers:
            return line + f"Try --system.workers {enough}"
        return line + f"More cores would help{'' if cuda else ', or training on a CUDA device'}"
    remedy = "--precision bf16, --system.compile or more GPUs" if cuda else "a CUDA device"
    return line + f"The step is the bottleneck. Try {remedy}"


class _Bench:
    """Measurements of a run, in the order in which they must be called, on all ranks.

    Each returns a rate in images per second.
    """

    def __init__(self, run: Run, log: Callable[[str], object]) -> None:
        self._run = run
        self._log = log
        self._process = run.process
        self._batch_size = run.config.optim.batch_size
        self._read = 0
        self._batch: Batch
        self.is_cuda = run.process.device.type == "cuda"

    def loader(self) -> float:
        """Measure data loading without training."""
        batches, workers, world_size = self._batches(), self._run.workers, self._process.world_size

        def load() -> None:
            self._batch = next(batches)

        # Skip the batches that the first workers loaded while the other workers started.
        self._repeat(load, SECONDS / 4, max(1, NUM_BUFFERS * workers))
        seconds = self._repeat(load, SECONDS, max(_MIN_REPEATS, workers))
        rate = sum(distributed.gather_objects(self._batch_size / world_size / seconds))
        each = f"{workers} worker{'s' * (workers != 1)} for each of {world_size}"
        note = f"{each} process{'es' * (world_size != 1)}"
        self._log_row("loader only", rate, note if workers else "in the training process itself")
        return rate

    def step(self) -> float:
        """Measure augmentation and training step, without loading: on one batch."""
        train = partial(self._train, self._batch)
        self._repeat(train, SECONDS / 4, 2)
        seconds = self._repeat(train, SECONDS, _MIN_REPEATS)
        augmentation = partial(self._augment, self._batch)
        share = self._repeat(augmentation, SECONDS / 4, _MIN_REPEATS) / seconds
        rate = self._batch_size / seconds
        self._log_row("step only", rate, f"augmentation takes {share:.0%} of the step")
        return rate

    def both(self, loader_is_slower: bool) -> float:
        """Measure training: loading and steps combined."""
        batches, waited = self._batches(), 0.0

        def train() -> None:
            nonlocal waited
            started = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - started
            self._train(batch)

        # Consume the batches that a slower loader has prefetched: later steps find none.
        ahead = NUM_BUFFERS * self._run.workers if loader_is_slower else 0
        self._repeat(train, SECONDS / 4, max(2, ahead))
        waited, started = 0.0, time.monotonic()
        seconds = self._repeat(train, SECONDS, max(_MIN_REPEATS, self._run.workers))
        share = waited / (time.monotonic() - started)
        rate = self._batch_size / seconds
        self._log_row("both", rate, f"waiting for data {share:.0%} of the time")
        return rate

    def _batches(self) -> Iterator[Batch]:
        """Yield batches endlessly, of images that no earlier call has read.

        Images that were read before are in the page cache; those of a large dataset are not.
        """
        run = self._run
        optim = replace(run.config.optim, epochs=_ENDLESS)
        sampler = build_sampler(optim, run.config.seed, len(run.dataset.source), run.process)
        sampler.start_step = self._read
        self._read += NUM_BUFFERS * run.workers
        for batch in load_batches(run.dataset, sampler, run.workers, self.is_cuda, self._log):
            self._read += 1
            yield batch

    def _train(self, batch: Batch) -> None:
        run, crops = self._run, self._augment(batch)
        labels, indices = to_device([batch.labels, batch.indices], self._process.device)
        training_step(
            run.model, run.method, run.optimizer, run.precision, crops, labels, indices, 0.0
        )

    def _augment(self, batch: Batch) -> list[Tensor]:
        return augment(batch, self._process.device, self._run.config.system.compile)

    def _repeat(self, act: Callable[[], object], seconds: float, minimum: int) -> float:
        """Call a function for some seconds, at least ``minimum`` times, as often on all ranks.

        Returns the mean duration of a call in seconds.
        """
        flags, done, passed = distributed.SharedFlags(1), 0, 0.0
        self._synchronize()
        started = time.monotonic()
        while not any(flags.exchange(done >= minimum and passed >= seconds)):
            act()
            done += 1
            passed = time.monotonic() - started
        flags.finish()
        self._synchronize()
        return (time.monotonic() - started) / done

    def _synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self._process.device)

    def _log_row(self, name: str, rate: float, note: str) -> None:
        milliseconds = format_number(1000 * self._batch_size / rate)
        self._log(f"{name:<14}{format_number(rate):>10}{milliseconds:>12}  {note}")


def format_number(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
