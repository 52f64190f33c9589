"""One process or many: set-up from torchrun's environment, gather, reduce, barrier.

Every function is a no-op where there is one process.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Process:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0


@contextmanager
def process_group(device: str = "auto") -> Iterator[Process]:
    """Join torchrun's process group, if there is one, for the duration of the block.

    Args:
        device: ``auto`` (CUDA where there is one, else the CPU) or a torch device name.

    Raises:
        ValueError: The device does not exist.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Process(0, 1, chosen)
        return
    cuda = chosen.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", device_id=chosen if cuda else None)
    try:
        yield Process(dist.get_rank(), world_size, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"system.device: {name!r} is no torch device; try auto, cpu or cuda"
        ) from None
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"system.device: there is no cuda:{index}, only {torch.cuda.device_count()} CUDA "
                "devices; start fewer processes or use --system.device cpu"
            )
        return torch.device("cuda", index)
    return device


def data_parallel(module: nn.Module, process: Process, sync_batchnorm: bool) -> nn.Module:
    """Return ``module``, or DistributedDataParallel around it where there are many processes.

    Buffers (BatchNorm's running statistics, the bank) are not broadcast: the bank is equal on
    all ranks already, and the statistics of rank 0 are the ones that are saved.

    Args:
        module: On the process's device.
        process: This process.
        sync_batchnorm: Share BatchNorm's batch statistics; torch does so on CUDA alone.
    """
    if process.world_size == 1:
        return module
    if sync_batchnorm and process.device.type == "cuda":
        convert_sync_batchnorm(module)  # timm's: torch's drops the activations of BatchNormAct
    # Newer torch has a new name for it and warns of the old one.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    if process.device.type == "cuda":
        options["device_ids"] = [process.device]
    return DistributedDataParallel(module, **options)


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, (B, ...) each, in rank order: (world * B, ...)."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def mean(tensor: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
