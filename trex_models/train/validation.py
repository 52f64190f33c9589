"""Accuracy on held-out images: of the training head, and of a k-NN classifier on features.

Exact on any number of processes.
Shapes: N images, B batch, C classes, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trex_models.data.center_crop import PROTOCOLS, CenterCropDataset, CropBatch
from trex_models.data.decode import UnreadableImageError, or_skip
from trex_models.data.loading import load_batches, to_device
from trex_models.data.sources import Source
from trex_models.distributed import (
    Process,
    broadcast_buffers,
    gather,
    gather_rows,
    raise_on_all_ranks,
)
from trex_models.evaluation.knn import knn_votes, topk_correct
from trex_models.heads import widen
from trex_models.method.model import TReX
from trex_models.precision import Precision

_QUERIES = 4096
_Indices = TypeVar("_Indices", range, np.ndarray)


class ValidationDataset(CenterCropDataset):
    """Center crops of a source's images, 224 of 256, as the authors validate during training.

    Args:
        source: Labeled images.
        size: Side of the crops, S.
        skip: Leave out unreadable images.
    """

    def __init__(self, source: Source, size: int, skip: bool = False) -> None:
        super().__init__(source, replace(PROTOCOLS["validation"], size=(size, size)), skip)

    def __getitems__(self, indices: Sequence[int]) -> CropBatch:
        """Return a batch, which may be empty; ValueError names an image that cannot be read."""
        try:
            return super().__getitems__(indices)
        except UnreadableImageError as error:
            raise or_skip(error) from error


@dataclass(frozen=True)
class Neighbors:
    """References of a weighted k-NN classifier.

    Args:
        dataset: Training images.
        indices: Indices of the references, (N,).
        k: Number of neighbors that vote.
    """

    dataset: ValidationDataset
    indices: np.ndarray
    k: int


class Validator:
    """Measures a method in eval mode, with rank 0's BatchNorm statistics.

    Nothing that training depends on is changed.

    Args:
        dataset: Images to validate on.
        process: This process; it takes every world_size-th image from its rank on.
        precision: Number formats of the computation.
        batch_size: Batch size of this process.
        workers: Number of loader processes.
        neighbors: References of the k-NN classifier; None for none.
        log: As ``load_batches``.
        asked_to_stop: As ``load_batches``.
        with_progress: Wraps (batches, their number, a title) to show progress.
        on_skip: Callback that receives {index: reason} of skipped validation images.
        on_skip_reference: The same for the references of the k-NN classifier.
    """

    def __init__(
        self,
        dataset: ValidationDataset,
        process: Process,
        precision: Precision,
        batch_size: int,
        workers: int,
        neighbors: Neighbors | None = None,
        log: Callable[[str], object] = print,
        asked_to_stop: Callable[[], object] = lambda: False,
        with_progress: Callable[
            [Iterator[CropBatch], int, str], Iterator[CropBatch]
        ] = lambda batches, *_: batches,
        on_skip: Callable[[dict[int, str]], object] = lambda _: None,
        on_skip_reference: Callable[[dict[int, str]], object] = lambda _: None,
    ) -> None:
        self._dataset = dataset
        self._process = process
        self._precision = precision
        self._batch_size = batch_size
        self._workers = workers
        self._neighbors = neighbors
        self._log = log
        self._asked_to_stop = asked_to_stop
        self._with_progress = with_progress
        self._on_skip = {"validation": on_skip, "features": on_skip_reference}

    @torch.no_grad()
    def measure(self, method: TReX) -> dict[str, float]:
        """Measure the online encoder and the head; every rank must call it.

        Args:
            method: The method; its mode is restored.

        Returns:
            val_top1 and val_top5, accuracies over the readable images; val_knn, accuracy of the
            k-NN classifier.

        Raises:
            ValueError: An image is unreadable, or all are; on all ranks.
        """
        was_training = method.training
        method.eval()
        broadcast_buffers(method.encoder)
        try:
            references = self._references(method)
            with raise_on_all_ranks():
                counts = self._count(method, references)
        finally:
            method.train(was_training)
        top1, top5, nearest, images = gather(counts[None]).sum(0).tolist()
        if not images:
            raise ValueError("none of the validation images is readable")
        measured = {"val_top1": top1 / images, "val_top5": top5 / images}
        return measured | ({"val_knn": nearest / images} if self._neighbors else {})

    def _count(self, method: TReX, references: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return counts of this process: correct by top-1, top-5 and k-NN, and images."""
        counts = torch.zeros(4, dtype=torch.int64, device=self._process.device)
        waiting: list[tuple[Tensor, Tensor]] = []  # many queries at once are faster
        own = self._own(range(len(self._dataset.source)))
        for features, labels in self._features(method, self._dataset, own, "validation"):
            with self._precision.autocast():
                logits = method.objective.logits(method.encoder.projector(widen(features)))
            found = topk_correct(logits, labels, 5, missing_score=-torch.inf)
            counts[0] += found[:, 0].sum()
            counts[1] += found[:, -1].sum()
            counts[3] += len(labels)
            if references is not None:
                waiting.append((features, labels))
                if sum(len(part) for _, part in waiting) >= _QUERIES:
                    counts[2] += self._count_nearest(references, waiting)
                    waiting = []
        if references is not None and waiting:
            counts[2] += self._count_nearest(references, waiting)
        return counts

    def _references(self, method: TReX) -> tuple[Tensor, Tensor] | None:
        """Return features and labels of the references of all ranks."""
        if self._neighbors is None:
            return None
        with raise_on_all_ranks():
            features, labels = self._own_references(method, self._neighbors)
        # A process has none where there are fewer of them than processes, and knows no width then.
        width = gather(torch.tensor([features.shape[1]], device=features.device)).max()
        if not width:
            raise ValueError("none of the training images to compare with is readable")
        if not len(features):
            features = features.new_empty(0, int(width))
        return gather_rows(features), gather_rows(labels)

    def _own_references(self, method: TReX, among: Neighbors) -> tuple[Tensor, Tensor]:
        """Return the references of this rank; written in place, as they may be large."""
        own, filled, device = self._own(among.indices), 0, self._process.device
        features = torch.empty(0, 0, device=device)
        labels = torch.empty(len(own), dtype=torch.int64, device=device)
        for batch, batch_labels in self._features(method, among.dataset, own, "features"):
            if not filled:
                features = widen(batch).new_empty(len(own), batch.shape[1])
            part = slice(filled, filled + len(batch))
            features[part], labels[part] = batch, batch_labels
            filled += len(batch)
        return features[:filled], labels[:filled]

    def _count_nearest(
        self, references: tuple[Tensor, Tensor], queries: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        assert self._neighbors is not None
        features, labels = (torch.cat(column) for column in zip(*queries, strict=True))
        num_classes = len(self._dataset.source.classes)
        votes = knn_votes(*references, features, num_classes, self._neighbors.k)
        return topk_correct(votes, labels, 1).sum()

    def _own(self, indices: _Indices) -> _Indices:
        """Return the indices of this process."""
        return indices[self._process.rank :: self._process.world_size]

    def _features(
        self, method: TReX, dataset: ValidationDataset, own: Sequence[int] | np.ndarray, name: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the backbone's features, (<= B, F), and labels of some images."""
        size, device = self._batch_size, self._process.device
        batches = [[int(i) for i in own[at : at + size]] for at in range(0, len(own), size)]
        loaded = load_batches(
            dataset, batches, self._workers, device.type == "cuda", self._log, self._asked_to_stop
        )
        for batch in self._with_progress(loaded, len(batches), name):
            self._on_skip[name](batch.unreadable)
            if len(batch.labels):
                crops, labels = to_device([batch.images, batch.labels], device)
                with self._precision.autocast():
                    features = method.encoder.backbone(dataset.crop.normalize(crops))
                yield features, labels
