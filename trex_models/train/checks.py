"""Preflight checks: catch problems that would otherwise surface hours into a run.

Each check may return a warning, or raise a ValueError of one line that names the remedy.
Shapes: N images, C classes, Q bank size.
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import timm.optim
import torch
from torch import nn

from trex_models.data.decode import UnreadableImageError, with_skip_hint
from trex_models.data.loading import NUM_BUFFERS
from trex_models.data.sources import Source, require_rgb, spread_indices

_TOLERATED = 0.01  # warn if a larger share of the classes has no prototype
_TARGET = 0.001  # largest share at the bank size that the warning recommends
_SAMPLES = 16  # images that check_samples reads
_SHARED_MEMORY = Path("/dev/shm")


def run_checks(checks: Iterable[Callable[[], str | None]]) -> list[str]:
    """Run all checks; return their warnings, or raise ValueError with a line per failure."""
    failed, warnings = [], []
    for check in checks:
        try:
            warnings.append(check())
        except (ValueError, OSError) as error:
            failed.append(str(error))
    if failed:
        raise ValueError("\n".join(failed))
    return [warning for warning in warnings if warning]


def check_bank_size(size: int, labels: np.ndarray, num_classes: int) -> str | None:
    """Check that the bank size is between the numbers of classes and of images, labels (N,).

    Returns a warning if many classes will have no prototype: their logits would be 0.
    """
    counts = np.bincount(labels, minlength=num_classes)
    counts = counts[counts > 0]
    if size > len(labels):
        raise ValueError(
            f"--objective.bank-size {size} exceeds the dataset's {len(labels)} images: the bank "
            f"would contain images twice; use at most {len(labels)}, or the recipe auto"
        )
    share, larger = _share_without_prototype(size, counts), 1
    while _share_without_prototype(larger, counts) > _TARGET:
        larger *= 2
    larger = min(larger, len(labels))
    advice = f"{share:.1%} of the classes without a prototype; --objective.bank-size {larger}"
    advice += f" would leave {_share_without_prototype(larger, counts):.1%}"
    if size < len(counts):
        problem = f"is below the {len(counts)} classes and leaves"
        raise ValueError(f"--objective.bank-size {size} {problem} {advice}")
    return f"--objective.bank-size {size} leaves about {advice}" if share > _TOLERATED else None


def check_bank_refills(size: int, images: int) -> str | None:
    """Return a warning if training with ``images`` images fills the bank fewer than ten times."""
    if size * 10 <= images:
        return None
    return (
        f"--objective.bank-size {size} is filled {images / size:.1f} times by the run, but should "
        f"be at least 10 times; use at most {images // 10}, or the recipe auto"
    )


def check_momentum(momentum: float, steps: int) -> str | None:
    """Return a warning if the momentum encoder averages over more than a fifth of the steps."""
    if (1 - momentum) * steps >= 5:
        return None
    horizon = f"{1 / (1 - momentum):,.0f}" if momentum < 1 else "infinitely many"
    return (
        f"--objective.ema-momentum {momentum} averages over {horizon} steps, more than a fifth of "
        f"the run's {steps}; use {max(0, 1 - 50 / steps):.2g}, or the recipe auto"
    )


def check_rate(name: str, peak: float, batch_size: int) -> str | None:
    """Return a warning if the peak rate is over ten times the default of an Adam-like optimizer."""
    optimizer = timm.optim.get_optimizer_class(name, bind_defaults=False)
    usual = inspect.signature(optimizer).parameters["lr"].default
    has_betas = timm.optim.get_optimizer_info(name).has_betas
    if not has_betas or not isinstance(usual, float) or peak <= 10 * usual:
        return None
    return (
        f"the learning rate of {name} rises to {peak:g}, but is usually about {usual:g}: use "
        f"--optim.base-lr {usual * 256 / batch_size:g}, or the recipe auto"
    )


def _share_without_prototype(size: int, counts: np.ndarray) -> float:
    total = counts.sum()
    if size >= total:
        return 0.0
    # Logarithm of C(N - n, Q) / C(N, Q): Q draws without replacement miss a class of n images.
    log = np.array([math.lgamma(total - n + 1) for n in counts])
    log -= np.array([math.lgamma(max(total - n - size, 0) + 1) for n in counts])
    log += math.lgamma(total - size + 1) - math.lgamma(total + 1)
    return float(np.where(total - counts < size, 0.0, np.exp(np.minimum(log, 0.0))).mean())


def checkpoint_bytes(module: nn.Module, optimizer: str) -> int:
    """Return the approximate size in bytes of a checkpoint of a module and its optimizer."""
    state = [value for value in module.state_dict().values() if isinstance(value, torch.Tensor)]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    averages = 1 if optimizer == "sgd" else 2  # most optimizers average first and second moments
    return sum(tensor.nbytes for tensor in [*state, *trained * averages])


def check_shared_memory(batch_bytes: int, workers: int, processes: int) -> None:
    """Check that batches fit into the shared memory through which workers return them.

    Otherwise a worker would crash with a bus error. ``workers`` is the number per training process,
    ``processes`` the number of training processes on this machine.
    """
    if not workers or not _SHARED_MEMORY.is_dir():
        return
    needed = batch_bytes * workers * processes * NUM_BUFFERS
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise ValueError(
            f"{_SHARED_MEMORY} has {free / 1e6:,.0f} MB free, but the batches of "
            f"{workers * processes} workers need {needed / 1e6:,.0f} MB; enlarge it (docker run "
            "--shm-size 8g) or lower --system.workers"
        )


def check_samples(name: str, source: Source, skip: bool = False) -> str | None:
    """Check that some images, spread over the source, are readable and (H, W, 3) uint8.

    If ``skip`` is set, unreadable images only cause a warning.
    """
    indices = spread_indices(source, _SAMPLES)
    reasons = []
    for index in indices:
        try:
            image = source.read(index)
        except UnreadableImageError as error:
            if not skip:
                raise with_skip_hint(error) from error
            reasons.append(str(error))
            continue
        require_rgb(image, source.name(index))
    count = f"of {len(indices)} sampled {name} images"
    if len(reasons) == len(indices):
        raise ValueError(f"none {count} is readable, such as: {reasons[-1]}")
    return f"{len(reasons)} {count} are unreadable, such as: {reasons[0]}" if reasons else None


def check_classes(source: Source) -> str | None:
    """Return a warning if classes have no images."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    empty = [source.classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    warning = f"{len(empty)} of {len(counts)} classes have no images"
    return f"{warning}, such as {empty[0]}" if empty else None


def check_tensorboard() -> None:
    """Check that tensorboard is installed; an ImportError would not reach the other ranks."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        package = "the package tensorboard: pip install '.[train]' in a clone"
        raise ValueError(f"--system.tensorboard requires {package}") from error


def check_cpu_bfloat16(precision: str, device: torch.device, smallest_crop: int) -> None:
    """Reject bfloat16 on a CPU for crop sizes at which its gradients are wrong.

    torch 2.15's weight gradient of a strided 3x3 convolution of a 1x1 input reads uninitialized
    memory on CPUs with AVX512-BF16; a ResNet has one for crops of 16 pixels or fewer.
    """
    if precision == "bf16" and device.type == "cpu" and smallest_crop <= 16:
        raise ValueError(
            "--precision bf16 has wrong gradients on a CPU for crops of 16 pixels or fewer; use "
            "--precision fp32 or larger crops"
        )
