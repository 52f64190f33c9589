"""Safe reading of t-ReX checkpoints and translation of their keys to our models' names.

Four kinds of files are supported: the official backbone files (flat, with torchvision's names), the
official full training states (online encoder, momentum encoder, memory bank, optimizer, arguments),
official training states with a learned classifier instead of a bank, and the files of this package
(a trainer's checkpoint or an exported model). Pickles cannot run code (``unpickling``). Unknown
keys are errors in training states; in a model's file they are later checked as backbone keys.

Shapes: C classes, D embedding dimension, Q bank size.
"""

from __future__ import annotations

import errno
import re
import stat
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

from trex_models.heads import Projector, class_means, widen
from trex_models.pretrained.unpickling import RefusedError, load_torch


class CheckpointError(ValueError):
    """The file is damaged, unsafe or not a t-ReX checkpoint."""


class DamagedError(CheckpointError):
    """The file is truncated, corrupt, or of an unknown format."""


class KeyPattern(NamedTuple):
    """Maps keys with a prefix, or one complete key (no final dot), to a part of the model."""

    form: str
    prefix: str
    part: str


# The longest matching prefix wins.
KEY_TABLE = (
    KeyPattern("official", "model.encoder.", "backbone"),
    KeyPattern("official", "model.head.layers.", "projector"),
    KeyPattern("official", "model_ema.encoder.", "momentum backbone"),
    KeyPattern("official", "model_ema.head.layers.", "momentum projector"),
    KeyPattern("official", "memory.features", "bank features"),
    KeyPattern("official", "memory.labels", "bank labels"),
    KeyPattern("official", "memory.ptr", "bank pointer"),
    KeyPattern("official", "clf.fc.weight", "classifier weights"),
    KeyPattern("trainer", "encoder.backbone.", "backbone"),
    KeyPattern("trainer", "encoder.projector.", "projector"),
    KeyPattern("trainer", "momentum_encoder.encoder.backbone.", "momentum backbone"),
    KeyPattern("trainer", "momentum_encoder.encoder.projector.", "momentum projector"),
    KeyPattern("trainer", "objective.bank.features", "bank features"),
    KeyPattern("trainer", "objective.bank.labels", "bank labels"),
    KeyPattern("trainer", "objective.bank.indices", "bank indices"),
    KeyPattern("trainer", "objective.bank.written", "bank steps"),
    KeyPattern("trainer", "objective.bank._extra_state", "bank pointer"),
    KeyPattern("trainer", "objective.classifier.weight", "classifier weights"),
    KeyPattern("trainer", "objective.classifier.bias", "classifier biases"),
    KeyPattern("trainer", "objective.target_mean", "target mean"),
    KeyPattern("trainer", "objective.target_variance", "target variance"),
    KeyPattern("trainer", "objective.num_batches_tracked", "target batches"),
    KeyPattern("model", "proj.", "projector"),
    KeyPattern("model", "fc.weight", "classifier weights"),
    KeyPattern("model", "fc.bias", "classifier biases"),
    KeyPattern("model", "", "backbone"),
)

_TIMM = {"arch", "epoch", "version", "args", "metric", "optimizer", "amp_scaler", "state_dict"}
_TRAINER: dict[str, tuple[type, ...]] = {  # type of each entry, then the types of its items
    **dict.fromkeys(("config", "optimizer", "scaler"), (dict,)),
    **dict.fromkeys(("images", "teacher", "inherited_license"), (str,)),
    **dict.fromkeys(("step", "batchnorm_groups", "process"), (int,)),
    **dict.fromkeys(("meter", "labels", "indices"), (Tensor,)),
    "classes": (list, str),
    "unreadable": (list, int),
    "crops": (list, Tensor),  # with process, labels and indices: step with a non-finite loss
    "environment": (dict, int, str),
    "files": (dict, Tensor),
}
# Entry that contains the weights of a training state -> the other entries allowed next to it.
CONTAINERS: dict[str, Collection[str]] = {
    "state_dict_ema": _TIMM,  # timm's trainer; before "state_dict", as in timm's own loader
    "state_dict": _TIMM,
    "model": {"optimizer", "epoch", "args", "fp16_scaler"},
    "method": _TRAINER,
}

