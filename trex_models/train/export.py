"""A trained method as timm folders: model.safetensors and config.json, checked by reloading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import ResNet

from trex_models import checkpoints, folders
from trex_models.train.checkpointing import make_folder
from trex_models.train.method import TReX

# Models of the zoo by backbone and depth of the projector. trex_resnet is on any ResNet.
_ZOO = {("resnet50", 3): "trex_resnet50_cls", ("resnet50", 1): "trexstar_resnet50_cls"}


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
    """Write ``folder/backbone`` and, where the backbone is a ResNet, ``folder/cls``.

    Both load by ``timm.create_model("local-dir:...", pretrained=True)``; the backbone does so
    without this package. Each replaces an earlier export in one move.

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
    logits = method.objective.logits(method.encoder.projector(features))
    trained = checkpoints.split(method.state_dict(), num_classes=len(classes))
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
    written = [folders.write(model, folder / "backbone", images, features)]
    if isinstance(model, ResNet):
        name = None if backbone_args else _ZOO.get((backbone, head_args["proj_layers"]))
        args = {} if name else {"backbone": backbone, **backbone_args}
        whole = timm.create_model(
            name or "trex_resnet",
            pretrained_cfg=cfg | {"num_classes": len(classes), "label_names": tuple(classes)},
            **args,
            **head_args,
        )
        whole.load_state_dict(trained.state_dict())
        written.append(folders.write(whole, folder / "cls", images, logits))
    return written
