"""Read any t-ReX checkpoint safely, into the names of our models.

Four forms: the official release's backbone files (flat, torchvision's names), its full training
states (online encoder, momentum encoder, memory bank, optimizer, arguments), its full states
without a bank (learned class weights), and ours (a trainer's checkpoint, an exported model).
Pickles run no code (``unpickling``). In a training state a key that the table below does not name
is an error; in a model's file it is taken for the backbone's, and compared with it later. All
commands read files by `load_checkpoint` and `sort_keys`, so that all refuse the same contents.

Shapes: C classes, D embedding, Q bank size.
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
    """A file is damaged, unsafe, or not a t-ReX checkpoint; the message says what to do."""


class DamagedError(CheckpointError):
    """A file is cut short, or its contents do not match its checksums."""


class Row(NamedTuple):
    """Part that the keys under a prefix belong to; without a trailing dot, one key's full name."""

    form: str
    prefix: str
    part: str


# The longest prefix that matches decides.
KEY_TABLE = (
    Row("official", "model.encoder.", "backbone"),
    Row("official", "model.head.layers.", "projector"),
    Row("official", "model_ema.encoder.", "momentum backbone"),
    Row("official", "model_ema.head.layers.", "momentum projector"),
    Row("official", "memory.features", "bank features"),
    Row("official", "memory.labels", "bank labels"),
    Row("official", "memory.ptr", "bank pointer"),
    Row("official", "clf.fc.weight", "class weights"),
    Row("trainer", "encoder.backbone.", "backbone"),
    Row("trainer", "encoder.projector.", "projector"),
    Row("trainer", "momentum_encoder.encoder.backbone.", "momentum backbone"),
    Row("trainer", "momentum_encoder.encoder.projector.", "momentum projector"),
    Row("trainer", "objective.bank.features", "bank features"),
    Row("trainer", "objective.bank.labels", "bank labels"),
    Row("trainer", "objective.bank.indices", "bank indices"),
    Row("trainer", "objective.bank.written", "bank ages"),
    Row("trainer", "objective.bank._extra_state", "bank pointer"),
    Row("trainer", "objective.classifier.weight", "class weights"),
    Row("trainer", "objective.classifier.bias", "class biases"),
    Row("model", "proj.", "projector"),
    Row("model", "fc.weight", "class weights"),
    Row("model", "fc.bias", "class biases"),
    Row("model", "", "backbone"),
)

# Entry of the weights in a training state, and the other entries, which are not weights.
_TIMM = {"arch", "epoch", "version", "args", "metric", "optimizer", "amp_scaler", "state_dict"}
_TRAINER: dict[str, tuple[type, ...]] = {  # with their types, and those of their items
    **dict.fromkeys(("config", "optimizer", "scaler"), (dict,)),
    **dict.fromkeys(("images", "inherited_license"), (str,)),
    **dict.fromkeys(("step", "batchnorm_groups", "process"), (int,)),
    **dict.fromkeys(("meter", "labels", "indices"), (Tensor,)),
    "classes": (list, str),
    "unreadable": (list, int),
    "crops": (list, Tensor),  # as process, labels and indices: of a step whose loss was not finite
    "environment": (dict, int, str),
    "files": (dict, Tensor),
}
CONTAINERS: dict[str, Collection[str]] = {
    "state_dict_ema": _TIMM,  # timm's trainer; timm prefers the average, too
    "state_dict": _TIMM,
    "model": {"optimizer", "epoch", "args", "fp16_scaler"},
    "method": _TRAINER,
}

