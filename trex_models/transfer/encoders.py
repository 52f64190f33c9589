"""Models as encoders of images: what is evaluated, how its images are prepared, what it is called.

An encoder is told apart from others by what its features depend on: the tensors of its weights,
its modules and their settings, the preprocessing, the precision, the kind of device, and the
versions of what computes. Names and files do not count.

Shapes: B batch, F features, S side in pixels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from trex_models import licenses, timm_folder
from trex_models.data.centre_crops import PROTOCOLS, CentreCrop
from trex_models.data.sources import Source, digest
from trex_models.evaluation.features import image_batches, preprocessing

PIXELS = "pixels"
"""Name of the encoder that is no model: an image's pixels at 16 x 16."""
PREPROCESSING = (*PROTOCOLS, "model")
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKAGES = ("torch", "torchvision", "timm", "pillow")
_PIXEL_SIDE = 16  # on fractals 32 is no better by either classifier, and takes four times as long
_CALIBRATION_IMAGES = 2048


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model that maps images to features."""

    name: str
    """As it was asked for."""
    model: nn.Module
    """Maps (B, 3, S, S) to (B, F); on its device, in eval mode."""
    transform: CentreCrop
    """How images are prepared."""
    precision: str = "fp32"
    """One of ``PRECISIONS``: what the device computes in."""
    device: str = "cpu"
    """Kind of device that computes the features: their last digits depend on it."""
    facts: Mapping[str, Any]
    """For a report: architecture, hash of the weights, number of features and of parameters."""

    @property
    def num_features(self) -> int:
        """F."""
        return int(self.facts["num_features"])

    @cached_property
    def modules_sha256(self) -> str:
        """Of the modules as they were first looked at: some note what they are given."""
        return modules_digest(self.model)

    def identity(self) -> dict[str, Any]:
        """Return what features depend on, for JSON."""
        return {
            "weights_sha256": self.facts["weights_sha256"],
            "modules_sha256": self.modules_sha256,
            "transform": asdict(self.transform),
            "precision": self.precision,
            "device": self.device,
            "versions": {package: version(package) for package in _PACKAGES},
        }


def load(
    name: str,
    *,
    prepare: str = "transfer",
    precision: str = "fp32",
    untrained: bool = False,
    seed: int = 0,
    device: str = "cpu",
    file: Path | None = None,
    classifier: bool = False,
    hint: str = "",
) -> Encoder:
    """Load an encoder by name, without a classifier.

    Args:
        name: A timm model (with a tag or without, ``hf-hub:OWNER/NAME`` too), the folder of one
            (config.json and weights), the folder of a finished training run of ours, or "pixels".
        prepare: Name of the preprocessing: "transfer" (the shorter side is resized to the crop's,
            bicubic; the authors' for transfer), "validation" (to 256 for 224, bilinear) or
            "model" (whatever the model's own configuration says). Crop size, mean and standard
            deviation are always the model's.
        precision: What the device computes in: fp32, tf32 (on CUDA, faster), bf16 or fp16.
        untrained: Whether to give the architecture random weights, to compare with.
        seed: Of random weights.
        device: Where to put it.
        file: Weights of your own, in any form that the model reads; None for the model's.
        classifier: Whether to keep the classifier; features are then its logits.
        hint: What to do where there are no weights, for the message.

    Raises:
        ValueError: There is no such model or it has no weights, the folder is none, the device
            is not there, or the model's output is not one vector an image.
    """
    _require_choice("preprocessing", prepare, PREPROCESSING)
    _require_choice("precision", precision, tuple(PRECISIONS))
    if name == PIXELS and file is None:
        return _pixels(precision)
    where = _device(device)
    if precision == "tf32" and where.type != "cuda":
        raise ValueError(f"precision tf32 is of CUDA devices, and the device is {device}: use fp32")
    model = _create(name, untrained, seed, file, classifier, hint)
    try:
        model = model.to(where).to(memory_format=torch.channels_last)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used ({_first_line(error)})") from error
    model = model.eval()
    cfg: Mapping[str, Any] = vars(model)["pretrained_cfg"]
    own = resolve_model_data_config(model)
    if prepare == "model":
        transform = preprocessing(model)
    else:
        size: tuple[int, int] = (own["input_size"][1], own["input_size"][2])
        mean, std = tuple(own["mean"]), tuple(own["std"])
        transform = replace(PROTOCOLS[prepare], size=size, mean=mean, std=std)
    architecture = cfg.get("architecture") or type(model).__name__
    stated = cfg.get("license") or "not stated"
    own_weights = file or timm_folder.find_timm_folder(name)
    facts = {
        "source": str(own_weights or name),
        "architecture": architecture,
        "tag": "" if file else cfg.get("tag", ""),
        "license": licenses.describe(own_weights, architecture) if own_weights else stated,
        "untrained": untrained,
        **({"seed": seed} if untrained else {}),
        "weights_sha256": weights_digest(model),
        "num_features": _width(name, model, transform),
        "parameters": sum(p.numel() for p in model.parameters()),
        "preprocessing": prepare,
    }
    return Encoder(
        name=name,
        model=model,
        transform=transform,
        precision=precision,
        device=where.type,
        facts=facts,
    )


def calibrated(encoder: Encoder, source: Source, title: str, workers: int = 0) -> Encoder:
    """Return an encoder whose BatchNorm statistics are those of a data set's images.

    Random weights with BatchNorm's initial statistics would give features of no use that say
    nothing about training. At most 2,048 images are taken, evenly over the source.

    Args:
        encoder: Its model is changed in place.
        source: Training images.
        title: What the report calls them.
        workers: Loader processes.
    """
    count = min(len(source), _CALIBRATION_IMAGES)
    indices = [index * len(source) // count for index in range(count)]
    device = next(encoder.model.parameters()).device
    images = image_batches(source, encoder.transform, 64, workers, device, indices)
    update_bn(images, encoder.model)
    encoder.model.eval()
    facts = {
        **encoder.facts,
        "batchnorm": f"statistics of {count} training images of {title}",
        "weights_sha256": weights_digest(encoder.model),
    }
    return replace(encoder, facts=facts)


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's tensors with their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def modules_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's modules by name, class and settings.

    Settings are attributes that are plain values, such as how a transformer pools; and buffers that
    are not among the weights.
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
    return value is None or isinstance(value, bool | int | float | str)


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
    known = f"local-dir:{folder}" if folder else name
    if file is not None and not file.is_file():
        raise ValueError(f"--file {file} is no file; name the weights of {name}")
    # timm passes a file over there.
    if file is not None and (folder is not None or ":" in name or name == PIXELS):
        raise ValueError(f"--file goes with the name of an architecture of timm, not with {name}")
    options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(file)}} if file else {}
    if not classifier:
        options["num_classes"] = 0
    torch.manual_seed(seed)
    try:
        if not untrained:
            return timm.create_model(known, pretrained=True, **options)
        return _random(known)
    except Exception as error:  # timm, the Hub and safetensors let anything out
        architecture = name.removeprefix("hf-hub:").partition(".")[0]
        if folder is None and ":" not in name and architecture not in timm.list_models():
            near = difflib.get_close_matches(architecture, timm.list_models(), 3)
            names = f"; the nearest names are {', '.join(near)}" if near else ""
            raise ValueError(f"--model {name}: timm knows no model of this name{names}") from error
        remedy = "" if untrained or not hint else f"; {hint}"
        raise ValueError(
            f"--model {name} cannot be loaded: {_first_line(error)}{remedy}"
        ) from error


def _random(name: str) -> nn.Module:
    """Return the architecture with random weights; residual branches count from the start."""
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, zero_init_last=False)
    except TypeError:  # most architectures have no such argument
        return timm.create_model(name, pretrained=False, num_classes=0)


@torch.inference_mode()
def _width(name: str, model: nn.Module, transform: CentreCrop) -> int:
    """Return F, of an image of the model's size."""
    device = next(model.parameters()).device
    try:
        output = model(torch.zeros(1, 3, *transform.size, device=device))
    except RuntimeError as error:
        raise ValueError(
            f"--model {name} takes no images of {transform.size} pixels ({_first_line(error)})"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"--model {name} gives {shape} for one image, not one vector of shape (1, F); choose a "
            "model that pools its features"
        )
    return output.shape[1]


def _pixels(precision: str) -> Encoder:
    size = (_PIXEL_SIDE, _PIXEL_SIDE)
    crop = CentreCrop(
        size=size, crop_pct=1.0, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
    )
    model = nn.Flatten()
    facts = {
        "source": f"the pixels of the image at {_PIXEL_SIDE} x {_PIXEL_SIDE}, in [0, 1]",
        "architecture": PIXELS,
        "tag": "",
        "license": "none: pixels are no weights",
        "untrained": True,
        "weights_sha256": weights_digest(model),
        "num_features": 3 * _PIXEL_SIDE**2,
        "parameters": 0,
        "preprocessing": PIXELS,
    }
    return Encoder(name=PIXELS, model=model, transform=crop, precision=precision, facts=facts)


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it computes nothing")
        return found
    except RuntimeError as error:
        raise ValueError(
            f"--device {device} is no device of torch ({_first_line(error)})"
        ) from error


def _require_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, not {value!r}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
