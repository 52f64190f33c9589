"""One training step, in the order that the method requires."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trex_models.method.backbone import preserve_running_stats
from trex_models.method.model import TReX
from trex_models.precision import Precision


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite; weights, optimizer and bank are unchanged."""


def training_step(
    model: nn.Module,
    method: TReX,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    crops: Sequence[Tensor],
    labels: Tensor,
    indices: Tensor,
    learning_rate: float,
    clip_grad: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run one training step: forward, backward, update of bank and weights.

    ``model`` is ``method``, or DistributedDataParallel around it. Crops are one tensor per
    resolution, (N_r * B, 3, S_r, S_r), crop-major, global first; labels and sample indices, (B,).
    Gradients are scaled so that their norm is at most ``clip_grad``, unless it is 0.
    Returns the loss before the optimizer's step, and the logits, (N * B, C); both detached.

    Raises:
        NonFiniteLossError: The loss of this process is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)  # free memory for the activations
    with precision.autocast():
        loss, logits = model(crops, labels, indices)
    read_loss = _read_later(loss.detach())
    with preserve_running_stats(method.encoder.backbone):
        precision.scaler.scale(loss).backward()
    # Meanwhile the device runs the backward pass: waiting here does not leave it idle.
    if not math.isfinite(read_loss()):
        raise NonFiniteLossError("the loss is no longer finite")
    with precision.autocast():
        # Before the optimizer's step: the average follows the weights that produced the loss.
        method.update_bank(crops, labels, indices)
    if clip_grad:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(method.parameters(), clip_grad)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return loss.detach(), logits.detach()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all global generators: drop path then depends only on (seed, step, rank)."""
    drawn = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    torch.manual_seed(drawn)
    random.seed(drawn)
    np.random.seed(drawn)  # noqa: NPY002  # a backbone may draw from it


def _read_later(scalar: Tensor) -> Callable[[], float]:
    """Start copying a scalar to the host; the returned function only waits for this copy."""
    if scalar.device.type != "cuda":
        return scalar.item
    copy = torch.empty_like(scalar, device="cpu", pin_memory=True).copy_(scalar, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> float:
        copied.synchronize()
        return copy.item()

    return read
