"""The memory bank: the last Q embeddings of the momentum encoder, first in, first out.

Shapes: B batch, D embedding, Q bank size, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trex_models.heads import class_means


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Require integer labels and, on the CPU, labels in [0, C).

    Values on a GPU are not checked, because reading them would synchronize the device.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    # Subclasses such as FakeTensor may have no values.
    if type(labels) is Tensor and labels.device.type == "cpu" and labels.numel():
        lowest, highest = (int(bound) for bound in labels.aminmax())
        if not 0 <= lowest <= highest < num_classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"labels must be in [0, {num_classes}), got {wrong}")


class MemoryBank(nn.Module):
    """First-in, first-out store of embeddings (not normalized), labels and sample indices.

    ``size`` should be a multiple of the batch size: a batch that crosses the end is truncated.
    Initial entries are N(0, 1) noise with uniform random labels, so that nearly every class has a
    prototype from the first step. All tensors are buffers without gradient. This is MoCo's queue
    (He et al. 2020, arXiv 1911.05722) with labels; t-ReX (arXiv 2206.15369), section 3.2.

        bank = MemoryBank(8192, dim=256, num_classes=1000)
        bank.enqueue(embeddings, labels)

    Args:
        size: Number of entries, Q; 8192 in the paper.
        dim: Embedding dimension, D.
        num_classes: Number of classes, C. Random initial labels are drawn from it.
        dtype: Data type of the stored embeddings, independent of the training precision.

    Raises:
        ValueError: ``size``, ``dim`` or ``num_classes`` is below 1.

    Attributes:
        embeddings: Embeddings, (Q, D); ``features`` in state dicts, as in the official release.
        labels: Class labels, (Q,).
        indices: Sample indices, (Q,); -1 for unknown samples, such as those of the initial noise.
        written: Number of the batch that wrote each entry, (Q,); -1 for initial entries.
        pointer: Position of the next entry to overwrite.
        batches: Number of batches enqueued so far.
    """

    features: Tensor  # embeddings, under their name in state dicts
    labels: Tensor
    indices: Tensor
    written: Tensor

    def __init__(
        self, size: int, dim: int, num_classes: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if min(size, dim, num_classes) < 1:
            raise ValueError(
                f"the bank's sizes must be at least 1, got {size=}, {dim=}, {num_classes=}"
            )
        self.num_classes = num_classes
        self.pointer = self.batches = 0  # Python ints: reading them must not synchronize
        self.register_buffer("features", torch.randn(size, dim, dtype=dtype))
        self.register_buffer("labels", torch.randint(num_classes, (size,)))
        self.register_buffer("indices", torch.full((size,), -1))
        self.register_buffer("written", torch.full((size,), -1))

    @property
    def embeddings(self) -> Tensor:
        """Embeddings, (Q, D)."""
        return self.features

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Overwrite the oldest entries; a batch that crosses the end of the bank is truncated.

        Args:
            embeddings: Momentum-encoder embeddings, (B, D), on the bank's device.
            labels: Class labels, (B,), integers in [0, C).
            indices: Sample indices, (B,), integers from 0; only ``LOOK`` reads them.

        Raises:
            ValueError: Shapes do not match, or (on the CPU) labels are not in [0, C).
        """
        size, dim = self.embeddings.shape
        if embeddings.shape != (len(labels), dim) or labels.ndim != 1:
            raise ValueError(
                f"expected embeddings (B, {dim}) and labels (B,), got "
                f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
            )
        if indices is not None and indices.shape != labels.shape:
            raise ValueError(
                f"indices must be ({len(labels)},) like labels, got {tuple(indices.shape)}"
            )
        check_labels(labels, self.num_classes)
        count = min(len(labels), size - self.pointer)
        window = slice(self.pointer, self.pointer + count)
        self.embeddings[window] = embeddings[:count].to(self.embeddings.dtype)
        self.labels[window] = labels[:count]
        self.indices[window] = -1 if indices is None else indices[:count]
        self.written[window] = self.batches
        self.pointer = (self.pointer + count) % size
        self.batches += 1

    @torch.no_grad()
    def class_means(self) -> Tensor:
        """Return L2-normalized class means, (C, D); zero for a class without entries (Eq. 2)."""
        return class_means(self.embeddings, self.labels, self.num_classes)

    def get_extra_state(self) -> dict[str, int]:
        """Return the counters."""
        return {"pointer": self.pointer, "batches": self.batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the counters."""
        self.pointer, self.batches = state["pointer"], state["batches"]