# Names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add to keys.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT_NAMES = (".weight", ".bias", ".running_mean", ".running_var")
_INTEGERS = {"bank labels", "bank indices", "bank steps"}  # parts


@dataclass(frozen=True)
class Checkpoint:
    """Parts of a checkpoint, with the key names of our models."""

    form: str  # official, trainer or model
    backbone: dict[str, Tensor]
    projector: dict[str, Tensor] = field(default_factory=dict)
    classifier_weights: Tensor | None = None  # prototypes (Eq. 2) or learned (Eq. 1), (C, D)
    classifier_biases: Tensor | None = None  # (C,)
    absent_classes: tuple[int, ...] = ()  # classes without bank entries; their prototypes are zero
    key_report: dict[str, str] = field(default_factory=dict)  # key of the file -> new key or reason

    @property
    def proj_layers(self) -> int:
        """Number of the projector's hidden layers, L; also 0 without a projector."""
        return sum(key.endswith(".fc.weight") for key in self.projector)

    def projector_args(self) -> dict[str, int]:
        """Return the ``TRexResNet`` arguments that describe the projector, which must exist."""
        out_dim, hidden_dim = self.projector[f"{self.proj_layers + 1}.weight"].shape
        widths = {"proj_hidden_dim": hidden_dim, "proj_dim": out_dim}
        return {"proj_layers": self.proj_layers, **widths}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a contiguous state dict of the complete model: backbone, ``proj.*``, ``fc.*``."""
        state = self.backbone | {f"proj.{key}": value for key, value in self.projector.items()}
        if self.classifier_weights is not None:
            state["fc.weight"] = self.classifier_weights
        if self.classifier_biases is not None:
            state["fc.bias"] = self.classifier_biases
        return {key: value.contiguous() for key, value in state.items()}


def read(
    path: Path | str,
    *,
    momentum_encoder: bool = False,
    num_classes: int | None = None,
    backbone: str | None = "resnet50",
) -> Checkpoint:
    """Read and split a file or timm folder; check it against timm's ``backbone`` unless None."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    contents = load_checkpoint(path)
    try:
        checkpoint = split(contents, momentum_encoder=momentum_encoder, num_classes=num_classes)
        if backbone is not None:
            with torch.device("meta"):
                expected = timm.create_model(backbone, num_classes=0).state_dict()
            check_keys(checkpoint.backbone, expected, backbone)
            if checkpoint.classifier_biases is not None and not checkpoint.projector:
                raise CheckpointError(f"this is a linear {backbone} classifier, not a t-ReX model")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint


def split(
    contents: Mapping[str, Any], *, momentum_encoder: bool = False, num_classes: int | None = None
) -> Checkpoint:
    """Split a state dict, or a training state that contains one, into the parts of our models.

    ``num_classes`` is the number of classes of a memory bank, C. The default is the number in a
    trainer's checkpoint, otherwise 1000 (ImageNet-1K); 0 omits the classifier weights.
    """
    form, parts, locations = sort_keys(contents)
    encoder = "momentum " if momentum_encoder else ""
    backbone, projector = parts[f"{encoder}backbone"], parts[f"{encoder}projector"]
    if not backbone:
        missing = f"no {encoder}encoder" if encoder else "no backbone"
        raise CheckpointError(f"{missing} in {len(locations)} keys; use a complete checkpoint")
    if form == "official" and not projector:
        raise CheckpointError(f"the {encoder}projector is missing; use a complete checkpoint")
    check_finite(parts)
    width = _check_projector(projector)
    if num_classes is None and form == "trainer" and "classes" in contents:
        num_classes = len(contents["classes"])
    weights, biases = (parts[f"classifier {name}"].get("") for name in ("weights", "biases"))
    absent: tuple[int, ...] = ()
    if num_classes == 0:
        weights = biases = None
    elif parts["bank features"]:
        if weights is not None:
            raise CheckpointError("memory bank and learned classifier exclude each other")
        weights, absent = _prototypes(parts, num_classes)
    _check_classifier(weights, biases, width)
    key_report = {key: _new_key(part, name, encoder) for key, (part, name) in locations.items()}
    return Checkpoint(form, backbone, projector, weights, biases, absent, key_report)


class SortedKeys(NamedTuple):
    """Contents of a file, sorted into the parts of ``KEY_TABLE``."""

    form: str  # official, trainer or model
    parts: dict[str, dict[str, Any]]  # part -> {name without the prefix: value}
    locations: dict[str, tuple[str, str]]  # key or entry of the file -> part, name in that part


