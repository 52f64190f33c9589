"""Files in the format of the official release, with random values."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import types
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

KEYS = Path(__file__).parent / "data" / "full_checkpoint_keys.json"
BACKBONE = "module.model.encoder."
NUMPY_MODULES = {"new": "numpy._core.multiarray", "old": "numpy.core.multiarray"}

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_GOLDEN_DEPTH = 3
_BATCH = 256
_EPOCH_STEPS = 5004
_EPOCHS = 100

_OFFICIAL_NAMES = {
    "encoder.backbone.": "module.model.encoder.",
    "encoder.projector.": "module.model.head.layers.",
    "momentum_encoder.encoder.backbone.": "module.model_ema.encoder.",
    "momentum_encoder.encoder.projector.": "module.model_ema.head.layers.",
    "objective.bank.": "module.memory.",
    "objective.classifier.": "module.clf.fc.",
}

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout(
    depth: int, memory: bool = True, num_classes: int = 1000, bank_size: int = 8192
) -> Layout:
    """Shape and dtype of every tensor in the ``model`` entry of a full checkpoint."""
    names: Layout = {}
    for golden_name, (golden_shape, dtype) in json.loads(KEYS.read_text()).items():
        name, shape = golden_name, tuple(golden_shape)
        encoder, found, rest = name.partition(".head.layers.")
        if found:
            index, _, leaf = rest.partition(".")
            if depth < int(index) <= _GOLDEN_DEPTH:
                continue
            if int(index) > _GOLDEN_DEPTH:
                name = f"{encoder}.head.layers.{depth + 1}.{leaf}"
        if not memory and not name.startswith("module.model."):
            continue
        if name in ("module.memory.features", "module.memory.labels"):
            shape = (bank_size, *shape[1:])
        names[name] = shape, getattr(torch, dtype.removeprefix("torch."))
    if not memory:
        names["module.clf.fc.weight"] = (num_classes, 256), torch.float32
    return names


def full_checkpoint(
    depth: int,
    memory: bool = True,
    seed: int = 0,
    num_classes: int = 1000,
    *,
    bank_size: int = 8192,
    absent: Sequence[int] = (),
    optimizer: bool = True,
) -> dict[str, Any]:
    """Build the contents of a full checkpoint with 3 (t-ReX) or 1 (t-ReX*) hidden layers.

    With ``memory``, it has a bank without the ``absent`` classes and a momentum encoder; otherwise
    learned classifier weights. With ``optimizer``, it has momentum buffers.
    """
    generator = torch.Generator().manual_seed(seed)
    names = layout(depth, memory, num_classes, bank_size)
    bank = _bank(bank_size, num_classes, absent, generator) if memory else {}
    model = OrderedDict(
        (name, bank[name] if name in bank else _draw(name, shape, generator))
        for name, (shape, _) in names.items()
    )
    vars(model)["_metadata"] = OrderedDict({"": {"version": 1}})  # as state_dict() adds
    return {
        "model": model,
        "optimizer": _sgd_state(model, optimizer, generator),
        "epoch": _EPOCHS,
        "args": _arguments(depth, bank_size if memory else 0, num_classes, seed),
        "fp16_scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 400,
        },
    }


def backbone_checkpoint(seed: int = 0) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (name.removeprefix(BACKBONE), _draw(name, shape, generator))
        for name, (shape, _) in layout(_GOLDEN_DEPTH).items()
        if name.startswith(BACKBONE)
    )


def backbone_of(full: dict[str, Any]) -> OrderedDict[str, Tensor]:
    """Extract the online backbone from a full checkpoint, in the format of a backbone file."""
    return OrderedDict(
        (name.removeprefix(BACKBONE), tensor)
        for name, tensor in full["model"].items()
        if name.startswith(BACKBONE)
    )


def official_form(method: dict[str, Any]) -> dict[str, Any]:
    """Convert a trainer's weights to a full checkpoint of the official release."""
    weights: dict[str, Any] = {}
    for key, value in method.items():
        (prefix,) = [prefix for prefix in _OFFICIAL_NAMES if key.startswith(prefix)]
        name = key.removeprefix(prefix)
        if name == "_extra_state":
            weights["module.memory.ptr"] = torch.tensor([value["pointer"]])
        elif name not in ("indices", "written"):
            weights[_OFFICIAL_NAMES[prefix] + name] = value
    return {"model": weights, "epoch": 100, "optimizer": {}, "fp16_scaler": {}}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(_EPOCHS * _EPOCH_STEPS)
    if name.endswith("running_var"):
        values = torch.rand(shape, generator=generator) + 0.5
    else:
        values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        values *= math.sqrt(2 / values[0].numel())
        # The mean of ReLU outputs grows with depth and would hide the differences between images:
        # filters with zero sum remove it.
        values -= values.flatten(1).mean(1).view(-1, *[1] * (len(shape) - 1))
    elif name.endswith("weight"):
        values.mul_(0.1).add_(1)
    elif not name.endswith("running_var"):
        values *= 0.1
    # The first hidden layer's inputs have norm 1, those of the other layers norm sqrt(width).
    if name.endswith(("head.layers.1.fc.bias", "head.layers.1.bn.running_mean")):
        values /= math.sqrt(shape[0])
    elif name.endswith("head.layers.1.bn.running_var"):
        values /= shape[0]
    return values


