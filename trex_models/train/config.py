"""Configuration of a training run: frozen dataclasses. The string below a field describes it.

The defaults are those of t-ReX (arXiv 2206.15369), section 4 and appendix, and of its released
training setup.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trex_models.data import photometric
from trex_models.precision import PrecisionName


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_at_least(least: float, section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        option = f"--{prefix}.{name}".replace("_", "-")
        in_range = value is None or value >= least
        _require(in_range, f"{option} must be at least {least}, got {value}")


def _require_source(data: DataConfig, option: str, value: str, *sources: str) -> None:
    """Raise ValueError if an option is set that only other ``sources`` use."""
    _require(
        not value or data.source in sources,
        f"{option} is not available with --data.source {data.source}; leave it unset, or use "
        f"--data.source {' or '.join(sources)}",
    )


_RESERVED_ARGS = ("pretrained", "checkpoint_path", "cache_dir", "device")  # of timm.create_model


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training images."""

    source: Literal["folder", "csv", "huggingface", "tar", "fractals", "images"] = "folder"
    """folder: a folder with one folder of images per class. csv: a table of image paths and labels.
    huggingface: a local dataset, saved by the datasets library or as parquet files. tar: tar files
    of class folders, or of pairs as in WebDataset. fractals: generated images. images: a folder of
    images without labels, at any depth (only distill)."""
    path: str = ""
    """Folder of class folders, images or tar files; CSV, tar or parquet file; or a dataset's
    folder."""
    split: str = ""
    """Split to train on (source huggingface). Optional if the dataset has only one split."""
    image_column: str = ""
    """Column of the images or their paths. If unset: path (source csv), or the only image column
    (source huggingface)."""
    label_column: str = ""
    """Column of the labels. If unset: label, or the only class-label column (huggingface)."""
    unreadable: Literal["raise", "skip"] = "raise"
    """How to handle an unreadable image. raise: end the run. skip: replace it with a random other
    image, which depends on the seed; skipped images are counted and listed in unreadable.txt."""
    max_unreadable: float = 0.01
    """Largest share of skipped training images; the run ends if there are more."""
    decode: Literal["auto", "exact"] = "auto"
    """How to decode JPEGs for training crops. exact: at full size. auto: at 1/2 or 1/4 of their
    size if no crop is enlarged by that, which is faster. Boxes are then rounded to pixels of the
    reduced image, and the levels (0 to 255) within a box differ by 0.3 on average."""
    num_classes: int = 40
    """Number of classes to generate (source fractals)."""
    images_per_class: int = 150
    """Number of images to generate per class (source fractals)."""
    image_size: int = 64
    """Side length of the generated images in pixels (source fractals)."""
    variation: float = 1.0
    """Variation of shape and rotation within a class (source fractals)."""

    @property
    def skips_unreadable(self) -> bool:
        """True if unreadable images are skipped."""
        return self.unreadable == "skip"

    def __post_init__(self) -> None:
        files = "folder", "csv", "huggingface", "tar", "images"
        _require_source(self, "--data.path", self.path, *files)
        _require_source(self, "--data.split", self.split, "huggingface")
        _require_source(self, "--data.image-column", self.image_column, "csv", "huggingface")
        _require_source(self, "--data.label-column", self.label_column, "csv", "huggingface")
        _require(
            0 <= self.max_unreadable < 1,
            f"--data.max-unreadable must be in [0, 1), got {self.max_unreadable}",
        )
        _require_at_least(2, self, "data", "num_classes")
        _require_at_least(1, self, "data", "images_per_class", "image_size")
        _require_at_least(0, self, "data", "variation")


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Number, size, scale and augmentation of the crops of an image."""

    global_crops: int = 1
    """Number of global (large) crops per image, M_g. The first one enters the memory bank."""
    global_size: int = 224
    """Side length of a global crop in pixels."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Smallest and largest area of a global crop, as a share of the image's area."""
    local_crops: int = 8
    """Number of local (small) crops per image, M_l; 0 disables them."""
    local_size: int = 96
    """Side length of a local crop in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Smallest and largest area of a local crop, as a share of the image's area."""
    global_augmentation: photometric.PhotometricAugmentation = photometric.GLOBAL_AUGMENTATION
    """Flip, colors and blur of the global crops."""
    local_augmentation: photometric.PhotometricAugmentation = photometric.LOCAL_AUGMENTATION
    """Flip, colors and blur of the local crops."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "crops", "global_crops")
        _require_at_least(0, self, "crops", "local_crops")
        sizes = self.global_size, self.local_size
        in_range = min(sizes) > 0 and max(sizes) <= 2048
        options = "--crops.global-size and --crops.local-size"
        _require(in_range, f"{options} must be from 1 to 2048, got {sizes[0]} and {sizes[1]}")
        for kind, (low, high) in (("global", self.global_scale), ("local", self.local_scale)):
            rule = f"--crops.{kind}-scale LOW HIGH must satisfy 0 < LOW <= HIGH <= 1"
            _require(0 < low <= high <= 1, f"{rule}, got {low} {high}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone (any timm model that returns one vector per image) and projector."""

    backbone: str = "resnet50"
    """Name of a timm model: a convolutional network, or a ViT that supports dynamic_img_size."""
    backbone_args: tuple[str, ...] = ()
    """Arguments of the timm model as key=value, for example drop_path_rate=0.1."""
    projector: Literal["mlp", "none"] = "mlp"
    """mlp: the paper's projector, which the exported backbone does not include. none: the objective
    uses the backbone's features; the options below are ignored."""
    hidden_layers: int = 3
    """Number of hidden layers of the projector, L. In the paper, more layers improve transfer, and
    fewer the accuracy on the training classes. 0: only L2 normalization and a linear layer."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layers."""
    embedding_dim: int = 256
    """Embedding dimension, D: the width of the projector's output."""

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
                f"--model.backbone-args must be key=value, got {item[:1000]!r}",
            )
            _require(
                not key.startswith(_RESERVED_ARGS),
                f"--model.backbone-args must not load weights or choose a device, got {item!r}; "
                "use --init-from or --system.device instead",
            )
            try:
                parsed[key] = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                parsed[key] = text
        return parsed


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Loss: a classification loss, or the distillation of a teacher."""

    name: Literal["ocm", "cosine", "look", "softmax", "distill"] = "ocm"
    """ocm: online class means of the memory bank (Eq. 2). cosine: learned classifier (Eq. 1).
    look: the nearest neighbors in the bank (a reconstruction of LOOK, Feng et al. 2022). softmax:
    linear classifier with bias, as a baseline. distill: features of a frozen teacher."""
    teacher: str = ""
    """Teacher (distill): a timm model, t-ReX or a model to compare with, a timm folder, or a run.
    It receives the global crops; its width replaces --model.embedding-dim."""
    teacher_size: int | None = None
    """Side length to which crops are resized for the teacher, in pixels. If unset: global-size."""
    temperature: float = 0.1
    """Temperature of the cosine similarities, tau (ocm, cosine, look)."""
    bank_size: int | None = None
    """Number of bank entries, Q (ocm, look). If unset: 8192 for ocm, 65536 for look."""
    neighbors: int = 256
    """Number of nearest neighbors in the bank, k (look); at most the bank size is used."""
    ema_momentum: float = 0.999
    """Momentum of the momentum encoder, m, whose embeddings fill the bank (ocm, look)."""

    @property
    def resolved_bank_size(self) -> int:
        """Number of bank entries, Q; 0 for an objective without a bank."""
        default = {"ocm": 8192, "look": 65536}.get(self.name, 0)
        return (self.bank_size or default) if default else 0

    def resolved(self) -> ObjectiveConfig:
        """Return a copy with the default bank size filled in, if there is a bank."""
        return replace(self, bank_size=self.resolved_bank_size or self.bank_size)

    def __post_init__(self) -> None:
        tau, m = self.temperature, self.ema_momentum
        _require(
            (self.name == "distill") == bool(self.teacher),
            "--objective.teacher must be set for --objective.name distill, and only for it, got "
            f"{self.teacher!r} for {self.name}; set both to distill a timm model, folder or run",
        )
        _require(tau > 0, f"--objective.temperature must be positive, got {tau}")
        _require_at_least(1, self, "objective", "bank_size", "neighbors", "teacher_size")
        _require(0 <= m <= 1, f"--objective.ema-momentum must be in [0, 1], got {m}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer; the learning rate follows a linear warm-up and a cosine decay."""

    name: str = "sgd"
    """sgd (without Nesterov momentum, as in the paper), or an optimizer of timm, such as adamw,
    lamb, lion, muon (docs/training.md)."""
    epochs: int = 100
    """Number of epochs."""
    batch_size: int = 256
    """Number of images per step, over all processes."""
    base_lr: float = 0.1
    """Learning rate for batches of 256: the peak is base_lr * batch_size / 256."""
    final_lr: float = 1e-6
    """Learning rate at the end of the cosine decay."""
    warmup_epochs: int = 10
    """Number of epochs of linear warm-up from 0."""
    momentum: float = 0.9
    """Momentum, if the optimizer has this setting."""
    weight_decay: float = 1e-4
    """Weight decay of tensors with more than one dimension; others have none."""
    betas: tuple[float, ...] | None = None
    """Decay rates of the running averages, such as 0.9 0.999 for adamw. If unset: the optimizer's
    defaults."""
    eps: float | None = None
    """Constant added to the denominator of the update. If unset: the optimizer's default."""
    clip_grad: float = 0.0
    """Largest norm of the gradient of all parameters; 0 disables clipping."""

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return self.base_lr * self.batch_size / 256

    def __post_init__(self) -> None:
        _require_at_least(1, self, "optim", "epochs", "batch_size")
        non_negative = "base_lr", "final_lr", "warmup_epochs", "momentum", "weight_decay"
        _require_at_least(0, self, "optim", *non_negative, "eps", "clip_grad")
        in_range = all(0 <= beta < 1 for beta in self.betas or ())
        _require(in_range, f"--optim.betas must be in [0, 1), got {self.betas}")
        _require(
            self.warmup_epochs <= self.epochs,
            f"--optim.warmup-epochs {self.warmup_epochs} exceeds --optim.epochs {self.epochs}",
        )


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """System settings. Apart from sync_batchnorm, none changes the result beyond rounding."""

    device: str = "auto"
    """auto (CUDA if available, otherwise the CPU), or a torch device name."""
    workers: int | None = None
    """Number of loader workers per training process; 0 loads in the training process itself.
    If unset: the number of cores per training process, at most 8."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication backend of several processes. auto: nccl on CUDA, gloo on the CPU."""
    sync_batchnorm: bool = True
    """Synchronize BatchNorm statistics across CUDA processes, as for the paper's models."""
    channels_last: bool = True
    """Store images and weights in NHWC order, which makes convolutions faster."""
    compile: bool = False
    """Compile encoder and augmentation with torch.compile, which takes minutes at the start."""
    checkpoint_activations: bool = False
    """Recompute the backbone's activations in the backward pass instead of storing them: saves
    device memory, for 29 % more computation with the trex recipe (docs/memory.md)."""
    log_every: int = 20
    """Number of steps between two reports of the training metrics."""
    save_minutes: float = 15.0
    """Minutes between two checkpoints; 0 disables saving by time. The last two are kept."""
    save_steps: int = 0
    """Number of steps between two checkpoints; 0 disables saving by steps."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to the folder tensorboard of the run."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "system", "log_every")
        _require_at_least(0, self, "system", "workers", "save_minutes", "save_steps")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Accuracy on held-out images, of the training head and of k-NN on the backbone's features."""

    every: int = 1
    """Number of epochs between two validations."""
    path: str = ""
    """Validation images, in the format of --data.path and of the same classes. No validation if
    path, split and images-per-class are all unset."""
    split: str = ""
    """Split to validate on (source huggingface): of --validation.path, or of --data.path."""
    images_per_class: int = 0
    """Number of validation images to generate per class (source fractals)."""
    neighbors: int = 0
    """Number of neighbors of the k-NN classifier on features, k; 0 disables it."""
    neighbors_among: int = 50_000
    """Number of training images that k-NN searches, a random subset. Each validation extracts
    their features: 2 GB of device memory per 250,000 (ResNet-50), twice that if distributed."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "validation", "every", "neighbors_among")
        _require_at_least(0, self, "validation", "images_per_class", "neighbors")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a complete training run."""

    output: str
    """Folder for the run: config.json, metrics.jsonl, checkpoints/ and export/."""
    init_from: str = ""
    """Weights to start from instead of random ones: a t-ReX checkpoint of NAVER or of this trainer,
    a run, or a timm folder. All parts that match are loaded, including memory bank and momentum
    encoder; before the first step the trainer reports which parts were restored."""
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    precision: PrecisionName = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU. fp16: with loss scaling, as for the paper's models."""
    seed: int = 0
    """Seed of the initial weights, the data order and all augmentations."""
    license: str = ""
    """License of the trained weights, which is written into the exported models."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"--seed must be at least 0, got {self.seed}")
        labeled, neighbors = self.data.source != "images", self.validation.neighbors
        _require(
            labeled or (self.objective.name == "distill" and not neighbors),
            "--data.source images has no labels, as losses other than distill and "
            "--validation.neighbors require; use --data.source folder, or leave them unset",
        )
        path, split = self.validation.path, self.validation.split
        _require_source(self.data, "--validation.path", path, "folder", "csv", "huggingface", "tar")
        _require_source(self.data, "--validation.split", split, "huggingface")


# Fields that may change when a run is resumed, because they do not affect the trained weights. The
# paths of images and teacher are among them: digests of both detect others.
_CHANGEABLE_ON_RESUME = {
    "output",
    "license",
    *("data.path", "data.unreadable", "data.max_unreadable", "objective.teacher"),
    *(f"validation.{item.name}" for item in dataclasses.fields(ValidationConfig)),
    *(f"system.{item.name}" for item in dataclasses.fields(SystemConfig)),
} - {"system.sync_batchnorm"}


def to_json(config: Config) -> str:
    """Return the configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(saved: Mapping[str, Any]) -> Config:
    """Rebuild a configuration from ``dataclasses.asdict`` or parsed JSON.

    Raises:
        ValueError: A field is unknown or missing, or a value has a wrong type or is out of range.
    """
    config: Config = _build(Config, saved, "")
    return config