def sort_keys(contents: Mapping[str, Any]) -> SortedKeys:
    """Sort a state dict or a training state by ``KEY_TABLE`` and check the types of its values."""
    state, others = _unwrap(contents)
    for key in state:
        if not isinstance(key, str):
            raise CheckpointError(f"key {key!r} must be a string; save model.state_dict()")
    names = {key: ".".join(s for s in key.split(".") if s not in WRAPPERS) for key in state}
    rows = {key: _row(name) for key, name in names.items()}
    form = next((row.form for row in rows.values() if row.form != "model"), "model")
    parts: dict[str, dict[str, Any]] = {row.part: {} for row in KEY_TABLE}
    locations = dict.fromkeys(others, ("", ""))
    for key, row in rows.items():
        name = names[key].removeprefix(row.prefix)
        if row.form != form:
            raise CheckpointError(f"{key!r} is not a key of the {form} format")
        if name in parts[row.part]:
            raise CheckpointError(f"{names[key]!r} occurs twice in the file, once as {key!r}")
        if row.part != "bank pointer":
            check_type(key, row.part, state[key])
        parts[row.part][name] = state[key]
        locations[key] = row.part, name
    if any(parts[part] for part in parts if part.startswith("bank")):
        _check_bank(parts, len(contents["classes"]) if "classes" in others else None)
    return SortedKeys(form, parts, locations)


