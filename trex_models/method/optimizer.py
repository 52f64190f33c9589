"""Optimizers and the learning rate of every step (t-ReX, training details)."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import timm.optim
import torch
from torch import nn

MOMENTUM = 0.9  # of t-ReX; also timm's default
_UNAVAILABLE = [
    *("bnb*", "fused*", "kron*"),  # require bitsandbytes, apex and opt_einsum
    "adahessian",  # second-order gradients
    "*adafactorbv*",  # its state contains a data type, which checkpoints cannot store
]


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


def build_optimizer(
    module: nn.Module,
    name: str = "sgd",
    *,
    lr: float = 0.1,
    momentum: float = MOMENTUM,
    weight_decay: float = 1e-4,
    betas: tuple[float, ...] | None = None,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer with weight decay only on parameters of more than one dimension.

    The default is SGD as in t-ReX (arXiv 2206.15369): without Nesterov momentum, unlike timm's
    "sgd". All other names are timm's.

        optimizer = build_optimizer(method, "adamw", weight_decay=0.05)
        for group in optimizer.param_groups:
            group["lr"] = rate  # before each step, from learning_rates

    Args:
        module: Module to train; parameters that do not require gradients are skipped.
        name: Name of the optimizer, as in ``timm.optim.list_optimizers()``.
        lr: Peak of the learning rate; optimizers with corrected weight decay depend on it.
        momentum: Momentum, for the optimizers of which timm sets it.
        weight_decay: Weight decay of weights; biases and normalization layers have none.
        betas: Decay rates of the running averages. If None: the optimizer's defaults.
        eps: Constant added to the denominator. If None: the optimizer's default.

    Raises:
        ValueError: The optimizer is not available or lacks a setting. The message starts with the
            name of the argument.
    """
    _check_settings(name, momentum, betas, eps)
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    optional = {"betas": betas, "eps": eps}
    settings: dict[str, Any] = {k: value for k, value in optional.items() if value is not None}
    try:
        return timm.optim.create_optimizer_v2(groups, name, lr=lr, momentum=momentum, **settings)
    except ValueError as error:
        raise ValueError(f"name {name} does not accept these settings ({error})") from error


def _check_settings(
    name: str, momentum: float, betas: tuple[float, ...] | None, eps: float | None
) -> None:
    names = [str(name) for name in timm.optim.list_optimizers(exclude_filters=_UNAVAILABLE)]
    if name not in names:
        similar = difflib.get_close_matches(name.lower(), names, 5) or ["sgd", "adamw", "lamb"]
        raise ValueError(
            f"name {name!r} is not available; use an optimizer of timm that requires neither other "
            f"packages nor second-order gradients, such as {', '.join(similar)}"
        )
    info = timm.optim.get_optimizer_info(name)
    for setting, value, default, exists in (
        ("momentum", momentum, MOMENTUM, info.has_momentum),
        ("betas", betas, None, info.has_betas),
        ("eps", eps, None, info.has_eps),
    ):
        if value != default and not exists:
            raise ValueError(f"{setting} {value} is not a setting of {name}; leave it unset")
    if betas is not None and len(betas) != info.num_betas:
        raise ValueError(f"betas of {name} must be {info.num_betas} numbers, got {betas}")


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Convert the tensors of a restored optimizer to the memory format of their parameters.

    Fused SGD reads both in memory order: different strides would pair the wrong elements.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
