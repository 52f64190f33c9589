"""Validation: accuracy of the training head and of k-NN on features, and the features' rank.

Accuracies are exact for any number of processes: each image counts once.
Shapes: N images, B batch, C classes, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from trex_models.data.center_crop import PROTOCOLS, CenterCropDataset, CropBatch
from trex_models.data.decode import UnreadableImageError, with_skip_hint
from trex_models.data.loading import load_batches, to_device
from trex_models.data.sources import Source
from trex_models.distributed import (
    Process,
    broadcast_buffers,
    gather,
    gather_rows,
    preserve_buffers,
    raise_on_all_ranks,
    sum_over_ranks,
)
from trex_models.evaluation.geometry import rankme
from trex_models.evaluation.knn import knn_votes, topk_correct
from trex_models.heads import widen
from trex_models.method.model import TReX
from trex_models.precision import Precision

_QUERIES = 4096
_CALIBRATION_IMAGES = 2048


class ValidationDataset(CenterCropDataset):
    """Center crops of a source, 224 of 256 pixels, as in the authors' validation."""

    def __init__(self, source: Source, size: int, skip: bool = False) -> None:
        super().__init__(source, replace(PROTOCOLS["validation"], size=(size, size)), skip)

    def __getitems__(self, indices: Sequence[int]) -> CropBatch:
        """Return a batch, which may be empty; ValueError if an image is unreadable."""
        try:
            return super().__getitems__(indices)
        except UnreadableImageError as error:
            raise with_skip_hint(error) from error


@dataclass(frozen=True)
class Neighbors:
    """References of a weighted k-NN classifier: dataset, sample indices, (N,), and k."""

    dataset: ValidationDataset
    indices: np.ndarray
    k: int


