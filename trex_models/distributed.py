"""Distributed training: process group setup, exchange of tensors, objects and errors.

torchrun, or a Slurm script, sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
With a single process, all functions work without communication.
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
    """An error that every rank raises, so that only rank 0 prints it."""

    on_all_ranks = True


class PeerError(RuntimeError):
    """Error after the failure of another process, which prints the cause."""

    exit_status = 1


@dataclass(frozen=True)
class Process:
    """Rank and device of this process, and the number of processes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True if this process writes files and logs."""
        return self.rank == 0


@contextmanager
def process_group(device: str = "auto", backend: str = "auto") -> Iterator[Process]:
    """Join the process group, if there is one, for the duration of the block.

    Backend ``auto`` is nccl on CUDA; tensors on the CPU always use gloo. Communication errors that
    are caused by the failure of another process are raised as a PeerError.
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
        raise ValueError(f"system.backend: nccl requires CUDA, got {chosen}; use auto or gloo")
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo", device_id=chosen if nccl else None
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "check MASTER_ADDR and MASTER_PORT: this process cannot connect to the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({first_line(error)})"
        ) from error
    if dist.get_rank():  # only rank 0 logs messages that are the same on all ranks
        logging.getLogger("trex_models").setLevel(logging.ERROR)
    try:
        yield Process(dist.get_rank(), world_size, chosen)
    except BaseException as error:
        if not nccl:  # nccl would wait for the other processes
            dist.destroy_process_group()
        if is_peer_failure(error):
            raise PeerError("another process failed; see its error message") from error
        raise
    dist.destroy_process_group()


def is_peer_failure(error: BaseException | None) -> bool:
    """Return True if an error is caused by communication with a process that has exited."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def data_parallel(module: nn.Module, process: Process, sync_batchnorm: bool) -> nn.Module:
    """Wrap a module in DistributedDataParallel if there are several processes.

    Buffers (BatchNorm's running statistics, the memory bank) are not broadcast at each step: the
    bank is identical on all ranks, and only the running statistics of rank 0 are saved.
    """
    if process.world_size == 1:
        return module
    if synchronizes(process, sync_batchnorm):
        convert_sync_batchnorm(module)  # from timm: torch's drops the activations of BatchNormAct
    # Newer versions of torch have renamed the argument and warn about the old name.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    devices = [process.device] if process.device.type == "cuda" else None
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(module, device_ids=devices, **options)


def warm_up_ddp(model: nn.Module, *inputs: Any) -> None:
    """Run a backward pass, after which DistributedDataParallel fixes the order of gradients.

    Otherwise the first step after each start would sum gradients in another order than later steps.
    With three or more processes, this changes the rounding, so a resumed run would not be bitwise
    identical to an uninterrupted run. Parameters and buffers do not change.
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
    """Return True if BatchNorm uses statistics of the global batch; torch requires CUDA."""
    return process.world_size == 1 or (sync_batchnorm and process.device.type == "cuda")


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors, (B, ...), of all ranks in rank order, (world_size * B, ...)."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate tensors of all ranks in rank order; their numbers of rows may differ."""
    if not dist.is_initialized():
        return tensor
    counts = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of the tensors of all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: T) -> list[T]:
    """Return the picklable values of all ranks in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return the picklable value of rank 0."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers, such as BatchNorm's running statistics, to all ranks."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a ValueError or OSError of any rank on all ranks, as a SharedError."""
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
    """Integer flags of which all processes see the maximum over processes at the same step.

    With several processes, results are one call old: the exchange takes place during the step,
    between the CPUs, so that nothing waits for the device.
    """

    def __init__(self, count: int) -> None:
        self._flags = torch.zeros(count, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def exchange(self, *flags: int) -> list[int]:
        """Send this process's flags, 0 to 255, and return the maxima of the last exchange."""
        own = torch.tensor(flags, dtype=torch.uint8)
        if not dist.is_initialized():
            return own.tolist()
        if self._work is not None:
            self._work.wait()
        last: list[int] = self._flags.tolist()
        self._flags = own
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, async_op=True)
        return last

    def finish(self) -> None:
        """Wait for the pending exchange."""
        if self._work is not None:
            self._work.wait()


@torch.no_grad()
def check_identical(parts: Mapping[str, Iterable[Tensor]]) -> None:
    """Raise a SharedError if the tensors of a named part differ between processes."""
    if not dist.is_initialized():
        return
    own = torch.stack([_checksum(torch.stack([*map(_checksum, ts)])) for ts in parts.values()])
    sums = gather(own[None]).cpu()
    for name, column in zip(parts, sums.T, strict=True):
        others = [rank for rank, value in enumerate(column.tolist()) if value != column[0]]
        if others:
            raise SharedError(
                f"the {name} of process {', '.join(map(str, others))} differs from that of process "
                "0; a device or the network may be faulty: resume from the last checkpoint"
            )


def _checksum(tensor: Tensor) -> Tensor:
    """Return a position-weighted sum of a tensor's bits as integers, modulo 2**64."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integer[tensor.element_size()]).flatten().long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()
