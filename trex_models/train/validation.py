"""Top-1 and top-5 accuracy of the training head, exact on any number of processes.

Shapes: N images, B batch, C classes, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from trex_models.data.loading import load_batches
from trex_models.data.sources import Source
from trex_models.train.distributed import Process, broadcast_buffers, gather
from trex_models.train.method import TReX
from trex_models.train.step import Precision

_CROP_PCT = 224 / 256  # resize the shorter side to 256, cut out the central 224


@dataclass(frozen=True)
class Images:
    """A batch of validation images.

    Args:
        images: (B, 3, S, S), normalised.
        labels: (B,).
    """

    images: Tensor
    labels: Tensor

    def pin_memory(self) -> Images:
        """Return the batch in page-locked memory."""
        return Images(self.images.pin_memory(), self.labels.pin_memory())


class ValidationDataset:
    """Centre crops of a source's images, 224 of 256, as the authors validate during training.

    Args:
        source: Labelled images.
        size: S.
    """

    def __init__(self, source: Source, size: int) -> None:
        self.source = source
        self._transform: Callable[[Image.Image], Tensor] = create_transform(
            (3, size, size), interpolation="bilinear", crop_pct=_CROP_PCT
        )

    def __getitems__(self, indices: Sequence[int]) -> Images:
        """Return a batch; ValueError names an image that cannot be read."""
        images = [self._transform(Image.fromarray(self.source.read(index))) for index in indices]
        return Images(torch.stack(images), torch.from_numpy(self.source.labels[list(indices)]))


@torch.no_grad()
def validate(
    method: TReX,
    dataset: ValidationDataset,
    process: Process,
    precision: Precision,
    batch_size: int,
    workers: int,
    say: Callable[[str], object] = print,
) -> dict[str, float]:
    """Measure the online encoder and the head, in eval mode, with rank 0's BatchNorm statistics.

    Every process must call it. Nothing that training depends on is changed.

    Args:
        method: The method; its mode is restored.
        dataset: The images.
        process: This process: it takes every world_size-th image from its rank on.
        precision: The types to compute in.
        batch_size: Images at a time, of this process.
        workers: Loader processes.
        say: What to do with a line about a worker's death.

    Returns:
        val_top1 and val_top5, shares of all N images; exact integers are summed.

    Raises:
        ValueError: An image cannot be read.
    """
    was_training = method.training
    method.eval()
    broadcast_buffers(method.encoder)
    own = range(process.rank, len(dataset.source), process.world_size)
    batches = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    counts = torch.zeros(3, dtype=torch.int64, device=process.device)  # top-1, top-5, images
    pinned = process.device.type == "cuda"
    try:
        for batch in load_batches(dataset, batches, workers, pinned, say):
            images = batch.images.to(process.device, non_blocking=True)
            labels = batch.labels.to(process.device, non_blocking=True)
            with precision.autocast():
                logits = method.objective.logits(method.encoder([images]))
            ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            seen = torch.tensor(len(labels), device=process.device)
            counts += torch.stack([ranked[:, 0].sum(), ranked.sum(), seen])
    finally:
        method.train(was_training)
    top1, top5, images_seen = gather(counts[None]).sum(0).tolist()
    return {"val_top1": top1 / images_seen, "val_top5": top5 / images_seen}