def _bank(
    size: int, num_classes: int, absent: Sequence[int], generator: torch.Generator
) -> dict[str, Tensor]:
    present = torch.tensor([c for c in range(num_classes) if c not in absent])
    once = present[torch.randperm(len(present), generator=generator)]
    more = present[torch.randint(len(present), (size,), generator=generator)]
    labels = torch.cat([once, more])[:size]
    labels = labels[torch.randperm(size, generator=generator)]
    features = torch.randn(num_classes, 256, generator=generator)[labels]
    features += 0.5 * torch.randn(features.shape, generator=generator)
    features *= torch.rand(size, 1, generator=generator) + 0.5
    pointer = torch.tensor([_EPOCHS * _EPOCH_STEPS * _BATCH % size])
    tensors = {"features": features, "labels": labels, "ptr": pointer}
    return {f"module.memory.{name}": tensor for name, tensor in tensors.items()}


def _sgd_state(
    model: OrderedDict[str, Tensor], momentum: bool, generator: torch.Generator
) -> dict[str, Any]:
    online = [model[name] for name in model if name.startswith(("module.model.", "module.clf."))]
    buffers = [torch.randn(tensor.shape, generator=generator) for tensor in online * momentum]
    state = {index: {"momentum_buffer": buffer} for index, buffer in enumerate(buffers)}
    group = {"lr": 1e-6, "momentum": 0.9, "params": list(range(len(online)))}
    return {"state": state, "param_groups": [group]}


def _arguments(depth: int, bank_size: int, num_classes: int, seed: int) -> argparse.Namespace:
    warmup = np.linspace(0, 0.1, 10 * _EPOCH_STEPS)
    decay = np.linspace(0, np.pi, 90 * _EPOCH_STEPS, endpoint=False)
    return argparse.Namespace(
        output="runs/trex",
        seed=seed,
        epochs=_EPOCHS,
        hidden_layers=depth,
        memory_size=bank_size,
        num_classes=num_classes,
        tau=0.1,
        half_precision=True,
        global_scale=(0.25, 1.0),
        devices=["cuda:0", "cuda:1", "cuda:2", "cuda:3"],
        lr_schedule=np.concatenate([warmup, 1e-6 + 0.5 * (0.1 - 1e-6) * (1 + np.cos(decay))]),
    )


def write(
    obj: object,
    path: str | Path,
    *,
    numpy_names: Literal["new", "old"] = "new",
    legacy: bool = False,
) -> None:
    """Save a checkpoint with torch's current or legacy format and NumPy's new or old names."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj: Any, name: str | None = None) -> None:
            if obj is not _RECONSTRUCT:
                super().save_global(obj, name)  # type: ignore[misc]
                return
            line = f"{NUMPY_MODULES[numpy_names]}\n_reconstruct\n".encode()
            self.write(pickle.GLOBAL + line)  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]

    module: Any = types.ModuleType("pickle_with_numpy_names")
    module.Pickler = Pickler
    module.dump = pickle.dump
    torch.save(obj, path, module, _use_new_zipfile_serialization=not legacy)


def write_release(folder: Path) -> None:
    """Write the six files of the release: short bank, no momentum encoder, no optimizer state."""
    folder.mkdir(parents=True)
    releases = ("trex", 3, ()), ("trexstar", 1, (7,))  # a short bank may lack a class
    for seed, (name, depth, absent) in enumerate(releases):
        write(backbone_checkpoint(seed), folder / f"{name}.pth")
        full = full_checkpoint(depth, seed=seed + 2, bank_size=1024, absent=absent, optimizer=False)
        for key in [key for key in full["model"] if key.startswith("module.model_ema.")]:
            del full["model"][key]
        write(full, folder / f"{name}_2_checkpoint_full.pth")
        write(backbone_of(full), folder / f"{name}_2.pth")
