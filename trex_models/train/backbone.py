"""Any timm backbone that pools to one vector, checked before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn


def build_backbone(name: str, args: Mapping[str, Any], sizes: Sequence[int]) -> nn.Module:
    """Create a timm model without classifier, with random weights.

    Args:
        name: A timm model name.
        args: Its further arguments.
        sizes: The sides of the crops that it must take, in pixels, the global one first.

    Raises:
        ValueError: timm has no such model, it refuses the arguments, or it cannot turn crops of
            these sizes into one vector each.
    """
    args = full_args(name, args, sizes[0])
    with torch.device("meta"):  # shapes alone: no memory, no time
        probe = _create(name, args).eval()
        for size in sizes:
            _check_output(name, probe, size)
    return _create(name, args)


def full_args(name: str, args: Mapping[str, Any], global_size: int) -> dict[str, Any]:
    """Add what training from scratch on several resolutions wants, where the model takes it.

    Raises:
        ValueError: timm has no such model, or it refuses the arguments.
    """
    _check_name(name)
    with torch.device("meta"):
        accepted = inspect.signature(type(_create(name, args)).__init__).parameters
    added: dict[str, Any] = {}
    if "zero_init_last" in accepted:
        added["zero_init_last"] = False
    if "dynamic_img_size" in accepted:
        added |= {"dynamic_img_size": True, "img_size": global_size}
    return added | dict(args)


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    similar = timm.list_models(f"{name[:6]}*")[:5]
    hint = f"; similar names: {', '.join(similar)}" if similar else ""
    raise ValueError(f"model.backbone: timm has no model {name!r}{hint}")


def _create(name: str, args: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, **args)
    except TypeError as error:
        raise ValueError(f"model.backbone_args: {name} refuses {dict(args)}: {error}") from error


def _check_output(name: str, model: nn.Module, size: int) -> None:
    try:
        shape = tuple(model(torch.empty(2, 3, size, size)).shape)
    except Exception as error:  # each model fails in its own way
        raise ValueError(
            f"model.backbone: {name} does not take {size}-pixel crops ({error}); take a "
            "convolutional network or a ViT with dynamic_img_size, or change the crop sizes"
        ) from error
    if shape != (2, model.num_features):
        raise ValueError(
            f"model.backbone: {name} turns an image into {shape[1:]}, not a vector of "
            f"{model.num_features}; take one that pools"
        )
