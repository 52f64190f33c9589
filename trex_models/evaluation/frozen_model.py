"""Frozen models: the model under evaluation, its preprocessing and its identity.

A model's identity is everything that its features depend on: the tensors of its weights, its
modules and their settings, the preprocessing, the precision, the type of device, and versions.
Names and files do not count.

Shapes: B batch, F features, D embedding, C channels, H, W height and width, S side in pixels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from trex_models.cli import first_line
from trex_models.data.center_crop import PROTOCOLS, CenterCrop, image_batches
from trex_models.data.sources import Source, digest
from trex_models.heads import Projector
from trex_models.precision import Precision, PrecisionName, choose_device
from trex_models.pretrained import licenses, timm_folder

PIXELS = "pixels"
"""Name of the baseline without a model: an image's pixels at 16 x 16."""
Preprocessing = Literal["transfer", "validation", "model"]
FeaturesName = Literal["backbone", "projector", "logits", "dense"]
_PACKAGES = ("torch", "torchvision", "timm", "pillow")
_PIXEL_SIDE = 16  # on fractals 32 is no better by either classifier, and takes four times as long
_CALIBRATION_IMAGES = 2048
_FP32 = Precision.from_name("fp32", "cpu")


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """A model that maps images to features."""

    name: str
    model: nn.Module
    """Module that maps (B, 3, S, S) to (B, *shape); on its device, in eval mode."""
    transform: CenterCrop
    shape: tuple[int, ...]
    """Shape of one image's features."""
    precision: Precision = _FP32
    """Number formats, and type of the device: the last digits of features depend on both."""
    metadata: Mapping[str, Any]
    """Description for reports: architecture, hash of the weights, number of parameters."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        features: FeaturesName | None = None,
        preprocessing: Preprocessing = "transfer",
        precision: PrecisionName = "fp32",
        device: str = "cpu",
        file: Path | None = None,
        untrained: bool = False,
        seed: int = 0,
        hint: str = "",
    ) -> FrozenModel:
        """Load a timm model, a timm folder, a finished run (its backbone), or "pixels".

        Features are "backbone" (pooled, before any projector), "projector", "logits", or "dense"
        (the last feature map); None is the model's output without its classifier. Preprocessing
        resizes the shorter side to the crop's, bicubic ("transfer", the authors'), to 256 for 224,
        bilinear ("validation"), or as the model's configuration says ("model"); crop size, mean
        and standard deviation are always the model's. ``file`` holds weights for an architecture
        of timm, ``untrained`` gives random ones of ``seed``, and ``hint`` is the remedy to report
        if there are none.
        """
        place = choose_device("cpu" if name == PIXELS else device)
        formats = Precision.from_name(precision, place.type)
        if name == PIXELS and file is None:
            model, transform, metadata = _pixels()
        else:
            model = _create(name, untrained, seed, file, features == "logits", hint)
            model = model.to(place).to(memory_format=torch.channels_last).eval()
            transform = _transform(model, preprocessing)
            metadata = _metadata(name, model, file) | {"preprocessing": preprocessing}
            metadata |= {"untrained": untrained, **({"seed": seed} if untrained else {})}
        metadata["weights_sha256"] = weights_digest(model)
        metadata["parameters"] = sum(p.numel() for p in model.parameters())
        part = _select(name, model, features)
        shape = _shape(name, part, transform, features == "dense")
        metadata["num_features"] = shape[0]
        return cls(
            name=name,
            model=part,
            transform=transform,
            shape=shape,
            precision=formats,
            metadata=metadata,
        )

    @cached_property
    def modules_sha256(self) -> str:
        """Hash of the modules at first use: some modules record their last input."""
        return modules_digest(self.model)

    def identity(self) -> dict[str, Any]:
        """Return what the features depend on, for JSON."""
        return {
            "weights_sha256": self.metadata["weights_sha256"],
            "modules_sha256": self.modules_sha256,
            "transform": asdict(self.transform),
            "precision": self.precision.name,
            "device": self.precision.device_type,
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def recalibrate_batchnorm(self, source: Source, title: str, workers: int = 0) -> FrozenModel:
        """Return the model with BatchNorm statistics of a source's images; changes it in place.

        Random weights with BatchNorm's initial statistics are no baseline. At most 2,048 images are
        taken, evenly over the source, which ``title`` names in reports.
        """
        count = min(len(source), _CALIBRATION_IMAGES)
        indices = [index * len(source) // count for index in range(count)]
        images = image_batches(source, self.transform, 64, workers, device_of(self.model), indices)
        update_bn(images, self.model)
        self.model.eval()
        metadata = {
            **self.metadata,
            "batchnorm": f"statistics of {count} training images of {title}",
            "weights_sha256": weights_digest(self.model),
        }
        return replace(self, metadata=metadata)


def preprocessing(model: nn.Module) -> CenterCrop:
    """Return the preprocessing that a timm model's configuration asks for.

    Args:
        model: Model from ``timm.create_model``.

    Raises:
        ValueError: The model has no ``pretrained_cfg``, or it asks for something that
            ``CenterCrop`` does not support.
    """
    if not getattr(model, "pretrained_cfg", None):
        name = type(model).__name__
        raise ValueError(f"{name} has no pretrained_cfg; pass a transform, such as CenterCrop()")
    return CenterCrop.from_data_config(resolve_model_data_config(model))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's tensors with their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def modules_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's modules by name, class and settings.

    Settings are attributes with plain values, such as a transformer's kind of pooling, and buffers
    that are not in the state dict.
    """
    parts: list[str | bytes] = [repr(model)]
    kept = model.state_dict().keys()
    for name, module in model.named_modules():
        settings = {
            key: repr(value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key != "training" and _is_plain(value)
        }
        parts.append(json.dumps([name, type(module).__qualname__, settings]))
    for name, buffer in model.named_buffers():
        if name not in kept:
            parts += [name, _bytes(buffer)]
    return digest(*parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values, whatever its type and memory format."""
    data = tensor.detach().cpu().contiguous().flatten()
    return data.view(torch.uint8).numpy().tobytes()


def _create(
    name: str, untrained: bool, seed: int, file: Path | None, classifier: bool, hint: str
) -> nn.Module:
    folder = timm_folder.find_timm_folder(name)
    if folder is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name}: no such folder with a config.json; name another model")
    if file is not None and not file.is_file():
        raise ValueError(f"--file {file} is no file; name the weights of {name}")
    # timm ignores the file for models from these places.
    if file is not None and (folder is not None or ":" in name or name == PIXELS):
        raise ValueError(f"--file goes with the name of an architecture of timm, not with {name}")
    options: dict[str, Any] = {"pretrained": not untrained}
    if untrained or not classifier:
        options["num_classes"] = 0
    if file:
        options["pretrained_cfg_overlay"] = {"file": str(file)}
    torch.manual_seed(seed)
    try:
        known = f"local-dir:{folder}" if folder else name
        if untrained:
            with suppress(TypeError):  # most architectures have no such argument
                return timm.create_model(known, zero_init_last=False, **options)
        return timm.create_model(known, **options)
    except Exception as error:  # timm, the Hub and safetensors let anything out
        architecture = name.partition(".")[0]
        problem = f" cannot be loaded: {first_line(error)}"
        if folder is None and ":" not in name and architecture not in timm.list_models():
            near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), 3))
            problem, hint = ": timm knows no model of this name", near and f"the nearest are {near}"
        raise ValueError(f"--model {name}{problem}{hint and f'; {hint}'}") from error


def _transform(model: nn.Module, protocol: Preprocessing) -> CenterCrop:
    if protocol == "model":
        return preprocessing(model)
    own = resolve_model_data_config(model)
    _, height, width = own["input_size"]
    mean, std = tuple(own["mean"]), tuple(own["std"])
    return replace(PROTOCOLS[protocol], size=(height, width), mean=mean, std=std)


def _metadata(name: str, model: Any, file: Path | None) -> dict[str, Any]:
    cfg: Mapping[str, Any] = vars(model)["pretrained_cfg"]
    architecture = cfg.get("architecture") or type(model).__name__
    stated = cfg.get("license") or "not stated"
    own_weights = file or timm_folder.find_timm_folder(name)
    return {
        "source": str(own_weights or name),
        "architecture": architecture,
        "tag": "" if file else cfg.get("tag", ""),
        "license": licenses.describe(own_weights, architecture) if own_weights else stated,
    }


def _pixels() -> tuple[nn.Module, CenterCrop, dict[str, Any]]:
    size = (_PIXEL_SIDE, _PIXEL_SIDE)
    crop = replace(PROTOCOLS["transfer"], size=size, mean=(0, 0, 0), std=(1, 1, 1))
    metadata = {
        "source": f"the pixels of the image at {_PIXEL_SIDE} x {_PIXEL_SIDE}, in [0, 1]",
        "architecture": PIXELS,
        "tag": "",
        "license": "none: pixels are no weights",
        "untrained": True,
        "preprocessing": PIXELS,
    }
    return nn.Flatten(), crop, metadata


class _Dense(nn.Module):
    """A model up to its last feature map: (B, 3, S, S) -> (B, C, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


class _Pooled(_Dense):
    """The backbone of a model with a projector: (B, 3, S, S) -> (B, F)."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model.global_pool(super().forward(images))


def _select(name: str, model: Any, features: FeaturesName | None) -> nn.Module:
    """Return the part of a model that gives the features asked for."""
    projects = isinstance(getattr(model, "proj", None), Projector)
    lacks = ""
    if features == "projector" and not projects:
        lacks = "projector, as trex_resnet50_proj and DIR/export/cls of a run have"
    elif features == "logits" and not getattr(model, "num_classes", 0):
        lacks = "classifier, as trex_resnet50_cls has"
    elif features == "dense" and (
        not hasattr(model, "forward_features") or "NHWC" in str(getattr(model, "output_fmt", ""))
    ):
        lacks = "feature map (C, H, W)"
    if lacks:
        raise ValueError(
            f"--features {features}: {name} has no {lacks}; choose --features backbone"
        )
    if features == "dense":
        return _Dense(model)
    return _Pooled(model) if features == "backbone" and projects else model


@torch.inference_mode()
def _shape(name: str, model: nn.Module, transform: CenterCrop, dense: bool) -> tuple[int, ...]:
    """Return the shape of one image's features."""
    try:
        output = model(torch.zeros(1, 3, *transform.size, device=device_of(model)))
    except RuntimeError as error:
        raise ValueError(
            f"--model {name} takes no images of {transform.size} pixels ({first_line(error)})"
        ) from error
    shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
    if len(shape) != (3 if dense else 1):
        wanted = "a map (C, H, W); choose --features backbone"
        if not dense:
            wanted = "a vector (F,); choose a model that pools its features"
        found = shape or type(output).__name__
        raise ValueError(f"--model {name} gives {found} for an image, not {wanted}")
    return shape
