"""Backbones: any timm model that returns one vector per image, checked before training.

Activations may be recomputed in the backward pass (Chen et al., arXiv 1604.06174): only the
input of each block is stored, and its forward pass runs a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import timm
import torch
from torch import nn

from trex_models.distributed import preserve_buffers


def build_backbone(
    name: str, args: Mapping[str, Any] | None = None, sizes: Sequence[int] = (224, 96)
) -> tuple[nn.Module, int]:
    """Create a timm model without classifier, with random weights.

    Passes ``dynamic_img_size`` to ViTs, which must accept several resolutions, and
    ``zero_init_last=False`` to convolutional networks, if timm supports these arguments.

        backbone, width = build_backbone("convnext_atto")

    Args:
        name: Name of a timm model.
        args: Further arguments of the model.
        sizes: Side lengths of the crops in pixels, global crops first.

    Returns:
        The model, and the width of its features.

    Raises:
        ValueError: timm has no such model, the model does not accept the arguments, or it does not
            return one vector for each crop of these sizes.
    """
    args = full_args(name, args or {}, sizes[0])
    with torch.device("meta"):  # only shapes: needs no memory and little time
        probe = _create(name, args).eval()
        widths = [_feature_width(name, probe, size) for size in sizes]
    return _create(name, args), widths[0]


def full_args(name: str, args: Mapping[str, Any], global_size: int) -> dict[str, Any]:
    """Add the arguments that several resolutions require, if the model supports them."""
    if ":" in name:
        raise ValueError(
            f"backbone {name!r} names pretrained weights, but training starts from random ones; "
            "name only the architecture"
        )
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"{name[:6]}*")[:5]) or "those of timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; choose a backbone such as {similar}")
    full = dict(args)
    optional: tuple[dict[str, Any], ...] = (
        {"zero_init_last": False},
        {"dynamic_img_size": True, "img_size": global_size},
    )
    with torch.device("meta"):
        _create(name, full)
        for defaults in optional:
            with suppress(ValueError):
                _create(name, defaults | full)
                full = defaults | full
    return full


def _create(name: str, args: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, **args)
    except TypeError as error:
        raise ValueError(f"backbone {name} does not accept {dict(args)}: {error}") from error


def _feature_width(name: str, model: nn.Module, size: int) -> int:
    try:
        shape = model(torch.empty(2, 3, size, size)).shape
    except Exception as error:  # models raise different types
        raise ValueError(
            f"backbone {name} does not accept crops of {size} pixels ({error}); use a "
            "convolutional network or a ViT with dynamic_img_size, or other crop sizes"
        ) from error
    if len(shape) != 2:
        problem = f"backbone {name} returns {tuple(shape[1:])} per image, not a vector"
        raise ValueError(f"{problem}; use a model that pools its features")
    return int(shape[1])


def recompute_activations(backbone: nn.Module, name: str) -> None:
    """Make a timm model recompute its activations in the backward pass.

    Losses and gradients are bit-identical if kernels are deterministic, as on a CPU. The
    backward pass must run inside ``preserve_running_stats``.
    """
    model: Any = backbone
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:
        raise ValueError(
            f"backbone {name} of timm cannot recompute its activations; instead, reduce the batch "
            "size or the number of local crops, or use another backbone"
        ) from error
    model.recomputes_activations = True


def preserve_running_stats(backbone: nn.Module) -> AbstractContextManager[None]:
    """Return a context for the backward pass, in which forward passes may run again.

    The second forward pass updates BatchNorm's running statistics a second time; the context
    restores them. ``track_running_stats`` must not be turned off instead: the second pass must save
    the same tensors as the first.
    """
    recomputes = hasattr(backbone, "recomputes_activations")
    return preserve_buffers(backbone) if recomputes else nullcontext()
