"""Scores in [0, 1] with 95 % confidence intervals, as entries of reports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_REPLICATES = 500


def score(value: float, interval: Sequence[float] | None) -> dict[str, Any]:
    """Return the entry of a score and its interval, which is clipped to [0, 1]."""
    ends = interval and [min(max(float(end), 0.0), 1.0) for end in interval]
    return {"value": float(value), "interval": ends}


def share_score(correct: np.ndarray) -> dict[str, Any]:
    """Return the entry of the share of test images or queries that are correct, (N,) bool."""
    share = float(correct.mean())
    return score(share, wilson_interval(share, len(correct)))


def mean_score(values: np.ndarray) -> dict[str, Any]:
    """Return the entry of a mean over queries, (N,), with a normal interval; None for one."""
    mean = float(values.mean())
    if len(values) < 2:
        return score(mean, None)
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return score(mean, (mean - half, mean + half))


def bootstrap_scores(
    measure: Callable[[np.ndarray], Mapping[str, float]], count: int
) -> dict[str, Any]:
    """Return the entries of scores over N test images, with percentile bootstrap intervals.

    ``measure`` maps indices of test images, which may repeat, to the scores by name.
    """
    rng = np.random.default_rng(0)
    samples = [measure(rng.integers(count, size=count)) for _ in range(_REPLICATES)]
    entries = {}
    for name, value in measure(np.arange(count)).items():
        ends = np.nanquantile([sample[name] for sample in samples], (0.025, 0.975))
        entries[name] = score(value, ends.tolist())
    return entries


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean by Student's t; None for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def wilson_interval(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson, "Probable Inference", 1927)."""
    center = share + _Z**2 / (2 * images)
    half = _Z * math.sqrt(share * (1 - share) / images + _Z**2 / (4 * images**2))
    total = 1 + _Z**2 / images
    return (center - half) / total, (center + half) / total
