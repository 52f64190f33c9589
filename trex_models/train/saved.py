"""What can be made of a saved run: its export, and a step that went wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trex_models import checkpoints
from trex_models.licenses import resolve_license
from trex_models.precision import Precision, choose_device
from trex_models.train import checkpointing
from trex_models.train.build import build_method, export_method
from trex_models.train.config import from_dict
from trex_models.train.method import TReX
from trex_models.train.step import seed_step


def export_checkpoint(path: Path, folder: Path, weights_license: str | None = None) -> list[Path]:
    """Export any checkpoint of the trainer, of a finished run or not.

    Args:
        path: A file of a run's checkpoints folder, or the run's folder: its last whole one.
        folder: Where to write, as ``export.export``.
        weights_license: Licence to state; None for the one that the run was started with.

    Returns:
        The exported folders.

    Raises:
        ValueError: There is no checkpoint, it is damaged or does not fit its configuration, or it
            must stay under another licence.
    """
    method, state = load_method(path)
    checkpointing.refuse_step(path, state)
    config = from_dict(state["config"])
    chosen = config.license if weights_license is None else weights_license
    config = replace(config, license=resolve_license(chosen, state["inherited_license"]))
    return export_method(method, config, state["classes"], folder)


def load_step(path: Path | str) -> tuple[TReX, tuple[list[Tensor], Tensor, Tensor], Precision]:
    """Load a step whose loss was not finite, as its process saw it.

    ``with precision.autocast(): loss, logits = method(*inputs)`` is then its forward pass.

    Args:
        path: The file that training named.

    Returns:
        The method in training mode, its inputs (the crops of each resolution, the labels, and
        which samples they are), and the precision; on CUDA where there is one, else on the CPU.
        The global generators are seeded as they were; BatchNorm's running statistics alone are
        those after the step's forward pass.

    Raises:
        ValueError: The file is not such a step, or its precision needs CUDA.
    """
    path = Path(path)
    device = choose_device()
    method, state = load_method(path)
    if "crops" not in state:
        raise ValueError(f"{path} is a checkpoint, not a step: it holds no crops")
    precision = Precision.from_name(state["config"]["precision"], device.type)
    precision.apply()
    seed_step(state["config"]["seed"], state["step"], state["process"])
    crops = [images.to(device) for images in state["crops"]]
    inputs = crops, state["labels"].to(device), state["ids"].to(device)
    return method.train().to(device), inputs, precision


def load_method(path: Path) -> tuple[TReX, dict[str, Any]]:
    """Build a checkpoint's method, on the CPU; return it and all that the file holds.

    Args:
        path: A file, or a run's folder: its last checkpoint that is not damaged.

    Raises:
        ValueError: There is no checkpoint, or it is damaged or does not match its configuration.
    """
    if path.is_dir():
        newest = checkpointing.newest(path, lambda _, error: print(error))
        if newest is None:
            raise ValueError(f"{path} holds no checkpoints; name a run's folder or a checkpoint")
        path, state = newest
    else:
        state = checkpointing.load(path)
    config, num_classes = from_dict(state["config"]), len(state["classes"])
    # First without memory: the configuration may ask for a network that the file cannot fill.
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
    """Raises ValueError with a message after a number of calls of torch's functions."""

    def __init__(self, left: int, message: str) -> None:
        super().__init__()
        self.left, self.message = left, message

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(self.message)
        return func(*args, **(kwargs or {}))
