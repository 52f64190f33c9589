"""What would fail, or go badly, hours after the start, found before it.

Each check raises a ValueError of one line with the remedy, or returns a warning.
Shapes: N images, C classes, Q bank size.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trex_models.data.decode import UnreadableImageError, or_skip
from trex_models.data.image_files import FileSource
from trex_models.data.loading import LIVE_BATCHES
from trex_models.data.sources import Source

_TOLERATED = 0.01  # share of classes without a prototype above which we warn
_AIM = 0.001  # and that of the size which we then recommend
_SAMPLES = 16
_SHARED_MEMORY = Path("/dev/shm")


def all_of(*checks: Callable[[], object]) -> list[str]:
    """Run every check; return their warnings.

    Raises:
        ValueError: Checks failed; one line each.
    """
    failed, warnings = [], []
    for check in checks:
        try:
            warning = check()
        except (ValueError, OSError) as error:
            failed.append(str(error))
        else:
            warnings += [str(warning)] if warning else []
    if failed:
        raise ValueError("\n".join(failed))
    return warnings


def bank(size: int, labels: np.ndarray, num_classes: int) -> str | None:
    """Check that a bank can hold every class, and no image twice.

    Args:
        size: Q.
        labels: Of the training images, (N,).
        num_classes: C.

    Returns:
        A warning where many classes will have no prototype, whose logits are then 0.

    Raises:
        ValueError: Q exceeds N, or C exceeds Q.
    """
    counts = np.bincount(labels, minlength=num_classes)
    counts = counts[counts > 0]
    num_classes = len(counts)
    if size > len(labels):
        raise ValueError(
            f"objective.bank_size {size} exceeds the data set's {len(labels)} images, so that it "
            f"would hold images twice; take at most {len(labels)}"
        )
    share = _share_without_prototype(size, counts)
    wanted = min(_size_for(_AIM, counts), len(labels))
    advice = f"{share:.1%} of the classes without a prototype; --objective.bank-size {wanted}"
    advice += f" leaves {_share_without_prototype(wanted, counts):.1%}"
    if size < num_classes:
        raise ValueError(
            f"objective.bank_size {size} is below the {num_classes} classes and leaves {advice}"
        )
    if share > _TOLERATED:
        return f"a bank of {size} leaves about {advice}"
    return None


def _share_without_prototype(size: int, counts: np.ndarray) -> float:
    """Return the expected share of classes of which Q images drawn at random show none."""
    # In logarithms: the product over Q draws without replacement, of images not in the class.
    total = counts.sum()
    if size >= total:
        return 0.0
    log = np.array([math.lgamma(total - n + 1) for n in counts])
    log -= np.array([math.lgamma(max(total - n - size, 0) + 1) for n in counts])
    log += math.lgamma(total - size + 1) - math.lgamma(total + 1)
    return float(np.where(total - counts < size, 0.0, np.exp(np.minimum(log, 0.0))).mean())


def _size_for(share: float, counts: np.ndarray) -> int:
    """Return the smallest power of two that leaves at most a share without a prototype."""
    size = 1
    while _share_without_prototype(size, counts) > share:
        size *= 2
    return size


def disk_space(folder: Path, module: nn.Module, files: int) -> None:
    """Check that a folder has room for the checkpoints still to be written.

    Args:
        folder: The run's folder, which need not exist yet.
        module: What is trained; the optimiser holds a buffer for every parameter.
        files: Most checkpoints to be there at once beyond those that are there.

    Raises:
        ValueError: There is less room.
    """
    needed = files * checkpoint_bytes(module)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{folder} has {_megabytes(free)} of space left, the checkpoints take "
            f"{_megabytes(needed)}; make room, or choose another --output"
        )


def checkpoint_bytes(module: nn.Module) -> int:
    """Return about how large a checkpoint is."""
    state = [value for value in module.state_dict().values() if isinstance(value, torch.Tensor)]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*state, *trained])


def shared_memory(batch_bytes: int, workers: int, processes: int) -> None:
    """Check that batches fit into the memory through which worker processes hand them over.

    Args:
        batch_bytes: Of one process's batch.
        workers: Loader processes per training process.
        processes: Training processes on this machine.

    Raises:
        ValueError: They do not; a worker would end by a bus error.
    """
    if not workers or not _SHARED_MEMORY.is_dir():
        return
    needed = batch_bytes * workers * processes * LIVE_BATCHES
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise ValueError(
            f"{_SHARED_MEMORY} has {_megabytes(free)} left, batches on their way from "
            f"{workers * processes} workers take {_megabytes(needed)}; enlarge it (docker run "
            "--shm-size 8g) or lower --system.workers"
        )


def samples(name: str, source: Source, skip: bool = False) -> str | None:
    """Read a few images from all over a source.

    Args:
        name: What they are for.
        source: The images.
        skip: Whether those that cannot be read will be passed over.

    Returns:
        A warning where some cannot be read and will be passed over.

    Raises:
        ValueError: One cannot be read, or none of many; or one is not (H, W, 3) uint8.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)).tolist()
    reasons = []
    for index in indices:
        try:
            image = source.read(index)
        except UnreadableImageError as error:
            if not skip:
                raise or_skip(error) from error
            reasons.append(str(error))
            continue
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"{source.name(index)} is {image.dtype} {image.shape}, not uint8 (H, W, 3)"
            )
    if len(reasons) == len(indices):
        raise ValueError(
            f"none of {len(indices)} {name} images can be read; the last: {reasons[-1]}"
        )
    if reasons:
        return (
            f"{len(reasons)} of {len(indices)} {name} images cannot be read, such as: {reasons[0]}"
        )
    return None


