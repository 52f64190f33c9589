"""Memory of the transfer evaluation for a million images.

    OMP_WAIT_POLICY=passive python -m benchmarks.transfer_memory

Takes 16 minutes on two shared cores and 4.1 GB of temporary disk space. Requires Linux, since
memory is read from /proc. Each part runs in a separate process, with the functions of the
evaluation: feature extraction into the cache, with tiny generated images and a trivial network;
k-NN and retrieval for a number of queries; the SGD layers of the complete grid, on some batches
sampled from the complete feature file; geometry.

Two peaks are reported, relative to the memory of the process after its imports. *Held* is anonymous
memory (RssAnon, read every 20 ms). *With pages* also counts pages of the mapped file (VmHWM), which
the kernel can reclaim. *Promised* is the formula in the docstrings, evaluated for these sizes, if
there is one.

Shapes: N images, M queries, F features, C classes.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from benchmarks import measure
from trex_models.data.center_crop import CenterCrop
from trex_models.data.sources import digest
from trex_models.evaluation import linear
from trex_models.evaluation.feature_file import DTYPES
from trex_models.evaluation.frozen_model import FrozenModel, weights_digest
from trex_models.evaluation.geometry import analyze
from trex_models.evaluation.inputs import as_tensor, require_finite
from trex_models.evaluation.ranking import BLOCK as RANKING_BLOCK
from trex_models.evaluation.ranking import PAIRS, class_retrieval
from trex_models.evaluation.splits import held_out
from trex_models.transfer import protocol
from trex_models.transfer.cache import FeatureCache

_STATUS = Path("/proc/self/status")
_SIDE = 8
_CHUNK = 4096  # the default of k-NN
_GEOMETRY_CHUNK = 8192  # the default of analyze
_VALIDATION_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of a run."""

    folder: Path
    """Root of the feature cache."""
    images: int
    """Number of images, N."""
    queries: int
    """Number of queries, M."""
    width: int
    """Number of features, F."""
    classes: int
    """Number of classes, C."""
    batches: int
    """Number of batches of 1,024 samples to train the SGD layers on."""
    dtype: str
    """Precision of the feature file."""

    @property
    def file_bytes(self) -> int:
        """Size of all features on disk, in bytes."""
        return (self.images + self.queries) * self.width * DTYPES[self.dtype].itemsize

    def samples(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return features, (N, F) or (M, F), and labels of the split "train" or "test"."""
        count, seed = {"train": (self.images, 1), "test": (self.queries, 2)}[split]
        source = TinyImages(count, self.classes, seed)
        cache = FeatureCache(root=self.folder, dtype=self.dtype)
        return cache.features(frozen_model(self.width), source, split), source.labels


class TinyImages:
    """Source of images that are generated when read: an image of the class plus noise."""

    def __init__(self, count: int, num_classes: int, seed: int) -> None:
        rng = np.random.default_rng(0)
        self.centers = rng.integers(0, 96, (num_classes, _SIDE, _SIDE, 3), dtype=np.uint8)
        self.classes = [str(label) for label in range(num_classes)]
        self.labels = np.arange(count) % num_classes
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (8, 8, 3) uint8 RGB."""
        center = self.centers[self.labels[index]]
        rng = np.random.default_rng((self.seed, index))
        return center + rng.integers(0, 160, center.shape, dtype=np.uint8)

    def name(self, index: int) -> str:
        """Return the name of an image in messages."""
        return f"image {index}"

    def digest(self) -> str:
        """Return a hash of everything that determines the images."""
        return digest(self.centers, self.labels, f"seed {self.seed}")


def frozen_model(width: int) -> FrozenModel:
    """Return a model that projects pixels randomly to F features, followed by a ReLU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * _SIDE**2, width), nn.ReLU())
    crop = CenterCrop(size=(_SIDE, _SIDE), crop_pct=1.0, interpolation="bicubic")
    metadata = {
        "architecture": "projection",
        "weights_sha256": weights_digest(model),
    }
    return FrozenModel(
        name="projection", model=model, transform=crop, shape=(width,), metadata=metadata
    )


def extract(setup: Setup) -> dict[str, Any]:
    """Extract the features of all images and queries to files."""
    for split in ("train", "test"):
        setup.samples(split)
    return {}


def vote(setup: Setup) -> dict[str, Any]:
    """Score k-NN on the queries, with all images as references."""
    return {"top1": protocol.knn_score(*setup.samples("train"), *setup.samples("test"))}


def train(setup: Setup) -> dict[str, Any]:
    """Train and score layers of the complete grid on a few batches, as ``sgd_scores`` does.

    The initial check and split cover all images.
    """
    array, labels = setup.samples("train")
    features = as_tensor(array)
    require_finite("features", features, _CHUNK)
    mask = torch.from_numpy(held_out(labels, protocol.VALIDATION_SHARE))
    everything = linear.Samples(features, torch.from_numpy(labels), torch.arange(len(labels)))
    generator = torch.Generator().manual_seed(0)
    fitted, held = (
        everything._replace(rows=rows[torch.randperm(len(rows), generator=generator)][:count])
        for rows, count in (
            ((~mask).nonzero().flatten(), setup.batches * linear.BATCH),
            (mask.nonzero().flatten(), _VALIDATION_BATCHES * linear.BATCH),
        )
    )
    curve = linear.fitted_accuracies(
        fitted,
        held,
        protocol.SGD_GRID,
        num_classes=setup.classes,
        device=torch.device("cpu"),
        epochs=1,
    )
    return {
        "settings": len(curve),
        "settings_at_once": _at_once(setup),
        "training_samples": len(fitted.rows),
        "validation_samples": len(held.rows),
        "best_top1": max(curve),
    }


def look(setup: Setup) -> dict[str, Any]:
    """Compute the geometry of the features of all images."""
    found = analyze(*setup.samples("train"), chunk=_GEOMETRY_CHUNK)
    return {"coding_length": found.coding_length, "effective_rank": found.effective_rank}


def rank(setup: Setup) -> dict[str, Any]:
    """Rank all images for each query."""
    found = class_retrieval(*setup.samples("train"), *setup.samples("test"))
    return {"mAP": float(found.average_precision.mean())}


def promised(part: str, setup: Setup) -> int | None:
    """Return the documented memory of a part in bytes; None without a documented formula."""
    width, classes, k = setup.width, setup.classes, protocol.K
    if part == "k-NN":
        q, r = min(_CHUNK, setup.queries), min(_CHUNK, setup.images)
        votes = min(4 * setup.queries * classes, 1 << 28)
        search = 4 * q * r + 20 * width * max(q, r) + 60 * q * k
        return search + 12 * setup.queries * k + votes
    if part == "retrieval":
        pairs = min(PAIRS, setup.queries * setup.images)
        return 24 * pairs + 16 * RANKING_BLOCK * width
    if part == "SGD layers":
        return 4 * _at_once(setup) * classes * (2 * (width + 1) + 2 * linear.BATCH)
    if part == "geometry":
        return 8 * (5 * width**2 + 4 * classes * width + 4 * _GEOMETRY_CHUNK * width)
    return None


def _at_once(setup: Setup) -> int:
    device = torch.device("cpu")
    most = linear.settings_at_once(setup.classes, setup.width, linear.BATCH, device)
    return min(most, len(protocol.SGD_GRID))


PARTS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "extraction": extract,
    "k-NN": vote,
    "retrieval": rank,
    "SGD layers": train,
    "geometry": look,
}


class Peak:
    """Context manager that records the peak memory of this process, read every 20 ms."""

    def __enter__(self) -> Self:
        """Start the thread that reads the memory."""
        self._before = memory()
        self._most = self._before["RssAnon"]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Stop the thread and compute the peaks."""
        self._end.set()
        self._thread.join()
        self.before = self._before["RssAnon"]
        self.held = self._most - self.before
        self.with_pages = memory()["VmHWM"] - self._before["VmRSS"]

    def _read(self) -> None:
        while True:
            self._most = max(self._most, memory()["RssAnon"])
            if self._end.wait(0.02):
                return


def memory() -> dict[str, int]:
    """Return the memory entries of /proc/self/status, in bytes."""
    lines = [line.split() for line in _STATUS.read_text().splitlines()]
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


def measured(part: str, setup: Setup) -> dict[str, Any]:
    """Run a part in this process and measure its memory."""
    started = time.perf_counter()
    with Peak() as peak:
        found = PARTS[part](setup)
    return {
        "imports_bytes": peak.before,
        "held_bytes": peak.held,
        "promised_bytes": promised(part, setup),
        "with_pages_bytes": peak.with_pages,
        "seconds": round(time.perf_counter() - started, 1),
        "n": 1,
        **found,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("transfer_memory", __doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1_000, help="queries for k-NN")
    parser.add_argument("--width", type=int, default=2048, help="number of features")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=12, help="batches for the SGD layers")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of features")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="for features")
    options = parser.parse_args(arguments)
    if not _STATUS.exists():
        parser.error("memory is read from /proc, which this system does not have; use Linux")
    sizes = {name: value for name, value in vars(options).items() if name in Setup.__annotations__}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        setup = Setup(**sizes | {"folder": Path(folder)})
        parts = _parts(setup, options.parts)
    _show(parts)
    shape = {name: value for name, value in asdict(setup).items() if name != "folder"}
    file = {"setup": shape, "file_bytes": setup.file_bytes}
    measure.record(options.out, {"machine": measure.machine(), **file, "parts": parts})


def _parts(setup: Setup, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run each part in a separate process, sequentially."""
    found: dict[str, dict[str, Any]] = {}
    # Spawned, since a forked process would inherit this one's memory.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for number, part in enumerate(names, start=1):
            print(f"[{number}/{len(names)}] {part}", file=sys.stderr)
            found[part] = processes.submit(measured, part, setup).result()
    return found


def _show(parts: dict[str, dict[str, Any]]) -> None:
    print(f"{'part':<12}{'held MB':>10}{'promised':>10}{'with pages':>12}{'seconds':>9}")
    for part, row in parts.items():
        limit = row["promised_bytes"]
        print(
            f"{part:<12}{row['held_bytes'] / 1e6:>10.0f}"
            f"{'' if limit is None else f'{limit / 1e6:.0f}':>10}"
            f"{row['with_pages_bytes'] / 1e6:>12.0f}{row['seconds']:>9.0f}"
        )


if __name__ == "__main__":
    main()
