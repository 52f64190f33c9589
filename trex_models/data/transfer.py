"""From the CPU's memory to a device, beside what the device computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device; on CUDA on a stream of its own, where they are page-locked.

    Their copying overlaps with all that the current stream still has to do, and what is queued
    there from now on waits for it. The CPU waits for nothing.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    current, copying = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copying):
        copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
    current.wait_stream(copying)
    for tensor in copies:
        tensor.record_stream(current)  # its memory is not to be used anew before
    return copies


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