def classes(source: Source) -> str | None:
    """Return a warning where classes have no images."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    empty = [source.classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    if empty:
        return f"{len(empty)} of {len(counts)} classes have no images, such as {empty[0]}"
    return None


class ImageFiles:
    """Compares image files with those that a checkpoint was trained on.

    A thread looks at them, for that takes 4 seconds for 1.28 million local files and many minutes
    on network storage. A checkpoint keeps 4 bytes a file.

    Args:
        sources: Images by the name of what they are for.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = {k: s for k, s in sources.items() if isinstance(s, FileSource)}
        self._now: dict[str, Tensor] = {}
        self._before: Mapping[str, Tensor] = {}
        self._checkpoint: Path | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        found = {k: source.fingerprint() for k, source in self._sources.items()}
        self._now = {k: torch.from_numpy(pairs.view(np.int16)) for k, pairs in found.items()}

    def compare_with(self, state: Mapping[str, Tensor], checkpoint: Path) -> None:
        """Set what to compare the files with: the state that a checkpoint holds."""
        self._before, self._checkpoint = state, checkpoint

    def state(self, seconds: float = 1.0) -> dict[str, Tensor]:
        """Return what to keep in a checkpoint: (N, 2) int16 by name; empty if not known in time."""
        self._thread.join(seconds)
        return self._now

    def warnings(self) -> list[str]:
        """Return a line for each kind of change, once, as soon as the files are known."""
        if not self._now:
            return []
        before, self._before = self._before, {}
        lines = [self._changes(name, pairs) for name, pairs in before.items() if name in self._now]
        return [line for found in lines for line in found]

    def _changes(self, name: str, before: Tensor) -> list[str]:
        source, now = self._sources[name], self._now[name]
        since = f"since {self._checkpoint} was saved"
        if before.shape != now.shape:
            return [f"warning: {len(now):,} {name} images, {len(before):,} before: changed {since}"]
        sizes, times = (before != now).T
        times &= ~sizes
        if times.all():
            return [f"all {name} images have other modification times {since}, but no other sizes"]
        return [
            f"warning: {int(changed.sum()):,} of {len(now):,} {name} images have {what} {since}, "
            f"such as {source.name(int(changed.nonzero()[0]))}"
            for changed, what in ((sizes, "other sizes"), (times, "other modification times"))
            if changed.any()
        ]


def tensorboard() -> None:
    """Check that TensorBoard's files can be written.

    Raises:
        ValueError: The package is missing.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "system.tensorboard needs tensorboard: pip install trex-models[train]"
        ) from error


def cpu_bfloat16(precision: str, device: torch.device, sizes: Iterable[int]) -> None:
    """Refuse bfloat16 gradients that are wrong.

    torch 2.15's weight gradient of a strided 3x3 convolution of a 1x1 input reads memory that
    nobody wrote, on CPUs with AVX512-BF16; a ResNet has one where crops are of 16 pixels or fewer.

    Raises:
        ValueError: They would occur.
    """
    if precision == "bf16" and device.type == "cpu" and min(sizes) <= 16:
        raise ValueError(
            "precision bf16 on a CPU has wrong gradients for crops of 16 pixels or fewer; take "
            "--precision fp32 or larger crops"
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
