"""Configuration of a training run: frozen dataclasses, each field with its meaning below it.

Defaults are the paper's: t-ReX (arXiv 2206.15369), section 4 and appendix, and its released
training set-up.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trex_models.precision import PrecisionName


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_at_least(least: float, section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(
            value is None or value >= least,
            f"{prefix}.{name} must be at least {least}, got {value}",
        )


def _require_source(data: DataConfig, name: str, value: str, *sources: str) -> None:
    """Refuse a value that no source but ``sources`` reads."""
    _require(
        not value or data.source in sources,
        f"{name} is set, but data.source {data.source} has none; it is for --data.source "
        f"{' or '.join(sources)}",
    )


_RESERVED_ARGS = ("pretrained", "checkpoint_path", "cache_dir", "device")  # of timm.create_model


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source of the images."""

    source: Literal["folder", "csv", "huggingface", "fractals"] = "folder"
    """folder: one folder of images per class under ``path``. csv: a table of image paths and
    labels. huggingface: a dataset on disk, saved by ``datasets`` or as parquet files. fractals:
    generated images."""
    path: str = ""
    """The folder of class folders, the CSV file, or the dataset's folder or parquet file."""
    split: str = ""
    """Split to train on (source huggingface); may be empty if there is only one."""
    image_column: str = ""
    """Column of the image or its path. Unset: path (source csv), the only image column
    (source huggingface)."""
    label_column: str = ""
    """Column of the label. Unset: label, or the only one of class labels (source huggingface)."""
    unreadable: Literal["raise", "skip"] = "raise"
    """How to handle an unreadable image. raise: end the run. skip: replace it by another one, drawn
    by the seed; such images are counted and listed in unreadable.txt."""
    max_unreadable: float = 0.01
    """Share of unreadable images above which the run ends, if they are skipped."""
    num_classes: int = 40
    """Number of classes to generate (source fractals)."""
    images_per_class: int = 150
    """Number of images to generate per class (source fractals)."""
    image_size: int = 64
    """Side of a generated image in pixels (source fractals)."""
    variation: float = 1.0
    """Variation of shape and rotation within a class (source fractals)."""

    @property
    def skips_unreadable(self) -> bool:
        """Whether unreadable images are skipped."""
        return self.unreadable == "skip"

    def __post_init__(self) -> None:
        _require_source(self, "data.path", self.path, "folder", "csv", "huggingface")
        _require_source(self, "data.split", self.split, "huggingface")
        for name in ("image_column", "label_column"):
            _require_source(self, f"data.{name}", getattr(self, name), "csv", "huggingface")
        _require(
            0 <= self.max_unreadable < 1,
            f"data.max_unreadable is a share in [0, 1), got {self.max_unreadable}",
        )
        _require_at_least(2, self, "data", "num_classes")
        _require_at_least(1, self, "data", "images_per_class", "image_size")
        _require_at_least(0, self, "data", "variation")


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Number, size and scale of the crops of an image."""

    global_crops: int = 1
    """M_g, large crops per image; the first one feeds the bank."""
    global_size: int = 224
    """Side of a global crop in pixels."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Smallest and largest share of the image's area in a global crop."""
    local_crops: int = 8
    """M_l, small crops per image; 0 for none."""
    local_size: int = 96
    """Side of a local crop in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Smallest and largest share of the image's area in a local crop."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "crops", "global_crops")
        _require_at_least(0, self, "crops", "local_crops")
        sizes = self.global_size, self.local_size
        in_range = min(sizes) > 0 and max(sizes) <= 2048
        _require(in_range, f"crop sizes must be 1 to 2048 pixels, got {sizes[0]} and {sizes[1]}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            _require(
                0 < low <= high <= 1, f"crops.{name} needs 0 < low <= high <= 1, got {low} {high}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone (any timm model that pools to one vector) and the projector behind it."""

    backbone: str = "resnet50"
    """A timm model name: a convolutional network, or a ViT that takes dynamic_img_size."""
    backbone_args: tuple[str, ...] = ()
    """Further arguments of the backbone as key=value, for example drop_path_rate=0.1."""
    projector: Literal["mlp", "none"] = "mlp"
    """mlp: the paper's, thrown away after training. none: the objective sees the backbone's
    features, and the fields below are ignored."""
    hidden_layers: int = 3
    """L, the projector's depth: deeper transfers better, shallower classifies better. 0 leaves
    the L2 norm and the bottleneck."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layers."""
    embedding_dim: int = 256
    """D, width of the projector's output."""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "model", "hidden_layers")
        _require_at_least(1, self, "model", "hidden_dim", "embedding_dim")
        self.parsed_backbone_args()

    def parsed_backbone_args(self) -> dict[str, Any]:
        """Return ``backbone_args`` as keyword arguments; values are Python literals or strings."""
        parsed: dict[str, Any] = {}
        for item in self.backbone_args:
            key, equals, text = item.partition("=")
            _require(
                bool(equals) and key.isidentifier() and len(item) < 1000,
                f"model.backbone_args takes key=value, got {item[:1000]!r}",
            )
            _require(
                not key.startswith(_RESERVED_ARGS),
                f"model.backbone_args must not load weights or choose a device, got {item!r}; name "
                "a checkpoint by --init-from",
            )
            try:
                parsed[key] = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                parsed[key] = text
        return parsed


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The classification loss."""

    name: Literal["ocm", "cosine", "look", "softmax"] = "ocm"
    """ocm: online class means of the bank (Eq. 2). cosine: learned class weights (Eq. 1). look:
    the image's nearest neighbors in the bank (a reconstruction of LOOK, Feng et al. 2022).
    softmax: a linear classifier with bias, the plain baseline."""
    temperature: float = 0.1
    """tau of cosine similarities (all but softmax)."""
    bank_size: int | None = None
    """Q, embeddings in the memory bank (ocm, look). Unset: 8192 for ocm, 65536 for look."""
    neighbors: int = 256
    """k, nearest neighbors in the bank (look); the whole bank if that is smaller."""
    ema_momentum: float = 0.999
    """m of the moving average that fills the bank (ocm, look)."""

    @property
    def bank_entries(self) -> int:
        """Q, with its default; 0 for an objective without a bank."""
        default = {"ocm": 8192, "look": 65536}.get(self.name, 0)
        return (self.bank_size or default) if default else 0

    def resolved(self) -> ObjectiveConfig:
        """Return a copy with the bank's size filled in, where there is a bank."""
        return replace(self, bank_size=self.bank_entries or self.bank_size)

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "objective.temperature must be above 0")
        _require_at_least(1, self, "objective", "bank_size", "neighbors")
        _require(0 <= self.ema_momentum <= 1, "objective.ema_momentum must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with momentum, linear warm-up and cosine decay per step."""

    epochs: int = 100
    """Passes over the data."""
    batch_size: int = 256
    """Images per step, all processes together."""
    base_lr: float = 0.1
    """Peak learning rate per 256 images: the peak is base_lr * batch_size / 256."""
    final_lr: float = 1e-6
    """Learning rate that the cosine decays to."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up from 0."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay of tensors with more than one dimension; 0 on all others."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "optim", "epochs", "batch_size")
        non_negative = "base_lr", "final_lr", "warmup_epochs", "sgd_momentum", "weight_decay"
        _require_at_least(0, self, "optim", *non_negative)
        _require(
            self.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs ({self.warmup_epochs}) exceeds optim.epochs ({self.epochs})",
        )


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """System settings. Apart from sync_batchnorm, none changes the result beyond rounding."""

    device: str = "auto"
    """auto: CUDA where there is one, else the CPU. Or a torch device name."""
    workers: int | None = None
    """Loader processes per training process; 0 loads in the training process itself.
    Unset: as many as there are cores, at most 8."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How processes exchange tensors. auto: nccl on CUDA, gloo on the CPU."""
    sync_batchnorm: bool = True
    """Share BatchNorm statistics between CUDA processes, as the paper's models did."""
    channels_last: bool = True
    """Store images and weights as NHWC, which is faster for convolutions."""
    compile: bool = False
    """Compile the encoder and the augmentation with torch.compile: minutes at the start."""
    checkpoint_activations: bool = False
    """Recompute the backbone's activations in the backward pass instead of keeping them: less
    device memory for 29 % more computation with the trex recipe (docs/memory.md)."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    save_minutes: float = 15.0
    """Minutes between two checkpoints; 0 for none by time. The last two checkpoints are kept."""
    save_steps: int = 0
    """Steps between two checkpoints; 0 for none by steps."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run's folder tensorboard."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "system", "log_every")
        _require_at_least(0, self, "system", "workers", "save_minutes", "save_steps")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Accuracy on held-out images: of the training head, and of k-NN on the backbone's features."""

    every: int = 1
    """Epochs between two validations."""
    path: str = ""
    """As data.path, of the same classes; no validation if this, split and images_per_class are
    empty."""
    split: str = ""
    """Split to validate on (source huggingface), of data.path if path is empty."""
    images_per_class: int = 0
    """Number of further images to generate per class (source fractals)."""
    neighbors: int = 0
    """k of the k-NN classifier on features; 0 for none."""
    neighbors_among: int = 50_000
    """Number of training images to compare with, drawn by the seed. 250,000 of a ResNet-50 take
    2 GB of device memory on one process, twice that on several; each validation reads them."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "validation", "every", "neighbors_among")
        _require_at_least(0, self, "validation", "images_per_class", "neighbors")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete training run."""

    output: str
    """Folder for the run: config.json, metrics.jsonl, checkpoints/ and export/."""
    init_from: str = ""
    """Weights to start from instead of random ones: any t-ReX checkpoint (NAVER's, a run or a
    checkpoint of this trainer, a timm folder). Parts that match are loaded, bank and momentum
    encoder included; a report of all parts precedes the first step."""
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    precision: PrecisionName = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU. fp16 scales the loss, as the paper's models did."""
    seed: int = 0
    """Fixes the initial weights, the data order and every augmentation."""
    license: str = ""
    """License of the trained weights, written into the export; yours to choose."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
        path, split = self.validation.path, self.validation.split
        _require_source(self.data, "validation.path", path, "folder", "csv", "huggingface")
        _require_source(self.data, "validation.split", split, "huggingface")


# Fields that may change when a run is resumed, as they do not change what is learned. The place of
# the images may change, too: that they are the same ones is checked by their names.
_FREE_FIELDS = {
    "output",
    "license",
    *("data.path", "data.unreadable", "data.max_unreadable"),
    *(f"validation.{item.name}" for item in dataclasses.fields(ValidationConfig)),
    *(f"system.{item.name}" for item in dataclasses.fields(SystemConfig)),
} - {"system.sync_batchnorm"}


def to_json(config: Config) -> str:
    """Return the configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(saved: Mapping[str, Any]) -> Config:
    """Rebuild a configuration from ``dataclasses.asdict`` or parsed JSON.

    Raises:
        ValueError: A value has another type or is out of range, or a field is unknown or missing.
    """
    config: Config = _build(Config, saved, "")
    return config


