"""The authors' published figures of t-ReX and other models (ICLR 2023, arXiv 2206.15369).

None was measured here. Those of the paper were read off its plots, to about 0.0002 in top-1 and
0.003 in log-odds; those of the released models are in the release's own table. The means are over
13 and over 15 transfer datasets, so figures of one do not compare with figures of the other.
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


class Figures(NamedTuple):
    """Points that compare with each other."""

    title: str
    num_datasets: int
    """Number of transfer datasets that the means are over."""
    points: tuple[Point, ...]


_RELEASED = {  # by variant and tag of the weights
    ("trex", "in1k"): Point("t-ReX", 0.780, 1.1704),
    ("trexstar", "in1k"): Point("t-ReX*", 0.802, 0.8829),
    ("trex", "in1k_r2"): Point("t-ReX (retrained)", 0.779, 1.1664),
    ("trexstar", "in1k_r2"): Point("t-ReX* (retrained)", 0.802, 0.8800),
}

PUBLISHED = {
    "paper": Figures(
        "ImageNet-1K, 13 sets",
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
    "crops-1": Figures(
        "local crops with 1 hidden layer; ImageNet-1K, 13 sets",
        13,
        (
            Point("0 crops", 0.7634, 1.030),
            Point("2 crops", 0.7892, 1.153),
            Point("4 crops", 0.7933, 1.181),
            Point("6 crops", 0.7954, 1.180),
            Point("8 crops", 0.7945, 1.175),
        ),
    ),
    "crops-3": Figures(
        "local crops with 3 hidden layers; ImageNet-1K, 13 sets",
        13,
        (
            Point("0 crops", 0.7410, 1.145),
            Point("2 crops", 0.7671, 1.281),
            Point("4 crops", 0.7730, 1.320),
            Point("6 crops", 0.7750, 1.332),
            Point("8 crops", 0.7794, 1.349),
        ),
    ),
    "released": Figures("ImageNet-1K, 15 sets", 15, tuple(_RELEASED.values())),
}
"""By the names that ``trex_models.transfer.pictures.scatter`` takes."""


def reported(name: str) -> Point:
    """Return the figures of a model of NAVER's, such as trex_resnet50_cls.in1k_r2."""
    model, _, tag = name.partition(".")
    return _RELEASED[model.partition("_")[0], tag]