@dataclass(frozen=True)
class Validator:
    """Validation of a method in eval mode, with the BatchNorm statistics of rank 0.

    It does not affect training. Each process evaluates every world_size-th image.

    Args:
        dataset: Validation images.
        process: This process.
        precision: Precision of the computation.
        batch_size: Batch size of this process.
        workers: Number of loader workers; ``log`` and ``should_stop`` are for them, too.
        neighbors: References of the k-NN classifier; None disables it.
        with_progress: Function of (batches, their number, a title) that adds a progress bar.
        on_skip: Callback that receives {index: reason} of skipped validation images.
        on_skip_reference: The same for the references of the k-NN classifier.
    """

    dataset: ValidationDataset
    process: Process
    precision: Precision
    batch_size: int
    workers: int
    neighbors: Neighbors | None = None
    log: Callable[[str], object] = print
    should_stop: Callable[[], object] = lambda: False
    with_progress: Callable[[Iterator[CropBatch], int, str], Iterator[CropBatch]] = (
        lambda batches, *_: batches
    )
    on_skip: Callable[[dict[int, str]], object] = lambda _: None
    on_skip_reference: Callable[[dict[int, str]], object] = lambda _: None

    @torch.no_grad()
    def measure(self, method: TReX) -> dict[str, float]:
        """Measure the accuracy of encoder and head; all ranks must call this method.

        Returns val_top1 and val_top5, if the objective predicts labels, and val_knn of the k-NN
        classifier: accuracies on the readable images; and val_rank, the effective rank of the
        backbone's features (``rankme``). Raises ValueError on all ranks if an image is unreadable,
        or if all were skipped.
        """
        was_training = method.training
        method.eval()
        broadcast_buffers(method.encoder)
        try:
            references = self._references(method, self.neighbors) if self.neighbors else None
            with raise_on_all_ranks():
                counts, gram = self._count(method, references)
        finally:
            method.train(was_training)
        top1, top5, nearest, images = gather(counts[None]).sum(0).tolist()
        if not images:
            raise ValueError("none of the validation images is readable; fix or replace them")
        width = _shared_width(gram)
        gram = gram if len(gram) else gram.new_zeros(width, width)
        # Rounded, since the order of the sum depends on the number of processes.
        measured = {"val_rank": float(f"{rankme(sum_over_ranks(gram)):.6g}")}
        if method.objective.predicts_labels:
            measured |= {"val_top1": top1 / images, "val_top5": top5 / images}
        return measured | ({"val_knn": nearest / images} if self.neighbors else {})

    @torch.no_grad()
    def measure_start(self, method: TReX, calibrate: bool) -> dict[str, float]:
        """Measure the weights that training starts from; all ranks must call this method.

        ``calibrate`` computes BatchNorm statistics from training images, for random weights: with
        initial statistics they would be too weak a baseline.
        """
        with preserve_buffers(method.encoder):
            if calibrate and self.neighbors:
                dataset, indices = self.neighbors.dataset, self.neighbors.indices
                # The same images on all ranks: synchronized BatchNorm needs equal batches.
                chosen = indices[:_CALIBRATION_IMAGES].tolist()
                with raise_on_all_ranks(), self.precision.autocast():
                    update_bn(self._crops(dataset, chosen, "BatchNorm"), method.encoder.backbone)
            return self.measure(method)

    def _count(
        self, method: TReX, references: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return sums, (4,), and the Gram matrix of the features, (F, F), of this rank's images."""
        counts = torch.zeros(4, dtype=torch.int64, device=self.process.device)
        gram = torch.zeros(0, 0, dtype=torch.float64, device=self.process.device)
        pending: list[tuple[Tensor, Tensor]] = []  # large batches of queries are faster
        indices = np.arange(len(self.dataset.source))
        for features, labels in self._features(method, self.dataset, indices, "validation"):
            if method.objective.predicts_labels:
                with self.precision.autocast():
                    logits = method.objective.logits(method.encoder.projector(widen(features)))
                correct = topk_correct(logits, labels, 5, missing_score=-torch.inf)
                counts[0] += correct[:, 0].sum()
                counts[1] += correct[:, -1].sum()
            counts[3] += len(labels)
            rows = features.double()
            gram = gram if len(gram) else rows.new_zeros(rows.shape[1], rows.shape[1])
            gram.addmm_(rows.T, rows)
            if references is not None:
                pending.append((features, labels))
                if sum(len(part) for _, part in pending) >= _QUERIES:
                    counts[2] += self._count_nearest(references, pending)
                    pending = []
        if references is not None and pending:
            counts[2] += self._count_nearest(references, pending)
        return counts, gram

    def _references(self, method: TReX, among: Neighbors) -> tuple[Tensor, Tensor]:
        features = torch.empty(0, 0, device=self.process.device)
        parts: list[Tensor] = []
        with raise_on_all_ranks():
            for batch, labels in self._features(method, among.dataset, among.indices, "features"):
                if not parts:  # filled in place: it may be large
                    size = len(self._own(among.indices))
                    features = widen(batch).new_empty(size, batch.shape[1])
                filled = sum(map(len, parts))
                features[filled : filled + len(batch)] = batch
                parts.append(labels)
        width = _shared_width(features)
        if not width:
            raise ValueError("none of the images that k-NN searches is readable; replace them")
        if not parts:
            features = features.new_empty(0, width)
            parts = [torch.empty(0, dtype=torch.int64, device=features.device)]
        labels = torch.cat(parts)
        return gather_rows(features[: len(labels)]), gather_rows(labels)

    def _count_nearest(
        self, references: tuple[Tensor, Tensor], queries: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        assert self.neighbors is not None
        features, labels = (torch.cat(column) for column in zip(*queries, strict=True))
        num_classes = len(self.dataset.source.classes)
        votes = knn_votes(*references, features, num_classes, self.neighbors.k)
        return topk_correct(votes, labels, 1).sum()

    def _own(self, indices: np.ndarray) -> np.ndarray:
        return indices[self.process.rank :: self.process.world_size]

    def _features(
        self, method: TReX, dataset: ValidationDataset, indices: np.ndarray, name: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for crops, labels in self._crops(dataset, self._own(indices).tolist(), name):
            with self.precision.autocast():
                features = method.encoder.backbone(crops)
            yield features, labels

    def _crops(
        self, dataset: ValidationDataset, indices: list[int], name: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        size, device = self.batch_size, self.process.device
        on_skip = self.on_skip if dataset is self.dataset else self.on_skip_reference
        batches = [indices[at : at + size] for at in range(0, len(indices), size)]
        loaded = load_batches(
            dataset, batches, self.workers, device.type == "cuda", self.log, self.should_stop
        )
        for batch in self.with_progress(loaded, len(batches), name):
            on_skip(batch.unreadable)
            if len(batch.labels):
                crops, labels = to_device([batch.images, batch.labels], device)
                yield dataset.crop.normalize(crops), labels


def _shared_width(rows: Tensor) -> int:
    """Return the width of the rows of any rank: a rank without images does not know it."""
    return int(gather(torch.tensor([rows.shape[1]], device=rows.device)).max())
