"""Export of saved runs: timm folders, verified by reloading, and failed steps to debug."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trex_models.method.backbone import full_args
from trex_models.method.model import TReX
from trex_models.method.objectives import LinearSoftmax
from trex_models.precision import Precision, choose_device
from trex_models.pretrained import checkpoints, timm_folder
from trex_models.pretrained.checkpoints import Checkpoint
from trex_models.pretrained.licenses import resolve_license
from trex_models.train import checkpointing
from trex_models.train.build import build_method, load_teacher
from trex_models.train.config import Config, from_dict
from trex_models.train.step import seed_step

# Registered models by backbone and hidden layers; trex_resnet supports any ResNet.
_ZOO = {("resnet50", 3): "trex_resnet50", ("resnet50", 1): "trexstar_resnet50"}


def export_checkpoint(path: Path, folder: Path, weights_license: str | None = None) -> list[Path]:
    """Export a checkpoint, or a run's last one, with ``export_method``; return the folders.

    ``weights_license`` replaces the license that the run was started with.

    Raises:
        ValueError: There is no valid checkpoint, or its license does not permit another one.
    """
    method, state = load_method(path)
    checkpointing.reject_failed_step(path, state)
    config = from_dict(state["config"])
    chosen = config.license if weights_license is None else weights_license
    config = replace(config, license=resolve_license(chosen, state["inherited_license"]))
    return export_method(method, config, state["classes"], folder)


@torch.no_grad()
def export_method(method: TReX, config: Config, classes: list[str], folder: Path) -> list[Path]:
    """Write ``folder/backbone`` and, if timm or this package can build it, the complete model.

    The complete model is ``folder/cls``, or ``folder/proj``, which returns embeddings, if the
    objective has no classifier. It is a model of this package if the backbone is a ResNet, and of
    timm if a linear classifier follows the backbone directly. Load them
    with ``timm.create_model("local-dir:...", pretrained=True)``; the backbone needs only timm.
    Earlier exports are replaced atomically. ``method`` must be on the CPU; eval mode is set.

    Raises:
        ValueError: ``folder`` cannot be created.
        RuntimeError: A reloaded model has other outputs than the method; it is not kept.
    """
    checkpointing.make_folder(folder)
    method.eval()
    backbone, size = config.model.backbone, config.crops.global_size
    backbone_args = full_args(backbone, config.model.parsed_backbone_args(), size)
    backbone_args.pop("zero_init_last", None)  # it only affects initial weights
    images = torch.randn(2, 3, size, size, generator=torch.Generator())
    features = method.encoder.backbone(images)
    embeddings = method.encoder.projector(features)
    has_classes = method.objective.classifier_weights() is not None
    trained = checkpoints.split(method.state_dict(), num_classes=len(classes) if has_classes else 0)
    # Not timm's configuration of the architecture: mean, crop and license are of this training.
    stock_cfg = timm.get_pretrained_cfg(backbone)
    cfg = {
        "num_classes": 0,
        "input_size": (3, size, size),
        "fixed_input_size": bool(stock_cfg and stock_cfg.fixed_input_size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": stock_cfg and stock_cfg.first_conv,
        "classifier": stock_cfg and stock_cfg.classifier,
        "license": config.license or None,
    }

    model = timm.create_model(backbone, num_classes=0, pretrained_cfg=cfg, **backbone_args)
    model.load_state_dict(trained.backbone)
    written = [timm_folder.write_timm_folder(model, folder / "backbone", images, features)]
    if has_classes:
        cfg |= {"num_classes": len(classes), "label_names": tuple(classes)}
    complete = _complete_model(method, trained, config, backbone_args, cfg)
    if complete is not None:
        output = method.objective.logits(embeddings) if has_classes else embeddings
        name = "cls" if has_classes else "proj"
        written.append(timm_folder.write_timm_folder(complete, folder / name, images, output))
    return written


def _complete_model(
    method: TReX,
    trained: Checkpoint,
    config: Config,
    backbone_args: dict[str, Any],
    cfg: dict[str, Any],
) -> nn.Module | None:
    objective: Any = method.objective
    backbone = config.model.backbone
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
    if not is_resnet or (trained.classifier_weights is None and not trained.projector):
        return None
    name, args = "trex_resnet", {"backbone": backbone, **backbone_args}
    known = (backbone, config.model.hidden_layers)
    if known in _ZOO and trained.projector and not backbone_args:
        name, args = f"{_ZOO[known]}_{'proj' if trained.classifier_weights is None else 'cls'}", {}
    if linear is not None:
        args["linear_classifier"] = True
    model = timm.create_model(
        name,
        pretrained_cfg=cfg,
        **args,
        proj_layers=config.model.hidden_layers,
        proj_hidden_dim=config.model.hidden_dim,
        proj_dim=config.model.embedding_dim if config.model.projector == "mlp" else 0,
        temperature=config.objective.temperature,
    )
    model.load_state_dict(trained.state_dict())
    return model


def load_step(path: Path | str) -> tuple[TReX, tuple[list[Tensor], Tensor, Tensor], Precision]:
    """Load a step with a non-finite loss from the file that the error message names.

    Returns the method in training mode, its inputs (crops of each resolution, labels, sample
    indices) and the precision, on CUDA if available, otherwise on the CPU. To repeat the forward
    pass of the failed process, run ``with precision.autocast(): loss, logits = method(*inputs)``:
    the global generators are seeded as in the run. Only running statistics (of BatchNorm, of a
    teacher's features) differ: they already include this forward pass.

    Raises:
        ValueError: The file is not a failed step, or its precision requires CUDA.
    """
    path = Path(path)
    device = choose_device()
    method, state = load_method(path)
    if "crops" not in state:
        raise ValueError(f"{path} is a checkpoint, not a failed step; pass a nonfinite_step_*.pt")
    precision = Precision.from_name(state["config"]["precision"], device.type)
    precision.apply()
    seed_step(state["config"]["seed"], state["step"], state["process"])
    crops = [images.to(device) for images in state["crops"]]
    method.objective.teacher = load_teacher(from_dict(state["config"]), device)
    inputs = crops, state["labels"].to(device), state["indices"].to(device)
    return method.train().to(device), inputs, precision


def load_method(path: Path) -> tuple[TReX, dict[str, Any]]:
    """Build the method of a checkpoint, or of a run's last one, on the CPU; return its state, too.

    Raises:
        ValueError: There is no checkpoint, or it is damaged or does not match its configuration.
    """
    saved = checkpointing.load_last(path) if path.is_dir() else (path, checkpointing.load(path))
    path, state = saved
    config, num_classes = from_dict(state["config"]), len(state["classes"])
    # First without memory: the configuration may describe a network of any size.
    too_large = "its configuration describes a larger network than its tensors"
    try:
        if re.search(r"(?<![\d.])\d{7}", repr(config.model.parsed_backbone_args())):
            raise ValueError(too_large)
        with torch.device("meta"), _LimitedCalls(5_000 + 50 * len(state["method"]), too_large):
            expected = build_method(config, num_classes).state_dict()
        if difference := checkpoints.mismatch(state["method"], expected):
            raise ValueError(f"its weights do not match its configuration: {difference}")
    except Exception as error:  # each network refuses arguments in its own way
        raise ValueError(f"{path}: {error}") from error
    method = build_method(config, num_classes)
    checkpointing.restore({"method": method}, state, path)
    return method, state


class _LimitedCalls(TorchFunctionMode):
    """Context in which torch functions may be called a limited number of times."""

    def __init__(self, left: int, message: str) -> None:
        super().__init__()
        self.left, self.message = left, message

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(self.message)
        return func(*args, **(kwargs or {}))
