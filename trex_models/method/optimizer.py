"""SGD's parameter groups and the learning rate of every step (t-ReX, training details)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def learning_rates(
    peak: float, final: float, warmup_steps: int, total_steps: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Linear warm-up from 0 to ``peak`` (both ends included), then a cosine down to ``final``.

    The schedule of t-ReX (arXiv 2206.15369), whose peak is 0.1 per 256 images of a batch.

    Args:
        peak: Highest learning rate.
        final: End of the cosine, which it would reach one step after the last.
        warmup_steps: Steps of the linear part.
        total_steps: Steps in all.

    Returns:
        One learning rate a step, (total_steps,).
    """
    warmup = np.linspace(0, peak, warmup_steps)
    decay_steps = total_steps - warmup_steps
    phase = np.pi * np.arange(decay_steps) / max(decay_steps, 1)
    decay = final + 0.5 * (peak - final) * (1 + np.cos(phase))
    return np.concatenate([warmup, decay])


def build_sgd(
    module: nn.Module, momentum: float = 0.9, weight_decay: float = 1e-4, lr: float = 0.1
) -> torch.optim.SGD:
    """SGD without Nesterov; only parameters with more than one dimension decay.

    The optimizer of t-ReX (arXiv 2206.15369).

        optimizer = build_sgd(method)
        for group in optimizer.param_groups:
            group["lr"] = rate  # before each step, from learning_rates

    Args:
        module: Module to train; parameters without gradient are left out.
        momentum: Momentum of the gradients.
        weight_decay: Weight decay, for weights, not for biases and norms.
        lr: Learning rate, where no step sets its own.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Lay out a restored optimizer's buffers as its parameters are.

    Fused SGD walks both in memory order: with other strides it would mix up their elements.
    """
    for parameter, state in optimizer.state.items():
        buffer = state.get("momentum_buffer")
        if buffer is not None:
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