# Modules around a module: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT_NAMES = (".weight", ".bias", ".running_mean", ".running_var")
_INTEGERS = {"bank labels", "bank indices", "bank ages"}  # parts


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a checkpoint, in the names of our models."""

    form: str  # official, trainer or model
    backbone: dict[str, Tensor]
    projector: dict[str, Tensor] = field(default_factory=dict)
    class_weights: Tensor | None = None  # prototypes (Eq. 2) or learned weights (Eq. 1), (C, D)
    class_biases: Tensor | None = None  # (C,)
    absent_classes: tuple[int, ...] = ()  # those without an entry in the bank have prototypes of 0
    key_report: dict[str, str] = field(default_factory=dict)  # of every key and entry of the file

    @property
    def proj_layers(self) -> int:
        """Number of the projector's hidden layers, L; 0 without one, too."""
        return sum(key.endswith(".fc.weight") for key in self.projector)

    def head_args(self) -> dict[str, int]:
        """Return ``TRexResNet``'s arguments for this head: depth and widths."""
        out_dim, hidden_dim = self.projector[f"{self.proj_layers + 1}.weight"].shape
        widths = {"proj_hidden_dim": hidden_dim, "proj_dim": out_dim}
        return {"proj_layers": self.proj_layers, **widths}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the complete model's state dict, contiguous: backbone, ``proj.*``, ``fc.*``."""
        state = self.backbone | {f"proj.{key}": value for key, value in self.projector.items()}
        if self.class_weights is not None:
            state["fc.weight"] = self.class_weights
        if self.class_biases is not None:
            state["fc.bias"] = self.class_biases
        return {key: value.contiguous() for key, value in state.items()}


def read(
    path: Path | str,
    *,
    momentum_encoder: bool = False,
    num_classes: int | None = None,
    backbone: str | None = "resnet50",
) -> Checkpoint:
    """Read and split a file or a timm folder, and check it against timm's ``backbone``, if any."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    contents = load_checkpoint(path)
    try:
        checkpoint = split(contents, momentum_encoder=momentum_encoder, num_classes=num_classes)
        if backbone is not None:
            with torch.device("meta"):
                expected = timm.create_model(backbone, num_classes=0).state_dict()
            _check_keys(checkpoint.backbone, expected, backbone)
            if checkpoint.class_biases is not None and not checkpoint.projector:
                raise CheckpointError(f"it is a linear {backbone} classifier, not a t-ReX model")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint


def split(
    contents: Mapping[str, Any], *, momentum_encoder: bool = False, num_classes: int | None = None
) -> Checkpoint:
    """Split a state dict, or a training state around one, into the parts of our models.

    ``num_classes``, C, is that of a bank: by default 1000 (ImageNet-1K), or that of a trainer's
    checkpoint; 0 leaves the class weights out.
    """
    form, parts, places = sort_keys(contents)
    encoder = "momentum " if momentum_encoder else ""
    backbone, projector = parts[f"{encoder}backbone"], parts[f"{encoder}projector"]
    if not backbone:
        wanted = f"{encoder}encoder" if encoder else "backbone"
        raise CheckpointError(f"it holds no {wanted}, among {len(places)} keys; use another file")
    if form == "official" and not projector:
        raise CheckpointError(f"it holds a {encoder}backbone without its projector; it is cut down")
    check_finite(parts)
    width = _check_projector(projector)
    if num_classes is None and form == "trainer" and "classes" in contents:
        num_classes = len(contents["classes"])
    class_weights, class_biases = (parts[f"class {name}"].get("") for name in ("weights", "biases"))
    absent: tuple[int, ...] = ()
    if num_classes == 0:
        class_weights = class_biases = None
    elif parts["bank features"]:
        if class_weights is not None:
            raise CheckpointError("it holds both a memory bank and learned class weights")
        class_weights, absent = _prototypes(parts, num_classes)
    _check_classifier(class_weights, class_biases, width)
    key_report = {key: _fate(part, name, encoder) for key, (part, name) in places.items()}
    return Checkpoint(form, backbone, projector, class_weights, class_biases, absent, key_report)


class SortedKeys(NamedTuple):
    """Contents of a file by the parts of ``KEY_TABLE``."""

    form: str  # official, trainer or model
    parts: dict[str, dict[str, Any]]  # values of every part, by name without the prefix
    places: dict[str, tuple[str, str]]  # part and name there of every key and entry of the file


def sort_keys(contents: Mapping[str, Any]) -> SortedKeys:
    """Sort a state dict, or a training state around one, by ``KEY_TABLE``, and check its types."""
    state, others = _unwrap(contents)
    for key in state:
        if not isinstance(key, str):
            raise CheckpointError(f"the key {key!r} is no name; save model.state_dict()")
    names = {key: ".".join(s for s in key.split(".") if s not in WRAPPERS) for key in state}
    rows = {key: _row(name) for key, name in names.items()}
    form = next((row.form for row in rows.values() if row.form != "model"), "model")
    parts: dict[str, dict[str, Any]] = {row.part: {} for row in KEY_TABLE}
    places = dict.fromkeys(others, ("", ""))
    for key, row in rows.items():
        name = names[key].removeprefix(row.prefix)
        if row.form != form:
            raise CheckpointError(f"unexpected key {key!r} next to those of the {form} form")
        if name in parts[row.part]:
            raise CheckpointError(f"{names[key]!r} is in the file twice, once as {key!r}")
        if row.part != "bank pointer":
            _check_type(key, row.part, state[key])
        parts[row.part][name] = state[key]
        places[key] = row.part, name
    if any(parts[part] for part in parts if part.startswith("bank")):
        _check_bank(parts, len(contents["classes"]) if "classes" in others else None)
    return SortedKeys(form, parts, places)


def _unwrap(contents: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Return the weights of a training state, and the names of its other entries."""
    container = next((n for n in CONTAINERS if isinstance(contents.get(n), Mapping)), None)
    if container is not None:
        others = [name for name in contents if name != container]
        expected = CONTAINERS[container]
        if unknown := [name for name in others if name not in expected]:
            listed = f"{_some(unknown)} next to {container!r}"
            raise CheckpointError(f"unknown entries {listed}; expected only {sorted(expected)}")
        if container == "method":
            _check_entries(contents)
        return contents[container], others
    if not any(isinstance(value, Tensor) for value in contents.values()):
        wanted = f"weights, or {' or '.join(map(repr, CONTAINERS))} with weights in it"
        raise CheckpointError(f"its entries are {_some(list(contents))}; expected {wanted}")
    return contents, []


