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
    facts: Mapping[str, Any]
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
        """Load a model by name.

        Args:
            name: A timm model (with a tag or without, also ``hf-hub:OWNER/NAME``), a timm folder
                (config.json and weights), the folder of a finished training run, or "pixels".
            features: "backbone" (pooled, before any projector), "projector", "logits", or "dense"
                (the last feature map); None for the model's output without its classifier.
            preprocessing: "transfer" (resize the shorter side to the crop's, bicubic; the authors'
                for transfer), "validation" (to 256 for 224, bilinear), or "model" (the model's
                own). Crop size, mean and standard deviation are always the model's.
            precision: Number formats on the device.
            device: ``auto`` or a torch device name.
            file: Weights for an architecture of timm, in any form that the model reads.
            untrained: Random weights of ``seed``, as a baseline.
            seed: Seed of random weights.
            hint: Remedy to report if there are no weights.

        Raises:
            ValueError: The model, its weights or the device are not available, or the model does
                not give these features.
        """
        place = choose_device("cpu" if name == PIXELS else device)
        formats = Precision.from_name(precision, place.type)
        if name == PIXELS and file is None:
            model, transform, facts = _pixels()
        else:
            model = _create(name, untrained, seed, file, features == "logits", hint)
            model = model.to(place).to(memory_format=torch.channels_last).eval()
            transform = _transform(model, preprocessing)
            facts = _facts(name, model, file) | {"preprocessing": preprocessing}
            facts |= {"untrained": True, "seed": seed} if untrained else {"untrained": False}
        facts["weights_sha256"] = weights_digest(model)
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        part = _select(name, model, features)
        shape = _shape(name, part, transform, features == "dense")
        facts["num_features"] = shape[0]
        return cls(
            name=name, model=part, transform=transform, shape=shape, precision=formats, facts=facts
        )

    @cached_property
    def modules_sha256(self) -> str:
        """Hash of the modules at first use: some modules record their last input."""
        return modules_digest(self.model)

    def identity(self) -> dict[str, Any]:
        """Return what the features depend on, for JSON."""
        return {
            "weights_sha256": self.facts["weights_sha256"],
            "modules_sha256": self.modules_sha256,
            "transform": asdict(self.transform),
            "precision": self.precision.name,
            "device": self.precision.device_type,
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def calibrated(self, source: Source, title: str, workers: int = 0) -> FrozenModel:
        """Return the model with BatchNorm statistics of a dataset's images; changes it in place.

        Features of random weights with BatchNorm's initial statistics say nothing about training.
        At most 2,048 images are taken, evenly over the source, which ``title`` names in reports.
        """
        count = min(len(source), _CALIBRATION_IMAGES)
        indices = [index * len(source) // count for index in range(count)]
        images = image_batches(source, self.transform, 64, workers, device_of(self.model), indices)
        update_bn(images, self.model)
        self.model.eval()
        facts = {
            **self.facts,
            "batchnorm": f"statistics of {count} training images of {title}",
            "weights_sha256": weights_digest(self.model),
        }
        return replace(self, facts=facts)


def preprocessing(model: nn.Module) -> CenterCrop:
    """Return the preprocessing that a timm model's configuration asks for.

    Args:
        model: Model from ``timm.create_model``.

    Raises:
        ValueError: The model has no ``pretrained_cfg``, or it asks for something that
            ``CenterCrop`` does not support.
    """
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg, which describes the preprocessing; "
            "pass a transform, such as PROTOCOLS['transfer'] of trex_models.data.center_crop"
        )
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
        raise ValueError(
            f"--model {name}: there is no such folder with a config.json; name a timm folder, the "
            "folder of a finished run, or a model of timm"
        )
    if file is not None and not file.is_file():
        raise ValueError(f"--file {file} is no file; name the weights of {name}")
    # timm ignores the file for models from these places.
    if file is not None and (folder is not None or ":" in name or name == PIXELS):
        raise ValueError(f"--file goes with the name of an architecture of timm, not with {name}")
    options: dict[str, Any] = {} if untrained else {"pretrained": True}
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
        architecture = name.removeprefix("hf-hub:").partition(".")[0]
        problem = f" cannot be loaded: {first_line(error)}"
        if folder is None and ":" not in name and architecture not in timm.list_models():
            near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), 3))
            problem = ": timm knows no model of this name"
            hint = f"the nearest names are {near}" if near else ""
        elif untrained:
            hint = ""
        raise ValueError(f"--model {name}{problem}{hint and f'; {hint}'}") from error


def _transform(model: nn.Module, protocol: Preprocessing) -> CenterCrop:
    if protocol == "model":
        return preprocessing(model)
    own = resolve_model_data_config(model)
    _, height, width = own["input_size"]
    mean, std = tuple(own["mean"]), tuple(own["std"])
    return replace(PROTOCOLS[protocol], size=(height, width), mean=mean, std=std)


def _facts(name: str, model: Any, file: Path | None) -> dict[str, Any]:
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
    facts = {
        "source": f"the pixels of the image at {_PIXEL_SIDE} x {_PIXEL_SIDE}, in [0, 1]",
        "architecture": PIXELS,
        "tag": "",
        "license": "none: pixels are no weights",
        "untrained": True,
        "preprocessing": PIXELS,
    }
    return nn.Flatten(), crop, facts


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
    if features == "projector" and not projects:
        raise ValueError(
            f"--features projector: {name} has no projector; trex_resnet50_proj, the _cls models "
            f"and DIR/export/cls of a run have one; {name} has --features backbone"
        )
    if features == "logits" and not getattr(model, "num_classes", 0):
        raise ValueError(
            f"--features logits: {name} has no classifier; trex_resnet50_cls has one, and any "
            f"model of timm with classes; {name} has --features backbone"
        )
    if features == "dense":
        order = str(getattr(model, "output_fmt", ""))
        if not hasattr(model, "forward_features") or "NHWC" in order:
            raise ValueError(
                f"--features dense: {name} has no feature map (C, H, W); choose --features backbone"
            )
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
        found = shape or type(output).__name__
        raise ValueError(
            f"--features dense: {name} gives {found} for an image, not a map (C, H, W); it is not "
            "convolutional: choose --features backbone"
            if dense
            else f"--model {name} gives {found} for an image, not a vector (F,); choose a model "
            "that pools its features"
        )
    return shape
