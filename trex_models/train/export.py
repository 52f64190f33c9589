"""A trained method as timm folders: model.safetensors and config.json, checked by reloading."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from timm.models.resnet import ResNet
from torch import Tensor, nn

from trex_models.train.checkpointing import make_folder
from trex_models.train.method import TReX

# Where the parts of the method stand in a whole model; the class weights become fc.weight.
PREFIXES = {"encoder.backbone.": "", "encoder.projector.": "proj."}

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
    model.load_state_dict(method.encoder.backbone.state_dict())
    written = [_write(model, folder / "backbone", images, features)]
    if isinstance(model, ResNet):
        name = None if backbone_args else _ZOO.get((backbone, head_args["proj_layers"]))
        args = {} if name else {"backbone": backbone, **backbone_args}
        whole = timm.create_model(
            name or "trex_resnet",
            pretrained_cfg=cfg | {"num_classes": len(classes), "label_names": tuple(classes)},
            **args,
            **head_args,
        )
        whole.load_state_dict(_whole_state(method))
        written.append(_write(whole, folder / "cls", images, logits))
    return written


def _whole_state(method: TReX) -> dict[str, Tensor]:
    state = {"fc.weight": method.objective.class_weights()}
    for key, tensor in method.state_dict().items():
        for prefix, ours in PREFIXES.items():
            if key.startswith(prefix):
                state[ours + key.removeprefix(prefix)] = tensor
    return state


def _write(model: nn.Module, folder: Path, images: Tensor, expected: Tensor) -> Path:
    """Save beside ``folder``, reload, compare with ``expected``, and move into place."""
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_for_hf(model, str(beside), safe_serialization=True)
        config_path = beside / "config.json"
        config = json.loads(config_path.read_text())
        # It stands at the top level too, and transformers refuses to be told twice.
        config.get("model_args", {}).pop("num_classes", None)
        config_path.write_text(json.dumps(config, indent=2) + "\n")
        reloaded = timm.create_model(f"local-dir:{beside}", pretrained=True).eval()
        error = (reloaded(images) - expected).abs().max().item()
        if not error <= 1e-4 * expected.abs().max().item():
            raise RuntimeError(
                f"the export to {folder} does not reproduce the model: off by {error}"
            )
        beside.chmod(0o755)  # mkdtemp's folders are private
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.replace(old)
            beside.replace(folder)
            shutil.rmtree(old)
        else:
            beside.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
