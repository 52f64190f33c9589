"""Small models and timm folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import trex_models
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.method.objectives import CosineSoftmax, OnlineClassMeans
from trex_models.pretrained import timm_folder

Args = dict[str, Any]
CHANNELS = (8, 16, 24, 32)
NUM_CLASSES = 3
SMALL: Args = {"backbone": "resnet10t", "channels": CHANNELS, "proj_hidden_dim": 32}
CFG = {
    "num_classes": 0,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "conv1.0",
    "classifier": "fc",
}
TINY: Args = {"channels": (4, 8, 16, 32)}
COLORS = {"ant": (220, 30, 30), "bee": (30, 200, 30), "cat": (40, 40, 220), "dog": (230, 230, 40)}
SIDE = 64
C, D = 5, 6  # classes and dimension of make_bank's entries


def load(folder: Path | str, **args: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **args).eval()


def tiny_method(bank: bool) -> TReX:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=0)
    encoder = Encoder(network, trex_models.Projector(512, 2, 32, 16))
    if bank:
        return TReX(encoder, OnlineClassMeans(MemoryBank(64, 16, 5), 0.1))
    return TReX(encoder, CosineSoftmax(16, 5, 0.1))


class TinyBackbone(nn.Module):
    """Pooled convolution with BatchNorm that counts its calls."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return self.bn(self.conv(images)).relu().mean((2, 3))


def quick(model: nn.Module) -> nn.Module:
    """Make BatchNorm's running statistics adapt within the few steps of a test."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.5
    return model


def small_model() -> nn.Module:
    """Return a complete t-ReX model with 3 classes, ready for training."""
    return quick(timm.create_model("trex_resnet", num_classes=NUM_CLASSES, **SMALL))


def tiny_folder(path: Path, seed: int = 0) -> Path:
    """Return a small backbone as the trainer exports it."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=0, pretrained_cfg=CFG, **TINY).eval()
    return write_folder(model, path)


def write_folder(model: Any, path: Path) -> Path:
    """Write a model for images of 32 pixels as a timm folder."""
    images = torch.randn(2, 3, 32, 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    return timm_folder.write_timm_folder(model.eval(), path, images, model(images).detach())


def tiny_classifier(path: Path, weight: torch.Tensor | None = None) -> Path:
    """Return a small complete model as the trainer exports it, with classifier ``weight``."""
    torch.manual_seed(1)
    model: Any = timm.create_model(
        "trex_resnet",
        backbone="resnet10t",
        pretrained_cfg=CFG | {"num_classes": 4, "label_names": tuple(COLORS)},
        num_classes=4,
        proj_layers=1,
        proj_hidden_dim=32,
        proj_dim=16,
        **TINY,
    )
    if weight is not None:
        model.fc.weight = nn.Parameter(weight)
    return write_folder(model, path)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def make_bank(size: int = 40, seed: int = 0) -> MemoryBank:
    torch.manual_seed(seed)
    bank = MemoryBank(size, D, C, torch.float64)
    bank.indices.copy_(torch.randint(0, 12, (size,)))  # several entries of a sample
    return bank


def batch(images: int = 4, crops: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    z = torch.randn(images * crops, D, dtype=torch.float64, requires_grad=True)
    return z, torch.randint(C, (images,)), torch.arange(images)


def write_model(folder: Path, name: str, license: str = "mit", **kwargs: Any) -> Path:  # noqa: A002
    """Write a model as a timm folder; each of its tensors affects its outputs."""
    torch.manual_seed(0)
    args: Args = {"zero_init_last": False} if "resnet" in name else {}
    model = timm.create_model(name, **args, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor in (module.running_mean, module.weight, module.bias):
                assert tensor is not None
                tensor.data.add_(torch.randn_like(tensor) / 10)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 1.5)
    cfg = {"input_size": (3, SIDE, SIDE), "crop_pct": 0.93, "license": license}
    return _save(model, folder, cfg, kwargs)


def save_model(folder: Path, name: str, cfg: Args, seed: int = 0, **args: Any) -> Path:
    """Write a new model as a timm folder, described by ``cfg``."""
    torch.manual_seed(seed)
    return _save(timm.create_model(name, **args), folder, cfg, args)


def _save(model: Any, folder: Path, cfg: Args, args: Args) -> Path:
    config = {"pretrained_cfg": {**model.pretrained_cfg, **cfg}}
    save_for_hf(model, str(folder), model_config=config, model_args=args, safe_serialization=True)
    edit_config(folder, lambda config: config["model_args"].pop("num_classes", None))
    return folder
