"""Interface of the tasks, and the settings that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trex_models.evaluation.frozen_model import FrozenModel, ModelOutput
from trex_models.transfer.cache import FeatureCache
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
    iterations: int = 0
    """Training iterations of the segmentation head; 0 for the dataset's default."""


class Context(NamedTuple):
    """Model under evaluation, cache of its features, and settings."""

    model: FrozenModel
    cache: FeatureCache
    plan: Plan

    def features(self, opened: OpenedDataset) -> list[np.ndarray]:
        """Return the features of the training images, if any, and of the test images."""
        name, parts = opened.dataset.name, opened.splits.items()
        return [self.cache.features(self.model, part, f"{name}-{split}") for split, part in parts]


class Task:
    """Task on frozen features; a subclass for each."""

    name: str
    title: str
    kinds: tuple[str, ...]
    """Kinds of datasets that have this task."""
    features: ModelOutput = None
    """Output of the model that the task requires; see ``FrozenModel.load``."""
    has_picture = False

    def check_model(self, model: FrozenModel) -> None:
        """Raise a ValueError if the task does not support the model."""

    def protocol(self, opened: OpenedDataset, plan: Plan) -> Entry:
        """Return the protocol for the report; raise a ValueError for an unsuitable dataset."""
        raise NotImplementedError

    def dependencies(self, context: Context) -> Entry:  # noqa: ARG002 - for subclasses
        """Return what the results depend on besides protocol, images and features."""
        return {}

    def evaluate(self, opened: OpenedDataset, context: Context) -> Entry:
        """Return the results, with ``scores``."""
        raise NotImplementedError

    def draw(self, opened: OpenedDataset, entry: Entry, context: Context) -> Any:
        """Return a figure of the results."""
        raise NotImplementedError
