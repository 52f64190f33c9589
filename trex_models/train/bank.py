"""The memory bank: the last Q embeddings of the momentum encoder, first in first out.

MoCo's queue (He et al. 2020) with labels, as t-ReX section 3.2 uses it.
Shapes: B batch, D embedding, Q bank size, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trex_models.heads import class_means


class Bank(nn.Module):
    """FIFO of raw (not normalised) embeddings and their labels.

    Starts as N(0, 1) noise with uniform random labels, so that every class has a
    prototype from the first step.

    Args:
        size: Q.
        dim: D.
        num_classes: C.
        dtype: Type of the embeddings; float32 whatever the precision of training.
    """

    features: Tensor
    labels: Tensor

    def __init__(
        self, size: int, dim: int, num_classes: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pointer = 0  # a Python int: reading it must not wait for the device
        self.register_buffer("features", torch.randn(size, dim, dtype=dtype))
        self.register_buffer("labels", torch.randint(num_classes, (size,)))

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor) -> None:
        """Write a batch at the pointer; what does not fit before the end is dropped.

        Args:
            features: (B, D).
            labels: (B,).
        """
        size = len(self.labels)
        written = min(len(labels), size - self.pointer)
        window = slice(self.pointer, self.pointer + written)
        self.features[window] = features[:written].to(self.features.dtype)
        self.labels[window] = labels[:written]
        self.pointer = (self.pointer + written) % size

    @torch.no_grad()
    def class_means(self) -> Tensor:
        """Return L2-normalised class means, (C, D); zero for a class without entries."""
        return class_means(self.features, self.labels, self.num_classes)

    def get_extra_state(self) -> int:
        """Return the pointer, which belongs to the state."""
        return self.pointer

    def set_extra_state(self, state: int) -> None:
        """Restore the pointer."""
        self.pointer = state
