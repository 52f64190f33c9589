"""Reference outputs of an official file, computed with torchvision and plain formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Outputs(NamedTuple):
    """Outputs for a batch of images; only features for a backbone file."""

    features: Tensor
    embeddings: Tensor | None
    logits: Tensor | None


@torch.no_grad()
def outputs(
    checkpoint: Mapping[str, Any],
    images: Tensor,
    momentum: bool = False,
    num_classes: int = 1000,
) -> Outputs:
    """Compute the outputs of a checkpoint in eval mode, in float64.

    ``momentum`` is for the momentum encoder of a full one.
    """
    if "model" not in checkpoint:
        return Outputs(features(checkpoint, images), None, None)
    model = checkpoint["model"]
    encoder = "module.model_ema." if momentum else "module.model."
    x = features(under(model, f"{encoder}encoder."), images)
    z = embeddings(under(model, f"{encoder}head.layers."), x)
    if "module.clf.fc.weight" in model:
        weight = model["module.clf.fc.weight"].double()
        directions = weight / weight.norm(dim=1, keepdim=True)
    else:
        bank = under(model, "module.memory.")
        directions = prototypes(bank["features"].double(), bank["labels"], num_classes)
    return Outputs(x, z, z / z.norm(dim=1, keepdim=True) @ directions.T / 0.1)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def features(backbone: Mapping[str, Tensor], images: Tensor) -> Tensor:
    with torch.device("meta"):  # draws no random numbers
        resnet = torchvision.models.resnet50()
        resnet.fc = nn.Identity()
    resnet.load_state_dict(backbone, strict=True, assign=True)
    return resnet.double().eval()(images.double())


def embeddings(layers: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Apply the projector: L2 norm, hidden layers, bottleneck."""
    layers = {name: tensor.double() for name, tensor in layers.items()}
    x = x / x.norm(dim=1, keepdim=True)
    i = 1
    while f"{i}.fc.weight" in layers:
        x = x @ layers[f"{i}.fc.weight"].T + layers[f"{i}.fc.bias"]
        scale = layers[f"{i}.bn.weight"] / torch.sqrt(layers[f"{i}.bn.running_var"] + 1e-5)
        x = (x - layers[f"{i}.bn.running_mean"]) * scale + layers[f"{i}.bn.bias"]
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        i += 1
    return x @ layers[f"{i}.weight"].T


def prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the normalized sum of each class's features; zero for empty classes."""
    sums = torch.zeros(num_classes, features.shape[1], dtype=features.dtype)
    for feature, label in zip(features, labels.tolist(), strict=True):
        sums[label] += feature
    present = sums.any(dim=1)
    sums[present] /= sums[present].norm(dim=1, keepdim=True)
    return sums


def pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """Return smooth random images with the statistics of normalized images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic", antialias=True)
