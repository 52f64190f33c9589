"""From accuracies to the numbers of a report: log-odds, intervals, the mean over datasets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def accuracy(top1: Sequence[float], images: int) -> dict[str, Any]:
    """Return a dataset's scores, from the accuracy of each seed and the number of test images.

    ``interval`` is that of the mean over seeds, ``test_interval`` the uncertainty due to the
    number of test images, both of 95 %; ``clipped`` says whether an accuracy is 0 or 1.
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


def knn_scores(top1: float, images: int) -> dict[str, Any]:
    """Return a dataset's k-NN scores: ``top1``, ``log_odds``, and whether it is ``clipped``."""
    return {"top1": top1, "log_odds": log_odds(top1, images), "clipped": top1 in (0, 1)}


def log_odds(top1: float, images: int) -> float:
    """Return ln(p / (1 - p)) of an accuracy p, kept half an image away from 0 and 1."""
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
    """Return the 95 % interval of a share by Wilson's score ("Probable Inference", 1927)."""
    z = 1.959963984540054  # 95 % of a normal distribution lie within so many deviations
    center = share + z**2 / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    total = 1 + z**2 / images
    return (center - half) / total, (center + half) / total


def summary(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a model's scores over datasets, entries of a report of equally many seeds each."""
    entries = datasets.values()
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
        "datasets": list(datasets),
    }
