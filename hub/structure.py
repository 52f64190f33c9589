"""Examine a network for its card: its parts, and what timm can do with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from hub.hub_folder import Model, load_folder
from trex_models.cli import first_line
from trex_models.heads import CosineClassifier, Projector


@dataclass(frozen=True)
class ModelStructure:
    """A model's parts."""

    backbone: str
    """Its name in timm."""
    is_resnet: bool
    num_features: int
    """Width of the backbone's pooled features."""
    embedding_dim: int
    """Width of the projector's embeddings; 0 without a projector."""
    classifier: str
    """cosine, linear, other (two of them, or hidden layers), or empty without a classifier."""
    temperature: float
    """Temperature of the cosine classifier."""
    has_pyramid: bool
    """Whether timm builds it with ``features_only=True``."""


@torch.inference_mode()
def inspect_model(model: Model) -> ModelStructure:
    """Load a model and describe it.

    Raises:
        ValueError: It does not turn an image of its own input size into a vector.
    """
    network = load_folder(model.folder)
    size = model.config["pretrained_cfg"]["input_size"]
    images = torch.zeros(1, *size)
    try:
        maps = network.forward_features(images)
        vector = network.forward_head(maps, pre_logits=True)
    except Exception as error:  # each model fails in its own way
        raise ValueError(
            f"{model.folder}: it does not take images of its own input_size, {tuple(size)} "
            f"({first_line(error)}); export it again"
        ) from error
    if not isinstance(vector, Tensor) or vector.ndim != 2:
        raise ValueError(
            f"{model.folder}: its output is not a vector; export it again, with a global_pool"
        )
    has_projector = isinstance(getattr(network, "proj", None), Projector)
    width = vector.shape[1]
    backbone = model.config["architecture"]
    if not model.is_stock:
        backbone = model.config.get("model_args", {}).get("backbone", "resnet50")
    return ModelStructure(
        backbone=backbone,
        is_resnet=isinstance(network, ResNet),
        num_features=network.global_pool(maps).shape[1] if has_projector else width,
        embedding_dim=width if has_projector else 0,
        classifier=_classifier(network) if network.num_classes else "",
        temperature=getattr(network, "temperature", 1.0),
        has_pyramid=_has_pyramid(model.folder, images),
    )


def _classifier(network: Any) -> str:
    classifier = network.get_classifier()
    if isinstance(classifier, CosineClassifier):
        return "cosine"
    return "linear" if isinstance(classifier, nn.Linear) else "other"


def _has_pyramid(folder: Path, images: Tensor) -> bool:
    """Try it: timm does not list which architectures and depths can."""
    try:
        pyramid = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
        pyramid.eval()(images)
    except Exception:  # each model fails in its own way
        return False
    return True
