"""Activations computed anew in the backward pass instead of kept (Chen et al., arXiv 1604.06174).

Memory for time: of every block of the backbone its input alone is kept, and its forward pass runs
a second time. Losses and gradients are the same bits where kernels repeat theirs, as on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_MARK = "recomputes_activations"


def recompute_activations(backbone: nn.Module, name: str) -> None:
    """Let a backbone compute its activations anew in the backward pass.

    The backward pass must then run inside ``kept_buffers``.

    Args:
        backbone: A timm model.
        name: Its name, for the message.

    Raises:
        ValueError: timm cannot do so with this model.
    """
    model: Any = backbone
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:
        raise ValueError(
            f"system.checkpoint_activations: timm's {name} cannot recompute its activations; leave "
            "the option out and lower optim.batch_size or crops.local_crops, or take another "
            "backbone"
        ) from error
    setattr(model, _MARK, True)


@contextmanager
def kept_buffers(backbone: nn.Module) -> Iterator[None]:
    """Leave the buffers at the end of the block as they were at its start.

    The second forward pass updates BatchNorm's running statistics a second time. It cannot be run
    without them (``track_running_stats`` off): it must save the tensors that the first one saved.
    A no-op for a backbone that does not recompute.

    Args:
        backbone: What ``recompute_activations`` may have been given.
    """
    if not getattr(backbone, _MARK, False):
        yield
        return
    buffers = list(backbone.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
