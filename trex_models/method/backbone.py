"""Backbones: any timm model that pools to one vector, checked before training starts.

Activations may be recomputed in the backward pass (Chen et al., arXiv 1604.06174): only the
input of each block is kept, and its forward pass runs a second time.
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

    Where timm has these arguments, ViTs get ``dynamic_img_size``, for several resolutions, and
    convolutional networks ``zero_init_last=False``.

        backbone, width = build_backbone("convnext_atto")

    Args:
        name: A timm model name.
        args: Further arguments of the model.
        sizes: Sides of the crops in pixels, global crops first.

    Returns:
        The model, and the width of its features.

    Raises:
        ValueError: timm has no such model, it refuses the arguments, or it does not map crops of
            these sizes to one vector each.
    """
    args = full_args(name, args or {}, sizes[0])
    with torch.device("meta"):  # only shapes: costs neither memory nor time
        probe = _create(name, args).eval()
        widths = [_feature_width(name, probe, size) for size in sizes]
    return _create(name, args), widths[0]


def full_args(name: str, args: Mapping[str, Any], global_size: int) -> dict[str, Any]:
    """Add the arguments that training on several resolutions needs, if the model has them."""
    if ":" in name:
        raise ValueError(
            f"model.backbone: {name!r} is pretrained; training starts from random weights; name "
            "only the architecture"
        )
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"{name[:6]}*")[:5]) or "those of timm.list_models()"
        raise ValueError(f"model.backbone: timm has no model {name!r}; take one of {similar}")
    full = dict(args)
    wanted: tuple[dict[str, Any], ...] = (
        {"zero_init_last": False},
        {"dynamic_img_size": True, "img_size": global_size},
    )
    with torch.device("meta"):
        _create(name, full)
        for more in wanted:
            with suppress(ValueError):
                _create(name, more | full)
                full = more | full
    return full


def _create(name: str, args: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, **args)
    except TypeError as error:
        raise ValueError(f"model.backbone_args: {name} refuses {dict(args)}: {error}") from error


def _feature_width(name: str, model: nn.Module, size: int) -> int:
    try:
        shape = model(torch.empty(2, 3, size, size)).shape
    except Exception as error:  # each model fails in its own way
        raise ValueError(
            f"model.backbone: {name} does not take {size}-pixel crops ({error}); use a "
            "convolutional network or a ViT with dynamic_img_size, or other sizes"
        ) from error
    if len(shape) != 2:
        found = f"{name} turns an image into {tuple(shape[1:])}, not a vector"
        raise ValueError(f"model.backbone: {found}; use one that pools")
    return int(shape[1])


def recompute_activations(backbone: nn.Module, name: str) -> None:
    """Let a timm model recompute its activations in the backward pass.

    Losses and gradients are bit-identical where kernels are deterministic, as on a CPU. The
    backward pass must run inside ``preserve_running_stats``.
    """
    model: Any = backbone
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:
        raise ValueError(
            f"system.checkpoint_activations: timm's {name} cannot recompute its activations; lower "
            "optim.batch_size or crops.local_crops instead, or use another backbone"
        ) from error
    model.recomputes_activations = True


def preserve_running_stats(backbone: nn.Module) -> AbstractContextManager[None]:
    """Return the context for a backward pass, in which forward passes may run again.

    The second forward pass updates BatchNorm's running statistics a second time; the context
    restores them. It cannot run without them (``track_running_stats`` off), as it must save the
    tensors that the first one saved.
    """
    recomputes = hasattr(backbone, "recomputes_activations")
    return preserve_buffers(backbone) if recomputes else nullcontext()
