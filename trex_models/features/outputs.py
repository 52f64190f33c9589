"""What of a model is kept of each image: ``OUTPUTS`` has the choices.

Shapes: B batch, C channels, D embedding, F features, H, W height and width of the feature map.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trex_models.heads import Projector
from trex_models.transfer import encoders
from trex_models.transfer.encoders import Encoder

OUTPUTS = {
    "backbone": "pooled features before any projector, (F)",
    "projector": "embeddings after the projector, (D)",
    "dense": "the last stage's feature map, (C, H, W)",
    "logits": "the classifier's, one a class",
}
_PROJECTORS = (
    "trex_resnet50_proj, trexstar_resnet50_proj, the _cls models, and DIR/export/cls of a run"
)


class _Pooled(nn.Module):
    """The backbone of a model with a projector."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map images, (B, 3, S, S), to pooled features, (B, F)."""
        return self.model.global_pool(self.model.forward_features(images))


class _Dense(nn.Module):
    """A model without pooling and what follows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map images, (B, 3, S, S), to feature maps, (B, C, H, W)."""
        return self.model.forward_features(images)


def load(
    name: str,
    output: str = "backbone",
    *,
    file: Path | None = None,
    prepare: str = "transfer",
    precision: str = "fp32",
    device: str = "cpu",
) -> tuple[Encoder, tuple[int, ...]]:
    """Load a model that gives one of its outputs.

    Args:
        name: As ``trex_models.transfer.encoders.load`` takes it, like the other arguments.
        output: A key of ``OUTPUTS``.
        file: Weights of your own.
        prepare: How images are prepared.
        precision: What the device computes in.
        device: Where to put it.

    Returns:
        The model, and the shape of its output for one image.

    Raises:
        ValueError: The model cannot be loaded, or has no such output.
    """
    encoder = encoders.load(
        name,
        prepare=prepare,
        precision=precision,
        device=device,
        file=file,
        classifier=output == "logits",
        hint="" if file else "--file gives an architecture of timm weights of your own",
    )
    model: Any = encoder.model
    projects = isinstance(getattr(model, "proj", None), Projector)
    if output == "projector" and not projects:
        raise ValueError(
            f"--output projector: {name} has no projector; {_PROJECTORS} have one; of {name} there "
            "is --output backbone"
        )
    if output == "logits" and not getattr(model, "num_classes", 0):
        raise ValueError(
            f"--output logits: {name} has no classifier; trex_resnet50_cls has one, and any model "
            "of timm with classes; of this one there is --output backbone"
        )
    if output == "backbone" and projects:
        encoder = replace(encoder, model=_Pooled(model))
    if output == "dense":
        encoder = replace(encoder, model=_dense(name, model))
    shape = _shape(encoder)
    if output == "dense" and len(shape) != 3:
        raise ValueError(
            f"--output dense: {name} gives {shape} for an image, not a map (C, H, W); it is not "
            "convolutional: choose --output backbone"
        )
    return encoder, shape


def _dense(name: str, model: Any) -> nn.Module:
    if not hasattr(model, "forward_features") or "NHWC" in str(getattr(model, "output_fmt", "")):
        raise ValueError(
            f"--output dense: {name} has no feature map (C, H, W); choose --output backbone"
        )
    return _Dense(model)


@torch.inference_mode()
def _shape(encoder: Encoder) -> tuple[int, ...]:
    device = next((p.device for p in encoder.model.parameters()), None)
    image = torch.zeros(1, 3, *encoder.transform.size, device=device)
    return tuple(encoder.model(image).shape[1:])
