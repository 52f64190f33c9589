"""What the authors report of their released weights: their figures, none of ours."""

from __future__ import annotations

from typing import NamedTuple


class Figures(NamedTuple):
    """Of a frozen backbone, by a linear classifier on its features."""

    top1: float
    """ImageNet-1K, percent."""
    log_odds: float
    """Mean over 15 transfer data sets, which leave out ImageNet-1K."""


# By variant and tag.
REPORTED = {
    ("trex", "in1k"): Figures(78.0, 1.1704),
    ("trexstar", "in1k"): Figures(80.2, 0.8829),
    ("trex", "in1k_r2"): Figures(77.9, 1.1664),
    ("trexstar", "in1k_r2"): Figures(80.2, 0.8800),
}


def reported(name: str) -> Figures:
    """Return the figures of the training that one of NAVER's models comes from.

    Args:
        name: Model and tag, such as trex_resnet50_cls.in1k_r2.
    """
    model, _, tag = name.partition(".")
    return REPORTED[model.partition("_")[0], tag]
