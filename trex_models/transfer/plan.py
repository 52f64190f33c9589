"""Settings that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trex_models.transfer.datasets import OpenedDataset

SHOTS = (1, 2, 5, 10)
Entry = dict[str, Any]
"""Results of a task on a dataset, as JSON; ``scores`` maps names to ``value`` and ``interval``."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Evaluation settings."""

    seeds: int = 5
    """Number of validation splits, with seeds 0, 1, ...; the seed also sets the order of SGD."""
    training_task: str | None = None
    """Dataset that the model was trained on; it is excluded from the transfer score."""
    geometry: bool = False
    """If True, also measure the geometry of the training images' features."""
    device: str = "cpu"
    """Device of the classifiers."""
    shots: tuple[int, ...] = SHOTS
    """Numbers of training images per class in the task few-shot, ascending."""
    episodes: int = 20
    """Number of random draws of these images."""
    whiten: OpenedDataset | None = None
    """Dataset from whose training images PCA whitening is learned for retrieval."""
    iterations: int | None = None
    """Training iterations of the segmentation head; None for the dataset's default."""
