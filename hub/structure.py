"""Structure of a model for its model card: its parts, and the features of timm that it supports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from hub.hub_folder import HubModel, load_folder
from trex_models.cli import first_line
from trex_models.heads import CosineClassifier, Projector


@dataclass(frozen=True)
class ModelStructure:
    """Structure of a model."""

    backbone: str
    """Name of the backbone in timm."""
    is_resnet: bool
    num_features: int
    """Number of pooled backbone features."""
    embedding_dim: int
    """Embedding dimension of the projector; 0 without a projector."""
    classifier: str
    """cosine, linear, other (two classifiers, or hidden layers), or "" without a classifier."""
    temperature: float
    """Temperature of the cosine classifier."""
    has_pyramid: bool
    """True if timm can build the model with ``features_only=True``."""


@torch.inference_mode()
def inspect_model(model: HubModel) -> ModelStructure:
    """Load a model and describe it.

    Raises:
        ValueError: The model does not map an image of its input size to a vector.
    """
    network = load_folder(model.folder)
    size = model.config["pretrained_cfg"]["input_size"]
    images = torch.zeros(1, *size)
    try:
        maps = network.forward_features(images)
        vector = network.forward_head(maps, pre_logits=True)
    except Exception as error:  # the type depends on the model
        raise ValueError(
            f"{model.folder}: the model fails for images of its input_size, {tuple(size)} "
            f"({first_line(error)}); export it again"
        ) from error
    if not isinstance(vector, Tensor) or vector.ndim != 2:
        raise ValueError(
            f"{model.folder}: the model's output is not a vector; export it with a global_pool"
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
    """Try ``features_only``, since timm has no list of architectures that support it."""
    try:
        pyramid = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
        pyramid.eval()(images)
    except Exception:  # the type depends on the model
        return False
    return True
