"""The authors' published figures of t-ReX and other models (ICLR 2023, arXiv 2206.15369).

None was measured here. Those of the paper were read off its plots, to about 0.0002 in top-1 and
0.003 in log-odds; those of the released models are in the release's table. Means over 13 and over
15 datasets do not compare.
"""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """The two scores of a model's frozen backbone, by linear classifiers on its features."""

    name: str
    top1: float
    """Share of ImageNet-1K's validation images, the training task."""
    mean_log_odds: float
    """Mean over transfer datasets of ln(p / (1 - p)), p the top-1 accuracy."""


class PublishedResults(NamedTuple):
    """Points that compare with each other: means over the same number of transfer datasets."""

    title: str
    num_datasets: int
    points: tuple[Point, ...]


_RELEASED = {  # by variant and tag of the weights
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
    "released": PublishedResults(
        "ImageNet-1K, 15 transfer datasets", 15, tuple(_RELEASED.values())
    ),
}


def reported(name: str) -> Point:
    """Return the figures of a model of NAVER's, such as trex_resnet50_cls.in1k_r2."""
    model, _, tag = name.partition(".")
    return _RELEASED[model.partition("_")[0], tag]
