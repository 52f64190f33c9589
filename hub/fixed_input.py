"""Outputs for one fixed input, which identify a published model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COUNT = 8
TOLERANCE = 1e-3
"""Relative to the largest output. Other processors and thread counts differ by about 1e-6."""


def images(size: Sequence[int]) -> Tensor:
    """Return the input of a size (C, H, W), (1, C, H, W) float32.

    2 sin((c + 1) (x + 2 y) / 17) in channel c, row y and column x: a formula, in float64, so that
    it depends on no random generator.
    """
    channels, height, width = size
    c = torch.arange(channels, dtype=torch.float64).view(-1, 1, 1)
    y = torch.arange(height, dtype=torch.float64).view(1, -1, 1)
    x = torch.arange(width, dtype=torch.float64).view(1, 1, -1)
    return (2 * torch.sin((c + 1) * (x + 2 * y) / 17)).float()[None]


@torch.inference_mode()
def fixed_outputs(model: Any) -> tuple[float, ...]:
    """Return the first outputs of a timm model in eval mode, to 6 significant digits."""
    values = model(images(model.pretrained_cfg["input_size"]))[0, :COUNT].tolist()
    return tuple(float(f"{value:.6g}") for value in values)


def relative_error(found: Sequence[float], recorded: Sequence[float]) -> float:
    """Return the largest difference, relative to the largest recorded value."""
    if len(found) != len(recorded):
        return float("inf")
    scale = max((abs(value) for value in recorded), default=0.0)
    errors = [abs(a - b) for a, b in zip(found, recorded, strict=True)]
    return max(errors, default=0.0) / max(scale, 1e-12)
