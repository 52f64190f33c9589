"""A small whole model that the tests of fine-tuning clients train in a few steps."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

import trex_models  # noqa: F401  # registers the models

NUM_CLASSES = 3
SMALL: dict[str, Any] = {
    "backbone": "resnet10t",
    "channels": (8, 16, 24, 32),
    "proj_hidden_dim": 32,
}


def quick(model: nn.Module) -> nn.Module:
    """Let batch norm's averages follow within the few steps of a test."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.5
    return model


def small_model() -> nn.Module:
    """Return a whole t-ReX model of 3 classes, ready to be trained."""
    return quick(timm.create_model("trex_resnet", num_classes=NUM_CLASSES, **SMALL))