def load_config(path: Path) -> Config:
    """Read the config.json of a run; raise a ValueError if it is not one."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the config.json of a run ({error}); pass another"
        ) from error


def _build(hint: Any, value: Any, name: str) -> Any:
    """Build the value of a field from JSON, whose lists become tuples."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        hints, prefix = get_type_hints(hint), f"{name}." if name else ""
        if unknown := [key for key in value if key not in hints]:
            name = f"{prefix}{unknown[0]}"
            raise ValueError(f"not a configuration of this version: unknown field {name}")
        parameters = inspect.signature(hint).parameters.values()
        if missing := [p.name for p in parameters if p.default is p.empty and p.name not in value]:
            name = f"{prefix}{missing[0]}"
            raise ValueError(f"not a configuration of this version: the field {name} is missing")
        return hint(**{key: _build(hints[key], value[key], f"{prefix}{key}") for key in value})
    converted = tuple(value) if isinstance(value, list) else value
    if not _has_type(converted, hint):
        raise ValueError(f"{name or 'the configuration'} has the wrong type {type(value).__name__}")
    return converted


def _has_type(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (Union, UnionType):
        return any(_has_type(value, choice) for choice in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = args[:1] * len(value) if args[-1] is ... else args
        return len(value) == len(hints) and all(map(_has_type, value, hints))
    return type(value) in ((int, float) if hint is float else (hint,))


def config_diff(saved: Mapping[str, Any], config: Config) -> list[str]:
    """List the fields in which a saved configuration differs, as 'name: saved -> new'.

    Fields that do not affect the trained weights are not compared.
    """
    old = flatten(saved)
    new = flatten(json.loads(to_json(config)))
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _CHANGEABLE_ON_RESUME
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to a dictionary with dotted names as keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
