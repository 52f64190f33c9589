"""Reference outputs of an official file, computed with torchvision and plain formulas.

Converted models are compared with these outputs, so this module shares no classes with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from trex_models.pretrained.checkpoints import WRAPPERS

TEMPERATURE = 0.1


class Outputs(NamedTuple):
    """Outputs for B images; only features for a backbone file."""

    features: Tensor
    """(B, 2048)."""
    embeddings: Tensor | None = None
    """(B, D)."""
    logits: Tensor | None = None
    """(B, C)."""


def entries(contents: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of a file: the weights one by one, other entries unsplit."""
    for name, value in contents.items():
        if name == "model" and isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


@torch.no_grad()
def outputs(
    contents: Mapping[str, Any],
    images: Tensor,
    *,
    momentum_encoder: bool = False,
    num_classes: int = 1000,
) -> Outputs:
    """Compute the outputs in eval mode: the backbone in float32, projector and logits in float64.

    Args:
        contents: Contents of the file as returned by torch.load; must be complete.
        images: Normalized images, (B, 3, S, S), float32.
        momentum_encoder: Use the momentum encoder instead of the online encoder.
        num_classes: Number of classes of the memory bank, C.
    """
    tensors = {
        ".".join(part for part in key.split(".") if part not in WRAPPERS): value
        for key, value in entries(contents)
    }
    if "conv1.weight" in tensors:
        return Outputs(_features(tensors, images))
    encoder = "model_ema." if momentum_encoder else "model."
    features = _features(_under(tensors, f"{encoder}encoder."), images)
    embeddings = _embeddings(_under(tensors, f"{encoder}head.layers."), features.double())
    if "clf.fc.weight" in tensors:
        directions = tensors["clf.fc.weight"].double()
    else:
        bank, labels = tensors["memory.features"].double(), tensors["memory.labels"]
        directions = torch.stack([bank[labels == c].sum(0) for c in range(num_classes)])
    cosines = _unit_rows(embeddings) @ _unit_rows(directions).T
    return Outputs(features, embeddings, cosines / TEMPERATURE)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _features(backbone: Mapping[str, Tensor], images: Tensor) -> Tensor:
    with torch.device("meta"):  # allocates no memory
        resnet = torchvision.models.resnet50()
    resnet.fc = nn.Identity()
    resnet.load_state_dict(backbone, assign=True)
    return resnet.eval()(images)


def _embeddings(layers: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = _unit_rows(x)
    i = 1
    while f"{i}.fc.weight" in layers:
        x = x @ layers[f"{i}.fc.weight"].double().T + layers[f"{i}.fc.bias"].double()
        mean, variance, scale, shift = (
            layers[f"{i}.bn.{name}"].double()
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        i += 1
    return x @ layers[f"{i}.weight"].double().T


def _unit_rows(x: Tensor) -> Tensor:
    norms = x.norm(dim=1, keepdim=True)
    return x / norms.where(norms > 0, 1)  # prototypes of absent classes remain zero
