"""One process or many: set-up from the environment, exchange of tensors, objects and errors.

torchrun, or a Slurm script, sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
Every function is a no-op where there is one process.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trex_models.cli import first_line
from trex_models.precision import choose_device

T = TypeVar("T")


class SharedError(ValueError):
    """An error that every rank raises, so that rank 0 alone prints it."""

    on_all_ranks = True


class PeerError(RuntimeError):
    """Another process failed; its own error is the one to read."""

    exit_status = 1


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
def process_group(device: str = "auto", backend: str = "auto") -> Iterator[Process]:
    """Join the process group, if there is one, for the duration of the block.

    Backend ``auto`` is nccl on CUDA; tensors on the CPU go by gloo in any case. An error of an
    exchange with a process that failed becomes a PeerError.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")), "--system.device")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Process(0, 1, chosen)
        return
    nccl = backend == "nccl" or (backend == "auto" and chosen.type == "cuda")
    if nccl and chosen.type != "cuda":
        raise ValueError(f"system.backend: nccl is for CUDA, not for {chosen}; use auto or gloo")
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo", device_id=chosen if nccl else None
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "this process cannot meet the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({first_line(error)})"
        ) from error
    if dist.get_rank():  # what all ranks log, rank 0 logs for all
        logging.getLogger("trex_models").setLevel(logging.ERROR)
    try:
        yield Process(dist.get_rank(), world_size, chosen)
    except BaseException as error:
        if not nccl:  # which would wait for the others
            dist.destroy_process_group()
        if is_peer_failure(error):
            raise PeerError("another process failed; read its own error") from error
        raise
    dist.destroy_process_group()


def is_peer_failure(error: BaseException | None) -> bool:
    """Return whether an error comes from an exchange with a process that is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def data_parallel(module: nn.Module, process: Process, sync_batchnorm: bool) -> nn.Module:
    """Return ``module``, or DistributedDataParallel around it where there are many processes.

    Buffers (BatchNorm's running statistics, the bank) are not broadcast at each step: the bank is
    equal on all ranks already, and the statistics of rank 0 are the ones that are saved.
    """
    if process.world_size == 1:
        return module
    if synchronizes(process, sync_batchnorm):
        convert_sync_batchnorm(module)  # timm's: torch's drops the activations of BatchNormAct
    # Newer torch has a new name for it and warns of the old one.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    devices = [process.device] if process.device.type == "cuda" else None
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(module, device_ids=devices, **options)


def warm_up_ddp(model: nn.Module, *inputs: Any) -> None:
    """Let DistributedDataParallel order its gradients, as it does after its first backward pass.

    Otherwise the first step of a process's life would sum them in another order than later ones,
    which from three processes on changes the rounding: an interrupted run would not end bit for
    bit like an uninterrupted one. Parameters and buffers stay as they are.
    """
    if isinstance(model, DistributedDataParallel):
        with preserve_buffers(model):
            model(*inputs)[0].backward()
            model.zero_grad(set_to_none=True)


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Restore a module's buffers at the end of the block."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def synchronizes(process: Process, sync_batchnorm: bool) -> bool:
    """Return whether BatchNorm's statistics are those of the global batch; torch needs CUDA."""
    return process.world_size == 1 or (sync_batchnorm and process.device.type == "cuda")


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, (B, ...) each, in rank order: (world * B, ...)."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, whose numbers of rows may differ, in rank order."""
    if not dist.is_initialized():
        return tensor
    counts = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, anything that can be pickled, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return rank 0's value, anything that can be pickled."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks rank 0's buffers, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a ValueError or OSError of one process on all, as a SharedError that names it."""
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    messages = gather_objects(None if error is None else str(error))
    lines = []
    for message in dict.fromkeys(messages):
        ranks = [str(rank) for rank, other in enumerate(messages) if other == message]
        where = "" if len(ranks) == len(messages) else f"process {', '.join(ranks)}: "
        lines += [where + line for line in (message or "").splitlines()]
    if any(message is not None for message in messages):
        raise SharedError("\n".join(lines)) from error


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


class SharedFlags:
    """Small numbers that any process may raise and that all see at the same step: the largest.

    With many processes the answer is one call old: the exchange takes place during the step,
    between the CPUs, so that nothing waits for the device.
    """

    def __init__(self, count: int) -> None:
        self._seen = torch.zeros(count, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def exchange(self, *raised: int) -> list[int]:
        """Raise this process's flags, 0 to 255, and return those that were raised before."""
        mine = torch.tensor(raised, dtype=torch.uint8)
        if not dist.is_initialized():
            return mine.tolist()
        if self._work is not None:
            self._work.wait()
        answer: list[int] = self._seen.tolist()
        self._seen = mine
        self._work = dist.all_reduce(self._seen, dist.ReduceOp.MAX, async_op=True)
        return answer

    def finish(self) -> None:
        """Wait for the exchange under way."""
        if self._work is not None:
            self._work.wait()


@torch.no_grad()
def check_identical(parts: Mapping[str, Iterable[Tensor]]) -> None:
    """Raise a SharedError for named parts whose tensors are not equal on all processes."""
    if not dist.is_initialized():
        return
    own = torch.stack([_checksum(torch.stack([*map(_checksum, ts)])) for ts in parts.values()])
    sums = gather(own[None]).cpu()
    for name, column in zip(parts, sums.T, strict=True):
        others = [rank for rank, value in enumerate(column.tolist()) if value != column[0]]
        if others:
            raise SharedError(
                f"the {name} of process {', '.join(map(str, others))} is no longer that of process "
                "0; a device or the network may be faulty: start again from the last checkpoint"
            )


def _checksum(tensor: Tensor) -> Tensor:
    """Return a sum over the bits, weighted by odd numbers that tell the position, modulo 2**64."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integer[tensor.element_size()]).flatten().long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()