def _check_entries(contents: Mapping[str, Any]) -> None:
    """Require the types of a trainer's entries, and integers of 64 bits."""
    for name, (kind, *of) in _TRAINER.items():
        value = contents.get(name, kind())
        items = value.values() if isinstance(value, Mapping) else value
        items = list(items) if isinstance(value, list | Mapping) else [value]
        if (
            not isinstance(value, kind)
            or (of and not all(isinstance(item, tuple(of)) for item in items))
            or any(isinstance(item, int) and abs(item) >> 63 for item in items)
        ):
            names = " or ".join(item.__name__ for item in of)
            expected = f"{kind.__name__}{f' of {names}' * bool(of)}"
            raise CheckpointError(f"its entry {name!r} is not a {expected}; use another file")


def _row(name: str) -> Row:
    def matches(row: Row) -> bool:
        is_start = not row.prefix or row.prefix.endswith(".")
        return name.startswith(row.prefix) if is_start else name == row.prefix

    return max(filter(matches, KEY_TABLE), key=lambda row: len(row.prefix))


def _check_type(key: str, part: str, value: Any) -> None:
    """Require a dense tensor of floats; of integers where a part or a buffer has those."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{key!r} is a {type(value).__name__}, not a tensor")
    allowed: tuple[torch.dtype, ...] = _FLOATS
    if key.endswith("num_batches_tracked") or part in _INTEGERS:
        allowed = (torch.int64,)
    elif part.endswith("backbone") and not key.endswith(_FLOAT_NAMES):
        allowed = (*_FLOATS, torch.int64, torch.bool)  # buffers, such as indices of positions
    if value.dtype not in allowed or value.layout != torch.strided:
        kind = "floating-point numbers" if torch.float32 in allowed else "64-bit integers"
        raise CheckpointError(
            f"{key} is {value.dtype} {value.layout}; expected dense {kind}: if the model was "
            "quantized or pruned, save the original weights"
        )


def _check_bank(parts: Mapping[str, Mapping[str, Any]], num_classes: int | None) -> None:
    """Require features (Q, D), integers (Q,) next to them, and labels in [0, num_classes)."""
    features, labels = parts["bank features"].get(""), parts["bank labels"].get("")
    if features is None or labels is None:
        missing = "features" if features is None else "labels"
        raise CheckpointError(f"the memory bank has no {missing}; it is cut down: use another file")
    if features.ndim != 2 or not len(features):
        raise CheckpointError(f"the bank's features are {tuple(features.shape)}; expected (Q, D)")
    for part in _INTEGERS:
        found = parts[part].get("", labels)
        if found.shape != features.shape[:1]:
            shapes = f"{tuple(found.shape)} and {tuple(features.shape)}"
            raise CheckpointError(f"the {part} do not match its features: {shapes}")
    _check_labels(labels, num_classes, "use another file")
    if not 0 <= bank_pointer(parts) < len(labels):
        raise CheckpointError(f"the bank's pointer is outside its {len(labels)} entries")


def _check_labels(labels: Tensor, num_classes: int | None, remedy: str) -> None:
    low, high = (int(label) for label in labels.aminmax())
    if low < 0 or high >= (num_classes or sys.maxsize):
        found = f"run from {low} to {high}, outside {num_classes} classes"
        raise CheckpointError(f"the bank's labels {found}; {remedy}")


def bank_pointer(parts: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the position where a memory bank is written next."""
    pointer = parts["bank pointer"].get("", 0)
    if isinstance(pointer, Mapping) and pointer.keys() == {"pointer", "batches"}:
        pointer = pointer["pointer"] if type(pointer["batches"]) is int else None
    if isinstance(pointer, Tensor) and pointer.dtype == torch.int64 and pointer.numel() == 1:
        pointer = pointer.item()
    if type(pointer) is not int:
        raise CheckpointError(f"the bank's pointer is a {type(pointer).__name__}, not an integer")
    return pointer