def _unwrap(contents: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    container = next((n for n in CONTAINERS if isinstance(contents.get(n), Mapping)), None)
    if container is not None:
        others = [name for name in contents if name != container]
        expected = CONTAINERS[container]
        if unknown := [name for name in others if name not in expected]:
            listed = f"next to {container!r}: {_summary(unknown)}"
            raise CheckpointError(f"unknown entries {listed}; expected only {sorted(expected)}")
        if container == "method":
            _check_entries(contents)
        return contents[container], others
    if not any(isinstance(value, Tensor) for value in contents.values()):
        expected = f"expected a state dict, or one under {' or '.join(map(repr, CONTAINERS))}"
        raise CheckpointError(f"no tensors in entries: {_summary(list(contents))}; {expected}")
    return contents, []


def _check_entries(contents: Mapping[str, Any]) -> None:
    """Check the types of a trainer checkpoint's entries, and that integers have 64 bits."""
    for name, (kind, *item_types) in _TRAINER.items():
        value = contents.get(name, kind())
        items = value.values() if isinstance(value, Mapping) else value
        items = list(items) if isinstance(value, list | Mapping) else [value]
        if (
            not isinstance(value, kind)
            or (item_types and not all(isinstance(item, tuple(item_types)) for item in items))
            or any(isinstance(item, int) and abs(item) >> 63 for item in items)
        ):
            names = " or ".join(item.__name__ for item in item_types)
            expected = f"{kind.__name__}{f' of {names}' * bool(item_types)}"
            raise CheckpointError(f"entry {name!r} is not of type {expected}; use another file")


def _row(name: str) -> KeyPattern:
    def matches(row: KeyPattern) -> bool:
        is_start = not row.prefix or row.prefix.endswith(".")
        return name.startswith(row.prefix) if is_start else name == row.prefix

    return max(filter(matches, KEY_TABLE), key=lambda row: len(row.prefix))


def check_type(key: str, part: str, value: Any) -> None:
    """Require a dense tensor with the type that its part or buffer needs: floats or integers."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{key!r} must be a tensor, got {type(value).__name__}")
    allowed: tuple[torch.dtype, ...] = _FLOATS
    if key.endswith("num_batches_tracked") or part in _INTEGERS:
        allowed = (torch.int64,)
    elif part.endswith("backbone") and not key.endswith(_FLOAT_NAMES):
        allowed = (*_FLOATS, torch.int64, torch.bool)  # buffers, such as position indices
    if value.dtype not in allowed or value.layout != torch.strided:
        kind = "floating-point numbers" if torch.float32 in allowed else "64-bit integers"
        raise CheckpointError(
            f"{key!r} must be a dense tensor of {kind}, got {value.dtype}, {value.layout}; if it "
            "was quantized or pruned, save the original weights"
        )


def _check_bank(parts: Mapping[str, Mapping[str, Any]], num_classes: int | None) -> None:
    """Require features (Q, D), integer columns (Q,), and labels in [0, num_classes)."""
    features, labels = parts["bank features"].get(""), parts["bank labels"].get("")
    if features is None or labels is None:
        missing = "features" if features is None else "labels"
        raise CheckpointError(f"the memory bank has no {missing}; use a complete checkpoint")
    if features.ndim != 2 or not len(features):
        shape = tuple(features.shape)
        raise CheckpointError(f"the bank features must have shape (Q, D), got {shape}")
    for part in _INTEGERS:
        if (shape := parts[part].get("", labels).shape) != features.shape[:1]:
            shapes = f"{tuple(shape)} and {tuple(features.shape)}"
            raise CheckpointError(f"the {part} do not match the bank features: {shapes}")
    _check_labels(labels, num_classes, "use another file")
    if not 0 <= bank_pointer(parts) < len(labels):
        shown = f"[0, {len(labels)}), got {bank_pointer(parts)}"
        raise CheckpointError(f"the bank pointer must be in {shown}")


def _check_labels(labels: Tensor, num_classes: int | None, remedy: str) -> None:
    low, high = (int(label) for label in labels.aminmax())
    if low < 0 or high >= (num_classes or sys.maxsize):
        allowed = f"in [0, {num_classes})" if num_classes else "non-negative"
        raise CheckpointError(f"bank labels must be {allowed}, got {low} to {high}; {remedy}")


def bank_pointer(parts: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the position of a memory bank's next write."""
    pointer = parts["bank pointer"].get("", 0)
    if isinstance(pointer, Mapping) and pointer.keys() == {"pointer", "batches"}:
        pointer = pointer["pointer"] if type(pointer["batches"]) is int else None
    if isinstance(pointer, Tensor) and pointer.dtype == torch.int64 and pointer.numel() == 1:
        pointer = pointer.item()
    if type(pointer) is not int:
        raise CheckpointError(f"the bank pointer must be an integer, got {type(pointer).__name__}")
    return pointer


def _new_key(part: str, name: str, encoder: str) -> str:
    """Return the key in the converted model, or how the entry is used or why it is dropped."""
    if not part:
        return "dropped: not weights"
    if part in ("bank features", "bank labels"):
        return "prototypes: L2-normalized class means"
    if part.startswith("bank "):
        return "dropped: state of the bank"
    if part.startswith("target "):
        return "dropped: statistics of the teacher's features"
    if part.startswith("classifier "):
        return "fc.weight" if part == "classifier weights" else "fc.bias"
    if part.startswith("momentum ") != bool(encoder):
        return f"dropped: {'online' if encoder else 'momentum'} encoder"
    return name if part.endswith("backbone") else f"proj.{name}"


_REMEDY = "set --num-classes, or num_classes in pretrained_cfg_overlay"


def _prototypes(
    parts: Mapping[str, Any], given_classes: int | None
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the bank's L2-normalized class means, (C, D), and the classes without entries."""
    features, labels = parts["bank features"][""], parts["bank labels"][""]
    num_classes = 1000 if given_classes is None else given_classes
    _check_labels(labels, num_classes, _REMEDY)
    counts = torch.bincount(labels, minlength=num_classes)
    absent = tuple((counts == 0).nonzero().flatten().tolist())
    if given_classes is None and len(absent) > num_classes / 2:
        present = f"{num_classes - len(absent)} of {num_classes}"
        raise CheckpointError(f"the bank has entries of only {present} classes; {_REMEDY}")
    if num_classes * features.shape[1] > 1 << 28:
        dim = features.shape[1]
        raise CheckpointError(f"{num_classes} classes x {dim} exceed 2**28 values; {_REMEDY}")
    prototypes = class_means(widen(features), labels, num_classes)
    check_finite({"class means": {"": prototypes}})
    return prototypes, absent


def _check_projector(projector: Mapping[str, Tensor]) -> int:
    if not projector:
        return 0
    layers = sorted({int(key.split(".")[0]) for key in projector if re.match(r"\d+\.", key)})
    last = projector.get(f"{layers[-1]}.weight") if layers else None
    first = projector.get(f"{layers[0]}.fc.weight", last) if layers else None
    if last is None or first is None or last.ndim != 2 or first.ndim != 2:
        raise CheckpointError(f"the projector is incomplete: the file has only layers {layers}")
    with torch.device("meta"):
        expected = Projector(first.shape[1], len(layers) - 1, last.shape[1], last.shape[0])
    check_keys(projector, expected.state_dict(), f"projector of {len(layers) - 1} hidden layers")
    return last.shape[0]


def _check_classifier(weights: Tensor | None, biases: Tensor | None, width: int) -> None:
    if weights is not None and (weights.ndim != 2 or not len(weights)):
        raise CheckpointError(f"classifier weights must be (C, D), got {tuple(weights.shape)}")
    if biases is not None and (weights is None or biases.shape != weights.shape[:1]):
        raise CheckpointError(f"{tuple(biases.shape)} classifier biases do not match the weights")
    if weights is not None and width not in (0, weights.shape[1]):
        raise CheckpointError(f"classifier weights {tuple(weights.shape)} do not match D = {width}")


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """Raise CheckpointError unless a state has exactly the keys, shapes and types expected."""
    if difference := mismatch(state, expected, exact=True):
        raise CheckpointError(f"the weights do not match a {name} ({difference}); use another file")


def mismatch(state: Mapping[str, Any], expected: Mapping[str, Any], *, exact: bool = False) -> str:
    """Describe the first difference of two states, or return ""; ``exact`` also compares dtypes."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if difference := key_difference(missing, unexpected):
        return difference
    for key, tensor in expected.items():
        value = state[key]
        if not isinstance(tensor, Tensor):
            continue
        floats = value.is_floating_point() and tensor.is_floating_point()
        if value.shape != tensor.shape or (value.dtype != tensor.dtype and (exact or not floats)):
            expectation = f"{tuple(tensor.shape)} {tensor.dtype}"
            return f"{key} is {tuple(value.shape)} {value.dtype}, expected {expectation}"
    return ""


def key_difference(missing: list[str], unexpected: list[str]) -> str:
    """Describe missing and unexpected keys, or return "" if there are none."""
    counts = f"missing keys: {_summary(missing)}, unexpected: {_summary(unexpected)}"
    return counts if missing or unexpected else ""


def check_finite(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError unless all values of all tensors are finite."""
    for part, state in parts.items():
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if all_finite(tensor):
                continue
            raise CheckpointError(
                f"{f'{part} {name}'.strip()} has {int((~tensor.isfinite()).sum())} non-finite "
                f"values of {tensor.numel()}; the file is damaged or its training diverged"
            )


def all_finite(tensor: Tensor) -> bool:
    """Return True if all values of a tensor are finite."""
    # A finite sum has finite terms and takes a tenth of the time of checking each term.
    return bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all())


def _summary(keys: list[str]) -> str:
    shown = ", ".join(map(str, keys[:3])) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} ({shown})" if keys else "0"


