"""Compare the speed of complete training, data loading included, with a reference pipeline.

    python -m benchmarks.end_to_end                                  # small model on the CPU

Both variants read the same JPEG photographs (500 x 375, about 100 KB) with one loader worker per
core, cut the recipe's crops and run its training steps: ours with the code of `trex_models.train`,
the reference with `benchmarks.reference_pipeline` and `benchmarks.reference_step`. `waiting` is the
fraction of time that the training process waits for a batch; on CUDA, ours includes time in which
the device still computes the previous step. `ratio` is the ratio of images per second on the
largest number of cores. On a CPU the training step dominates, even for a small network.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import measure, step
from benchmarks.photographs import write_photographs
from benchmarks.reference_pipeline import SPECS, reference_dataset
from trex_models.data.image_files import FolderSource
from trex_models.data.loading import NUM_BUFFERS, load_batches, to_device
from trex_models.data.multicrop import EpochSampler, MultiCropDataset, augment
from trex_models.precision import free_cores


@dataclass
class Trainer:
    """A loader and a training step."""

    batches: Callable[[], Iterator[Any]]
    train: Callable[[Any], object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    device, all_cores = torch.device(options.device), sorted(os.sched_getaffinity(0))
    results = []
    with TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.files, "standard")
        for count in options.cores:
            with _cores(all_cores[:count]):
                results.append(_measure(Path(folder), count, options, device))
                measure.record(options.out, {"by_cores": results})  # in case of a time limit
    machine = measure.machine(options.device)
    print(f"{machine['processor']}, {machine.get('device', 'CPU')}, {options.backbone}")
    for result in results:
        for name in ("ours", "reference"):
            print(
                f"{result['cores']} cores, {name:10}"
                f"{measure.format_spread(result['images_per_second'][name], ' images/s')}, "
                f"waiting {measure.format_spread(result['waiting'][name])}"
            )
        print(f"{result['cores']} cores, ratio {measure.format_spread(result['ratios'])}")
    measure.record(
        options.out,
        {
            "machine": machine,
            "backbone": options.backbone,
            "batch": options.batch,
            "dtype": options.dtype,
            "reference_dtype": options.reference_dtype or options.dtype,
            "ratio": results[-1]["ratios"]["median"],
            "by_cores": results,
        },
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser("end_to_end", __doc__)
    step.add_options(parser)
    parser.set_defaults(backbone="resnet18", batch=16, dtype="float32", rounds=4, steps=4)
    parser.add_argument("--files", type=int, default=256, help="number of photographs")
    parser.add_argument("--cores", type=int, nargs="+", default=[free_cores()], help="ascending")
    options = parser.parse_args(arguments)
    counts, available = options.cores, free_cores()
    if counts != sorted(counts) or counts[0] < 1 or counts[-1] > available:
        parser.error(f"--cores must be ascending, from 1 to {available}, got {counts}")
    return options


def _measure(
    root: Path, cores: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Measure both trainers alternately on a number of cores."""
    waiting: dict[str, list[float]] = {"ours": [], "reference": []}

    def rate(name: str, trainer: Trainer) -> float:
        seconds, waited = _train(trainer, options.steps, 3 * cores, device)
        waiting[name].append(waited / seconds)
        return options.batch * options.steps / seconds

    trainers = {
        "ours": _ours(root, cores, options, device),
        "reference": _reference(root, cores, options, device),
    }
    variants = {name: partial(rate, name, trainer) for name, trainer in trainers.items()}
    rates = measure.alternate(variants, options.rounds, warm_up=0)  # `_train` warms up
    return {
        "cores": cores,
        "images_per_second": measure.spreads(rates),
        "waiting": measure.spreads(waiting),
        "ratios": measure.ratios(rates["ours"], rates["reference"]),
    }


def _ours(root: Path, cores: int, options: argparse.Namespace, device: torch.device) -> Trainer:
    dataset = MultiCropDataset(FolderSource(root), SPECS, seed=0, num_buffers=NUM_BUFFERS)
    take = step.our_step(options, device)

    def train(batch: Any) -> None:
        crops = augment(batch, device)
        labels, indices = to_device([batch.labels, batch.indices], device)
        take(crops, labels, indices)

    def batches() -> Iterator[Any]:
        return load_batches(dataset, _sampler(options), cores, device.type == "cuda")

    return Trainer(batches, train)


def _reference(
    root: Path, cores: int, options: argparse.Namespace, device: torch.device
) -> Trainer:
    take = step.reference_step(options, device)

    def train(batch: Any) -> None:
        crops, labels = batch
        crops = [images.to(device, non_blocking=True) for images in crops]
        by_resolution = []
        for spec in SPECS:
            by_resolution.append(torch.cat(crops[: spec.count]))
            crops = crops[spec.count :]
        take(by_resolution, labels.to(device, non_blocking=True))

    dataset = reference_dataset(root, SPECS)

    def batches() -> Iterator[Any]:
        order = ([index for _, index in keys] for keys in _sampler(options))
        return iter(
            DataLoader(
                dataset,
                batch_sampler=order,
                num_workers=cores,
                pin_memory=device.type == "cuda",
            )
        )

    return Trainer(batches, train)


def _sampler(options: argparse.Namespace) -> EpochSampler:
    return EpochSampler(options.files, options.batch, epochs=1 << 20, seed=0)


def _train(trainer: Trainer, steps: int, lead: int, device: torch.device) -> tuple[float, float]:
    """Run training steps; return their total time and the time spent waiting for batches."""
    batches, waited = trainer.batches(), 0.0
    started = time.perf_counter()
    for number in range(lead + steps):
        if number == lead:
            measure.wait(device)
            started, waited = time.perf_counter(), 0.0
        requested = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - requested
        trainer.train(batch)
    measure.wait(device)
    return time.perf_counter() - started, waited


@contextmanager
def _cores(cores: Sequence[int]) -> Iterator[None]:
    """Restrict this process, its threads and its subprocesses to some cores, like taskset."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        _set_affinity(cores)
        torch.set_num_threads(len(cores))
        yield
    finally:
        _set_affinity(before)
        torch.set_num_threads(threads)


def _set_affinity(cores: Iterable[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


if __name__ == "__main__":
    main()