def _fate(part: str, name: str, encoder: str) -> str:
    """Return the converted model's key, or what else becomes of a key or an entry."""
    if not part:
        return "dropped: not weights"
    if part in ("bank features", "bank labels"):
        return "prototypes: L2-normalized class sums"
    if part.startswith("bank "):
        return "dropped: state of the bank"
    if part.startswith("class "):
        return "fc.weight" if part == "class weights" else "fc.bias"
    if part.startswith("momentum ") != bool(encoder):
        return f"dropped: {'online' if encoder else 'momentum'} encoder"
    return name if part.endswith("backbone") else f"proj.{name}"


_REMEDY = "give --num-classes, or num_classes in pretrained_cfg_overlay"


def _prototypes(
    parts: Mapping[str, Any], given_classes: int | None
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the bank's L2-normalized class sums, (C, D), and the classes without an entry."""
    features, labels = parts["bank features"][""], parts["bank labels"][""]
    num_classes = 1000 if given_classes is None else given_classes
    _check_labels(labels, num_classes, _REMEDY)
    counts = torch.bincount(labels, minlength=num_classes)
    absent = tuple((counts == 0).nonzero().flatten().tolist())
    if given_classes is None and len(absent) > num_classes / 2:
        found = f"{num_classes - len(absent)} of {num_classes} classes only"
        raise CheckpointError(f"the bank has entries of {found}; {_REMEDY}")
    if num_classes * features.shape[1] > 1 << 28:
        raise CheckpointError(f"{num_classes} classes are too many for {features.shape[1]} numbers")
    prototypes = class_means(widen(features), labels, num_classes)
    check_finite({"class means": {"": prototypes}})
    return prototypes, absent


def _check_projector(projector: Mapping[str, Tensor]) -> int:
    """Require a complete projector; return its width, 0 without one."""
    if not projector:
        return 0
    layers = sorted({int(key.split(".")[0]) for key in projector if re.match(r"\d+\.", key)})
    last = projector.get(f"{layers[-1]}.weight") if layers else None
    first = projector.get(f"{layers[0]}.fc.weight", last) if layers else None
    if last is None or first is None or last.ndim != 2 or first.ndim != 2:
        raise CheckpointError(f"its projector is incomplete: it has parts of layers {layers}")
    with torch.device("meta"):
        expected = Projector(first.shape[1], len(layers) - 1, last.shape[1], last.shape[0])
    _check_keys(projector, expected.state_dict(), f"projector of {len(layers) - 1} hidden layers")
    return last.shape[0]


def _check_classifier(weights: Tensor | None, biases: Tensor | None, width: int) -> None:
    if weights is not None and (weights.ndim != 2 or not len(weights)):
        raise CheckpointError(f"its class weights are {tuple(weights.shape)}; expected (C, D)")
    if biases is not None and (weights is None or biases.shape != weights.shape[:1]):
        raise CheckpointError(f"its class biases, {tuple(biases.shape)}, do not match its weights")
    if weights is not None and width not in (0, weights.shape[1]):
        shape = tuple(weights.shape)
        raise CheckpointError(f"its class weights, {shape}, do not match embeddings of {width}")


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    if difference := mismatch(state, expected, exact=True):
        raise CheckpointError(f"its weights are not those of a {name}: {difference}")


def mismatch(state: Mapping[str, Any], expected: Mapping[str, Any], *, exact: bool = False) -> str:
    """Describe the first difference of two states, if any; ``exact`` compares types of floats."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        return f"{_some(missing)} missing, {_some(unexpected)} unexpected"
    for key, tensor in expected.items():
        found = state[key]
        if not isinstance(tensor, Tensor):
            continue
        floats = found.is_floating_point() and tensor.is_floating_point()
        if found.shape != tensor.shape or (found.dtype != tensor.dtype and (exact or not floats)):
            wanted = f"{tuple(tensor.shape)} {tensor.dtype}"
            return f"{key} is {tuple(found.shape)} {found.dtype}, expected {wanted}"
    return ""


def check_finite(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError unless all values of all tensors are finite."""
    for part, state in parts.items():
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            # A finite sum has finite terms, and takes a tenth of the time of looking at each.
            if tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all():
                continue
            raise CheckpointError(
                f"{f'{part} {name}'.strip()} has {int((~tensor.isfinite()).sum())} values that are "
                f"not finite, of {tensor.numel()}; the file is damaged or its training diverged"
            )


def _some(keys: list[str]) -> str:
    shown = ", ".join(map(str, keys[:3])) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} ({shown})" if keys else "0"


