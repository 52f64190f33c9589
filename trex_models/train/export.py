"""A trained method as timm folders: model.safetensors and config.json, checked by reloading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import ResNet
from torch import nn

from trex_models import checkpoints, timm_folder
from trex_models.checkpoints import Checkpoint
from trex_models.train.checkpointing import make_folder
from trex_models.train.method import TReX
from trex_models.train.objectives import LinearSoftmax

# Models of the zoo by backbone and depth of the projector. trex_resnet is on any ResNet.
_ZOO = {("resnet50", 3): "trex_resnet50", ("resnet50", 1): "trexstar_resnet50"}


@torch.no_grad()
def export(
    method: TReX,
    folder: Path,
    *,
    backbone: str,
    backbone_args: Mapping[str, Any],
    head_args: Mapping[str, Any],
    image_size: int,
    classes: Sequence[str],
    weights_license: str = "",
) -> list[Path]:
    """Write ``folder/backbone`` and the whole model, where timm or this package can build it.

    The whole model is ``folder/cls``, or ``folder/proj`` for an objective without class weights,
    whose output are the embeddings. It is of this package where the backbone is a ResNet; a linear
    classifier right behind any backbone is timm's own. All load by
    ``timm.create_model("local-dir:...", pretrained=True)``, the backbone without this package.
    Each replaces an earlier export in one move.

    Args:
        method: The trained method, on the CPU; put into eval mode.
        folder: Where to write.
        backbone: timm's name of the backbone.
        backbone_args: Its further arguments.
        head_args: proj_layers, proj_hidden_dim, proj_dim and temperature of ``TRexResNet``.
        image_size: Side of the images to recommend, in pixels.
        classes: Names of the classes.
        weights_license: Licence to state; empty for none.

    Returns:
        The folders written.

    Raises:
        ValueError: ``folder`` cannot be made.
        RuntimeError: A reloaded model gives other outputs than the method; nothing is kept then.
    """
    make_folder(folder)
    method.eval()
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator())
    features = method.encoder.backbone(images)
    embeddings = method.encoder.projector(features)
    has_classes = method.objective.class_weights() is not None
    trained = checkpoints.split(method.state_dict(), num_classes=len(classes) if has_classes else 0)
    stock_cfg = timm.get_pretrained_cfg(backbone)
    cfg = {
        "num_classes": 0,
        "input_size": (3, image_size, image_size),
        "fixed_input_size": bool(stock_cfg and stock_cfg.fixed_input_size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": stock_cfg and stock_cfg.first_conv,
        "classifier": stock_cfg and stock_cfg.classifier,
        "license": weights_license or None,
    }

    model = timm.create_model(backbone, num_classes=0, pretrained_cfg=cfg, **backbone_args)
    model.load_state_dict(trained.backbone)
    written = [timm_folder.write_timm_folder(model, folder / "backbone", images, features)]
    if has_classes:
        cfg |= {"num_classes": len(classes), "label_names": tuple(classes)}
    whole = _whole_model(method, trained, backbone, backbone_args, head_args, cfg)
    if whole is not None:
        output = method.objective.logits(embeddings) if has_classes else embeddings
        name = "cls" if has_classes else "proj"
        written.append(timm_folder.write_timm_folder(whole, folder / name, images, output))
    return written


def _whole_model(
    method: TReX,
    trained: Checkpoint,
    backbone: str,
    backbone_args: Mapping[str, Any],
    head_args: Mapping[str, Any],
    cfg: dict[str, Any],
) -> nn.Module | None:
    """Return the model with its head; None where there is no more than the backbone to it."""
    objective: Any = method.objective
    linear = objective.classifier if isinstance(objective, LinearSoftmax) else None
    if linear is not None and not trained.projector:
        model: Any = timm.create_model(backbone, pretrained_cfg=cfg, **backbone_args)
        classifier = model.get_classifier()
        if not isinstance(classifier, nn.Linear):
            return None
        model.load_state_dict(trained.backbone, strict=False)
        classifier.load_state_dict(linear.state_dict())
        return model
    is_resnet = isinstance(method.encoder.backbone, ResNet)
    if not is_resnet or (trained.class_weights is None and not trained.projector):
        return None
    name, args = "trex_resnet", {"backbone": backbone, **backbone_args}
    known = (backbone, head_args["proj_layers"])
    if known in _ZOO and trained.projector and not backbone_args:
        name, args = f"{_ZOO[known]}_{'proj' if trained.class_weights is None else 'cls'}", {}
    if linear is not None:
        args["linear_classifier"] = True
    model = timm.create_model(name, pretrained_cfg=cfg, **args, **head_args)
    model.load_state_dict(trained.state_dict())
    return model
