"""From accuracies to the numbers of a report: log-odds, intervals, the mean over data sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def accuracy(top1: Sequence[float], images: int) -> dict[str, Any]:
    """Return a data set's scores.

    Args:
        top1: Of each seed.
        images: Test images.

    Returns:
        ``top1``: the ``mean``, the ``seeds``, the 95 % ``interval`` of the mean over seeds (None
        for one), ``test_interval``, what so few test images leave open, and ``clipped``, whether
        an accuracy is 0 or 1. ``log_odds``: the mean over seeds.
    """
    mean = statistics.fmean(top1)
    return {
        "top1": {
            "mean": mean,
            "seeds": list(top1),
            "interval": student_interval(top1),
            "test_interval": wilson_interval(mean, images),
            "clipped": any(p in (0, 1) for p in top1),
        },
        "log_odds": statistics.fmean(log_odds(p, images) for p in top1),
    }


def log_odds_facts(top1: float, images: int) -> dict[str, Any]:
    """Return the ``log_odds`` of one accuracy, and whether it was ``clipped``."""
    return {"log_odds": log_odds(top1, images), "clipped": top1 in (0, 1)}


def log_odds(top1: float, images: int) -> float:
    """Return ln(p / (1 - p)).

    It is infinite where all or none of the test images are right: p is kept half an image away
    from 0 and 1, so that one perfect data set leaves a mean finite.

    Args:
        top1: p, a share.
        images: Test images that it was measured on.
    """
    p = min(max(top1, 0.5 / images), 1 - 0.5 / images)
    return math.log(p / (1 - p))


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def wilson_interval(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score: what a finite test set leaves open.

    E. B. Wilson, "Probable Inference", 1927. The share may be a mean of several, of no whole number
    of images.

    Args:
        share: p, from 0 to 1.
        images: That it was measured on.
    """
    z = 1.959963984540054  # 95 % of a normal distribution lie within so many deviations
    centre = share + z**2 / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    total = 1 + z**2 / images
    return (centre - half) / total, (centre + half) / total


def summary(data_sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a model's score over data sets.

    Args:
        data_sets: A report's entry of each, without the training task's. Read are ``top1.seeds``,
            ``knn.top1`` and ``test.images``.

    Returns:
        ``mean_log_odds``, the same by seed (``seeds``), the 95 % ``interval`` over the seeds (None
        for one), ``knn_mean_log_odds`` and the names of the ``data_sets``.

    Raises:
        ValueError: The data sets differ in the number of seeds.
    """
    counts = {name: len(entry["top1"]["seeds"]) for name, entry in data_sets.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "the mean is over data sets of equally many seeds, got "
            f"{', '.join(f'{name} {count}' for name, count in counts.items())}: evaluate all with "
            "the same number"
        )
    entries = data_sets.values()
    odds = [
        [log_odds(p, entry["test"]["images"]) for p in entry["top1"]["seeds"]] for entry in entries
    ]
    seeds = [statistics.fmean(of_seed) for of_seed in zip(*odds, strict=True)]
    return {
        "mean_log_odds": statistics.fmean(seeds),
        "seeds": seeds,
        "interval": student_interval(seeds),
        "knn_mean_log_odds": statistics.fmean(
            log_odds(entry["knn"]["top1"], entry["test"]["images"]) for entry in entries
        ),
        "data_sets": list(data_sets),
    }
