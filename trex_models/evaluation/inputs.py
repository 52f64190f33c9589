"""Validation of features, (N, F), and labels, (N,), that callers pass."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from trex_models.pretrained.checkpoints import all_finite


def as_tensor(array: Tensor | np.ndarray) -> Tensor:
    """Wrap an array, which may be read-only or memory-mapped, without copying it."""
    with warnings.catch_warnings():  # this package never writes to it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(array)


def require_samples(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    name: str = "features",
    width: int | None = None,
) -> None:
    """Check the shapes, that F is ``width`` if passed, and that tensor labels are integers."""
    shape = tuple(features.shape)
    if len(shape) != 2 or 0 in shape or width not in (None, shape[1]):
        raise ValueError(f"{name} must be of shape (N, {width or 'F'}) and not empty, got {shape}")
    if labels is None:
        return
    fractions = isinstance(labels, Tensor) and labels.is_floating_point()
    if tuple(labels.shape) != shape[:1] or fractions:
        raise ValueError(
            f"labels of the {name} must be {shape[0]} integers, one per row, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )


def require_finite(
    name: str, features: Tensor, chunk: int = 4096, remedy: str = "", first: int = 0
) -> None:
    """Check that features, (N, F), are finite, in chunks; ``first`` is the first row's number."""
    for start in range(0, len(features), chunk):
        rows = features[start : start + chunk]
        if not all_finite(rows):
            row = first + start + int((~rows.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"{name} must be finite, but row {row} has a NaN or an infinity{remedy}"
            )