def _build(hint: Any, value: Any, name: str) -> Any:
    """Return the value of a field, with tuples for JSON's lists."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        hints, prefix = get_type_hints(hint), f"{name}." if name else ""
        if unknown := [key for key in value if key not in hints]:
            name = f"{prefix}{unknown[0]}"
            raise ValueError(f"not a configuration of this version: {name} is unknown")
        if hint is Config and "output" not in value:  # all others have defaults
            raise ValueError("not a configuration of this version: output is missing")
        return hint(**{key: _build(hints[key], value[key], f"{prefix}{key}") for key in value})
    found = tuple(value) if isinstance(value, list) else value
    if not _has_type(found, hint):
        raise ValueError(f"{name or 'the configuration'} has the wrong type {type(value).__name__}")
    return found


def _has_type(value: Any, hint: Any) -> bool:
    origin, of = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in of
    if origin in (Union, UnionType):
        return any(_has_type(value, choice) for choice in of)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = of[:1] * len(value) if of[-1] is ... else of
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    return type(value) in ((int, float) if hint is float else (hint,))


def config_diff(saved: Mapping[str, Any], config: Config) -> list[str]:
    """List the fields in which a saved configuration differs, as 'name: saved -> new'.

    Those that do not change what is learned are not compared.
    """
    old = flatten(saved)
    new = flatten(json.loads(to_json(config)))
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _FREE_FIELDS
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree of settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
