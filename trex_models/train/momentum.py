"""The momentum encoder: a moving average of the encoder that fills the bank (MoCo)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MomentumEncoder(nn.Module):
    """ema = m * ema + (1 - m) * online, over parameters only.

    BatchNorm normalises by batch statistics here too (the module stays in train mode); its
    running buffers follow this encoder's own batches and are never averaged.

    Args:
        encoder: The online encoder to start as a copy of.
        momentum: m.
    """

    def __init__(self, encoder: nn.Module, momentum: float) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Move the average towards the online encoder's parameters."""
        average: list[Tensor] = list(self.encoder.parameters())
        current: list[Tensor] = list(online.parameters())
        if average[0].dtype != torch.float64:
            torch._foreach_lerp_(average, current, 1 - self.momentum)
            return
        # Where runs are compared to the last bits, as written above: lerp rounds otherwise, and
        # deep networks amplify that.
        torch._foreach_mul_(average, self.momentum)
        torch._foreach_add_(average, torch._foreach_mul(current, 1 - self.momentum))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings, (B, D), of images, (B, 3, H, W)."""
        return self.encoder([images])
