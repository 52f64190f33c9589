"""Compare speed and memory of the data loader with the usual pipeline.

    OMP_WAIT_POLICY=passive python -m benchmarks.loader

Both variants cut the recipe's crops (1 x 224, 8 x 96) from the same JPEG files, alternately. Ours
returns uint8 crops and the random parameters of the photometric augmentation, which runs on the
training device (see `benchmarks.augment`); the reference (`benchmarks.reference_pipeline`) returns
augmented float32 tensors. `core`: CPU time of a worker's work, in one process with one thread, for
files of about 30 KB, 100 KB, 500 KB and 2 MB; `decode` is only reading and decoding; `reduced`
compares `--data.decode auto` with `exact`. `whole`: wall time with loader workers in the steady
state, without their start. `slow`: the same for ours alone, on storage where each read takes some
milliseconds, with more workers than cores. `memory`: memory of one worker beyond the memory that it
shares with its parent process. Takes twelve minutes on two cores.
"""

from __future__ import annotations

import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets.folder import pil_loader

from benchmarks import measure
from benchmarks.photographs import KINDS, NUM_CLASSES, write_photographs
from benchmarks.reference_pipeline import SPECS, reference_dataset, seeded
from trex_models.data.image_files import FolderSource
from trex_models.data.loading import NUM_BUFFERS, load_batches
from trex_models.data.multicrop import Batch, EpochSampler, Key, MultiCropDataset
from trex_models.data.tar_files import TarSource

WORKERS = 2, 8, 32  # of `slow`


class Files:
    """Our dataset and the reference's for the same folder of photographs."""

    def __init__(self, root: Path, source: str = "folder") -> None:
        self.folder = FolderSource(root)
        packed = root.with_suffix(".tar")
        if source == "tar":
            with tarfile.open(packed, "w") as tar:
                tar.add(root, root.name)
        ours = TarSource(packed) if source == "tar" else self.folder
        self.ours = MultiCropDataset(ours, SPECS, seed=0, num_buffers=NUM_BUFFERS)
        self.exact = replace(self.ours, source=ours, decode="exact")
        self.reference = reference_dataset(root, SPECS)

    def make_ours(self, keys: Sequence[Key]) -> Batch:
        """Return a batch as our loader workers do."""
        return self.ours.__getitems__(keys)

    def make_exact(self, keys: Sequence[Key]) -> Batch:
        """Return a batch of crops of images decoded at full size."""
        return self.exact.__getitems__(keys)

    def make_reference(self, keys: Sequence[Key]) -> Any:
        """Return a batch as the workers of a DataLoader do."""
        return default_collate([self.reference[index] for _, index in keys])

    def decode_ours(self, keys: Sequence[Key]) -> None:
        """Read and decode files with our code."""
        for _, index in keys:
            self.ours.source.read(index)

    def decode_reference(self, keys: Sequence[Key]) -> None:
        """Read and decode files as torchvision's ImageFolder does."""
        for _, index in keys:
            pil_loader(self.folder.name(index))

    def keys(self, batch: int) -> Iterator[list[Key]]:
        """Yield lists of (epoch, index) keys, practically without end."""
        return iter(EpochSampler(len(self.ours.source), batch, epochs=1 << 20, seed=0))


class SlowSource(FolderSource):
    """Class folders on storage whose reads take ``latency`` seconds."""

    latency = 0.0

    def read(self, index: int) -> np.ndarray:
        """Wait, and return the image."""
        time.sleep(self.latency)
        return super().read(index)


class Weighed:
    """Dataset that returns each batch together with the memory of its process, in MB."""

    def __init__(self, make: Callable[[Sequence[Key]], Any]) -> None:
        self._make = make
        self._resident_at_first: float | None = None

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Any, float, float]:
        """Return the batch, the growth of the peak resident set, and the unshared memory."""
        if self._resident_at_first is None:
            self._resident_at_first = _proc_megabytes("status", "VmRSS")
        batch = self._make(keys)
        growth = _proc_megabytes("status", "VmHWM") - self._resident_at_first
        return batch, growth, _proc_megabytes("smaps_rollup", "Private_Clean", "Private_Dirty")


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def core(files: Files, images: int, rounds: int) -> dict[str, Any]:
    """Measure images per second of CPU time for a worker's work, in this process."""

    def timed(work: Callable[[Sequence[Key]], object]) -> Callable[[], float]:
        batches = files.keys(images)  # the same batches for every variant
        return lambda: images / measure.cpu_seconds(partial(work, next(batches)))

    with seeded(0):
        items = measure.compared(timed(files.make_ours), timed(files.make_reference), rounds)
        decode = measure.compared(timed(files.decode_ours), timed(files.decode_reference), rounds)
        reduced = measure.compared(timed(files.make_ours), timed(files.make_exact), rounds)
    return {"images": images, "items": items, "decode": decode, "reduced": reduced}


def whole(files: Files, batch: int, batches: int, workers: int, rounds: int) -> dict[str, Any]:
    """Measure images per second of wall time with loader workers, in the steady state."""
    batches += -batches % workers
    keys = _keys(files, batch, batches, workers)
    steady = partial(_steady_rate, batch, batches, workers)

    def ours() -> float:
        return steady(load_batches(files.ours, keys, workers))

    def reference() -> float:
        order = [[index for _, index in part] for part in keys]
        return steady(iter(DataLoader(files.reference, batch_sampler=order, num_workers=workers)))

    rates = measure.compared(ours, reference, rounds)
    return {"batch": batch, "batches": batches, "workers": workers, "rates": rates}


