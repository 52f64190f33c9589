"""Momentum encoder: an exponential moving average of the encoder, which fills the bank (MoCo)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MomentumEncoder(nn.Module):
    """Exponential moving average of a module's parameters: ema = m * ema + (1 - m) * online.

    BatchNorm uses batch statistics here, too (the copy is in training mode if the original is);
    its running statistics are those of this encoder's batches, and are not averaged. MoCo
    (He et al. 2020, arXiv 1911.05722), Eq. 2.

        momentum_encoder = MomentumEncoder(encoder)
        momentum_encoder.update(encoder)  # once a step
        embeddings = momentum_encoder(images)

    Args:
        encoder: Online encoder, any module; the average starts as a copy of it.
        momentum: m, from 0 (copies at each update) to 1 (never changes).

    Raises:
        ValueError: ``momentum`` is outside [0, 1].
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Move the average towards the parameters of the online encoder, or of a wrapper."""
        average: list[Tensor] = list(self.encoder.parameters())
        current: list[Tensor] = list(online.parameters())
        if average[0].dtype != torch.float64:
            torch._foreach_lerp_(average, current, 1 - self.momentum)
            return
        # In float64 runs are compared bit for bit: lerp rounds differently, which deep networks
        # amplify.
        torch._foreach_mul_(average, self.momentum)
        torch._foreach_add_(average, torch._foreach_mul(current, 1 - self.momentum))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images without gradient, (B, 3, H, W) -> (B, D)."""
        return self.encoder(images)
