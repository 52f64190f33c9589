"""Momentum encoder: an exponential moving average of the encoder, which fills the bank (MoCo)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MomentumEncoder(nn.Module):
    """Exponential moving average of a module's parameters: ema = m * ema + (1 - m) * online.

    In training mode BatchNorm uses batch statistics here, too. Buffers are not averaged: running
    statistics are computed from this encoder's own batches. MoCo (He et al. 2020,
    arXiv 1911.05722), Eq. 2.

        momentum_encoder = MomentumEncoder(encoder)
        momentum_encoder.update(encoder)  # once per step
        embeddings = momentum_encoder(images)

    Args:
        encoder: Online encoder, any module; the average is initialized with its parameters.
        momentum: m, from 0 (a copy at each update) to 1 (never updated).

    Raises:
        ValueError: ``momentum`` is outside [0, 1].
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Update the average with the parameters of the online encoder, which may be wrapped."""
        average: list[Tensor] = list(self.encoder.parameters())
        current: list[Tensor] = list(online.parameters())
        if average[0].dtype != torch.float64:
            torch._foreach_lerp_(average, current, 1 - self.momentum)
            return
        # Runs in float64 are compared with the recorded ones: lerp rounds differently, and deep
        # networks amplify the difference.
        torch._foreach_mul_(average, self.momentum)
        torch._foreach_add_(average, torch._foreach_mul(current, 1 - self.momentum))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images without gradient, (B, 3, H, W) -> (B, D)."""
        return self.encoder(images)
