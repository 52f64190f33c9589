"""Frozen models: the model under evaluation, its preprocessing and its identity.

A model's identity is everything that its features depend on: the tensors of its weights, its
modules and their settings, the preprocessing, the precision, the device type and the versions of
packages. Model names and file names are not part of it.

Shapes: B batch; F features; C channels; H height, W width; S side of the image in pixels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import Format
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from trex_models.cli import first_line
from trex_models.data.center_crop import PROTOCOLS, CenterCrop, image_batches
from trex_models.data.sources import Source, digest
from trex_models.heads import Projector
from trex_models.precision import Precision, PrecisionName, choose_device
from trex_models.pretrained import figure, licenses, timm_folder
from trex_models.pretrained.checkpoints import key_difference

PIXELS = "pixels"
"""Name of the baseline without a model: the pixels of a 16 x 16 center crop."""
Preprocessing = Literal["transfer", "validation", "model"]
FeaturesName = Literal["backbone", "projector", "logits", "dense"]
ModelOutput = FeaturesName | Literal["features_only"] | None
_PACKAGES = ("torch", "torchvision", "timm", "pillow")
_PIXEL_SIDE = 16  # 32 is not more accurate on fractals, and takes four times as long
_PIXEL_STRIDE = 8  # of the feature map
_CALIBRATION_IMAGES = 2048
# Arguments of models for images of any size, by the architectures that have them.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)
_FP32 = Precision.from_name("fp32", "cpu")


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """Frozen model that maps images to features."""

    name: str
    model: nn.Module
    """Module that maps images, (B, 3, S, S), to (B, *shape); on its device, in eval mode."""
    transform: CenterCrop
    shape: tuple[int, ...]
    """Shape of one image's features."""
    precision: Precision = _FP32
    """Precision and device type; the last digits of the features depend on both."""
    metadata: Mapping[str, Any]
    """Description for reports, such as architecture, hash of the weights and license."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        features: ModelOutput = None,
        preprocessing: Preprocessing = "transfer",
        precision: PrecisionName = "fp32",
        device: str = "cpu",
        file: Path | None = None,
        untrained: bool = False,
        seed: int = 0,
        hint: str = "",
    ) -> FrozenModel:
        """Load a timm model, a model of ``pretrained.figure``, a timm folder, a run or "pixels".

        ``features`` is "backbone" (pooled, before any projector), "projector", "logits", "dense"
        (last feature map) or "features_only" (last feature map of timm's ``features_only``, for
        images of any size); None means the model's output without its classifier. ``preprocessing``
        resizes the shorter side to the crop size, bicubic ("transfer", as the authors do), to 256
        for a crop of 224, bilinear ("validation"), or as the model's configuration says ("model").
        Crop size, mean and standard deviation are always the model's. ``file`` contains weights
        for a timm architecture. ``untrained`` initializes the weights randomly, with ``seed``.
        ``hint`` is added to the error message if the model cannot be loaded.
        """
        target = choose_device("cpu" if name == PIXELS else device)
        mode = Precision.from_name(precision, target.type)
        maps = features == "features_only"
        if name == PIXELS and file is None:
            model, crop, metadata = _pixels(maps)
        else:
            model = create_model(name, file, features == "logits", untrained, seed, hint, maps)
            model = model.to(target).to(memory_format=torch.channels_last).eval()
            crop = _transform(model, preprocessing)
            metadata = _metadata(name, model, file) | {"preprocessing": preprocessing}
            metadata |= {"untrained": untrained, **({"seed": seed} if untrained else {})}
        metadata["weights_sha256"] = weights_digest(model)
        metadata["parameters"] = sum(p.numel() for p in model.parameters())
        part = _select(name, model, features)
        shape = _shape(name, part, crop, features in ("dense", "features_only"))
        metadata["num_features"] = shape[0]
        if maps:
            info = getattr(model, "feature_info", None)
            metadata["stride"] = info.reduction()[-1] if info else _PIXEL_STRIDE
        return cls(
            name=name, model=part, transform=crop, shape=shape, precision=mode, metadata=metadata
        )

    @cached_property
    def modules_sha256(self) -> str:
        """Hash of the modules, cached, since some modules later record their last input."""
        return modules_digest(self.model)

    def identity(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON values."""
        return {
            "weights_sha256": self.metadata["weights_sha256"],
            "modules_sha256": self.modules_sha256,
            "transform": asdict(self.transform),
            "precision": self.precision.name,
            "device": self.precision.device_type,
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def recalibrate_batchnorm(self, source: Source, title: str, workers: int = 0) -> FrozenModel:
        """Compute BatchNorm statistics from a source, in place, and return the updated model.

        Random weights with initial BatchNorm statistics are not a useful baseline. Uses at most
        2,048 images, evenly spaced over the source. ``title`` is its name in reports.
        """
        count = min(len(source), _CALIBRATION_IMAGES)
        indices = [index * len(source) // count for index in range(count)]
        images = image_batches(source, self.transform, 64, workers, device_of(self.model), indices)
        update_bn(images, self.model)
        self.model.eval()
        statistics = f"statistics of {count} training images of {title}"
        changes = {"batchnorm": statistics, "weights_sha256": weights_digest(self.model)}
        return replace(self, metadata={**self.metadata, **changes})


def preprocessing(model: nn.Module) -> CenterCrop:
    """Return the preprocessing of a timm model's configuration.

    Args:
        model: Model from ``timm.create_model``.

    Raises:
        ValueError: The model has no ``pretrained_cfg`` or one that is not supported.
    """
    if not getattr(model, "pretrained_cfg", None):
        name = type(model).__name__
        raise ValueError(f"{name} has no pretrained_cfg; pass a transform, such as CenterCrop")
    return CenterCrop.from_data_config(resolve_model_data_config(model))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU if it has no parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's tensors, with their names, dtypes and shapes."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        sha256.update(_bytes(tensor))
    return sha256.hexdigest()


def modules_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names, classes and settings of a model's modules.

    Settings are attributes with plain values, such as the pooling type of a ViT, and buffers that
    are not in the state dict.
    """
    parts: list[str | bytes] = [repr(model)]
    saved = model.state_dict().keys()
    for name, module in model.named_modules():
        settings = {
            key: repr(value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key != "training" and _is_plain(value)
        }
        parts.append(json.dumps([name, type(module).__qualname__, settings]))
    for name, buffer in model.named_buffers():
        if name not in saved:
            parts += [name, _bytes(buffer)]
    return digest(*parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _bytes(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten()
    return data.view(torch.uint8).numpy().tobytes()


def create_model(
    name: str,
    file: Path | None = None,
    classifier: bool = True,
    untrained: bool = False,
    seed: int = 0,
    hint: str = "",
    features_only: bool = False,
) -> Any:
    """Create a model by name or timm folder; pretrained weights must be complete.

    ``features_only`` creates timm's network of the last feature map instead, for any image size.
    """
    folder = timm_folder.find_timm_folder(name)
    source = f"local-dir:{folder}" if folder else name
    if folder is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{name} is not a folder with a config.json; pass another model")
    if file is not None and not file.is_file():
        raise ValueError(f"--file {file} is not a file; pass a file with weights of {name}")
    # timm ignores the file for models from these sources.
    if file is not None and (folder is not None or ":" in name or name in {PIXELS, *figure.MODELS}):
        raise ValueError(f"--file requires the name of a timm architecture, got {name}")
    overlay = {"file": str(file)} if file else None
    options: dict[str, Any] = {"pretrained": not untrained, "pretrained_cfg_overlay": overlay}
    if untrained or not classifier or features_only:
        options["num_classes"] = 0
    attempts: list[dict[str, Any]] = [{"zero_init_last": False}] if untrained else []
    if features_only:
        options |= {"features_only": True, "out_indices": (-1,)}
        attempts += _ANY_SIZE
    try:
        if source in figure.MODELS:
            source = figure.ARCHITECTURE
            options["pretrained_cfg"] = figure.pretrained_cfg(name, not untrained)
        with _all_keys_required():
            for arguments in attempts:
                torch.manual_seed(seed)
                with suppress(TypeError):  # most architectures have no such arguments
                    return timm.create_model(source, **arguments, **options)
            torch.manual_seed(seed)
            return timm.create_model(source, **options)
    except Exception as error:  # timm, the Hub and safetensors raise errors of any type
        architecture = source.partition(".")[0]
        reason = first_line(error).removeprefix(f"{file}: ").rstrip(".")
        if not isinstance(error, ValueError | RuntimeError | OSError):
            reason = "not a file of weights" if file else f"{type(error).__name__}: {reason}"
        problem = f" cannot be loaded{f' from {file}' if file else ''}: {reason}"
        if features_only and "features_only" in str(error):
            hint = "choose a model that timm's features_only supports"
        if folder is None and ":" not in name and architecture not in timm.list_models():
            near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), 3))
            problem = " has no config.json" if Path(name).is_dir() else " is not a timm model"
            hint = f"choose from {near or 'timm.list_models(), hf-hub:OWNER/NAME, timm folders'}"
        raise ValueError(f"{name}{problem}{hint and f'; {hint}'}") from error


def _all_keys_required() -> AbstractContextManager[object]:
    """Require all weights, which timm does not if it removes the classifier; not thread-safe."""
    load = nn.Module.load_state_dict

    def load_all(module: nn.Module, state: Any, strict: bool = True, assign: bool = False) -> Any:
        result = load(module, state, strict=False, assign=assign)
        own, unexpected = module.state_dict(), result.unexpected_keys * strict
        # Some files lack normalization layers on purpose: ConvNeXt's FCMAE in timm.
        missing = [key for key in result.missing_keys if strict or own[key].ndim > 1]
        if difference := key_difference(missing, unexpected):
            raise RuntimeError(f"the weights do not match the model ({difference})")
        return result

    return patch.object(nn.Module, "load_state_dict", load_all)


def _transform(model: nn.Module, protocol: Preprocessing) -> CenterCrop:
    if protocol == "model":
        return preprocessing(model)
    config = resolve_model_data_config(model)
    _, height, width = config["input_size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return replace(PROTOCOLS[protocol], size=(height, width), mean=mean, std=std)


def _metadata(name: str, model: Any, file: Path | None) -> dict[str, Any]:
    cfg: Mapping[str, Any] = vars(model)["pretrained_cfg"]
    architecture = cfg.get("architecture") or type(model).__name__
    stated = cfg.get("license") or "not stated"
    own_weights = file or timm_folder.find_timm_folder(name)
    return {
        "source": str(own_weights or (name in figure.MODELS and cfg.get("origin_url")) or name),
        "architecture": architecture,
        "tag": "" if file else cfg.get("tag", ""),
        "license": licenses.describe(own_weights, architecture) if own_weights else stated,
    }


def _pixels(maps: bool) -> tuple[nn.Module, CenterCrop, dict[str, Any]]:
    size = (_PIXEL_SIDE, _PIXEL_SIDE)
    crop = replace(PROTOCOLS["transfer"], size=size, mean=(0, 0, 0), std=(1, 1, 1))
    shape, side = ("blocks", _PIXEL_STRIDE) if maps else ("center crop", _PIXEL_SIDE)
    source = f"image pixels in [0, 1], {shape} of {side} x {side}"
    weights = {"architecture": PIXELS, "tag": "", "license": "none (no weights)", "untrained": True}
    metadata = {"source": source, **weights, "preprocessing": PIXELS}
    return nn.PixelUnshuffle(_PIXEL_STRIDE) if maps else nn.Flatten(), crop, metadata


class _Dense(nn.Module):
    """Wrapper that returns a model's last feature map: (B, 3, S, S) -> (B, C, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


class _LastMap(_Dense):
    """Wrapper that returns the map of a features_only model: (B, 3, S, S) -> (B, C, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.nhwc = getattr(model, "output_fmt", None) == Format.NHWC

    def forward(self, images: Tensor) -> Tensor:
        (output,) = self.model(images)
        return output.permute(0, 3, 1, 2) if self.nhwc else output


class _Pooled(_Dense):
    """Wrapper that returns pooled features before the projector: (B, 3, S, S) -> (B, F)."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model.global_pool(super().forward(images))


def _select(name: str, model: Any, features: ModelOutput) -> nn.Module:
    has_projector = isinstance(getattr(model, "proj", None), Projector)
    is_nhwc = "NHWC" in str(getattr(model, "output_fmt", ""))
    missing = ""
    if features == "projector" and not has_projector:
        missing = "projector (trex_resnet50_proj and a run's export/cls have one)"
    elif features == "logits" and not getattr(model, "num_classes", 0):
        missing = "classifier (trex_resnet50_cls and resnet50.a1_in1k have one)"
    elif features == "dense" and (is_nhwc or not hasattr(model, "forward_features")):
        missing = "feature map (C, H, W)"
    if missing:
        raise ValueError(
            f"{name} has no {missing}, required for {features}; choose another model or output"
        )
    if features == "dense":
        return _Dense(model)
    if features == "features_only":
        return model if name == PIXELS else _LastMap(model)
    return _Pooled(model) if features == "backbone" and has_projector else model


@torch.inference_mode()
def _shape(name: str, model: nn.Module, transform: CenterCrop, dense: bool) -> tuple[int, ...]:
    try:
        output = model(torch.zeros(1, 3, *transform.size, device=device_of(model)))
    except RuntimeError as error:
        raise ValueError(
            f"--model {name} does not accept images of {transform.size} pixels "
            f"({first_line(error)}); correct input_size in its configuration"
        ) from error
    shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
    if len(shape) != (3 if dense else 1):
        pooled = "(F,); choose a model that pools its features"
        expected = "(C, H, W); choose --features backbone" if dense else pooled
        actual = shape or type(output).__name__
        raise ValueError(f"--model {name} returns {actual} for an image, expected {expected}")
    return shape
