"""Results of t-ReX and other models that the authors published (arXiv 2206.15369).

We did not measure any of them. Results of the paper (ICLR 2023) were read from its plots, with
errors of about 0.0002 in top-1 and 0.003 in log-odds. Results of the released models are from the
table in the release. Means over 13 datasets are not comparable with means over 15.
"""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """The two scores of a model, from linear classifiers on the features of its backbone."""

    name: str
    top1: float
    """Accuracy on the ImageNet-1K validation images, the training task."""
    mean_log_odds: float
    """Mean over transfer datasets of ln(p / (1 - p)), p the top-1 accuracy."""


class PublishedResults(NamedTuple):
    """Points that are comparable: means over the same number of transfer datasets."""

    title: str
    num_datasets: int
    points: tuple[Point, ...]


_RELEASED = {  # by model and tag of the weights
    ("trex", "in1k"): Point("t-ReX", 0.780, 1.1704),
    ("trexstar", "in1k"): Point("t-ReX*", 0.802, 0.8829),
    ("trex", "in1k_r2"): Point("t-ReX (retrained)", 0.779, 1.1664),
    ("trexstar", "in1k_r2"): Point("t-ReX* (retrained)", 0.802, 0.8800),
}

PUBLISHED = {
    "paper": PublishedResults(
        "ImageNet-1K, 13 transfer datasets",
        13,
        (
            Point("DINO", 0.7480, 1.256),
            Point("PAWS", 0.7639, 1.255),
            Point("LOOK + multi-crop", 0.7800, 1.195),
            Point("SupCon", 0.7872, 1.047),
            Point("RSB-A1", 0.7972, 0.978),
            Point("t-ReX", 0.7800, 1.357),
            Point("t-ReX*", 0.8019, 1.080),
        ),
    ),
    "released": PublishedResults("ImageNet-1K, 15 transfer datasets", 15, (*_RELEASED.values(),)),
}


def reported(name: str) -> Point:
    """Return the published results of a NAVER model, such as trex_resnet50_cls.in1k_r2."""
    model, _, tag = name.partition(".")
    return _RELEASED[model.partition("_")[0], tag]
