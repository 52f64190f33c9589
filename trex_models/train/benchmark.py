"""How fast a run would be on this machine, with its data: the loader, the step, both; and advice.

    python -m trex_models.train RECIPE --benchmark [--FIELD VALUE ...]

Nothing is learned (the learning rate is 0), saved or written; ``config.output`` may be empty.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trex_models.data.decode import UnreadableImageError
from trex_models.data.loading import LIVE_BATCHES, load_batches, to_device
from trex_models.data.multicrop import Batch, CropSpec, augment
from trex_models.data.sources import Source
from trex_models.machine import free_cores, processor, processor_facts
from trex_models.train import build, distributed, preflight
from trex_models.train.advice import Rates, Setting, advice, figure
from trex_models.train.config import Config
from trex_models.train.reporting import duration
from trex_models.train.run import Run, built
from trex_models.train.step import training_step

SECONDS = 12.0  # of each of the three measurements; a quarter of it for what prepares them
_LEAST = 3  # steps, or batches, of a measurement
_ENDLESS = 10**9  # epochs
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "simplejpeg")
_SAMPLES = 16  # images whose size is looked at


def benchmark(config: Config) -> None:
    """Measure for about a minute; print a table, the bottleneck, and what helps.

    Every process must call it; the main process prints.

    Raises:
        ValueError: The configuration or the data will not do for training.
        PeerError: Another process failed.
    """
    with distributed.process_group(config.system.device, config.system.backend) as process:
        run = built(config, process)

        def say(line: str) -> None:
            if process.is_main:
                tqdm.write(line)
                sys.stdout.flush()

        say(_machine(process.device))
        for message in run.messages:
            say(message)
        bench = _Bench(run, say)
        say(f"\n{'':<14}{'images/s':>10}{'ms a batch':>12}")
        loader = bench.loader()
        step = bench.step()
        rates = Rates(loader=loader, step=step, both=bench.both(loader < step))
        images = run.sampler.total_steps * config.optim.batch_size
        seconds = images / rates.both
        say("\n".join(["", *bench.details(), ""]))
        say("\n".join([*advice(rates, bench.setting()), ""]))
        say(
            f"The whole run takes {figure(seconds / 3600)} hours ({duration(seconds)}): "
            f"{_epochs(config.optim.epochs)}, {images:,} images at {figure(rates.both)} images/s; "
            "validation and checkpoints come on top"
        )


@dataclass(frozen=True)
class _Worker:
    """A loader process in the mean: images per second, shares of its time, most memory in bytes.

    What is 0 is not known.
    """

    rate: float = 0.0
    computed: float = 0.0
    queued: float = 0.0
    memory: int = 0

    @property
    def blocked(self) -> float:
        """Share of its time that it waits otherwise: for files, above all."""
        return max(0.0, 1 - self.computed - self.queued) if self.computed else 0.0

    def __str__(self) -> str:
        told = f"A worker loads {figure(self.rate)} images/s"
        if not self.computed:
            return told
        return (
            f"{told}, {figure(self.rate / self.computed)} per CPU second: it computes "
            f"{self.computed:.0%} of the time, waits for a core {self.queued:.0%}, otherwise "
            f"(files) {self.blocked:.0%}"
        )


class _Bench:
    """The measurements, in their order; every process takes part in each.

    Args:
        run: At its first step.
        say: What to do with a line.
    """

    def __init__(self, run: Run, say: Callable[[str], object]) -> None:
        self._run = run
        self._say = say
        self._process = run.process
        self._workers = build.num_workers(run.config)
        self._batch_size = run.config.optim.batch_size
        self._read = 0
        self._batch: Batch
        self._worker = _Worker()
        if run.config.system.compile:
            run.method.encoder.compile()
        self._model = distributed.data_parallel(
            run.method, run.process, run.config.system.sync_batchnorm
        )
        with run.precision.autocast():
            distributed.rehearse(self._model, *run.blank_inputs())
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._process.device)

    @property
    def _cuda(self) -> bool:
        return self._process.device.type == "cuda"

    def loader(self) -> float:
        """Measure the loader alone; return images per second."""
        batches = self._batches()

        def load() -> None:
            self._batch = next(batches)

        # What the workers made while the first of them started does not count.
        self._repeat("loader: warming up", load, SECONDS / 4, max(1, LIVE_BATCHES * self._workers))
        workers = [child.pid for child in multiprocessing.active_children()]
        before, started = _scheduled(workers), time.monotonic()
        seconds = self._repeat("loader", load, SECONDS, max(_LEAST, self._workers))
        after, passed = _scheduled(workers), time.monotonic() - started
        own = self._batch_size / self._process.world_size / seconds
        rate = sum(distributed.gather_objects(own))
        self._row("loader alone", rate, _each(self._workers, self._process.world_size))
        if workers:
            computed, queued = (
                (a - b) / passed / len(workers) for a, b in zip(after, before, strict=True)
            )
            self._worker = _Worker(own / len(workers), computed, queued, _peak_memory(workers))
        return rate

    def step(self) -> float:
        """Measure augmentation and step, on one batch again and again; return images per second."""

        def train() -> None:
            self._train(self._batch)

        self._repeat("step: warming up", train, SECONDS / 4, 2)
        seconds = self._repeat("step", train, SECONDS, _LEAST)
        augmentation = self._repeat(
            "augmentation",
            lambda: self._augment(self._batch),
            SECONDS / 4,
            _LEAST,
        )
        rate = self._batch_size / seconds
        self._row("step alone", rate, f"augmentation is {augmentation / seconds:.0%} of it")
        return rate

    def both(self, loader_is_slower: bool) -> float:
        """Measure training; return images per second.

        Args:
            loader_is_slower: Whether batches loaded ahead, which no step will find later, must be
                used up first.
        """
        batches = self._batches()
        waited = 0.0

        def train() -> None:
            nonlocal waited
            started = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - started
            self._train(batch)

        ahead = LIVE_BATCHES * self._workers if loader_is_slower else 0
        self._repeat("both: warming up", train, SECONDS / 4, max(2, ahead))
        waited, started = 0.0, time.monotonic()
        least = max(_LEAST, self._workers) if loader_is_slower else _LEAST
        seconds = self._repeat("both", train, SECONDS, least)
        share = waited / (time.monotonic() - started)
        rate = self._batch_size / seconds
        self._row("both", rate, f"{share:.0%} of the time waiting for data")
        return rate

    def details(self) -> list[str]:
        """Return lines on a worker's time and on the highest use of memory."""
        used = []
        if self._cuda:
            total = torch.cuda.get_device_properties(self._process.device).total_memory
            used.append(
                f"{self._process.device} {_gigabytes(self._device_memory)} of {_gigabytes(total)}"
            )
        if own := _peak_memory([os.getpid()]):
            used.append(f"this process {_gigabytes(own)}")
        if self._worker.memory:
            used.append(f"a worker {_gigabytes(self._worker.memory)}, much of it shared")
        lines = [str(self._worker)] if self._workers else []
        return [*lines, f"Memory, at most: {', '.join(used)}"] if used else lines

    def setting(self) -> Setting:
        """Return what advice depends on beside the rates."""
        config, device = self._run.config, self._process.device
        memory = 1.0
        if self._cuda:
            memory = self._device_memory / torch.cuda.get_device_properties(device).total_memory
        return Setting(
            workers=self._workers,
            cores=max(1, free_cores() // build.local_processes()),
            queued=self._worker.queued,
            blocked=self._worker.blocked,
            files=config.data.source != "fractals",
            simplejpeg=find_spec("simplejpeg") is not None,
            side=_shorter_side(self._run.dataset.source),
            needed_side=_needed_side(self._run.dataset.specs),
            cuda=self._cuda,
            bf16=config.precision in ("fp32", "tf32") and self._has_fast_bf16(),
            channels_last=config.system.channels_last,
            compiled=config.system.compile,
            recomputes=config.system.checkpoint_activations,
            idle_devices=max(0, torch.cuda.device_count() - build.local_processes()),
            memory=memory,
        )

    def _has_fast_bf16(self) -> bool:
        if self._cuda:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        try:
            preflight.cpu_bfloat16(
                "bf16", self._process.device, [spec.size for spec in self._run.dataset.specs]
            )
        except ValueError:
            return False
        return "amx_bf16" in processor_facts("flags")

    @property
    def _device_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self._process.device)

    def _batches(self) -> Iterator[Batch]:
        """Yield batches, epoch after epoch, of images that no call before has read.

        Those are in the system's cache, where a large data set's are not.
        """
        config = self._run.config
        config = replace(config, optim=replace(config.optim, epochs=_ENDLESS))
        sampler = build.build_sampler(config, len(self._run.dataset.source), self._process)
        sampler.start_step = self._read
        self._read += LIVE_BATCHES * self._workers
        for batch in load_batches(self._run.dataset, sampler, self._workers, self._cuda, self._say):
            self._read += 1
            yield batch

    def _train(self, batch: Batch) -> None:
        run, device = self._run, self._process.device
        crops = self._augment(batch)
        labels, ids = to_device([batch.labels, batch.ids], device)
        training_step(
            self._model, run.method, run.optimizer, run.precision, crops, labels, ids, 0.0
        )

    def _augment(self, batch: Batch) -> list[Tensor]:
        return augment(batch, self._process.device, self._run.config.system.compile)

    def _repeat(self, name: str, act: Callable[[], object], seconds: float, least: int) -> float:
        """Act for some seconds, at least some times, and equally often in all processes.

        Returns:
            Seconds that it took once, in the mean.
        """
        flags, done, passed = distributed.SharedFlags(1), 0, 0.0
        bar = tqdm(
            total=seconds,
            desc=name,
            bar_format="{desc} {percentage:3.0f}%|{bar}|",
            leave=False,
            disable=not self._process.is_main or not sys.stderr.isatty(),
        )
        with bar:
            self._finish_work()
            started = time.monotonic()
            while not any(flags.exchange(done >= least and passed >= seconds)):
                act()
                done += 1
                passed = time.monotonic() - started
                bar.update(min(passed, seconds) - bar.n)
            flags.finish()
            self._finish_work()
            return (time.monotonic() - started) / done

    def _finish_work(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._process.device)

    def _row(self, name: str, rate: float, note: str) -> None:
        milliseconds = 1000 * self._batch_size / rate
        self._say(f"{name:<14}{figure(rate):>10}{figure(milliseconds):>12}  {note}")


