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


def _by_crops(layers: str, top1: tuple[float, ...], mean_log_odds: tuple[float, ...]) -> Figures:
    """Return the figures of models that were trained with 0, 2, 4, 6 and 8 local crops."""
    rows = zip(range(0, 10, 2), top1, mean_log_odds, strict=True)
    points = tuple(Point(f"{count} crops", *scores) for count, *scores in rows)
    return Figures(f"local crops with {layers}; ImageNet-1K, 13 transfer datasets", 13, points)


PUBLISHED = {
    "paper": Figures(
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
    "crops-1": _by_crops(
        "1 hidden layer",
        (0.7634, 0.7892, 0.7933, 0.7954, 0.7945),
        (1.030, 1.153, 1.181, 1.180, 1.175),
    ),
    "crops-3": _by_crops(
        "3 hidden layers",
        (0.7410, 0.7671, 0.7730, 0.7750, 0.7794),
        (1.145, 1.281, 1.320, 1.332, 1.349),
    ),
    "released": Figures("ImageNet-1K, 15 transfer datasets", 15, tuple(_RELEASED.values())),
}


def reported(name: str) -> Point:
    """Return the figures of a model of NAVER's, such as trex_resnet50_cls.in1k_r2."""
    model, _, tag = name.partition(".")
    return _RELEASED[model.partition("_")[0], tag]
