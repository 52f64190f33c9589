"""Device and precision of computations: autocast, TF32, loss scaling, CPU cores."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(
    name: str = "auto", local_rank: int = 0, option: str = "--device"
) -> torch.device:
    """Return the device that a user specifies; auto is CUDA if available, otherwise the CPU.

    ``local_rank`` is the default index of a CUDA device, ``option`` the name in error messages.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError):
        raise ValueError(
            f"{option}: {name!r} is not an available torch device; use auto, cpu or cuda"
        ) from None
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"{option}: cuda:{index} is not available (CUDA devices: {torch.cuda.device_count()}); "
            f"start fewer processes, or use {option} cpu"
        )
    return torch.device("cuda", index)


@dataclass(frozen=True)
class Precision:
    """Precision of a computation: dtype of autocast, use of TF32, and loss scaling.

    Code that requires float32 (norms, logits, prototypes, memory bank) disables autocast itself.
    """

    name: PrecisionName
    device_type: str
    scaler: torch.amp.GradScaler  # loss scaler, enabled only for fp16

    @classmethod
    def from_name(cls, name: PrecisionName, device_type: str) -> Precision:
        """Create from fp32, tf32, bf16, fp16 or auto (bf16 on CUDA, fp32 elsewhere)."""
        if name == "auto":
            name = "bf16" if device_type == "cuda" else "fp32"
        elif name in ("tf32", "fp16") and device_type != "cuda":
            raise ValueError(f"precision {name} requires CUDA, got {device_type}; use fp32 or bf16")
        return cls(name, device_type, torch.amp.GradScaler(device_type, enabled=name == "fp16"))

    def apply(self) -> None:
        """Set torch's global flags for training."""
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        products.allow_tf32 = convolutions.allow_tf32 = self.name != "fp32"
        convolutions.benchmark = True  # crops have a few fixed shapes

    def autocast(self) -> torch.autocast:
        """Return the context for forward passes."""
        dtype = _AUTOCAST.get(self.name)
        return torch.autocast(self.device_type, dtype, enabled=dtype is not None)

    def tf32(self) -> AbstractContextManager[None]:
        """Return a context that allows TF32 on CUDA, unless the precision is fp32."""
        return tf32(self.name != "fp32")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions on CUDA within the block."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32, whose errors of 1e-3 would change the nearest neighbors."""
    with tf32(False), torch.autocast(device.type, enabled=False):
        yield


def free_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the name of the CPU."""
    with suppress(OSError):  # only Linux has this file
        if match := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M):
            return match[1]
    return platform.processor() or platform.machine()