def _keys(files: Files, batch: int, batches: int, workers: int) -> list[list[Key]]:
    # One extra batch per worker keeps all of them busy until the last timed batch.
    return list(islice(files.keys(batch), 2 * workers + batches + workers))


def _steady_rate(batch: int, batches: int, workers: int, loaded: Iterator[Any]) -> float:
    """Return images per second after the first two batches of each worker."""
    for _ in range(2 * workers):
        next(loaded)
    start = time.perf_counter()
    for _ in range(batches):
        next(loaded)
    return batch * batches / (time.perf_counter() - start)


def slow(
    files: Files, batch: int, batches: int, rounds: int, latencies: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Measure images per second by latency of a read in ms and number of workers."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    source = SlowSource(files.folder.root)

    def rate(latency: float, workers: int) -> float:
        source.latency = latency / 1000
        dataset = MultiCropDataset(source, SPECS, seed=0, num_buffers=NUM_BUFFERS)
        count = batches + -batches % workers
        loaded = load_batches(dataset, _keys(files, batch, count, workers), workers)
        return _steady_rate(batch, count, workers, loaded)

    return {
        f"{latency:g} ms": measure.spreads(
            measure.alternate({str(n): partial(rate, latency, n) for n in WORKERS}, rounds, 0)
        )
        for latency in latencies
    }


def memory(files: Files, batch: int, batches: int) -> dict[str, dict[str, float]]:
    """Measure the memory of one loader worker and of its batches, in MB."""
    keys = list(islice(files.keys(batch), batches))
    found = {}
    for name, make in (("ours", files.make_ours), ("reference", files.make_reference)):
        made = list(load_batches(Weighed(make), keys, workers=1))
        found[name] = {
            "peak_rss": round(max(growth for _, growth, _ in made), 1),
            "uss": round(max(own for _, _, own in made), 1),
            "batch": round(_megabytes(made[0][0]), 1),
        }
    return found


@one_thread()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("loader", __doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--batches", type=int, default=8, help="batches timed in `whole`")
    parser.add_argument("--workers", type=int, default=2)
    about = "sizes of the photographs; `whole` reads the first"
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help=about)
    parser.add_argument("--files", type=int, default=128, help="standard photographs")
    parser.add_argument(
        "--latencies", type=float, nargs="*", default=[0, 1, 5, 20], help="of a read, in ms"
    )
    parser.add_argument(
        "--source", choices=["folder", "tar"], default="folder", help="of our loader"
    )
    parsed = parser.parse_args(arguments)
    if parsed.workers < 1:
        parser.error(f"--workers must be at least 1, got {parsed.workers}")
    batch: int = parsed.batch
    counts = {"standard": parsed.files, "small": parsed.files // 2}
    counts |= {"large": parsed.files // 8, "huge": parsed.files // 16}
    with TemporaryDirectory() as folder:
        kinds = {}
        for kind in parsed.kinds:
            count = max(counts[kind], NUM_CLASSES)
            write_photographs(Path(folder) / kind, count, kind)
            kinds[kind] = Files(Path(folder) / kind, parsed.source)
        measured = {
            kind: core(files, min(batch, len(files.ours.source)), parsed.rounds)
            for kind, files in kinds.items()
        }
        first = kinds[parsed.kinds[0]]
        batch = min(batch, len(first.ours.source))
        loaders = whole(first, batch, parsed.batches, parsed.workers, parsed.rounds)
        rounds = max(1, parsed.rounds // 4)
        delayed = slow(first, batch, parsed.batches, rounds, parsed.latencies)
        weights = memory(first, batch, 4)
    result = {
        "machine": measure.machine(),
        "ratio": measured[parsed.kinds[0]]["items"]["ratio"]["median"],
        "ratio_whole": loaders["rates"]["ratio"]["median"],
        "core": measured,
        "whole": loaders,
        "slow": delayed,
        "memory_mb": weights,
    }
    for kind, found in measured.items():
        print(f"\none core, {kind} files of about {KINDS[kind].kilobytes} KB")
        for what in ("items", "decode", "reduced"):
            against = ", against decode='exact'" if what == "reduced" else ""
            measure.print_compared(f"{what}, images/s of CPU time{against}", found[what])
    title = f"{parsed.workers} workers, batch size {batch}, {parsed.kinds[0]} files, images/s"
    measure.print_compared(title, loaders["rates"])
    print("\nimages/s by number of workers, if each read takes some milliseconds")
    for latency, rates in delayed.items():
        print(f"  {latency}: " + ", ".join(f"{n}: {r['median']:.0f}" for n, r in rates.items()))
    print("\nmemory in MB")
    for name, weight in weights.items():
        print(f"  {name}: " + ", ".join(f"{key} {value:g}" for key, value in weight.items()))
    print(f"\n{result['machine']}")
    measure.record(parsed.out, result)


def _proc_megabytes(file: str, *names: str) -> float:
    """Return the sum of some lines of a /proc/self file, converted from kB to MB."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(names)) * 1024 / 1e6


def _megabytes(batch: Any) -> float:
    """Return the size of a batch's tensors in MB."""
    if isinstance(batch, Batch):
        batch = [*batch.crops, *batch.parameters, batch.labels, batch.indices]
    if isinstance(batch, Tensor):
        return batch.nbytes / 1e6
    return sum(map(_megabytes, batch))


if __name__ == "__main__":
    main()
