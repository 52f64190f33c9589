"""Outputs of a model for a fixed input, recorded to recognize changes in published models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COUNT = 8
TOLERANCE = 1e-3
"""Relative to the largest output. Processors and thread counts change outputs by about 1e-6."""


def images(size: Sequence[int]) -> Tensor:
    """Return the fixed input for a size (C, H, W): one float32 image, (1, C, H, W).

    The pixel in channel c, row y and column x is 2 sin((c + 1) (x + 2 y) / 17), computed in
    float64: unlike random numbers, it is the same in every version of torch.
    """
    channels, height, width = size
    c = torch.arange(channels, dtype=torch.float64).view(-1, 1, 1)
    y = torch.arange(height, dtype=torch.float64).view(1, -1, 1)
    x = torch.arange(width, dtype=torch.float64).view(1, 1, -1)
    return (2 * torch.sin((c + 1) * (x + 2 * y) / 17)).float()[None]


@torch.inference_mode()
def fixed_outputs(model: Any) -> tuple[float, ...]:
    """Return the first outputs of a timm model in eval mode, rounded to 6 significant digits."""
    values = model(images(model.pretrained_cfg["input_size"]))[0, :COUNT].tolist()
    return tuple(float(f"{value:.6g}") for value in values)


def relative_error(outputs: Sequence[float], recorded: Sequence[float]) -> float:
    """Return the largest difference, relative to the largest recorded value."""
    if len(outputs) != len(recorded):
        return float("inf")
    scale = max((abs(value) for value in recorded), default=0.0)
    errors = [abs(a - b) for a, b in zip(outputs, recorded, strict=True)]
    return max(errors, default=0.0) / max(scale, 1e-12)