def load_checkpoint(path: Path | str) -> Mapping[str, Any]:
    """Read a .pth, .pt or .safetensors file; its first bytes determine the format.

    Tensors are memory-mapped where the format allows it.

    Raises:
        DamagedError: The file is truncated, corrupt, or of an unknown format.
        CheckpointError: The file is missing, unreadable, unsafe or not a state dict.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise CheckpointError(f"{path} is a web page, not weights; download the file again")
    damaged = DamagedError(
        f"{path} is damaged or truncated ({status.st_size} bytes); download or copy it again and "
        "compare sizes"
    )
    try:
        if start[8:9] == b"{":
            if int.from_bytes(start[:8], "little") > 4 << 20:
                raise RefusedError("the header exceeds 4 MiB, too large for a t-ReX model")
            return safetensors.torch.load_file(path)
        if not start.startswith((b"PK\x03\x04", b"\x80")):
            raise DamagedError(
                f"{path} is neither a PyTorch nor a safetensors file (it starts with "
                f"{start[:16]!r}); download or copy it again"
            )
        contents = load_torch(path)
    except (DamagedError, MemoryError):
        raise
    except RefusedError as error:
        raise CheckpointError(f"{path} was not loaded: {error}") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a corrupt offset, before the file's start
            raise damaged from error
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the libraries raise many types for a damaged file
        raise damaged from error
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} must contain a state dict, got {type(contents).__name__}")
    return contents
