"""SGD's parameter groups and the learning rate of every step (t-ReX, training details)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def learning_rates(
    peak: float, final: float, warmup_steps: int, total_steps: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Compute the learning rate of every step: linear warm-up from 0, then cosine decay.

    The schedule of t-ReX (arXiv 2206.15369), with a peak of 0.1 per 256 images in a batch.

    Args:
        peak: Learning rate at the end of the warm-up.
        final: Learning rate that the cosine decay would reach one step after the last one.
        warmup_steps: Number of steps of the warm-up.
        total_steps: Number of steps, including the warm-up.

    Returns:
        Learning rates, (total_steps,).
    """
    warmup = np.linspace(0, peak, warmup_steps)
    decay_steps = total_steps - warmup_steps
    phase = np.pi * np.arange(decay_steps) / max(decay_steps, 1)
    decay = final + 0.5 * (peak - final) * (1 + np.cos(phase))
    return np.concatenate([warmup, decay])


def build_sgd(
    module: nn.Module, momentum: float = 0.9, weight_decay: float = 1e-4, lr: float = 0.1
) -> torch.optim.SGD:
    """Build SGD with weight decay only on parameters of more than one dimension.

    The optimizer of t-ReX (arXiv 2206.15369), without Nesterov momentum.

        optimizer = build_sgd(method)
        for group in optimizer.param_groups:
            group["lr"] = rate  # before each step, from learning_rates

    Args:
        module: Module to train; parameters that do not require gradients are skipped.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of weights; biases and normalization layers have none.
        lr: Initial learning rate.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Convert the buffers of a restored optimizer to the memory format of their parameters.

    Fused SGD reads both in memory order: different strides would pair the wrong elements.
    """
    for parameter, state in optimizer.state.items():
        buffer = state.get("momentum_buffer")
        if buffer is not None:
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