def _machine(device: torch.device) -> str:
    """Return processor, device and versions in a line."""
    facts = [f"{processor()}, {free_cores()} cores"]
    if device.type == "cuda":
        facts.append(f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    facts.append(f"python {platform.python_version()}")
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            facts.append(f"{package} {version(package)}")
    return "; ".join(facts)


def _shorter_side(source: Source) -> float:
    """Return the median of the shorter sides of some images from all over a source, pixels."""
    sides = []
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)).tolist():
        with suppress(UnreadableImageError):
            sides.append(min(source.read(index).shape[:2]))
    return statistics.median(sides)


def _needed_side(specs: Sequence[CropSpec]) -> float:
    """Return the side of a square image from which on no crop is enlarged, pixels."""
    return max(spec.size / math.sqrt(spec.scale[0]) for spec in specs)


def _scheduled(processes: Sequence[int | None]) -> tuple[float, float]:
    """Return the seconds that processes have computed and waited for a core; 0 if not told.

    The threads of each are summed: what they spend counts as the process's own.
    """
    try:
        states = [
            (thread / "schedstat").read_text()
            for process in processes
            for thread in Path(f"/proc/{process}/task").iterdir()
        ]
    except OSError:
        return 0.0, 0.0
    nanoseconds = [[int(figure) for figure in state.split()[:2]] for state in states]
    return sum(s[0] for s in nanoseconds) / 1e9, sum(s[1] for s in nanoseconds) / 1e9


def _peak_memory(processes: Sequence[int | None]) -> int:
    """Return the most memory that one of some processes ever had, bytes; 0 if it is not told."""
    try:
        states = [Path(f"/proc/{process}/status").read_text() for process in processes]
    except OSError:
        return 0
    found = re.findall(r"VmHWM:\s*(\d+) kB", "".join(states))
    return 1024 * max(map(int, found), default=0)


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _each(workers: int, processes: int) -> str:
    if not workers:
        return "in the training process itself"
    told = f"{workers} worker{'s' * (workers != 1)}"
    return f"{told} for each of {processes} processes" if processes > 1 else told


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