def load_checkpoint(path: Path | str) -> Mapping[str, Any]:
    """Read the contents of a .pth, .pt or .safetensors file; its first bytes decide which.

    Tensors stay in the file until they are used, where its format allows that.

    Raises:
        DamagedError: The file is cut short, or its contents do not match its checksums or lengths.
        CheckpointError: It is missing, unreadable, unsafe, or something else.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror})") from error
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise CheckpointError(f"{path}: it is a web page, not weights; download the file again")
    damaged = DamagedError(
        f"{path}: it is damaged or cut short ({status.st_size} bytes); download or copy it again, "
        "and compare sizes"
    )
    try:
        if start[8:9] == b"{":
            if int.from_bytes(start[:8], "little") > 4 << 20:
                raise RefusedError("its header exceeds 4 MiB; it is another network's")
            return safetensors.torch.load_file(path)
        if not start.startswith((b"PK\x03\x04", b"\x80")):
            raise DamagedError(
                f"{path}: it is not a file of torch or safetensors (it begins with "
                f"{start[:16]!r}); download or copy it again"
            )
        contents = load_torch(path)
    except (DamagedError, MemoryError):
        raise
    except RefusedError as error:
        raise CheckpointError(f"{path}: refused: {error}") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a position before the file's start, from a wrong field
            raise damaged from error
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror or error})") from error
    except Exception as error:  # each library raises many kinds for a damaged file
        raise damaged from error
    if not isinstance(contents, Mapping):
        kind = type(contents).__name__
        raise CheckpointError(f"{path}: it holds a {kind}, not a state dict")
    return contents
